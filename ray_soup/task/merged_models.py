"""Soups of adapters as whole models: the base with their changes merged into it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet, lifted
from ray_soup.mixing.adapter_merge import MergedSoup
from ray_soup.mixing.blocks import layout_of
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.task.functions import as_in_workers
from ray_soup.task.models import build
from ray_soup.task.peft_models import adapted
from ray_soup.task.transformers_models import untie


def merged_soup(
    spec: str, coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet, out_dtype: str
) -> MergedSoup:
    """Return a soup of lifted ingredients as a whole model. Arguments as for `MergedSoup`; `spec` names the base.

    PEFT says which modules store the transpose of their weight: embeddings and Conv1D.
    """
    with as_in_workers(), torch.device("meta"):
        base = build(spec).model
        state = base.state_dict()
        modules: dict[str, Any] = dict(adapted(base, group).computing.named_modules())
    transposed = {
        name
        for name in group.modules
        if getattr(modules[name], "fan_in_fan_out", False) or isinstance(modules[name].get_base_layer(), torch.nn.Embedding)
    }
    ties = {alias: first for alias, first in group.tied.items() if alias in state}  # the others are names in files only
    return MergedSoup(coefficients, ingredients, group, transposed, ties, out_dtype)


def check_merged(spec: str, group: AdapterSet) -> None:
    """Check that transformers can hold any soup of a set as a whole model. Raises RecipeError.

    Tied tensors that adapters change in different ways need a config that does not tie them.
    """
    count = len(group.adapters)
    every = Coefficients(np.full((count, 1), 1 / count), (), (), dict.fromkeys(group.infos(), 0))
    soup = merged_soup(spec, every, lifted(group), group, "keep")
    names = soup.names
    with as_in_workers(), torch.device("meta"):
        model: Any = build(spec).model
        apart = sorted(soup.ties.keys() & names)
        if apart:
            config = copy.deepcopy(model.config)
            untie(config)
            model = type(model)(config)
        found = layout_of(model).state_shapes
    odd = sorted(found.keys() ^ set(names))
    if odd:
        why = (
            f", because adapters change one of the tied tensors {apart[0]} and {soup.ties[apart[0]]} alone" if apart else ""
        )
        raise RecipeError(
            f"adapter.merge is true, but {type(model).__name__} would have other tensors than the merged model, such as "
            f"{odd[0]}{why}. Remove the key: the soup is exact as an adapter."
        )

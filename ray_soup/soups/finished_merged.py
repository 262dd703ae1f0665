"""Check a finished soup of adapters that was merged into its base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.adapters import AdapterIngredient
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.adapter_bake import positions
from ray_soup.mixing.adapter_merge import MergedSoup
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe, with_changes
from ray_soup.soups.finished_adapters import MODULES, group_in
from ray_soup.soups.proof import Library, picked
from ray_soup.soups.records import RunRecord
from ray_soup.task.model_spec import ModelSpec

ROUNDING = 2.0**-53
"""Relative error of an operation in float64."""


def with_own_config(recipe: Recipe, folder: str, record: RunRecord, opened: Ingredient) -> Recipe:
    """Return a recipe for a finished soup: if adapters were merged into it, its model is built from its own config.

    The base may tie tensors that differ in the soup.
    """
    if "base" not in record or isinstance(opened, AdapterIngredient):
        return recipe
    spec = ModelSpec.parse(recipe.model)
    own = ModelSpec(spec.text, spec.library, folder, spec.options)
    return with_changes(recipe, {"model": own.with_options({})})


def compare_merged(
    out: Path, recipe: Recipe, coefficients: Coefficients, ingredients: Sequence[Ingredient], progress: ProgressCallback
) -> int:
    """Recompute every tensor, and compare it with the one in `out`; return the number of tensors.

    The order of the sums in a product depends on the library of linear algebra: an element may also be the rounded value of
    any number within the rounding error of the float64 sum. Raises SoupError for the first tensor that differs.
    """
    soup, model = _soup(recipe, coefficients, ingredients), open_ingredient(str(out))
    names = soup.names
    expected = {name: (soup.shape(name), soup.dtype(name)) for name in names}
    found = {name: (tuple(info.shape), info.dtype) for name, info in model.tensors.items()}
    odd = next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), None)
    for done, name in enumerate(names if odd is None else ()):
        for part in soup.ranges(name):
            have = model.read(name, part.start, part.start + len(part.written))
            if not torch.equal(have.view(torch.uint8), part.written.view(torch.uint8)):
                slack = soup.slack(name, part)
                low, high = ((part.exact.double() + sign * slack).to(have.dtype) for sign in (-1, 1))
                if not ((low <= have) & (have <= high)).all():
                    odd = name
        if odd is not None:
            break
        progress("comparing", done + 1, len(names))
    if odd is not None:
        raise SoupError(
            f"{model.files[0]}: the tensor {odd} differs from the one computed from coefficients, ingredients and base. "
            "Rebuild the model with ray-soup bake."
        )
    return len(names)


def compare_merged_sample(
    out: Path, recipe: Recipe, coefficients: Coefficients, ingredients: Sequence[Ingredient]
) -> int | None:
    """Compare elements of changed weights with W + sum_k c_k s_k B_k A_k, of tensors that their own libraries load.

    Returns the number of tensors compared; None if an ingredient or the base is in remote storage. Raises SoupError for one
    that differs by more than rounding.
    """
    soup, model = _soup(recipe, coefficients, ingredients), open_ingredient(str(out))
    group, used = soup.group, positions(coefficients, ingredients)
    if any(storage.is_remote(file) for one in (*group.adapters, group.base, model) for file in one.files):
        return None
    names = _sample(soup, model)
    read_base, read_model = Library(group.base), Library(model)
    totals = {n: read_base.elements(group.tied.get(n, n)).double().numpy() for n in names}
    sizes = {n: np.abs(total) for n, total in totals.items()}
    for n, ingredient in enumerate(ingredients):
        k: int = ingredient.position  # type: ignore[attr-defined] # of a lifted ingredient
        read = Library(group.adapters[k])
        for name in names if k in used else ():
            module = soup.changed[name]
            if group.modules[module].ranks[k]:
                pair, columns = group.adapters[k].pairs[module], int(np.prod(soup.shape(name)[1:]))
                b, a = (read.whole(x).double().flatten(1).numpy() for x in (pair.b, pair.a))
                at_b, at_a = np.divmod(picked(model.tensors[name].numel), columns)
                if module in soup.transposed:
                    at_b, at_a = at_a, at_b
                c = float(coefficients.of(group.modules[module].b)[n]) * pair.scale
                totals[name] = totals[name] + c * np.einsum("er,re->e", b[at_b], a[:, at_a])
                sizes[name] += abs(c) * np.einsum("er,re->e", np.abs(b[at_b]), np.abs(a[:, at_a]))
    for name in names:
        have, terms = read_model.elements(name), group.modules[soup.changed[name]].rank + 2 * len(ingredients) + 4
        low, high = (torch.from_numpy(totals[name] + s * terms * ROUNDING * sizes[name]).to(have.dtype) for s in (-1, 1))
        if not ((low <= have) & (have <= high)).all():
            raise SoupError(
                f"{out}: the tensor {name} differs from the sum of base and products, as their own libraries load them. "
                "Rebuild the model with ray-soup bake."
            )
    return len(names)


def _sample(soup: MergedSoup, model: Ingredient) -> list[str]:
    """Choose changed weights of several sizes."""
    weights = sorted((n for n in soup.changed if n not in soup.whole), key=lambda n: (model.tensors[n].numel, n))
    picks = np.linspace(0, len(weights) - 1, min(MODULES, len(weights))).round().astype(int) if weights else []
    return [weights[n] for n in dict.fromkeys(map(int, picks))]


def _soup(recipe: Recipe, coefficients: Coefficients, ingredients: Sequence[Ingredient]) -> MergedSoup:
    from ray_soup.task.merged_models import merged_soup

    return merged_soup(recipe.model, coefficients, ingredients, group_in(ingredients), recipe.out_dtype)

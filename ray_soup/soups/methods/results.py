"""What a method returns: coefficients, or a model that is no weighted sum of the ingredients."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.adapters import AdapterIngredient, open_checkpoint
from ray_soup.io.check import check_fits
from ray_soup.io.disk import writing
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import partition
from ray_soup.mixing.buffers import mixed_buffer
from ray_soup.recipe.plain import shown
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import Mixture, coefficients_of
from ray_soup.task.loader_names import with_old_names
from ray_soup.task.other_models import advice_for


@dataclass
class Model:
    """A model that a method made, which is no weighted sum of the ingredients."""

    tensors: dict[str, torch.Tensor]
    """The tensors of its state dict, by name, in the order of the model."""
    tied: dict[str, str]
    """Maps other names of a tensor to its first name."""
    figures: dict[str, Any] = field(default_factory=dict)
    """Keys for run.json."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one sentence or more each."""

    def write(self, path: Path) -> None:
        """Write the model as a safetensors file. Raises SoupError if it cannot be written."""
        from safetensors.torch import save_file

        with writing(path):
            save_file(self.tensors, path, {"format": "pt", **self.tied})


def result_of(session: Session, found: Any) -> Mixture | Model:
    """Check what the function of a method returned. Raises RecipeError if it is nothing that a method may return."""
    method = session.recipe.method
    if isinstance(found, Mixture):
        return found
    if isinstance(found, Mapping):
        return _model(session, dict(found))
    if isinstance(found, (str, os.PathLike)):
        return _model(session, _read(session, os.fspath(found)))
    arrays = isinstance(found, (np.ndarray, list, tuple))
    if not arrays and not isinstance(found, torch.Tensor):
        raise RecipeError(
            f"method: {method} returned a {type(found).__name__}; expected coefficients [K] or [K, B], a dictionary of "
            "tensors, or the path of a model file. Change what the function returns."
        )
    try:
        values = np.asarray(found) if arrays else found.detach().cpu().double().numpy()
        if np.iscomplexobj(values):
            raise TypeError("they are complex")
        values = values.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"method: {method} returned coefficients that are no numbers ({error}). Return floats.") from error
    checked, blocks = session.checked(values), session.partition
    if values.ndim == 1:
        checked, blocks = checked[:, :1], partition(session.inputs.layout, "model")
    return Mixture(coefficients_of(session, checked, blocks), session.figures, session.notes)


def _read(session: Session, path: str) -> dict[str, torch.Tensor]:
    """Read the model file that a method returned. Raises IngredientError if it does not fit the model."""
    layout, recipe = session.inputs.layout, session.recipe
    opened = open_checkpoint(path)
    if isinstance(opened, AdapterIngredient):
        raise RecipeError(f"method: {recipe.method} returned {path}, an adapter; expected the file of a whole model.")
    layout = with_old_names(layout, [opened], recipe.ignore)
    bound: Ingredient = check_fits(
        opened, layout.state_shapes, layout.known_names, recipe.ignore, advise=advice_for(recipe.model)
    )
    bound.check_copies()
    tensors = {name: bound.read(name).view(info.shape).clone() for name, info in bound.tensors.items()}
    bound.close()
    return tensors


def _model(session: Session, found: dict[str, Any]) -> Model:
    """Check the tensors that a method returned against the model; buffers that are missing are those of a soup."""
    recipe, layout, cure = session.recipe, session.inputs.layout, "Change what the function returns."
    start = f"method: {recipe.method} returned a model"
    if session.inputs.frozen:
        raise RecipeError(f"{start}, but the ingredients are LoRA adapters; expected coefficients. {cure}")
    if recipe.out_format != "safetensors":
        raise RecipeError(f"{start}, and out_format is {recipe.out_format}; expected safetensors. Change the key.")
    if recipe.polish is not None:
        raise RecipeError(f"{start}, and polish starts from a soup's coefficients. Remove the key `polish`.")
    _check_names(session, found, start, cure)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in layout.state_shapes.items():
        value = found.get(name)
        if value is None:
            value = mixed_buffer([session.inputs.ingredients[k] for k in session.subset], name, recipe.buffers).view(shape)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
            have = list(value.shape) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
            raise RecipeError(f"{start} in which {name} is {have}; expected a tensor {list(shape)}. {cure}")
        dtype = value.dtype
        if dtype.is_floating_point and recipe.out_dtype != "keep":
            dtype = getattr(torch, recipe.out_dtype)
        made = value.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
        if name not in layout.buffers and not torch.isfinite(made).all():
            raise RecipeError(f"{start} in which {name} is not finite in {str(dtype).removeprefix('torch.')}. {cure}")
        tensors[name] = made
    notes = [*session.notes, f"{recipe.method} returned a model: it is no weighted sum of the ingredients, and there are no "
             "coefficients."]  # fmt: skip
    if session.inputs.recalibrated(recipe):
        notes.append("Its running statistics are those that the method returned: none were re-estimated.")
    return Model(tensors, dict(layout.tied), session.figures, notes)


def _check_names(session: Session, found: Mapping[str, Any], start: str, cure: str) -> None:
    """Check which tensors a method returned. Raises RecipeError, with `start` and `cure` as its beginning and its end."""
    layout, recipe = session.inputs.layout, session.recipe
    shapes, names = layout.state_shapes, layout.known_names
    unknown = [name for name in found if name not in shapes and name not in names]
    missing = [name for name in layout.names if name not in found]
    for what, which in (("has", unknown), ("lacks", missing)):
        if which:
            raise RecipeError(
                f"{start} that {what} {', '.join(map(shown, which[:3]))}; expected the {len(shapes)} tensors of the model. "
                f"{cure}"
            )
    for alias, first in names.items():
        ours, theirs = found.get(alias), found.get(first)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and not torch.equal(ours, theirs):
            raise RecipeError(f"{start} in which {alias} and {first} differ, but they are one tensor in the model. {cure}")
    layers = [f"{layer}." for layer in session.inputs.recalibrated(recipe)]
    vectors = {name for norm in layout.spectral for name in (norm.u, norm.v)}
    for name in shapes:
        if name not in found and (name in vectors or name.startswith(tuple(layers))):
            raise RecipeError(
                f"{start} without {name}, which depends on the weights, so that those of the ingredients do not fit. Return "
                "it, too."
            )

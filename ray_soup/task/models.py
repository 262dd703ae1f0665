"""Build the model that a recipe names, describe it, and fill in its parameters from a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys

import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.recipe import is_function
from ray_soup.task.functions import MOVED, import_function
from ray_soup.task.libraries import LIBRARIES, BuiltModel
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess import preprocess_identity


def build(spec: str) -> BuiltModel:
    """Build the model that `spec` names, with random parameters. Raises RecipeError."""
    parsed = ModelSpec.parse(spec)
    if parsed.library in LIBRARIES:
        return LIBRARIES[parsed.library](parsed)
    if is_function(spec):
        made = import_function(spec)()
        if isinstance(made, torch.nn.Module):
            return BuiltModel(made)
        if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module):
            return BuiltModel(*made)
        raise RecipeError(
            f"model: {spec} returned {type(made).__name__}; expected a model, or (model, preprocess). Change what the "
            "function returns."
        )
    raise RecipeError(
        f"model: found {spec!r}; expected open_clip:, timm: or torchvision:NAME?classes=N, transformers:FOLDER, or "
        "package.module:function. Write it in one of these forms."
    )


def describe(spec: str) -> Layout:
    """Return the layout of the model that `spec` names, without allocating its parameters if the model allows that.

    Raises RecipeError.
    """
    try:
        with torch.device("meta"):
            return layout_of(build(spec).model)
    except RecipeError:
        raise
    except Exception:  # some models read their parameters while being built, which fails on the meta device in many ways
        return layout_of(build(spec).model)


def load_model(spec: str, path: str) -> torch.nn.Module:
    """Build the model that `spec` names with the parameters of the checkpoint at `path`, in eval mode.

    Raises RecipeError if the model cannot be built, IngredientError if the checkpoint does not fit it.
    """
    model = build(spec).model
    load_checkpoint(model, path)
    return model.eval()


def load_checkpoint(model: torch.nn.Module, path: str) -> None:
    """Fill in the parameters and buffers of `model`, in place, from the checkpoint at `path`.

    Raises IngredientError if the checkpoint does not fit.
    """
    layout = layout_of(model)
    checkpoint = open_ingredient(path).bind(layout.state_shapes, layout.tied)
    missing = set(layout.state_shapes) - set(checkpoint.tensors)
    extra = set(checkpoint.tensors) - set(layout.state_shapes)
    if missing or extra:
        raise IngredientError(
            f"{path} does not fit the model: the file lacks {sorted(missing)[:3]}, and the model has no {sorted(extra)[:3]} "
            f"({len(missing)} missing and {len(extra)} unexpected tensors). Use a checkpoint of this model."
        )
    state = model.state_dict()
    with torch.no_grad():
        for name, shape in layout.state_shapes.items():
            state[name].copy_(checkpoint.read(name).view(shape))


def fingerprint(spec: str, built: BuiltModel) -> str:
    """Hash everything that the outputs of a model depend on, except its parameters.

    This is the SHA-256 of `spec`, of the model's structure and preprocessing, and of the source of the module that its
    function is in. The hash is the same in every process and part of the cache keys of evaluations.
    """
    spec = MOVED.get(spec, spec)
    more = [str(getattr(built.model, name, "")) for name in ("config", "prompts")]
    parts = [spec, str(built.model), *preprocess_identity(built.preprocess), *more]
    digest = hashlib.sha256("\n".join(parts).encode())
    if is_function(spec):
        with contextlib.suppress(OSError, TypeError):
            digest.update(inspect.getsource(sys.modules[spec.partition(":")[0]]).encode())
    return digest.hexdigest()

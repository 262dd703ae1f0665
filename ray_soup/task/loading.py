"""A model with the parameters of a checkpoint, built as the files beside it state."""

from __future__ import annotations

import os

from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.task.libraries import IMAGE_OPTIONS
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import build, load_checkpoint
from ray_soup.task.preprocessing import as_trained


def load_model(spec: str, path: str | os.PathLike[str]) -> torch.nn.Module:
    """Build the model that `spec` names with the parameters of the checkpoint at `path`, in eval mode.

    >>> model = ray_soup.load_model("tests.tiny:build", "soup")
    >>> model.training
    False

    Args:
        spec: the model, as under the recipe key `model`; what it does not state and the files at `path` do is used.
        path: a checkpoint, or the folder of a soup.

    Raises RecipeError if the model cannot be built, IngredientError if the checkpoint does not fit it.
    """
    if ModelSpec.parse(spec).library in IMAGE_OPTIONS:
        spec, _ = as_trained(spec, [open_ingredient(os.fspath(path))])
    model = build(spec).model
    load_checkpoint(model, os.fspath(path))
    return model.eval()

"""Segmentation models of torchvision by name: `torchvision:deeplabv3_resnet50?classes=21`."""

from __future__ import annotations

from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess import Preprocess
from ray_soup.task.values import Settings, numbers

NAMES = ("deeplabv3_", "fcn_resnet", "lraspp_")
"""Beginnings of the names of torchvision's segmentation models; no classifier has such a name."""
IMAGE_OPTIONS = ("resize_size", "mean", "std", "interpolation")
"""The options that say how images are preprocessed."""
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")


def is_segmentation(spec: ModelSpec) -> bool:
    """Return whether a model is one of torchvision's segmentation models, without importing the library."""
    return spec.library == "torchvision" and spec.name.startswith(NAMES)


def build_segmentation(spec: ModelSpec) -> tuple[torch.nn.Module, Preprocess]:
    """Build a segmentation model and its preprocessing, which moves masks along with images.

    The model maps images float32 [n, 3, H, W] to a dictionary with logits [n, classes, H, W] as `out`. Raises RecipeError.
    """
    from torchvision.transforms import InterpolationMode, v2

    models, example = spec.import_library().models, f"torchvision:{spec.name}?classes=21"
    names = models.list_models(module=models.segmentation)
    if spec.name not in names:
        raise spec.unknown_name(names)
    spec.check_options(("classes", *IMAGE_OPTIONS, *_aux_loss(spec)), example)
    classes, size = spec.count("classes", example), spec.size("resize_size", example)
    mean, std = spec.floats("mean", 3, example), spec.floats("std", 3, example)
    interpolation = spec.choice("interpolation", INTERPOLATIONS)
    arguments = segmentation_arguments(spec)
    try:
        model = models.get_model(spec.name, weights=None, num_classes=classes, **arguments)
    except (ValueError, RuntimeError, TypeError) as error:
        raise RecipeError(f"model: torchvision cannot create '{spec.text}' ({error}). Change the options.") from error
    preset = models.get_model_weights(spec.name).DEFAULT.transforms()
    edges = preset.resize_size if size is None else list(size) if "," in spec.options["resize_size"] else [size[0]]
    preprocess: Preprocess = v2.Compose([
        v2.Resize(edges, InterpolationMode(interpolation) if interpolation else preset.interpolation, antialias=True),
        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean or preset.mean, std or preset.std),
    ])  # fmt: skip
    return model, preprocess


def segmentation_arguments(spec: ModelSpec) -> dict[str, Any]:
    """Return arguments of `torchvision.models.get_model` besides the number of classes. Raises RecipeError."""
    with_loss = {name: spec.choice(name, ("true", "false")) == "true" for name in _aux_loss(spec)}
    return {"weights_backbone": None, **with_loss}


def _aux_loss(spec: ModelSpec) -> tuple[str, ...]:
    """Return the option for an auxiliary classifier, which is used in training only, of a model that may have one."""
    return () if spec.name.startswith("lraspp_") else ("aux_loss",)


def used_by_segmentation(spec: ModelSpec) -> Settings:
    """Return the settings of the preprocessing of torchvision's own weights."""
    preset = spec.import_library().models.get_model_weights(spec.name).DEFAULT.transforms()
    return {
        "resize_size": ",".join(map(str, preset.resize_size)),
        "mean": numbers(preset.mean),
        "std": numbers(preset.std),
        "interpolation": preset.interpolation.value,
    }

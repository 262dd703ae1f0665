"""The recipe key `preprocess`: the options of the model that it stands for, or the transform that it describes or names."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.recipe import Preprocessing, Recipe
from ray_soup.task.functions import as_in_workers, import_function
from ray_soup.task.kept_models import kept
from ray_soup.task.libraries import BuiltModel, has_fixed_size, image_options, one_channel, size_option
from ray_soup.task.model_spec import DTYPE, ModelSpec, in_bfloat16
from ray_soup.task.models import build
from ray_soup.task.preprocess import Preprocess, input_kind, visible_settings
from ray_soup.task.segmentation import is_segmentation
from ray_soup.task.settings import used_settings
from ray_soup.task.values import Settings, pair, same_value, size_text

OPTIONS = {
    "open_clip": {"size": "image_size", "mean": "mean", "std": "std", "interpolation": "interpolation"},
    "timm": {
        "size": "img_size", "mean": "mean", "std": "std", "crop_pct": "crop_pct", "interpolation": "interpolation",
        "channels": "in_chans",
    },
    "torchvision": {"size": "crop_size", "mean": "mean", "std": "std", "interpolation": "interpolation"},
}  # fmt: skip
"""The option of each library's models that states the same as a key of the mapping."""
NEEDED = ("size", "mean", "std")
"""What a mapping must state for a model that a user's function builds, where no library has defaults."""


def model_of(recipe: Recipe) -> str:
    """Return the recipe's model with the options that a mapping `preprocess` stands for.

    Raises RecipeError if the library has no word for one of its values, or if the options of `model` contradict it or the
    key `precision`.
    """
    if in_bfloat16(recipe.model) and recipe.precision != "auto":
        raise RecipeError(
            f"precision: found {recipe.precision} with {DTYPE}=bfloat16 in `model: {recipe.model}`, whose weights decide "
            f"the precision. Remove the key `precision`, or the option {DTYPE}."
        )
    spec = ModelSpec.parse(recipe.model)
    if not isinstance(recipe.preprocess, Preprocessing) or spec.library not in OPTIONS:
        return recipe.model
    if is_segmentation(spec):
        line = spec.with_options(used_settings(spec))
        raise RecipeError(f"preprocess: state the images of {spec.name} by options instead, as in model: {line}")
    stated = stated_options(spec, recipe.preprocess)
    for option, value in stated.items():
        if option in spec.options and not same_value(spec.options[option], value):
            raise RecipeError(
                f"preprocess: {_shown(recipe.preprocess)} means {option}={value}, and `model:` has "
                f"{option}={spec.options[option]}. Remove the option, or state the same value."
            )
    return spec.with_options({option: value for option, value in stated.items() if option not in spec.options})


def stated_in(recipe: Recipe) -> set[str]:
    """Return the options of the model that the recipe states, in `model` or in `preprocess`. Raises RecipeError."""
    found = {*ModelSpec.parse(model_of(recipe)).options}
    if isinstance(recipe.preprocess, Preprocessing) and recipe.preprocess.crop_pct is None:
        found -= {"resize_size"} - ModelSpec.parse(recipe.model).options.keys()  # which follows from the library's share
    return found


def stated_options(spec: ModelSpec, stated: Preprocessing) -> Settings:
    """Return the options of a library's model that a mapping stands for. Raises RecipeError."""
    values = stated.values()
    found = {OPTIONS[spec.library][key]: _text(value) for key, value in values.items() if key in OPTIONS[spec.library]}
    if spec.library != "timm" and values.get("channels", 3) != 3:
        raise _refused(spec, "channels", 1, "its models take images of three channels")
    if spec.library == "open_clip":
        if values.get("crop_pct", 1) != 1:
            raise _refused(spec, "crop_pct", values["crop_pct"], "it resizes images to the size that it crops them to")
        if values.get("interpolation") == "nearest":
            raise _refused(spec, "interpolation", "nearest", "it has bicubic and bilinear")
    if spec.library == "torchvision" and {"size", "crop_pct"} & values.keys():
        size = values.get("size", used_settings(spec)["crop_size"])
        if isinstance(size, list) and size[0] != size[1]:
            raise _refused(spec, "size", size, "its transform cuts squares")
        found |= _torchvision_sizes(spec, int(size[0] if isinstance(size, list) else size), values.get("crop_pct"))
    return found


def _torchvision_sizes(spec: ModelSpec, size: int, crop_pct: float | None) -> Settings:
    """Return the sizes that images are resized and cropped to; without a share, the share of the library's preset."""
    preset = used_settings(replace(spec, options={}))
    if crop_pct is None and "resize_size" in spec.options:
        return {"crop_size": str(size)}
    resize = size * int(preset["resize_size"]) // int(preset["crop_size"]) if crop_pct is None else size / crop_pct
    return {"crop_size": str(size), "resize_size": str(math.floor(resize))}


def keys_of(spec: ModelSpec, options: Settings) -> Settings:
    """Return options of a library's model by the keys of the mapping that state the same, as texts."""
    found = {key: options[option] for key, option in OPTIONS[spec.library].items() if option in options}
    if "resize_size" in options:
        crop = options.get("crop_size", used_settings(spec)["crop_size"])
        found["crop_pct"] = str(math.floor(int(crop) / int(options["resize_size"]) * 1e6) / 1e6)
    return found


def texts_of(stated: Preprocessing) -> Settings:
    """Return what a mapping means for a model that a user's function builds, by the names of the record in run.json."""
    values = {"crop_pct": 1.0, "interpolation": "bilinear", "channels": 3} | stated.values()
    return {"crop" if key == "crop_pct" else key: _text(value) for key, value in values.items()}


def as_mapping(texts: Settings) -> dict[str, Any]:
    """Return the values of settings by the same names: numbers, a list of several, or a word."""
    found: dict[str, Any] = {}
    for name, text in texts.items():
        found[name] = text
        with contextlib.suppress(ValueError):
            numbers = [float(part) for part in text.split(",")]
            whole = [int(n) if name in ("size", "channels") and n.is_integer() else n for n in numbers]
            found[name] = whole[0] if len(whole) == 1 else whole
    return found


def _refused(spec: ModelSpec, key: str, value: object, reason: str) -> RecipeError:
    return RecipeError(
        f"preprocess: found {key}: {value}, which {spec.library} cannot do: {reason}. Remove it, or write a function: "
        "preprocess: module:function"
    )


def _text(value: Any) -> str:
    """Write a value as an option of a model, without rounding."""
    if isinstance(value, list) and all(isinstance(one, int) for one in value):
        return size_text(value)
    return ",".join(map(repr, value)) if isinstance(value, list) else str(value)


def _shown(stated: Preprocessing) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in stated.values().items()) + "}"


# Building


def build_for(recipe: Recipe) -> BuiltModel:
    """Build the recipe's model, with random parameters, and the preprocessing that the recipe states.

    Raises RecipeError.
    """
    built = build(model_of(recipe))
    if recipe.preprocess is None:
        return built
    spec = ModelSpec.parse(recipe.model)
    own = isinstance(recipe.preprocess, str)
    if spec.library in OPTIONS and not own:
        return built
    takes_texts = input_kind(built.preprocess) != "image" or getattr(built.model, "main_input_name", "") == "input_ids"
    if spec.library == "transformers" and not (own or takes_texts or built.preprocess is None):
        raise RecipeError(
            f"preprocess: the images of {spec.text} are preprocessed as the preprocessor_config.json in its folder says. "
            "Change the values there, or write a function: preprocess: module:function"
        )
    if takes_texts:
        raise RecipeError(f"preprocess: it is for images, and {spec.text} takes texts. Remove the key.")
    if spec.library in OPTIONS:
        _check_unstated(spec)
    return replace(built, preprocess=stated_preprocess(recipe))


def _check_unstated(spec: ModelSpec) -> None:
    """Check that no option of a model states what a function decides: it would have no effect. Raises RecipeError."""
    for option in image_options(spec):
        if option in spec.options and not (option == size_option(spec) and has_fixed_size(spec)):
            raise RecipeError(
                f"preprocess: the function decides how images are preprocessed, so {option} in `model: {spec.text}` has no "
                "effect. Remove the option, or the key `preprocess`."
            )


def stated_preprocess(recipe: Recipe) -> Preprocess:
    """Return the function that the recipe names, or the transform that its mapping describes. Raises RecipeError."""
    stated = recipe.preprocess
    if isinstance(stated, str):
        return import_function(stated, "preprocess")
    assert isinstance(stated, Preprocessing)
    missing = [key for key in NEEDED if getattr(stated, key) is None]
    if missing:
        raise RecipeError(
            f"preprocess: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, and {recipe.model} has no "
            f"defaults. Write all of {', '.join(NEEDED)}, as in preprocess: {{size: 64, mean: 0.5, std: 0.5}}"
        )
    return _timm_transform(stated)


def _timm_transform(stated: Preprocessing) -> Preprocess:
    """Return timm's transform for evaluation with these settings; a single mean or std is that of all channels."""
    timm = ModelSpec("timm", "timm", "", {}).import_library()
    channels = stated.channels or 3

    def each(value: Any) -> tuple[float, ...]:
        values = value if isinstance(value, list) else [value]
        return tuple(values * channels if len(values) == 1 else values)

    preprocess: Preprocess = timm.data.create_transform(
        input_size=(channels, *pair(stated.size)),
        mean=each(stated.mean),
        std=each(stated.std),
        crop_pct=stated.crop_pct or 1.0,
        interpolation=stated.interpolation or "bilinear",
    )
    return preprocess if channels == 3 else one_channel(preprocess)


def describe_for(recipe: Recipe) -> tuple[Layout, Settings]:
    """Return the layout of the recipe's model, and what its preprocessing shows: see `visible_settings`.

    Does not allocate the model's parameters if the model allows that. Raises RecipeError.
    """
    stated = recipe.preprocess
    if isinstance(stated, str):
        return _described(recipe)
    more = None if stated is None else stated.values()
    return kept("described", model_of(recipe), tuple[Layout, Settings], lambda: _described(recipe), more)


def _described(recipe: Recipe) -> tuple[Layout, Settings]:
    with as_in_workers():
        with contextlib.suppress(Exception):  # some models and transforms cannot be created on meta
            with torch.device("meta"):
                built = build_for(recipe)
            return layout_of(built.model), visible_settings(built.preprocess)
        built = build_for(recipe)
        layout, shown = layout_of(built.model), Settings()
        with contextlib.suppress(Exception):  # of an unusual object, nothing is visible
            shown = visible_settings(built.preprocess)
        return layout, shown

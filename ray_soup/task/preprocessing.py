"""The preprocessing of images and texts: its record in run.json, and a note if neither recipe nor files state it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout
from ray_soup.recipe import Data, Preprocessing, Recipe
from ray_soup.task.evidence import check_evidence, takes_images
from ray_soup.task.libraries import IMAGE_OPTIONS, WITH_AUXILIARY, has_auxiliary
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess import share_text
from ray_soup.task.preprocess_key import as_mapping, describe_for, keys_of, model_of, stated_in, texts_of
from ray_soup.task.settings import settings_of_processor, used_settings
from ray_soup.task.transformers_models import load_image_processor
from ray_soup.task.values import Settings

ORDER = ("size", "channels", "mean", "std", "crop", "interpolation")
RECORDED = {"image_size": "size", "img_size": "size", "crop_size": "size", "in_chans": "channels", "crop_pct": "crop"}
"""The names in the record of options that have another name."""

USUAL = {"crop_mode": "center", "resize_mode": "shortest"}
"""Options that the key `preprocess` has no words for, with their usual values."""


@dataclass(frozen=True)
class Examined:
    """The model of a recipe, and what came of comparing its preprocessing with the ingredients."""

    layout: Layout
    """The layout of the model."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """For run.json: size, mean, std, crop, interpolation, channels and source, if known."""


def with_cut(preprocessing: Mapping[str, Any], cut: Mapping[str, float]) -> dict[str, Any]:
    """Add the share of texts that are longer than fits into one example, by source, to a record of preprocessing."""
    return {**preprocessing, **({"cut": {name: round(share, 6) for name, share in cut.items()}} if cut else {})}


def examine(recipe: Recipe, ingredients: Sequence[Ingredient]) -> Examined:
    """Describe the recipe's model, and compare its preprocessing with what the ingredients say about their training.

    Raises RecipeError if they contradict each other, or the key `preprocess` cannot be used.
    """
    if recipe.preprocess is not None and recipe.data != Data() and not takes_images(recipe.data):
        _check_used(recipe.preprocess)
    layout, shown = describe_for(recipe)
    checked = check_evidence(recipe, ingredients, layout)
    record, left = _record(recipe, shown, checked.said)
    notes = [*checked.notes, *([_defaults(recipe, ingredients, left)] if left else [])]
    return Examined(layout, notes, record)


def preprocessing_of(recipe: Recipe) -> dict[str, Any]:
    """Return the record of the preprocessing of a recipe's images or texts; empty for arrays. Raises RecipeError."""
    return _record(recipe, describe_for(recipe)[1], frozenset())[0] if takes_images(recipe.data) else {}


def _check_used(stated: str | Preprocessing) -> None:
    """Check that a key `preprocess` has an effect on arrays: only what also changes the model has. Raises RecipeError."""
    idle = "the function" if isinstance(stated, str) else ", ".join(stated.values().keys() - {"size", "channels"})
    if idle:
        raise RecipeError(
            f"preprocess: {idle} would have no effect, because all data of the recipe are arrays (.npz files or functions), "
            "which are passed to the model unchanged. Remove it, and preprocess the arrays as in the training."
        )


def _defaults(recipe: Recipe, ingredients: Sequence[Ingredient], left: Settings) -> str:
    """Return the note about options that neither the ingredients nor the recipe state."""
    spec = ModelSpec.parse(model_of(recipe))
    others = f" and {len(ingredients) - 1} more" if len(ingredients) > 1 else ""
    who = f"{ingredients[0].path}{others} {'do' if others else 'does'}" if ingredients else "The checkpoints do"
    whole = len(left) == len(_image_options(spec))
    what = "how images were preprocessed in the training" if whole else ", ".join(left)
    values = ", ".join(f"{option} {value}" for option, value in left.items())
    stated = keys_of(spec, used_settings(spec))
    line = ", ".join(f"{key}: {value}" for key, value in as_mapping(stated).items() if (key, value) != ("channels", 3))
    used = "are used" if len(left) > 1 else "is used"
    return (
        f"{who} not say {what}, nor does the recipe: {values} {used}, as {spec.library} does by default. If the training "
        f"did otherwise, state it, as in preprocess: {{{line}}}"
    )


def _image_options(spec: ModelSpec) -> list[str]:
    """Return the options of a library's model that the results on images depend on, and that files do not show."""
    return [*IMAGE_OPTIONS[spec.library], *(["transform_input"] if has_auxiliary(spec) else [])]


# The record


def _record(recipe: Recipe, shown: Settings, said: frozenset[str]) -> tuple[dict[str, Any], Settings]:
    """Return the record of the preprocessing, and the options that are the library's defaults.

    Args:
        recipe: the recipe.
        shown: what its preprocessing shows.
        said: the options that the files of the ingredients say something about.
    """
    if not takes_images(recipe.data):
        return ({"source": "none"} if recipe.data != Data() else {}), {}
    spec = ModelSpec.parse(model_of(recipe))
    if "length" in shown:
        return {"length": int(shown["length"]), "source": "recipe" if "length" in spec.options else "files"}, {}
    if isinstance(recipe.preprocess, str):
        return {"function": recipe.preprocess, **_recorded(shown), "source": "recipe"}, {}
    if spec.library == "transformers":
        processor = load_image_processor(spec.import_library(), spec.name)
        return {**_recorded(settings_of_processor(processor.to_dict() if processor else {})), "source": "files"}, {}
    if spec.library not in IMAGE_OPTIONS:
        found = _recorded(shown)
        if isinstance(recipe.preprocess, Preprocessing):
            found = _recorded(texts_of(recipe.preprocess))
        else:
            found = {"model": recipe.model, **found}
        return {**found, "source": "recipe"}, {}
    used, options, given = used_settings(spec), _image_options(spec), stated_in(recipe)
    left = {option: used[option] for option in options if option not in given and option not in said}
    stated = any(option in given for option in options)
    if len(left) < len(options):  # one that says how images are cut needs no more words if it is the usual one
        left = {option: value for option, value in left.items() if USUAL.get(option) != value}
    source = "recipe" if stated else "files" if len(left) < len(options) else "default"
    return {**_recorded(_of_options(spec)), "source": source}, left


def _of_options(spec: ModelSpec) -> Settings:
    """Return the settings of a library's model by the names of the record."""
    used = used_settings(spec)
    found = {RECORDED.get(option, option): value for option, value in used.items() if option not in WITH_AUXILIARY}
    if spec.library == "torchvision":
        found["crop"] = share_text(int(used["crop_size"]), int(used["resize_size"]))
    if spec.library == "open_clip":
        found["crop"] = {"shortest": "1", "longest": "border"}.get(used["resize_mode"], used["resize_mode"])
    if spec.library == "timm" and used["crop_mode"] != "center":
        found["crop"] = f"{used['crop_mode']} {used['crop_pct']}".removesuffix(" 1")
    return {"channels": "3", **found}


def _recorded(settings: Settings) -> dict[str, Any]:
    """Turn settings into numbers and lists, with one mean and std for each channel."""
    texts = {name: settings[name] for name in ORDER if name in settings}
    found = as_mapping(texts)
    for name in ("mean", "std"):
        if name in found:
            values = found[name] if isinstance(found[name], list) else [found[name]]
            found[name] = [float(v) for v in values * (found.get("channels", 3) if len(values) == 1 else 1)]
    return {name: found[name] for name in ORDER if name in found}

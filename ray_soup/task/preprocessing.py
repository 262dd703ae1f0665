"""The preprocessing of images and texts: its record in run.json, and a note if neither recipe nor files state it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout
from ray_soup.recipe import Data, Preprocessing, Recipe, make_recipe, with_changes
from ray_soup.task.evidence import Checked, check_evidence, takes_images
from ray_soup.task.kept_models import keeping
from ray_soup.task.libraries import IMAGE_OPTIONS, WITH_AUXILIARY, has_auxiliary, image_options
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess import share_text
from ray_soup.task.preprocess_key import as_mapping, describe_for, keys_of, model_of, stated_in, texts_of
from ray_soup.task.segmentation import is_segmentation
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
    adopted: Settings = field(default_factory=dict)
    """The options of the model that the recipe does not state, with the values that files of the ingredients do."""


def with_cut(preprocessing: Mapping[str, Any], cut: Mapping[str, float]) -> dict[str, Any]:
    """Add the share of texts that are longer than fits into one example, by source, to a record of preprocessing."""
    return {**preprocessing, **({"cut": {name: round(share, 6) for name, share in cut.items()}} if cut else {})}


@keeping()
def examine(recipe: Recipe, ingredients: Sequence[Ingredient]) -> Examined:
    """Describe the recipe's model, and compare its preprocessing with what the ingredients say about their training.

    The model is that of `completed` with what was adopted. Raises RecipeError if the ingredients contradict each other or
    the recipe, or the key `preprocess` cannot be used.
    """
    if recipe.preprocess is not None and recipe.data != Data() and not takes_images(recipe.data):
        _check_used(recipe.preprocess)
    layout, shown = describe_for(recipe)
    checked = check_evidence(recipe, ingredients, layout)
    used = completed(recipe, checked.adopted)
    if checked.adopted:
        try:
            layout, shown = describe_for(used)
        except RecipeError as error:
            raise RecipeError(f"{error} Files of the ingredients state this: {' '.join(checked.notes)}") from error
    record, left = _record(used, shown, checked)
    notes = [*checked.notes, *([_defaults(used, ingredients, left)] if left else [])]
    return Examined(layout, notes, record, checked.adopted)


def as_trained(model: str, ingredients: Sequence[Ingredient]) -> tuple[str, list[str]]:
    """Return the recipe key `model` with what files state about the model, and notes; nothing about preprocessing.

    Raises RecipeError.
    """
    if ModelSpec.parse(model).library not in IMAGE_OPTIONS:
        return model, []
    recipe = make_recipe({"model": model, "ingredients": [ingredient.path for ingredient in ingredients]})
    examined = examine(recipe, ingredients)
    return completed(recipe, examined.adopted).model, examined.notes


def completed(recipe: Recipe, adopted: Settings) -> Recipe:
    """Return the recipe with options added to its model."""
    if not adopted:
        return recipe
    return with_changes(recipe, {"model": ModelSpec.parse(recipe.model).with_options(adopted)})


def preprocessing_of(recipe: Recipe, checked: Checked = Checked()) -> dict[str, Any]:
    """Return the record of the preprocessing of a recipe's images or texts, and of options of the model that change it.

    It is empty for arrays and a model without such options. Raises RecipeError.

    Args:
        recipe: the recipe, with the options that were adopted.
        checked: what came of the comparison with files.
    """
    if takes_images(recipe.data):
        return _record(recipe, describe_for(recipe)[1], checked)[0]
    structure = _structure_of(ModelSpec.parse(model_of(recipe)))
    return {**structure, "source": "none"} if structure else {}


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
    used = "are used" if len(left) > 1 else "is used"
    return (
        f"{who} not say {what}, nor does the recipe: {values} {used}, as {spec.library} does by default. If the training "
        f"did otherwise, state it, as in {_line(spec, left)}"
    )


def _line(spec: ModelSpec, left: Settings) -> str:
    """Return a line of the recipe that states the settings in use."""
    if is_segmentation(spec):
        return f"model: {spec.with_options(left)}"
    stated = as_mapping(keys_of(spec, used_settings(spec)))
    return f"preprocess: {{{', '.join(f'{key}: {v}' for key, v in stated.items() if (key, v) != ('channels', 3))}}}"


def _image_options(spec: ModelSpec) -> list[str]:
    """Return the options of a library's model that the results on images depend on, and that files do not show."""
    return [*image_options(spec), *(["transform_input"] if has_auxiliary(spec) else [])]


# The record


def _record(recipe: Recipe, shown: Settings, checked: Checked) -> tuple[dict[str, Any], Settings]:
    """Return the record of the preprocessing, and the options that are the library's defaults.

    Args:
        recipe: the recipe, with the options that were adopted.
        shown: what its preprocessing shows.
        checked: what came of the comparison with the files of the ingredients.
    """
    spec = ModelSpec.parse(model_of(recipe))
    structure = _structure_of(spec)
    if not takes_images(recipe.data):
        return ({**structure, "source": "none"} if recipe.data != Data() else {}), {}
    given = stated_in(recipe) - checked.adopted.keys()
    if "length" in shown:
        return {"length": int(shown["length"]), "source": "recipe" if "length" in given else "files"}, {}
    if isinstance(recipe.preprocess, str):
        return {"function": recipe.preprocess, **_recorded(shown), **structure, "source": "recipe"}, {}
    if spec.library == "transformers" and recipe.preprocess is None:
        processor = load_image_processor(spec.import_library(), spec.name)
        return {**_recorded(settings_of_processor(processor.to_dict() if processor else {})), "source": "files"}, {}
    if spec.library not in IMAGE_OPTIONS:
        found = _recorded(shown)
        if isinstance(recipe.preprocess, Preprocessing):
            found = _recorded(texts_of(recipe.preprocess))
        else:
            found = {"model": recipe.model, **found}
        return {**found, "source": "recipe"}, {}
    used, options, said = used_settings(spec), _image_options(spec), checked.said
    left = {option: used[option] for option in options if option not in given and option not in said}
    stated = any(option in given for option in options)
    if len(left) < len(options):  # one that says how images are cut needs no more words if it is the usual one
        left = {option: value for option, value in left.items() if USUAL.get(option) != value}
    source = "recipe" if stated else "files" if len(left) < len(options) else "default"
    places = {option: said[option] for option in checked.adopted if option in said}
    found = (
        {"resize_size": used["resize_size"], **_recorded(shown)} if is_segmentation(spec) else _recorded(_of_options(spec))
    )
    return {**found, **structure, **({"files": places} if places else {}), "source": source}, left


def _structure_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the options that change what a library's model computes, and not how images are preprocessed, for a record."""
    idle = ("classes", "zeroshot", "template", *image_options(spec))
    found = {option: value for option, value in spec.options.items() if option not in idle}
    return {"library": spec.library, "options": found} if found and spec.library in IMAGE_OPTIONS else {}


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

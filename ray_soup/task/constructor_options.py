"""Options of the recipe key `model` that no builder reads itself: arguments of the library's own constructor."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.task.model_spec import ModelSpec

RESERVED = re.compile(
    r"(\w+_)?pretrained(_\w+)?|(load_)?weights(_\w+)?|checkpoint_path|cache_dir|device|dtype|precision|progress|num_classes|"
    r"features_only|feature_cfg|out_indices|kwargs_filter|scriptable|exportable|no_jit|jit|output_dict|force_image_size|"
    r"force_preprocess_cfg"
)
"""Arguments that load other weights, that decide what a model returns and where it is, or that another option states."""
NO_TEXTS = ("true", "false", "yes", "no", "on", "off", "null", "none")
"""Truth values and nothing, in lower case. A constructor would take `False` or `no` for a text, and so for true."""
UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def constructor_arguments(spec: ModelSpec, known: Collection[str]) -> dict[str, Any]:
    """Return the options of a model that are not `known` as arguments: numbers, true and false as such, the rest as text.

    Raises RecipeError for arguments that a recipe cannot set.
    """
    others = {option: value for option, value in spec.options.items() if option not in known}
    if "classes" not in spec.options and (near := difflib.get_close_matches("classes", others, n=1)):
        raise RecipeError(f"model: {spec.text!r} has the unknown option '{near[0]}'; did you mean classes?")
    reserved = next(filter(RESERVED.fullmatch, others), None)
    if reserved is not None:
        raise RecipeError(
            f"model: {spec.text!r} has the option '{reserved}', which a recipe cannot set: the weights come from the "
            f"ingredients, and ray_soup decides what the model returns. Remove it; options with a meaning of their own: "
            f"{', '.join(known)}."
        )
    odd = next((option for option, value in others.items() if _is_no_text(value)), None)
    if odd is not None:
        raise RecipeError(
            f"model: found {spec.text!r}; expected true, false, a number or a text for the option '{odd}'. Write true or "
            "false, or remove the option to leave the library's default."
        )
    return {option: plain_value(value) for option, value in others.items()}


def _is_no_text(value: str) -> bool:
    return value.lower() in NO_TEXTS and value not in ("true", "false", "none")  # none is a choice of some constructors


def plain_value(text: str) -> Any:
    """Return the number or truth value that a text is, otherwise the text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        with suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    return text


def cannot_create(spec: ModelSpec, error: Exception, known: Collection[str], maker: Callable[[], Any]) -> RecipeError:
    """Return the error for a model that its library cannot create.

    Args:
        spec: the model.
        error: what the library raised.
        known: the options with a meaning of their own.
        maker: returns the class of the model, or another callable that takes the library's arguments.
    """
    found = UNEXPECTED.search(str(error))
    if found is None or found[1] not in spec.options:
        return RecipeError(f"model: {spec.library} cannot create '{spec.text}' ({error}). Change its name or its options.")
    names = {*known}
    with suppress(Exception):  # closest names are a courtesy
        names |= {name for name in inspect.signature(maker()).parameters if not RESERVED.fullmatch(name)}
    close = difflib.get_close_matches(found[1], sorted(names), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"options with a meaning of their own: {', '.join(known)}."
    return RecipeError(f"model: {spec.text!r} has the option '{found[1]}', which {spec.name} does not take; {hint}")

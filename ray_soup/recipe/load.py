"""Read recipes from YAML, keys and overrides, convert them to another method, and write them as YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ray_soup.errors import RecipeError
from ray_soup.recipe.methods import method_info
from ray_soup.recipe.paths import absolute_paths
from ray_soup.recipe.schema import Recipe

_FOR_EVERY_KIND = ("epochs", "micro_batch", "seed", "patience", "label_smoothing")


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    Paths in the file are relative to the recipe file; paths in `overrides` are relative to the current folder. If `method`
    differs from the recipe's own method, the recipe is converted as `for_method` does; overrides are applied last.
    Raises RecipeError if the file cannot be read or a key is wrong.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} is not valid YAML. Fix this error: {error}") from error
    if not isinstance(values, dict):
        found = {list: "is a list", str: "is plain text", type(None): "is empty"}.get(type(values), f"is {values!r}")
        raise RecipeError(f"The recipe {path} {found}; expected keys such as 'model:', 'ingredients:', 'data:'. Add them.")
    values = absolute_paths(values, path.absolute().parent)
    changes, source = parse_overrides(overrides), f"The recipe {path}"
    recipe = make_recipe(_merge(values, changes), source)
    if method is None or method == recipe.method:
        return recipe
    other = for_method(make_recipe(values, source), method).model_dump()
    return make_recipe(_merge(other, {**changes, "method": method}), source)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Turn a Recipe, its keys, or the path of a YAML file into a Recipe.

    Paths in a mapping of keys are relative to the current folder. Raises RecipeError.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return make_recipe(absolute_paths(dict(recipe), Path.cwd()))
    return load_recipe(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML text; loading the text gives an equal recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)
    return text


def make_recipe(values: dict[str, Any], source: str = "the recipe") -> Recipe:
    """Validate the keys of a recipe.

    Raises RecipeError with one line for each invalid key and, for an unknown key, the most similar known key. `source` names
    the recipe in the message.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for fault in error.errors():  # a value that fits no member of a union has one error for each member
            start, message = _explain(fault)
            known = lines.setdefault(start, [])
            known.append(message[:1].lower() + message[1:] if known else message)
        faults = "\n".join(f"  {start}{'; or '.join(messages)}" for start, messages in lines.items())
        raise RecipeError(f"{source} is not valid:\n{faults}") from None


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `["learn.lr=0.02"]` into `{"learn": {"lr": 0.02}}`.

    Paths are relative to the current folder. Raises RecipeError for text that is not key=value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"Found '{override}' where an override was expected. Write key=value, as in learn.lr=0.02.")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                f"The value of the override '{override}' is not valid YAML. Quote it, or fix this error: {error}"
            ) from error
        if isinstance(value, str):  # YAML reads 1e-3 as text
            with suppress(ValueError):
                value = float(value)
        values = _merge(values, _nested(key, value))
    return absolute_paths(values, Path.cwd())


def with_changes(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """Return the recipe with some keys changed, as in {"learn.lr": 0.1, "blocks": "layer"}.

    A changed `method` converts the recipe as `for_method` does before the other changes apply. Raises RecipeError.
    """
    values = (for_method(recipe, config["method"]) if "method" in config else recipe).model_dump()
    changes: dict[str, Any] = {}
    for key, value in config.items():
        changes = _merge(changes, _nested(key, value))
    changes.pop("method", None)
    return make_recipe(_merge(values, absolute_paths(changes, Path.cwd())), f"the recipe with {config}")


def for_method(recipe: Recipe, method: str, **learn: Any) -> Recipe:
    """Return the recipe for another method.

    Settings that suit one method carry over only where they make sense: `blocks` only if the method stays the same, and
    learning rate, schedule and batch size unless exactly one of the two methods is a softmax method. Otherwise the defaults
    of the new method apply. `learn` contains keys of the section `learn` that override everything else.
    """
    values = recipe.model_dump(exclude={"method", "learn", "blocks"})
    kept = recipe.learn.model_dump()
    if (method_info(method).kind == "softmax") != (recipe.info.kind == "softmax"):
        kept = {key: kept[key] for key in _FOR_EVERY_KIND}
    if method == recipe.method:
        values["blocks"] = recipe.blocks
    return Recipe.model_validate({**values, "method": method, "learn": {**kept, **learn}})


class _Whole(dict[str, Any]):
    """A mapping that replaces the old value instead of being merged into it."""


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Turn `learn.lr`, 0.02 into `{"learn": {"lr": 0.02}}`.

    The keys of a section are later merged into the section. Any other mapping, such as `{uniform: [0, 1]}`, replaces the
    old value.
    """
    section: Any = Recipe
    for part in key.split("."):
        section = _below(section, part)
    value = _whole(section, value)
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _below(section: Any, key: str) -> Any:
    """Look up the type of a section's key; None if `section` is not a section or has no such key."""
    return section.model_fields[key].annotation if _is_section(section) and key in section.model_fields else None


def _whole(section: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if _is_section(section):
        return {key: _whole(_below(section, key), inner) for key, inner in value.items()}
    return _Whole(value)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = type(into)(into)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and not isinstance(value, _Whole)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _explain(fault: Any) -> tuple[str, str]:
    """Describe one error of pydantic: the key with the value found there, and what was expected."""
    section: Any = Recipe
    where: list[str] = []
    for part in fault["loc"]:  # the location continues into the branches of a union: stop at the last field
        if not _is_section(section):
            break
        where.append(str(part))
        section = _below(section, part)
    key = ".".join(where)
    if fault["type"] == "extra_forbidden":
        return f"{key}: ", _explain_unknown(where)
    if fault["type"] == "missing":
        return f"{key}: ", "missing; add this key."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "model_type" and isinstance(section, type) and issubclass(section, BaseModel):
        message = f"Expected keys below it: {', '.join(section.model_fields)}."
    found = repr(fault["input"])
    found = found if len(found) <= 80 else f"{found[:80]}..."
    return (f"{key}: found {found}. " if key else ""), message


def _explain_unknown(where: list[str]) -> str:
    parent: Any = Recipe
    for part in where[:-1]:
        parent = _below(parent, part)
    near = difflib.get_close_matches(where[-1], list(parent.model_fields), n=1)
    prefix = ".".join([*where[:-1], ""])
    hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known keys here: {', '.join(parent.model_fields)}."
    return f"unknown key; {hint}"

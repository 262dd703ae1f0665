"""Read recipes from YAML, keys and overrides, convert them to another method, and write them as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ray_soup.errors import RecipeError
from ray_soup.recipe.explain import Fault, below, faults_of, is_section, takes_text_only
from ray_soup.recipe.methods import BEST_SINGLE, method_info
from ray_soup.recipe.paths import absolute_paths
from ray_soup.recipe.plain import plain, shown
from ray_soup.recipe.preprocessing import Preprocessing
from ray_soup.recipe.schema import UNSAID, Recipe
from ray_soup.recipe.yaml_reader import MOST_DEPTH, NULLS, check_characters, parse_yaml, read_text, resolve

_FOR_EVERY_KIND = (
    "epochs",
    "micro_batch",
    "gradient_checkpointing",
    "seed",
    "patience",
    "label_smoothing",
    "average",
    "refit",
)
_SINCE_0_2: dict[str, Any] = {
    "ignore": [],
    "preprocess": None,
    "baseline": BEST_SINGLE,
    "loggers": [],
    "objective": "auto",
    "select_by": "auto",
    "evaluate": None,
    "adapter": {"rank": None, "merge": False},
    "schedule": {"window": "auto", "decay": "auto"},
    "out_format": "safetensors",
    "start": None,
    "polish": None,
    "compare": {"rows": {}},
}
"""Keys that a dump leaves out at their default, so that a folder of version 0.1 still has the same recipe."""
_OFF_BY_DEFAULT = (
    ("adapter", "merge"),
    ("learn", "gradient_checkpointing"),
    ("learn", "smoothness"),
    ("learn", "refit"),
    ("actors", "by_layer"),
)
"""Keys within sections that a dump leaves out unless they are set, for the same reason."""
_is_text = takes_text_only(Recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    >>> recipe = ray_soup.load_recipe("recipe.yaml", ["learn.lr=0.02"])
    >>> recipe.method, recipe.learn.lr
    ('mehl+', 0.02)

    Paths in the file are relative to the recipe file; paths in `overrides` are relative to the current folder. If `method`
    differs from the recipe's own method, the recipe is converted as `for_method` does; overrides are applied last.
    Raises RecipeError if the file cannot be read or a key is wrong.
    """
    if not isinstance(path, (str, Path)):
        raise RecipeError(f"Found {shown(path)} as a recipe file; expected the path of a YAML file. Pass its path.")
    path = Path(path)
    source = f"The recipe {path}"
    values = parse_yaml(read_text(path, source), source, _is_text)
    if not isinstance(values, dict):
        found = {list: "is a list", str: "is plain text", type(None): "is empty"}.get(type(values), f"is {shown(values)}")
        raise RecipeError(f"{source} {found}; expected keys such as 'model:', 'ingredients:', 'data:'. Add them.")
    values = _resolved(values, path.absolute().parent, source)
    changes = parse_overrides(overrides)
    recipe = _make(_merge(values, changes, source), source, overrides)
    if method is None or method == recipe.method:
        return recipe
    other = for_method(make_recipe(values, source), method).model_dump()
    return _make(_merge(other, {**changes, "method": method}, source), source, overrides)


def as_recipe(recipe: Recipe | Mapping[str, Any] | str | Path) -> Recipe:
    """Turn a Recipe, its keys, or the path of a YAML file into a Recipe.

    Paths in a mapping of keys are relative to the current folder. Raises RecipeError.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return make_recipe(_resolved(plain(recipe), Path.cwd(), "The recipe"))
    if not isinstance(recipe, (str, Path)):
        raise RecipeError(f"Found {shown(recipe)} as a recipe; expected a Recipe, its keys, or the path of a YAML file.")
    return load_recipe(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML text; loading the text gives an equal recipe."""
    values = recipe.model_dump(mode="json")
    values = {key: value for key, value in values.items() if key not in _SINCE_0_2 or value != _SINCE_0_2[key]}
    for section, key in _OFF_BY_DEFAULT:
        if section in values and not values[section][key]:
            del values[section][key]
    if isinstance(recipe.preprocess, Preprocessing):
        values["preprocess"] = recipe.preprocess.values()
    if recipe.search.metric == "auto" and recipe.select_by in UNSAID:
        values["search"]["metric"] = "select_nll"  # as version 0.1 wrote it
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `parse_yaml` would not read as this text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if resolve(text) is text else "'")


_Dumper.add_representer(str, _represent_text)


def make_recipe(values: Mapping[str, Any], source: str = "The recipe") -> Recipe:
    """Validate the keys of a recipe.

    Raises RecipeError with one line for each invalid key and, for an unknown key, the most similar known key. `source` names
    the recipe in the message.
    """
    return _make(plain(values, what=source), source)


def _make(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Validate keys; a fault of a key that an override sets is that override's."""
    try:
        return Recipe(**values)
    except RecipeError as error:
        if not isinstance(error.__cause__, ValidationError):
            raise
        by_source: dict[str, list[Fault]] = {}
        for fault in faults_of(error.__cause__, Recipe):
            typed = next((one for one in reversed(overrides) if _concerns(one.partition("=")[0], fault.key)), None)
            by_source.setdefault(source if typed is None else _named(typed), []).append(fault)
        lines = (f"{name} is not valid:\n" + "\n".join(f"  {f}" for f in faults) for name, faults in by_source.items())
        raise RecipeError("\n".join(lines)) from None


def _concerns(changed: str, key: str) -> bool:
    """Return whether a fault of `key` may come from a change of the key `changed`."""
    return f"{key}.".startswith((f"{changed}.", f"{changed}[")) or (key != "" and changed.startswith(f"{key}."))


def _named(override: str) -> str:
    return f"The override {repr(override[:80])[1:-1]}{'...' if len(override) > 80 else ''}"


def _resolved(values: dict[str, Any], folder: Path, source: str) -> dict[str, Any]:
    """Resolve the paths among keys against a folder. Raises RecipeError, which names the source."""
    try:
        return absolute_paths(values, folder)
    except RecipeError as error:
        raise RecipeError(f"{source} is not valid:\n  {error}") from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse `["learn.lr=0.02"]` into `{"learn": {"lr": 0.02}}`.

    Paths are relative to the current folder; unquoted paths and names stay unchanged, anything else is YAML. Raises
    RecipeError for text that is not key=value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        name = _named(override)
        if not equals or not key:
            raise RecipeError(f"Found {shown(override)} where an override was expected. Write key=value: learn.lr=0.02.")
        if key.count(".") > MOST_DEPTH or len(text) > 1_000_000:
            raise RecipeError(f"{name} is too long. Shorten it, or write it into the recipe.")
        check_characters(key, name)
        value = _value(text, name, tuple(key.split(".")))
        if value is None and _is_text(tuple(key.split("."))) and text and Path(text).exists():
            raise RecipeError(f"{name} means no value, but {text} exists here. Write {key}=./{text} for the file or folder.")
        values = _merge(values, _resolved(_nested(key, value, name), Path.cwd(), name), name)
    return values


def _value(text: str, name: str, keys: tuple[str, ...]) -> Any:
    """Return the value of an override: unquoted text of a text key unchanged, anything else as YAML.

    The signs of YAML are characters of paths: in `ingredients=/data/run #2/*.pt` they begin no comment.
    """
    text = text.strip(" ")
    structured = text[:1] in ("'", '"') or (text[:1] + text[-1:]) in ("[]", "{}")
    if not _is_text(keys) or structured or text in NULLS:
        return parse_yaml(text, name, _is_text, keys)
    check_characters(text, name)
    return text


def with_changes(recipe: Recipe, config: Mapping[str, Any]) -> Recipe:
    """Return the recipe with some keys changed, as in {"learn.lr": 0.1, "blocks": "layer"}.

    A changed `method` converts the recipe as `for_method` does before the other changes apply. Raises RecipeError.
    """
    source = f"The recipe with {shown(config)}"
    given: dict[str, Any] = plain(config, what=source)
    values = (for_method(recipe, given["method"]) if "method" in given else recipe).model_dump()
    changes: dict[str, Any] = {}
    for key, value in given.items():
        if key.count(".") > MOST_DEPTH:
            raise RecipeError(f"{source} has a key of more than {MOST_DEPTH} parts. Shorten it.")
        changes = _merge(changes, _nested(key, value, source), source)
    changes.pop("method", None)
    return _make(_merge(values, _resolved(changes, Path.cwd(), source), source), source)


def for_method(recipe: Recipe, method: str, **learn: Any) -> Recipe:
    """Return the recipe for another method.

    Settings that suit one method carry over only where they make sense: `blocks` and `start` only if the method stays the
    same, and learning rate, schedule and batch size unless exactly one of the two methods is a softmax method. Otherwise the
    defaults of the new method apply. `learn` contains keys of the section `learn` that override everything else. Raises
    RecipeError.
    """
    values = recipe.model_dump(exclude={"method", "learn", "blocks", "start"})
    kept = recipe.learn.model_dump()
    if (method_info(method).kind == "softmax") != (recipe.info.kind == "softmax"):
        kept = {key: kept[key] for key in _FOR_EVERY_KIND}
    if method == recipe.method:
        values |= {"blocks": recipe.blocks, "start": recipe.start}
    return make_recipe({**values, "method": method, "learn": {**kept, **learn}}, f"The recipe for {method}")


class _Whole(dict[str, Any]):
    """A mapping that replaces the old value instead of being merged into it."""


def _nested(key: str, value: Any, source: str) -> dict[str, Any]:
    """Turn `learn.lr`, 0.02 into `{"learn": {"lr": 0.02}}`.

    The keys of a section are later merged into the section. Any other mapping, such as `{uniform: [0, 1]}`, replaces the
    old value. Raises RecipeError if a whole section is null, which would drop its keys.
    """
    section: Any = Recipe
    for part in key.split("."):
        section = below(section, part)
    if value is None and is_section(section):
        raise RecipeError(f"{source}: {key} is null; expected keys below it: {', '.join(section.model_fields)}. Add one.")
    value = _whole(section, value)
    for part in reversed(key.split(".")):
        value = {part: value}
    nested: dict[str, Any] = value
    return nested


def _whole(section: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if is_section(section):
        return {key: _whole(below(section, key), inner) for key, inner in value.items()}
    return _Whole(value)


def _merge(into: dict[str, Any], new: dict[str, Any], source: str, prefix: str = "") -> dict[str, Any]:
    """Return `into` with the keys of `new`. Raises RecipeError for keys below a value that has none."""
    merged = type(into)(into)
    for key, value in new.items():
        old, name = merged.get(key), f"{prefix}{key}"
        if old is None or not isinstance(value, dict) or isinstance(value, _Whole):
            merged[key] = value
        elif isinstance(old, dict):
            merged[key] = _merge(old, value, source, f"{name}.")
        else:
            raise RecipeError(
                f"{source}: {name} is {shown(old)}, so a change of {name}.{next(iter(value), '')} does not fit. "
                f"Change {name} as a whole."
            )
    return merged

"""Every recipe key with its type, default, meaning and an example, and the JSON Schema of a recipe for editors.

Both come from the fields of the recipe and the strings under them, so a new key needs nothing here but an example.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from ray_soup.recipe.distributions import DISTRIBUTIONS, RANGES
from ray_soup.recipe.explain import every_key, expected_by, is_section, section_in, takes_text_only
from ray_soup.recipe.methods import METHODS
from ray_soup.recipe.schema import SEARCHED, Recipe
from ray_soup.recipe.tuning import KINDS_OF_FINETUNE, Finetune, Trunk

FUNCTION = "module:function"
_is_text = takes_text_only(Recipe)
EXAMPLES: dict[str, Any] = {
    "compare.rows": {"ties": "ties.safetensors"},
    "ingredients": "zoo/*.safetensors", "ignore": ["criterion.*"], "model": "open_clip:ViT-B-32?classes=1000",
    "base_model": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "data.train": "train.parquet", "data.fit": "heldout.parquet",
    "data.select": "select.parquet", "data.test": {"v2": "v2.parquet", "sketch": "sketch.parquet"}, "method": "greedy",
    "preprocess": "my_package.images:transform", "preprocess.size": 64, "preprocess.mean": [0.5, 0.5, 0.5],
    "preprocess.std": [0.25, 0.25, 0.25], "preprocess.crop_pct": 0.9, "blocks": {"tensor": 4}, "adapter.rank": 32,
    "schedule.window": 8, "schedule.decay": 0.9, "learn.lr": 0.02, "learn.wd": 0.01, "learn.warmup": 0.1, "learn.clip": 1.0,
    "learn.batch_size": 64, "learn.micro_batch": 16, "learn.epochs": 10, "learn.patience": 2, "learn.label_smoothing": 0.1,
    "learn.model_batch": 18, "learn.models_epochs": 2, "learn.smoothness": 0.1, "learn.whiten": 1.0, "learn.seed": 2,
    "start": "soups/last_week", "polish.epochs": 3, "polish.lr": [1e-4, 3e-4], "polish.wd": 0.01, "polish.batch_size": 64,
    "loss": "my_package.losses:focal", "metric": "my_package.metrics:top5", "evaluate": "my_package.harness:evaluate",
    "actors.replicas": 4, "actors.shards": 2, "actors.cpus": 4, "actors.gpus": 1, "actors.wait_s": 300, "shard_size": "5GB",
    "finetune.trials": 24, "finetune.init": "base.safetensors", "finetune.pretrained": "open_clip:laion2b_s34b_b79k",
    "finetune.class_names": "classes.txt", "finetune.templates": ["a photo of a {}.", "a drawing of a {}."],
    "finetune.probe_wd": 1e-3, "finetune.trunk.lr": 1e-3, "finetune.trunk.wd": 0.1, "finetune.trunk.epochs": 10,
    "finetune.trunk.label_smoothing": 0.1, "finetune.trunk.mixup": 0.2, "finetune.trunk.shift": 2,
    "finetune.trunk.randaugment": 10, "finetune.lr": {"loguniform": [1e-5, 1e-3]}, "finetune.wd": {"choice": [0.0, 0.1]},
    "finetune.epochs": {"randint": [2, 9]}, "finetune.label_smoothing": 0.1, "finetune.mixup": {"uniform": [0.0, 0.4]},
    "finetune.shift": 2, "finetune.randaugment": 10, "finetune.workers_per_model": 4, "finetune.batch_size": 128,
    "finetune.seed": 2, "search.trials": 32, "search.loggers": ["wandb"], "search.time_budget_s": 3600,
    "search.space": {"learn.lr": {"loguniform": [0.001, 0.1]}, "blocks": {"choice": ["tensor", "layer"]}},
    "objective": "regression", "loggers": ["wandb", "mlflow"], "search.metric": "select_accuracy",
}  # fmt: skip
"""A value of each key other than its default; of keys that choose among words, or are true or false, another choice."""
_NUMBERS = "one number, or a list with one for each channel"
_TYPES = {
    "method": " or ".join(METHODS),
    "data.select": "a share between 0 and 1, or a file, folder, URI or module:function",
    "data.test": "text, names with one text each, or null",
    "preprocess.size": "an integer, or [height, width]",
    "preprocess.mean": _NUMBERS,
    "preprocess.std": _NUMBERS,
    "polish.lr": "a number above 0, or a list of them",
    "shard_size": "an integer of bytes, text as in 5GB, or null",
    "search.space": "recipe keys with a value or one of "
    + ", ".join(f"{kind}: [{'low, high' if kind in RANGES else 'value, ...'}]" for kind in DISTRIBUTIONS),
}
"""What keys expect that their types do not say, because a function checks them."""


@dataclass(frozen=True)
class KeyInfo:
    """One recipe key, described for people."""

    name: str
    """Full name, as in learn.lr."""
    type: str
    """What it expects, as in "a number above 0 or auto"."""
    default: str
    """Its default as in a recipe; "required" if there is none, empty for a section."""
    meaning: str
    """What it means, in one paragraph."""
    example: str
    """A line of a recipe, as in `learn: {lr: 0.02}`; empty for a section."""


def keys() -> list[KeyInfo]:
    """Return every recipe key, in the order of the schema; a section comes before the keys below it."""
    return [_described(name, info) for name, info in every_key(Recipe)]


def _described(name: str, info: FieldInfo) -> KeyInfo:
    inner = section_in(info.annotation)
    alone = is_section(info.annotation)
    meaning = info.description or inspect.getdoc(inner) or ""
    example = "" if inner is not None and name not in EXAMPLES else _line(name, example_of(name, info))
    return KeyInfo(name, _type(name, info), "" if alone else _default(name, info), " ".join(meaning.split()), example)


def _type(name: str, info: FieldInfo) -> str:
    if name in _TYPES:
        return _TYPES[name]
    if info.annotation is Any:  # a hyperparameter of finetune
        return f"{expected_by(Trunk.model_fields[name.rpartition('.')[2]])}; or one of {', '.join(KINDS_OF_FINETUNE)}"
    checks = f"{info.annotation} {info.metadata}"
    text = FUNCTION if "_function" in checks else "a path or URI" if "_clean" in checks else "text"
    inner = section_in(info.annotation)
    if inner is not None and not is_section(info.annotation):
        return f"{f'{text}, or ' if text == FUNCTION else ''}keys below it: {', '.join(inner.model_fields)}; or null"
    return re.sub(
        r"\btexts\b", "paths or URIs" if text.startswith("a path") else "texts", re.sub(r"\btext\b", text, expected_by(info))
    )


def _default(name: str, info: FieldInfo) -> str:
    """Return the default of a key, and those of methods that have another one."""
    if info.is_required():
        return "required"
    other: dict[str, list[str]] = {}
    for method in METHODS.values():
        own = {"blocks": method.blocks} if name == "blocks" else {f"learn.{k}": value for k, value in method.learn.items()}
        if name in own and own[name] != info.get_default():
            other.setdefault(_text(own[name]), []).append(method.name)
    return "; ".join([_text(info.get_default()), *(f"{text} with {' and '.join(those)}" for text, those in other.items())])


def example_of(name: str, info: FieldInfo) -> Any:
    """Return an example of a key's value, not its default. Raises LookupError if EXAMPLES lacks one."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    if info.annotation is bool:
        return not info.default
    choices = [one for part in (info.annotation, *get_args(info.annotation)) if get_origin(part) is Literal
               for one in get_args(part)]  # fmt: skip
    return next(choice for choice in choices if choice != info.default)


def nested(name: str, value: Any) -> Any:
    """Return `{"learn": {"lr": 0.02}}` for learn.lr and 0.02."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _line(name: str, value: Any) -> str:
    section, dot, key = name.partition(".")
    return f"{section}: {_text(nested(key, value))}" if dot else f"{section}: {_text(value)}"


def _text(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("...\n").strip()


# JSON Schema


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe: a recipe that loads is valid by it, and one with an unknown key is not.

    Editors complete and check recipes by it.
    """
    schema = Recipe.model_json_schema()
    definitions, properties = schema["$defs"], schema["properties"]
    sections = [("", Recipe), *((name, section_in(info.annotation)) for name, info in every_key(Recipe))]
    for name, section in sections:
        if section is not None:
            of = definitions[section.__name__] if name else schema
            of["description"] = inspect.getdoc(section) or ""
            for key, one in of["properties"].items():
                _as_it_is_read(one, (*filter(None, name.split(".")), key))
    definitions["Distribution"] = {"anyOf": [_distribution(kind) for kind in DISTRIBUTIONS]}
    properties["method"]["anyOf"] = [{"enum": [*METHODS]}, {"type": properties["method"].pop("type")}]
    properties["shard_size"]["anyOf"].append({"type": "string"})
    for name, one in definitions["Finetune"]["properties"].items():
        if Finetune.model_fields[name].annotation is Any:
            one |= _varied(definitions["Trunk"]["properties"][name])
    _add_search(definitions["Search"], definitions, properties)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "A recipe of ray_soup"}


def _as_it_is_read(one: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Let the schema of a key accept what a recipe may have there: a section without keys, and unquoted text."""
    one.pop("title", None)
    whole = one.pop("allOf", [one])  # older versions of pydantic wrap a reference that has a description
    if "$ref" in whole[0]:
        one.pop("default", None)
        one["anyOf"] = [{"$ref": whole[0].pop("$ref")}, {"type": "null"}]
    if _is_text(keys):
        parts = [one, *one.get("anyOf", [])]
        for part in [
            *parts,
            *(p[key] for p in parts for key in ("items", "additionalProperties") if isinstance(p.get(key), dict)),
        ]:
            if part.get("type") == "string" and "enum" not in part:
                part["type"] = ["string", "number", "boolean"]


def _distribution(kind: str) -> dict[str, Any]:
    """Return the schema of a distribution."""
    values = {"type": "array", "minItems": 1}
    if kind in RANGES:
        values = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    return {"type": "object", "properties": {kind: values}, "required": [kind], "additionalProperties": False}


def _varied(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a value of a key, or of a distribution of its values."""
    value = {key: part for key, part in schema.items() if key not in ("description", "default")}
    said = {key: schema[key] for key in ("description",) if key in schema}
    return {**said, "anyOf": [value, {"$ref": "#/$defs/Distribution"}]}


def _add_search(search: dict[str, Any], definitions: Mapping[str, Any], properties: Mapping[str, Any]) -> None:
    """Let the section `search` take the recipe keys that a search may vary, dotted or below their section."""
    space, below = dict[str, Any](), dict[str, Any]()
    for key in SEARCHED:
        section = section_in(Recipe.model_fields[key].annotation)
        if section is None:
            space[key] = _varied(properties[key])
            continue
        inner = {name: _varied(one) for name, one in definitions[section.__name__]["properties"].items()}
        space |= {f"{key}.{name}": one for name, one in inner.items()}
        below[key] = {"type": "object", "properties": inner, "additionalProperties": False}
    own = search["properties"]
    keys_of_space = {"type": "object", "properties": space, "additionalProperties": False}
    own["space"] = {"description": own["space"]["description"], "anyOf": [keys_of_space, {"type": "null"}]}
    search["properties"] = {**own, **{key: one for key, one in (space | below).items() if key not in own}}

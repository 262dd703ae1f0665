"""Paths in a recipe: which values are paths, and which folder they are relative to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_PATH_KEYS = {"data": ("train", "fit", "select", "test"), "finetune": ("init", "pretrained", "class_names")}


def is_function(spec: str) -> bool:
    """Return whether a string has the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None


def absolute(spec: str, folder: Path) -> str:
    """Resolve a path against `folder`. URIs and `module:function` are returned unchanged."""
    if "://" in spec or is_function(spec):
        return spec
    return str(folder.absolute() / Path(spec).expanduser())


def absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve every path among the keys of a recipe against `folder`."""
    values = dict(values)
    spec = values.get("ingredients")
    if isinstance(spec, str):
        values["ingredients"] = absolute(spec, folder)
    elif isinstance(spec, list):
        values["ingredients"] = [absolute(s, folder) if isinstance(s, str) else s for s in spec]
    if isinstance(values.get("model"), str):
        values["model"] = _absolute_model(values["model"], folder)
    for section, keys in _PATH_KEYS.items():
        given = values.get(section)
        if isinstance(given, dict):
            values[section] = {key: _absolute(value, folder) if key in keys else value for key, value in given.items()}
    return values


def _absolute_model(spec: str, folder: Path) -> str:
    """Resolve the folder of `transformers:FOLDER`, if it exists, and the file of `?zeroshot=FILE`."""
    name, mark, query = spec.partition("?")
    library, _, path = name.partition(":")
    if library == "transformers" and Path(absolute(path, folder)).is_dir():
        name = f"{library}:{absolute(path, folder)}"
    return name + mark + re.sub(r"(?<=\bzeroshot=)[^&]+", lambda file: absolute(file[0], folder), query)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return type(value)({name: _absolute(inner, folder) for name, inner in value.items()})
    return absolute(value, folder) if isinstance(value, str) else value

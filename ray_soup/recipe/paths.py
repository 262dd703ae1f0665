"""Paths in a recipe: which values are paths, and which folder they are relative to."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ray_soup.errors import RecipeError
from ray_soup.recipe.plain import shown

_PATH_KEYS = {
    "compare": ("rows",),
    "data": ("train", "fit", "select", "test"),
    "finetune": ("init", "pretrained", "class_names"),
}


def is_function(spec: str) -> bool:
    """Return whether a string has the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) is not None


def absolute(spec: str, folder: Path) -> str:
    """Resolve a path against `folder`; ~ and ~user are home folders, file:// is a path, and URIs get a lower-case scheme.

    `module:function` is returned unchanged. Raises RecipeError for an empty path or an unknown home folder.
    """
    if not spec:
        raise RecipeError("found ''. Expected a path. Remove the key if there is none.")
    if is_function(spec):
        return spec
    scheme, mark, rest = spec.partition("://")
    if mark and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        if scheme.lower() != "file":
            return f"{scheme.lower()}://{rest}"
        host, slash, path = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise RecipeError(f"found {shown(spec)}. Expected file:///PATH, a path on this machine.")
        return unquote(slash + path)
    found = os.path.expanduser(spec)
    if spec.startswith("~") and found == spec:
        name = spec.partition("/")[0]
        raise RecipeError(
            f"found {shown(spec)}. The home folder {name} is unknown; expected a path. Write ./{name} for a name."
        )
    return str(folder.absolute() / found)


def absolute_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve every path among the keys of a recipe against `folder`.

    Raises RecipeError, whose text begins with the key, for a path that cannot be resolved.
    """
    values = dict(values)
    spec = values.get("ingredients")
    if isinstance(spec, list):
        values["ingredients"] = [_absolute(s, folder, f"ingredients[{n}]") for n, s in enumerate(spec)]
    elif isinstance(spec, str):
        values["ingredients"] = _absolute(spec, folder, "ingredients")
    if isinstance(values.get("start"), str):
        values["start"] = _absolute(values["start"], folder, "start")
    if isinstance(values.get("model"), str):
        values["model"] = _absolute_model(values["model"], folder)
    for section, keys in _PATH_KEYS.items():
        given = values.get(section)
        if isinstance(given, dict):
            values[section] = {
                key: _absolute(value, folder, f"{section}.{key}") if key in keys else value for key, value in given.items()
            }
    return values


def _absolute_model(spec: str, folder: Path) -> str:
    """Resolve the folder of `transformers:FOLDER`, if it exists, and the file of `?zeroshot=FILE`."""
    name, mark, query = spec.partition("?")
    library, _, path = name.partition(":")
    if library == "transformers" and path and os.path.isdir(found := _absolute(path, folder, "model")):
        name = f"{library}:{found}"
    return name + mark + re.sub(r"(?<=\bzeroshot=)[^&]+", lambda file: str(_absolute(file[0], folder, "model")), query)


def _absolute(value: Any, folder: Path, key: str) -> Any:
    if isinstance(value, dict):
        return type(value)({name: _absolute(inner, folder, f"{key}.{name}") for name, inner in value.items()})
    if not isinstance(value, str):
        return value
    try:
        return absolute(value, folder)
    except RecipeError as error:
        raise RecipeError(f"{key}: {error}") from error

"""Plain values: what recipes consist of, and how values appear in messages."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from ray_soup.errors import RecipeError

SHOWN = 80  # characters of a value in a message
MOST_DEPTH = 20
MOST_VALUES = 200_000
_INSTEAD = {
    "ingredients": "the paths of checkpoints",
    "model": "the name of a model, or of a function that builds it, as in my_package.module:build",
    "data": "a path, or the name of a function that returns the data set, as in my_package.module:function",
}
"""What a section expects where an object in memory was given: other processes, and a later run, must find it too."""


def shown(value: Any) -> str:
    """Return a value as it appears in messages: on one line, without control characters, cut at 80 characters."""
    try:
        text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    except Exception:  # an integer of more than 4,300 digits, or the user's own __repr__
        digits = isinstance(value, int)
        text = f"an integer of about {int(value.bit_length() * 0.30103):,} digits" if digits else f"a {type(value).__name__}"
    text = text.replace("\n", " ")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def plain(values: Any, where: str = "", what: str = "The recipe") -> Any:
    """Convert values from Python into dicts, lists, texts, truth values, None and numbers.

    Tuples become lists, paths become texts, scalars of NumPy become numbers, and a function or class that can be imported
    becomes its name, `module:function`. Raises RecipeError, which names the key and starts with `what`, for other objects,
    for keys that are not text, and for cycles.
    """
    return _Plain(what).of(values, where, 0)


class _Plain:
    def __init__(self, what: str) -> None:
        self.what, self.left = what, MOST_VALUES

    def refuse(self, where: str, reason: str) -> RecipeError:
        return RecipeError(f"{self.what} is not valid:\n  {f'{where}: ' if where else ''}{reason}")

    def of(self, value: Any, where: str, depth: int) -> Any:
        self.left -= 1
        if depth > MOST_DEPTH or self.left < 0:
            limit = f"{MOST_DEPTH} deep" if depth > MOST_DEPTH else f"{MOST_VALUES:,} values"
            raise self.refuse(where[:SHOWN], f"found more than {limit}, or a value that contains itself. Simplify it.")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Mapping):
            wrong = next((key for key in value if not isinstance(key, str)), None)
            if wrong is not None or None in value:
                raise self.refuse(where, f"found the key {shown(wrong)}. Expected text as keys: quote it.")
            return {str(key): self.of(v, f"{where}.{key}" if where else str(key), depth + 1) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(v, f"{where}[{n}]", depth + 1) for n, v in enumerate(value)]
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif isinstance(value, (FunctionType, type)):
            return self.function(value, where)
        elif type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
            value = value.item()
        for kind in (str, int, float):  # subclasses, such as members of an Enum
            if isinstance(value, kind):
                return value if isinstance(value, bool) else kind(value) if kind is not str else str.__str__(value)
        section = where.partition(".")[0].partition("[")[0]
        expected = _INSTEAD.get(section, "text, a number, true, false, a list or keys")
        in_memory = " For models and data in memory, use ray_soup.mix_state_dicts." if section in _INSTEAD else ""
        raise self.refuse(where, f"found {shown(value)} of type {type(value).__name__}. Expected {expected}.{in_memory}")

    def function(self, value: Any, where: str) -> str:
        """Return the name by which other processes can import a function or class."""
        module, name = str(value.__module__), str(value.__qualname__)
        if module != "__main__" and getattr(sys.modules.get(module), name, None) is value:
            return f"{module}:{name}"
        place = "this script or notebook" if module == "__main__" else module
        raise self.refuse(
            where,
            f"found {name} of {place}, which other processes cannot import. Expected a function at the top level of a "
            "module. Move it into a file, and pass it from there, or write its name, as in my_package.module:function.",
        )


def texts_in(value: object) -> list[str]:
    """Return the texts among the values of nested lists and dictionaries."""
    if isinstance(value, (list, dict)):
        return [text for one in (value.values() if isinstance(value, dict) else value) for text in texts_in(one)]
    return [value] if isinstance(value, str) else []

"""What a key expects, in words, and what is wrong with a recipe, one line for each key."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ray_soup.recipe.plain import shown

MOST_KEY = 200  # characters of a key in a message


@dataclass(frozen=True)
class Fault:
    """What is wrong with one key."""

    key: str
    message: str

    def __str__(self) -> str:
        key = self.key if len(self.key) <= MOST_KEY else f"{self.key[:MOST_KEY]}..."
        return f"{key}: {self.message}" if key else self.message


class FaultsError(ValueError):
    """Raised in a validator that finds faults of several keys."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


def faults_of(error: ValidationError, root: type[BaseModel]) -> list[Fault]:
    """Return the faults of a ValidationError of `root`, one for each key."""
    found: dict[str, tuple[int, Fault]] = {}
    for fault in error.errors(include_url=False):
        original = fault.get("ctx", {}).get("error")
        if isinstance(original, FaultsError):
            found |= {one.key: (0, one) for one in original.faults}
            continue
        where, info, rest = _field_at(fault["loc"], root)
        key = ".".join(where)
        rank = 3 * len(rest) + (fault["type"] == "value_error")  # of the members of a union, the one that got furthest
        if key not in found or rank > found[key][0]:
            found[key] = rank, _fault(fault, where, info, rest, root)
    return [fault for _, fault in found.values()]


def _field_at(loc: Iterable[Any], root: type[BaseModel]) -> tuple[list[str], FieldInfo | None, list[Any]]:
    """Split the place of an error into the parts of the key, its field, and the place within the field's value."""
    section: Any = root
    info: FieldInfo | None = None
    where: list[str] = []
    rest: list[Any] = []
    for part in loc:
        if is_section(section):
            where.append(str(part))
            info = section.model_fields.get(part)
            section = _or_null(info.annotation) if info is not None else None
        else:
            rest.append(part)
    if info is not None and get_origin(info.annotation) in (Union, types.UnionType):
        rest = rest[1:]  # the member of the union
    return where, info, [part for part in rest if part != "[key]"]


def _fault(fault: Any, where: list[str], info: FieldInfo | None, rest: list[Any], root: type[BaseModel]) -> Fault:
    key = ".".join(where)
    if fault["type"] == "extra_forbidden":
        return Fault(key, unknown_key(root, where))
    if fault["type"] == "missing":
        return Fault(key, "missing; add this key.")
    key += "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
    if fault["type"] == "value_error":
        message = fault["msg"].removeprefix("Value error, ")
    else:
        expected = "text" if rest else expected_by(info)
        message = f"Expected {expected}.{_advice(fault['input'], expected)}"
    return Fault(key, f"found {shown(fault['input'])}. {message}")


def _advice(found: Any, expected: str) -> str:
    if isinstance(found, str) and re.search("a number|an integer", expected):
        with suppress(ValueError):
            return " Remove the quotes." if math.isfinite(float(found)) else ""
    if isinstance(found, (bool, int, float)) and expected.startswith("text"):
        return " Put it in quotes."
    return ""


def unknown_key(root: type[BaseModel], where: list[str]) -> str:
    """Describe a key that does not exist: the most similar one, or those that exist there."""
    parent: Any = root
    for part in where[:-1]:
        parent = _or_null(below(parent, part))
    if not is_section(parent):
        return f"unknown key; {'.'.join(where[:-1])[:MOST_KEY]} has no keys below it."
    first, dot, last = where[-1][:100].partition(".")
    if dot and below(below(parent, first), last) is not None:
        return f"unknown key; write {last} below {first}, as in {first}: {{{last}: ...}}."
    fields: Iterable[str] = parent.model_fields
    prefix = ".".join([*where[:-1], ""])
    near = _near(where[-1][:100], prefix, fields, root)
    hint = f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"known keys here: {', '.join(fields)}."
    return f"unknown key; {hint}"


def _near(key: str, prefix: str, fields: Iterable[str], root: type[BaseModel]) -> list[str]:
    """Return the full names of the keys that a wrong one may stand for: of the same name, otherwise of a similar one."""
    ends: dict[str, list[str]] = {}
    for name, _ in every_key(root):
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    if key in ends:
        return ends[key]
    near = difflib.get_close_matches(key, list(fields), n=1)
    if near:
        return [prefix + near[0]]
    return [name for end in difflib.get_close_matches(key, list(ends), n=1) for name in ends[end]]


def every_key(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield the full name and the field of every key: of a section first its own, then those below it."""
    for key, info in section.model_fields.items():
        yield prefix + key, info
        inner = section_in(info.annotation)
        if inner is not None:
            yield from every_key(inner, f"{prefix}{key}.")


# What a key expects


def expected_by(info: FieldInfo | None) -> str:
    """Describe what a key expects, as in "an integer from 1 to 100, or auto"."""
    return _described(info.annotation, info.metadata) if info is not None else "another value"


def _described(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    found = list(_alternatives(annotation, list(metadata)))
    if len(found) > 1 and found[-1] == "null":
        return f"{', '.join(found[:-1])}, or null"
    return " or ".join(found)


def _alternatives(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        yield from _alternatives(inner, [*metadata, *more])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member, metadata)
    elif origin is Literal:
        yield " or ".join(map(str, get_args(annotation)))
    elif is_section(annotation):
        yield f"keys below it: {', '.join(annotation.model_fields)}"
    elif origin is list:
        some = "one or more " if any(getattr(m, "min_length", 0) for m in _flat(metadata)) else ""
        yield f"a list of {some}{_described(get_args(annotation)[0]).replace('text', 'texts')}"
    elif origin is dict:
        key, value = get_args(annotation)
        named = get_origin(key) is Literal
        yield f"{{{get_args(key)[0]}: {_described(value)}}}" if named else "names with one text each"
    else:
        names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}
        bounds = _bounds(metadata) if annotation in (int, float) else ""
        yield names.get(annotation, "another value") + bounds


def _bounds(metadata: list[Any]) -> str:
    """Describe bounds, as in " from 1 to 100"."""
    flat = _flat(metadata)
    words = (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below"))
    found = {word: getattr(one, name) for name, word in words for one in flat if hasattr(one, name)}
    numbers = {w: f"{int(n):,}" if float(n).is_integer() else f"{n:g}" for w, n in found.items()}
    return "".join(f"{' and' if word == 'below' and len(found) > 1 else ''} {word} {n}" for word, n in numbers.items())


def _flat(metadata: list[Any]) -> list[Any]:
    return [inner for one in metadata for inner in getattr(one, "metadata", [one])]


# Types of keys


def is_section(kind: Any) -> bool:
    """Return whether a type is a group of keys."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _or_null(kind: Any) -> Any:
    """Return the group of keys in a type that is one or null; any other type unchanged."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    return inner[0] if len(inner) == 1 and is_section(inner[0]) else kind


def section_in(kind: Any) -> Any:
    """Return the group of keys that a type is, or may be besides text or null; None if there is none."""
    return next((one for one in (kind, *get_args(kind)) if is_section(one)), None)


def below(section: Any, key: str) -> Any:
    """Look up the type of a section's key; None if `section` is not a section or has no such key."""
    section = section_in(section)
    return section.model_fields[key].annotation if section is not None and key in section.model_fields else None


def members(annotation: Any) -> set[Any]:
    """Return the types of the values that a type consists of, such as {str} for `str | dict[str, list[str]]`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return set(map(type, inner))
    if origin in (Annotated, list):
        return members(inner[0])
    if origin is dict:
        return members(inner[1])
    return set().union(*map(members, inner)) if inner else {annotation}


def takes_text_only(root: type[BaseModel]) -> Callable[[tuple[str, ...]], bool]:
    """Return a function from the keys that lead to a value to whether the value is text, and never a number."""

    def is_text(keys: tuple[str, ...]) -> bool:
        section: Any = root
        for key in keys:
            if section_in(section) is None:
                break
            section = below(section, key)
        found = members(section) if section is not None and not is_section(section) else set()
        return str in found and not found & {int, float, bool}

    return is_text

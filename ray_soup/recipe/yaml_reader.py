"""A YAML reader for files that people write: bounded in time and memory, and every refusal names line and column.

It differs from yaml.safe_load where a file could be read in a way that its writer did not mean: keys are always text,
1e-6 is a number, dates and 010 are text, and duplicate keys, unknown tags and several documents are refused.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ray_soup.errors import RecipeError

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000  # with aliases written out
MOST_DEPTH = 20
MOST_DIGITS = 400  # of a number; the largest float has 309

Keys = tuple[str, ...]
"""The keys that lead to a value, as in ("learn", "lr"); positions in lists are left out."""

_KINDS = {
    stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}  # fmt: skip
_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {
    case(word): value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for case in (str.lower, str.upper, str.capitalize)
}
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_PREFIX = "tag:yaml.org,2002:"


def read_text(path: str | Path, what: str) -> str:
    """Read a text file of at most 1 MB: UTF-8, or UTF-16 with a byte order mark.

    Args:
        path: the file.
        what: names the file in messages, as in "The recipe r.yaml".

    Raises RecipeError if it is not a regular file, too large, or not text.
    """
    try:
        _check_kind(os.stat(path), what)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            _check_kind(os.fstat(file.fileno()), what)
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"{what} cannot be read: {reason}. Check the path.") from error
    if len(data) > MOST_BYTES:
        raise RecipeError(f"{what} is larger than {MOST_BYTES:,} bytes. Check that this is the right file.")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{what} is not valid {'UTF-16' if utf16 else 'UTF-8'} text (at byte {error.start:,}). Save it as UTF-8."
        ) from error
    check_characters(text, what)
    return text


def _check_kind(found: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(found.st_mode)), "not a file")
        raise RecipeError(f"{what} is {kind}; expected a text file. Check the path.")


def check_characters(text: str, what: str) -> None:
    """Check that a text contains no control characters and no lone surrogates. Raises RecipeError."""
    found = _FORBIDDEN.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        column = found.start() - text.rfind("\n", 0, found.start())
        raise RecipeError(
            f"{what} contains the control character {found[0]!a} in line {line}, column {column}; expected text. Remove it."
        )


def resolve(text: str) -> Any:
    """Return the value of unquoted text: null, a truth value, an integer or a float; otherwise the text itself."""
    if text in NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""), 16 if "x" in text else 10)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    special = _SPECIAL.fullmatch(text)
    return float(f"{special[1] or ''}{(special[2] or special[3]).lower()}") if special else text


def parse_yaml(text: str, what: str, is_text: Callable[[Keys], bool], keys: Keys = ()) -> Any:
    """Parse one YAML document into dicts with text as keys, lists, texts, truth values, None and numbers.

    Args:
        text: the document.
        what: names the document in messages.
        is_text: returns whether the value at some keys is text, so that an unquoted 1e5 or true stays text there; null
            stays null.
        keys: keys that lead to the document itself, prepended to the keys within it.

    Raises RecipeError if the document is not valid, has duplicate keys or unknown tags, is nested more than 20 deep, or
    has more than 100,000 values.
    """
    check_characters(text, what)
    try:
        return _Document(text, what, is_text).read(keys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        pattern = re.search("alias|anchor", str(error.context))
        advice = "Quote a value that begins with * or &" if pattern else "Fix this line"
        raise RecipeError(f"{what} is not valid YAML: {where}{error.problem or error.context}. {advice}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{what} is not valid YAML: {error}. Fix it.") from error


class _Document:
    """One pass over the events of a document. Nothing is expanded before it has been counted."""

    def __init__(self, text: str, what: str, is_text: Callable[[Keys], bool]) -> None:
        self.what, self.is_text = what, is_text
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[Any] = yaml.parse(text, Loader=loader)
        self.values = 0
        self.anchors: dict[str, tuple[Any, int]] = {}
        """Value and number of values of each finished anchor."""

    def read(self, keys: Keys) -> Any:
        value, documents = None, 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.refuse(event, "a second document begins; expected one. Remove the line ---")
                value = self.value(next(self.events), keys, 0)
        return value

    def refuse(self, event: Any, reason: str) -> NoReturn:
        mark: Any = event.start_mark
        raise RecipeError(f"{self.what}, line {mark.line + 1}, column {mark.column + 1}: {reason}.")

    def count(self, event: Any, values: int = 1) -> None:
        self.values += values
        if self.values > MOST_VALUES:
            self.refuse(event, f"more than {MOST_VALUES:,} values, with aliases written out; expected fewer. Shorten it")

    def value(self, event: Any, keys: Keys, depth: int) -> Any:
        self.count(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                self.refuse(event, f"the alias *{event.anchor} has no finished anchor before it. Quote it if it is text")
            value, values = self.anchors[event.anchor]
            self.count(event, values)
            return value
        if depth > MOST_DEPTH:
            self.refuse(event, f"nested more than {MOST_DEPTH} deep. Flatten it")
        before, anchor = self.values, event.anchor
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event, keys)
        elif isinstance(event, yaml.SequenceStartEvent):
            self.check_tag(event, "seq")
            value = []
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                value.append(self.value(event, keys, depth + 1))
        else:
            self.check_tag(event, "map")
            value = self.mapping(keys, depth)
        if anchor is not None:
            self.anchors[anchor] = (value, self.values - before)
        return value

    def mapping(self, keys: Keys, depth: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            self.count(event)
            if not isinstance(event, yaml.ScalarEvent):
                self.refuse(event, "a key is a list, a mapping or an alias; expected text. Quote it, or fix the indentation")
            self.check_tag(event, "str")
            key, plain, mark = event.value, event.implicit[0], event.start_mark
            if key in lines:
                self.refuse(event, f"the key '{key[:80]}' was already in line {lines[key]}. Remove one of the two")
            lines[key] = mark.line + 1 if mark is not None else 0
            if plain and key == "<<":
                merged = self.merged(next(self.events), keys, depth)
            else:
                own[key] = self.value(next(self.events), (*keys, key), depth + 1)
        return {**merged, **own}

    def merged(self, event: Any, keys: Keys, depth: int) -> dict[str, Any]:
        value = self.value(event, keys, depth + 1)
        sources = value if isinstance(value, list) else [value]
        if not all(isinstance(source, dict) for source in sources):
            self.refuse(event, "<< merges mappings; found another value. Write *NAME of a mapping there")
        return {key: inner for source in reversed(sources) for key, inner in source.items()}

    def scalar(self, event: Any, keys: Keys) -> Any:
        text, tag = event.value, event.tag
        kind = tag.removeprefix(_PREFIX) if tag else ""
        if kind in ("int", "float"):
            value = self.number(event, text)
            if isinstance(value, bool) or not isinstance(value, int if kind == "int" else (int, float)):
                self.refuse(event, f"the tag !!{kind} does not fit {text[:80]!r}. Remove the tag")
            return float(value) if kind == "float" else value
        self.check_tag(event, "str")
        if tag or not event.implicit[0]:
            return text
        if self.is_text(keys) and text not in NULLS:
            return text
        return self.number(event, text)

    def number(self, event: Any, text: str) -> Any:
        if len(text) > MOST_DIGITS and re.fullmatch(r"[-+0-9_.eExX]+", text):
            self.refuse(event, f"a number of {len(text):,} digits; expected at most {MOST_DIGITS}. Shorten it")
        return resolve(text)

    def check_tag(self, event: Any, kind: str) -> None:
        if event.tag not in (None, "!", _PREFIX + kind):
            tag = str(event.tag).replace(_PREFIX, "!!")
            self.refuse(event, f"the tag {tag[:80]} is not supported. Remove it")

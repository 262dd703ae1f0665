"""Mutations of files: damage that disks, networks, editors and other programs do, each a function of a seeded generator.

A mutation takes the bytes of a file and returns other bytes. `binary` damages any file; `structured` edits one value, key or
entry of a JSON or YAML document and keeps the rest.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import yaml

Mutation = Callable[[bytes, random.Random], bytes]
HUGE = 10**400
ODD = (
    None, True, -1, 0, 1e308, float("nan"), float("inf"), HUGE, 2**63, "", " ", "x" * 5000, "../../x", "/dev/zero",
    "\x1b[31mred\x07", "a\nb", "<script>alert(1)</script>", "nan", "1e5", [], {}, [[]] * 3, {"": None}, [None],
    "\u202e\ud83d",
)  # fmt: skip
"""Values that programs and people put where another type belongs."""


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_near_an_end(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit where formats keep their headers and directories: the first or the last 512 bytes."""
    changed = bytearray(data)
    if changed:
        near = rng.randrange(min(512, len(changed)))
        changed[near if rng.random() < 0.5 else len(changed) - 1 - near] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Keep the beginning only, as an interrupted copy does."""
    return data[: rng.choice((0, 1, 8, len(data) - 1, rng.randrange(len(data) + 1)))]


def lose_the_beginning(data: bytes, rng: random.Random) -> bytes:
    """Keep the end only."""
    return data[rng.randrange(len(data) + 1) :]


def lengthen(data: bytes, rng: random.Random) -> bytes:
    """Append zeros, noise, or the file itself."""
    return data + rng.choice((b"\0" * 100, rng.randbytes(100), data))


def swap(data: bytes, rng: random.Random) -> bytes:
    """Exchange two pieces of one length."""
    n = rng.choice((1, 16, 512))
    if len(data) < 2 * n:
        return data[::-1]
    a, b = sorted((rng.randrange(len(data) - n + 1), rng.randrange(len(data) - n + 1)))
    if b < a + n:
        return flip(data, rng)
    return data[:a] + data[b : b + n] + data[a + n : b] + data[a : a + n] + data[b + n :]


def blank(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a piece with zeros or ones, as a lost disk block reads."""
    start = rng.randrange(len(data) + 1)
    n = min(rng.choice((1, 8, 64, 4096)), len(data) - start)
    return data[:start] + rng.choice((b"\0", b"\xff")) * n + data[start + n :]


def drop(data: bytes, rng: random.Random) -> bytes:
    """Remove a piece from the middle."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice((1, 7, 64, 1000)) :]


def inflate(data: bytes, rng: random.Random) -> bytes:
    """Write a huge or negative number over a length: the first eight bytes, or any four or eight bytes."""
    number = rng.choice((2**63, 2**64 - 1, 2**40, 2**31, 2**32 - 1, len(data), len(data) + 1))
    packed = struct.pack("<Q", number & (2**64 - 1))[: rng.choice((4, 8))]
    start = 0 if rng.random() < 0.4 else rng.randrange(max(1, len(data) - 8))
    return data[:start] + packed + data[start + len(packed) :]


def foreign(data: bytes, rng: random.Random) -> bytes:
    """Put another kind of file in its place."""
    del data
    return rng.choice(
        (
            b"", b"\0" * 4096, b"{}", b"[]", b"null", b"hello\n", b"<!DOCTYPE html><html>Not found</html>",
            b"\x89PNG\r\n\x1a\n", b"PK\x05\x06" + b"\0" * 18, b"PAR1PAR1", b"[" * 100_000,
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            b"{\"a\":" * 50_000, b"\xff\xfe" + "text".encode("utf-16-le"), rng.randbytes(3000),
        )
    )  # fmt: skip


BINARY: tuple[Mutation, ...] = (
    flip, flip, flip_near_an_end, flip_near_an_end, cut, lose_the_beginning, lengthen, swap, blank, drop, inflate, foreign,
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of all values in a document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


def edit(document: Any, rng: random.Random) -> Any:
    """Change one value, key or entry of a document, in place where possible, and return the document."""
    path = rng.choice(_places(document))
    if not path:
        return rng.choice(ODD)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, value = path[-1], parent[path[-1]]
    action = rng.choice(("replace", "replace", "delete", "add", "nest", "scale"))
    if action == "delete":
        del parent[key]
    elif action == "add" and isinstance(parent, dict):
        parent[rng.choice(("extra", "", "__metadata__", "version", "a b"))] = rng.choice(ODD)
    elif action == "add":
        parent.append(value)
    elif action == "nest":
        parent[key] = [value] if rng.random() < 0.5 else {str(key): value}
    elif action == "scale" and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = value * rng.choice((-1, 0, 2, 1.5, 1e9))
    elif action == "scale" and isinstance(value, str) and value:
        parent[key] = rng.choice((value[:-1], value + "x", value.upper(), value[::-1]))
    else:
        parent[key] = rng.choice(ODD)
    return document


def edit_json(data: bytes, rng: random.Random) -> bytes:
    """Edit a JSON document, or one line of JSON lines."""
    lines = data.decode().splitlines()
    try:
        return json.dumps(edit(json.loads(data), rng)).encode()
    except ValueError:
        which = rng.randrange(len(lines))
        lines[which] = json.dumps(edit(json.loads(lines[which]), rng))
        return "\n".join(lines).encode()


def edit_yaml(data: bytes, rng: random.Random) -> bytes:
    """Edit a YAML document, or insert a line that is odd in YAML."""
    if rng.random() < 0.3:
        lines = data.decode().splitlines()
        odd = (
            "- a",
            "a: *b",
            "a: &a [*a]",
            "<<: {a: 1}",
            "!!python/object:os.system x",
            "\t",
            "---",
            "? [a]: b",
            lines[0],
            "a: !!binary x",
        )
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(odd))
        return "\n".join(lines).encode()
    edited = edit(yaml.safe_load(data), rng)
    try:
        return yaml.safe_dump(edited, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # a number with more digits than Python prints
        return b"learn: {lr: " + b"9" * 5000 + b"}\n"


def edit_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Edit the header of a safetensors file, and keep the tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    text = edit_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]

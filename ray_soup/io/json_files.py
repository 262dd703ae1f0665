"""Small JSON files that other programs wrote, read within bounds."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from typing import Any

from ray_soup.io import storage

LARGEST = 1 << 28
"""Bytes; an index of 100,000 tensors takes about 10 MB, and the reports of a long trial rarely more than 100 MB."""
KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def special_kind(path: str) -> str | None:
    """Say what a local path is if it is not a regular file, without opening it; None for a regular file or a URI.

    Opening a FIFO would wait for a writer that may never come, and a device may never end.
    """
    if storage.is_remote(path):
        return None
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "missing"
    except (OSError, ValueError) as error:  # a loop of links, a folder that may not be searched, a NUL in the name
        return f"unreadable ({getattr(error, 'strerror', None) or error})"
    return None if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "not a regular file")


def read_text(path: str) -> bytes:
    """Read a small file. Raises ValueError if it is not a regular file, or too large; OSError if it cannot be read."""
    kind = special_kind(path)
    if kind is not None:
        raise ValueError(f"{path} is {kind}; expected a file")
    size = storage.stat(path).size
    if size > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {LARGEST:,}")
    return storage.read_bytes(path)


def parse_json(text: bytes | str) -> Any:
    """Parse JSON. Raises ValueError for anything that is not JSON, for two entries of one name, and for deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: str) -> Any:
    """Read a small JSON file. Raises ValueError or OSError."""
    return parse_json(read_text(path))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} occurs twice")
    return found


def finite(value: Any) -> Any:
    """Return a JSON value with every NaN and infinity replaced by its name, because JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return value

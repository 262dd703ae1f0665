"""Folders that are made once and used again: the direction stores and the decoded data of this node.

They lie under RAY_SOUP_CACHE (default `~/.cache/ray_soup`) and together take at most RAY_SOUP_CACHE_GB (default: half of
what the disk had free without them); the ones unused for longest go first, never one that is in use.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from ray_soup.errors import SoupError

T = TypeVar("T")


_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Another cache for as long as this lasts."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def cache_folder() -> Path:
    usual = os.environ.get("RAY_SOUP_CACHE") or Path.home() / ".cache" / "ray_soup"
    return Path(_FOLDER.get() or usual).absolute()


def content_key(*parts: Any) -> str:
    """A name for what is made from `parts` (JSON values)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class InUse:
    """A folder of the cache, held: it is not thrown out until `close` or the end of the process."""

    def __init__(self, path: Path):
        self.path = path
        self._hold: IO[bytes] | None = open(path / "in_use", "ab")  # noqa: SIM115 - held open
        fcntl.flock(self._hold, fcntl.LOCK_SH)
        os.utime(path / "in_use")

    def close(self) -> None:
        if self._hold is not None:
            self._hold.close()
            self._hold = None


def cached(kind: str, key: str, nbytes: int, make: Callable[[Path], Iterator[T]]) -> Generator[T, None, InUse]:
    """Yield what `make(folder)` yields while it fills the folder, if nobody has filled it yet; the value of the
    generator (`yield from`) is the folder, held as InUse.

    Only one process of a node makes it, the others wait. It is written under another name and renamed when whole.
    Raises SoupError if `nbytes` do not fit on the disk.
    """
    root = cache_folder() / kind
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    _remove_leftovers(root)
    with FileLock(root / f"{key}.lock"):
        if not folder.exists():
            _make_room(nbytes, root)
            temporary = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=root))
            try:
                with _named_errors(temporary):
                    yield from make(temporary)
                (temporary / "in_use").touch()
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return InUse(folder)


def lookup(kind: str, key: str) -> InUse | None:
    """The folder, held, if it has been made."""
    try:
        return InUse(cache_folder() / kind / key)
    except OSError:
        return None


def drained(work: Generator[Any, None, T]) -> T:
    """The value of a generator, run to its end."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SoupError(
            f"The cache folder {folder.parent} cannot be written: {error.strerror or error}. Free some room, or point "
            "RAY_SOUP_CACHE at another disk."
        ) from error


def _size(folder: Path) -> int:
    """Bytes that a folder takes on the disk (holes in files take none)."""
    return sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())


def _remove_leftovers(root: Path) -> None:
    """What killed runs left half-made. Whoever is at work on a key holds its lock."""
    for folder in root.glob("*.tmp-*"):
        try:
            with FileLock(root / f"{folder.name.split('.tmp-')[0]}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            pass


def _make_room(nbytes: int, root: Path) -> None:
    entries = []
    for folder in cache_folder().glob("*/*/"):
        try:
            entries.append(((folder / "in_use").stat().st_mtime, _size(folder), folder))
        except OSError:  # not finished, or thrown out by another process just now
            continue
    taken = sum(size for _, size, _ in entries)
    free = shutil.disk_usage(root).free
    limit_gb = os.environ.get("RAY_SOUP_CACHE_GB")
    limit = float(limit_gb) * 1e9 if limit_gb else (free + taken) / 2
    for _, size, folder in sorted(entries):
        if taken + nbytes <= limit:
            break
        if _throw_out(folder):
            taken -= size
            free += size
    if nbytes > free:
        raise SoupError(
            f"The cache at {root} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free. Point "
            "RAY_SOUP_CACHE at a larger disk, or choose directions.dtype=int8."
        )


def _throw_out(folder: Path) -> bool:
    with open(folder / "in_use", "ab") as hold:
        try:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        return True

"""The cache of a node: folders that are made once and reused, such as direction stores and decoded data.

They are stored under RAY_SOUP_CACHE (default `~/.cache/ray_soup`). Together they take at most RAY_SOUP_CACHE_GB gigabytes
(default: half of the disk space that would be free without them). The least recently used entries are evicted first;
entries in use are never evicted.

An entry is the folder KIND/KEY with its content and two more files: `in_use`, on which every process that uses the entry
holds a shared lock, and `entry.json`, its CacheEntry. A folder without a CacheEntry of this version counts as missing and is
replaced.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from ray_soup.errors import DiskError, SoupError
from ray_soup.io import environment
from ray_soup.io.disk import write_text

T = TypeVar("T")
VERSION = 1

_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


@dataclass(frozen=True)
class CacheEntry:
    """The content of entry.json, which marks a cache entry as finished."""

    version: int
    """Version of this record; entries of other versions are rebuilt."""
    kind: str
    """The kind of content, such as `directions`; also the name of the parent folder."""
    key: str
    """Hash of everything that the content depends on, made by `content_key`."""


class InUse:
    """A cache folder that is protected from eviction until `close` or the end of the process.

    Raises OSError if the folder does not exist or is being evicted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hold: IO[bytes] | None = open(path / "in_use", "ab")  # noqa: SIM115 - held open
        fcntl.flock(self._hold, fcntl.LOCK_SH)
        os.utime(path / "in_use")

    def close(self) -> None:
        """Allow the folder to be evicted."""
        if self._hold is not None:
            with suppress(OSError):  # nothing was written to it, and the lock ends in any case
                self._hold.close()
            self._hold = None

    def discard(self) -> None:
        """Close it, and remove the folder unless another process uses it: nobody will need it again."""
        self.close()
        with suppress(OSError):
            _evict(self.path)


@contextmanager
def cache_at(folder: Path) -> Iterator[None]:
    """Use another cache folder within this context."""
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def cache_folder() -> Path:
    """Return the absolute path of the cache folder."""
    folder = _FOLDER.get()
    return environment.cache_folder() if folder is None else folder.absolute()


def content_key(*parts: Any) -> str:
    """Hash JSON values into a cache key of 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached(kind: str, key: str, nbytes: int, make: Callable[[Path], Iterator[T]]) -> Generator[T, None, InUse]:
    """Make a cache entry unless it exists; the value of this generator is the entry.

    Yields what `make(folder)` yields while it fills an empty folder. One process per node makes an entry while the others
    wait. The folder is renamed once it is complete, so no process sees a partial entry.

    Args:
        kind: the kind of content, such as `directions`.
        key: hash of everything that the content depends on.
        nbytes: size of the entry in bytes; other entries are evicted to make room for it.
        make: fills the folder.

    Raises SoupError if the disk has no room for `nbytes` or cannot be written, or if the cache is deleted meanwhile.
    """
    root = cache_folder() / kind
    with _locked(root, key):
        hold = lookup(kind, key)
        if hold is None:
            with _write_errors(root):
                target = _vacant(root, key)
                _make_room(nbytes, root)
                temporary = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=root))
            try:
                with _write_errors(root):
                    yield from make(temporary)
                    write_text(temporary / "entry.json", json.dumps(asdict(CacheEntry(VERSION, kind, key))))
                    hold = InUse(temporary)  # before it can be seen, and evicted, by other processes
                    hold.path = _move(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return hold


@contextmanager
def scratch() -> Iterator[Path]:
    """Provide an empty folder in the cache for as long as the context lasts; those of killed processes are removed."""
    root, key = cache_folder() / "scratch", secrets.token_hex(8)
    with _locked(root, key):
        with _write_errors(root):
            folder = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                (root / f"{key}.lock").unlink()


@contextmanager
def _locked(root: Path, key: str) -> Iterator[None]:
    """Hold the lock of a key; if another process deletes the cache at this moment, create it once more."""
    lock = FileLock(root / f"{key}.lock")
    for attempt in range(2):
        with _write_errors(root, final=attempt == 1):
            root.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(root)
            lock.acquire()
            break
    try:
        yield
    finally:
        with suppress(OSError):  # the lock ends in any case
            lock.release()


def _move(temporary: Path, target: Path) -> Path:
    """Move a finished entry into place; keep an entry that appeared there, if somebody deleted the lock meanwhile."""
    try:
        return temporary.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise SoupError(
                f"{target}: another process made this entry of the cache at the same time, because the cache was deleted "
                "while it was in use. Rerun the same command."
            ) from error
        raise


def lookup(kind: str, key: str) -> InUse | None:
    """Return a finished cache entry, or None if it does not exist. Raises SoupError if the cache cannot be written."""
    entry, root = CacheEntry(VERSION, kind, key), cache_folder() / kind
    for folder in _places(root, key):
        if _read_entry(folder) == entry:
            with _write_errors(root, final=False):
                hold = InUse(folder)
                if _read_entry(folder) == entry:  # check again: another process may have begun to evict it
                    return hold
                hold.close()
    return None


def _read_entry(folder: Path) -> CacheEntry | None:
    """Read the record of an entry; return None if it is missing or unreadable."""
    try:
        return CacheEntry(**json.loads((folder / "entry.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _places(root: Path, key: str) -> tuple[Path, Path]:
    """Return the paths of an entry; the second is used while a process still uses an outdated entry at the first."""
    return root / key, root / f"{key}.v{VERSION}"


def _vacant(root: Path, key: str) -> Path:
    """Return a free path for a new entry, after removing an outdated or damaged one that no process uses."""
    for place in _places(root, key):
        if place.is_symlink() or place.is_file():
            place.unlink()
        if not place.exists() or _evict(place):
            return place
    raise SoupError(
        f"{root / key}: this entry of the cache is damaged, and another process still uses it. Wait until that process has "
        "ended, or set RAY_SOUP_CACHE to another folder."
    )


@contextmanager
def _write_errors(root: Path, final: bool = True) -> Iterator[None]:
    """Turn errors of the cache's own files into a DiskError; unless `final`, let a folder that was deleted pass."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # NotImplementedError: the file system has no locks
        elsewhere = getattr(error, "filename", None)
        if elsewhere is not None and not os.fsdecode(elsewhere).startswith(str(root)) and root.is_dir():
            raise  # of a file that was read for the entry
        if isinstance(error, FileNotFoundError) and not final:
            return
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileNotFoundError):
            reason = "it was deleted while it was in use"
        raise DiskError(
            f"The cache folder {root} cannot be written: {reason}. Free some disk space, or set RAY_SOUP_CACHE to a "
            "folder on another disk; then rerun the same command."
        ) from error


def _size(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk (holes in files take none)."""
    return sum(f.lstat().st_blocks * 512 for f in folder.rglob("*"))


def _remove_leftovers(root: Path) -> None:
    """Remove the unfinished entries of killed runs; a process that is making an entry holds the lock of its key."""
    for folder in root.glob("*.tmp-*"):
        try:
            with FileLock(root / f"{folder.name.split('.tmp-')[0]}.lock", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except (Timeout, OSError):
            pass


def _make_room(nbytes: int, root: Path) -> None:
    entries, now = [], time.time()
    for folder in cache_folder().glob("*/*/"):
        if ".tmp-" in folder.name:  # being made
            continue
        try:
            used = min((folder / "in_use").stat().st_mtime, now)  # a clock may have been ahead
            entries.append((used, _size(folder), folder))
        except OSError:  # not an entry, or just evicted by another process
            continue
    taken = sum(size for _, size, _ in entries)
    free = shutil.disk_usage(root).free
    limit = environment.cache_bytes() or (free + taken) / 2
    for _, size, folder in sorted(entries):
        if taken + nbytes <= limit:
            break
        with suppress(OSError):  # it stays
            if _evict(folder):
                taken -= size
                free += size
    if nbytes > free:
        raise DiskError(
            f"The cache at {root} needs {nbytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free. Set "
            "RAY_SOUP_CACHE to a folder on a larger disk, or choose directions.dtype=int8 or int4."
        )


def _evict(folder: Path) -> bool:
    """Remove a cache folder unless a process uses it; return whether it was removed. Raises OSError if this fails."""
    try:
        with open(folder / "in_use", "ab") as hold:
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / "entry.json").unlink(missing_ok=True)  # first: if this process is killed now, it counts as missing
            try:
                shutil.rmtree(folder)
            except OSError as error:
                error.filename = str(folder)  # not relative to it
                raise
    except BlockingIOError:
        return False
    except FileNotFoundError:  # another process has removed it
        pass
    return True

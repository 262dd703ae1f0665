"""Files on local disks and at URIs: object storage (s3://, gs://, az://), what pyarrow.fs opens (hdfs://), and hf://.

A failed request is retried with exponential backoff; the final error names the URI. Endpoints and credentials come from the
environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), never from a URI, because URIs are written into recipes and reports.
"""

from __future__ import annotations

import fnmatch
import glob as local_glob
import os
import posixpath
import shutil
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_soup.errors import SoupError
from ray_soup.io import disk, hugging_face
from ray_soup.io.arrow_files import ArrowFile, arrow_filesystem
from ray_soup.io.cache import InUse, cached, content_key
from ray_soup.io.hub_path import is_hub
from ray_soup.io.mapped import guard, mapped, opened, release_pages
from ray_soup.io.objects import ObjectFile, is_object
from ray_soup.io.remote import Stat

PART = 1 << 24  # bytes copied at a time
AHEAD = 4
"""Parts of one remote file that are read at the same time."""
_HELD: dict[str, InUse] = {}  # cached copies that this process uses, by URI


def is_remote(path: str) -> bool:
    """Return whether this is a URI and not a local path."""
    return "://" in path


def _remote(uri: str) -> ObjectFile | ArrowFile:
    return ObjectFile(uri) if is_object(uri) else ArrowFile(uri)


def filesystem(uri: str) -> tuple[Any, str]:
    """Return a file system of pyarrow for a URI, and the path in it; Ray Tune takes both for its storage.

    Raises RecipeError.
    """
    return arrow_filesystem(uri)


def isfile(path: str) -> bool:
    """Return whether a file exists at a path or URI."""
    return _remote(path).stat() is not None if is_remote(path) else os.path.isfile(path)


def isdir(path: str) -> bool:
    """Return whether a folder exists at a path or URI."""
    return _remote(path).is_folder() if is_remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    """Return whether a file or a folder exists at a path or URI."""
    return isfile(path) or isdir(path) if is_remote(path) else os.path.exists(path)


def stat(path: str) -> Stat:
    """Return size and version of a file. Raises FileNotFoundError."""
    if not is_remote(path):
        local = os.stat(path)
        return Stat(local.st_size, local.st_mtime_ns)
    found = _remote(path).stat()
    if found is None:
        raise FileNotFoundError(f"{path} does not exist")
    return found


def listdir(path: str) -> list[str]:
    """Return the sorted names in a folder; an empty list if it does not exist."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    return sorted(_remote(path).listed(recursive=False))


def walk(folder: str) -> dict[str, Stat]:
    """Return all files below a folder, sorted by their paths relative to the folder."""
    if not is_remote(folder):
        files = {}
        for file in disk.files_below(Path(folder)):
            with suppress(FileNotFoundError):  # removed just now
                files[str(file.relative_to(folder))] = stat(str(file))
        return files
    found = _remote(folder).listed(recursive=True)
    return {name: at for name, at in sorted(found.items()) if at is not None}


def glob(pattern: str) -> list[str]:
    """Return the paths that match a pattern of `*`, `?`, `[...]` and `**`, in no particular order."""
    if not is_remote(pattern):
        return local_glob.glob(os.path.expanduser(pattern), recursive=True)
    parts = pattern.split("/")
    fixed = next((n for n, part in enumerate(parts) if local_glob.has_magic(part)), len(parts))
    base = "/".join(parts[:fixed])
    if fixed == len(parts):
        return [pattern] if exists(pattern) else []
    deep = len(parts) - fixed > 1 or "**" in parts
    found = _remote(base).listed(recursive=deep)
    return [f"{base}/{name}" for name in found if _matches(name.split("/"), parts[fixed:])]


def matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a pattern of `*`, `?`, `[...]` and `**`."""
    return _matches(path.split("/"), pattern.split("/"))


def _matches(names: list[str], parts: list[str]) -> bool:
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _matches(names, parts[1:]) or _matches(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def join(folder: str, *names: str) -> str:
    """Join names to a folder that is a path or URI."""
    return "/".join([folder.rstrip("/"), *names]) if is_remote(folder) else os.path.join(folder, *names)


def read_bytes(path: str) -> bytes:
    """Read a whole small file. Raises FileNotFoundError."""
    if is_object(path):
        return ObjectFile(path).content()
    return b"".join(chunks(path)) if is_remote(path) else Path(path).read_bytes()


class LocalFile:
    """A local file, memory-mapped without a file descriptor, so that thousands can be open."""

    def __init__(self, path: str) -> None:
        guard()
        self.path = path
        with opened(path) as (_, descriptor, self.version):
            self._bytes = mapped(path, descriptor, self.version.size)

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return a view, not a copy, of `nbytes` bytes at `offset`. Raises SoupError if the file has become shorter."""
        part = self._bytes.data[offset : offset + nbytes]
        if len(part) != nbytes:
            raise SoupError(
                f"{self.path} changed while it was in use: it has {len(self._bytes):,} bytes; expected {offset + nbytes:,}. "
                "Rerun the command."
            )
        return part

    def drop_pages(self) -> None:
        """Release the pages read so far from this process (they stay in the system's page cache)."""
        release_pages([self._bytes.ctypes.data])


class RemoteFile:
    """A file in remote storage, read by byte ranges; safe to use from several threads."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size = uri, size
        self._file = _remote(uri)

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes at `offset`. Raises SoupError if the storage fails or the file has become shorter."""
        data = self._file.read(offset, nbytes)
        if len(data) != nbytes:
            raise SoupError(
                f"{self.uri} changed while it was in use: read {len(data)} of {nbytes} bytes at offset {offset}. Rerun "
                "the command."
            )
        return data

    def parts(self) -> Iterator[memoryview]:
        """Yield the bytes in order, AHEAD parts of them read at the same time."""
        pending: deque[Future[memoryview]] = deque()
        with ThreadPoolExecutor(AHEAD) as pool:
            for offset in range(0, self.size, PART):
                pending.append(pool.submit(self.read, offset, min(PART, self.size - offset)))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def drop_pages(self) -> None:
        """Do nothing: there are no pages to release."""


def open_file(path: str, size: int) -> LocalFile | RemoteFile:
    """Open a file of `size` bytes for reading by ranges."""
    return RemoteFile(path, size) if is_remote(path) else LocalFile(path)


def chunks(path: str) -> Iterator[memoryview]:
    """Yield the bytes of a file in order; a chunk is valid until the next one is taken."""
    if is_remote(path):
        yield from RemoteFile(path, stat(path).size).parts()
        return
    with open(path, "rb", buffering=0) as stream:
        buffer = bytearray(1 << 22)
        while n := stream.readinto(buffer):
            yield memoryview(buffer)[:n]


def local_copy(path: str) -> Generator[tuple[int, int], None, str]:
    """Copy the current version of a remote file or folder into the cache; the value of this generator is its local path.

    Yields (bytes copied, bytes in total). A local path is returned unchanged. Files of the Hugging Face Hub are downloaded
    into the cache of `huggingface_hub` instead. The copy is not evicted before this process ends or copies another version.
    Raises FileNotFoundError.
    """
    if not is_remote(path):
        return path
    if is_hub(path):
        return (yield from hugging_face.download(path))
    hold, copy = yield from cached_copy(path)
    if path in _HELD:
        _HELD[path].close()
    _HELD[path] = hold
    return str(copy)


def cached_copy(path: str) -> Generator[tuple[int, int], None, tuple[InUse, Path]]:
    """Copy the current version of a remote file or folder into the cache.

    Yields (bytes copied, bytes in total). The value of this generator is the entry, which is evicted some time after it was
    closed, and the local path. Raises FileNotFoundError.
    """
    base = posixpath.basename(path.rstrip("/"))
    files = _files_of(path)
    if not files:
        raise FileNotFoundError(f"{path} does not exist")
    total = sum(s.size for s in files.values())

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        done = 0
        for name in files:
            target = folder / "copy" / base / name  # with an empty name: the file `base` itself
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                for chunk in chunks(join(path, name) if name else path):
                    file.write(chunk)
                    done += len(chunk)
                    yield done, total
        if _files_of(path) != files:
            raise SoupError(f"{path} changed while it was copied. Rerun the command.")

    key = content_key(path, [[name, s.size, s.version] for name, s in files.items()])
    hold = yield from cached("files", key, total, make)
    return hold, hold.path / "copy" / base


def _files_of(path: str) -> dict[str, Stat]:
    """Return the files of a folder by their relative paths, or a file by an empty name."""
    return {"": stat(path)} if isfile(path) else walk(path)


def _make_folder(target: str) -> None:
    """Make the folder of a local file."""
    with disk.writing(Path(target)):
        Path(target).parent.mkdir(parents=True, exist_ok=True)


def write_bytes(data: bytes, target: str) -> None:
    """Write a small file atomically. Raises DiskError for a local one."""
    if is_remote(target):
        _remote(target).write(data)
        return
    _make_folder(target)
    disk.write_bytes(Path(target), data)


def upload(source: Path, target: str) -> None:
    """Copy a local file to a path or URI, atomically: a reader sees the whole file or none. Raises DiskError for a path."""
    if is_remote(target):
        _remote(target).write(source)
        return
    _make_folder(target)
    with open(source, "rb") as file, disk.replacing(Path(target)) as copy:
        shutil.copyfileobj(file, copy, PART)


def download(path: str, target: Path) -> None:
    """Copy the file at a path or URI to a new local file. Raises FileNotFoundError, or DiskError for the local file."""
    with disk.writing(target):
        file = open(target, "wb")  # noqa: SIM115 - what reading raises is not about this file
    with file:
        for chunk in chunks(path):
            with disk.writing(target):
                file.write(chunk)


def remove(path: str) -> None:
    """Remove a file if it exists."""
    if is_remote(path):
        _remote(path).remove()
    else:
        Path(path).unlink(missing_ok=True)

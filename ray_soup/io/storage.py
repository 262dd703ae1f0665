"""Files on local disks and at URIs of every storage system that pyarrow.fs supports (s3://, gs://, hdfs://, ...).

Those of the Hugging Face Hub (hf://) are read from the cache of `huggingface_hub`, see io/hugging_face.py.

A failed request is retried with exponential backoff; the final error names the URI. Endpoints and credentials come from the
environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), never from a URI, because URIs are written into recipes and reports.
"""

from __future__ import annotations

import fnmatch
import glob as local_glob
import os
import posixpath
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import disk, hugging_face
from ray_soup.io.cache import InUse, cached, content_key
from ray_soup.io.hub_path import HubPath, is_hub
from ray_soup.io.mapped import guard, opened, release_pages
from ray_soup.io.redact import check_uri

T = TypeVar("T")
PAUSES_S = (1, 2, 4, 8)  # between attempts
REQUEST_S = 60  # timeout of one request
PART = 1 << 24  # bytes copied at a time
FINAL = ("access_denied", "access denied", "invalid_access_key", "signature", "no_such_bucket", "forbidden", "credential")
_HELD: dict[str, InUse] = {}  # cached copies that this process uses, by URI


@dataclass(frozen=True)
class Stat:
    """Size and version of a file."""

    size: int
    """Bytes."""
    version: int
    """Modification time in ns."""


def is_remote(path: str) -> bool:
    """Return whether this is a URI and not a local path."""
    return "://" in path


def _filesystem(uri: str) -> tuple[Any, str]:
    """Return the pyarrow file system of a URI, and the path in it."""
    scheme, _, path = uri.partition("://")
    if scheme == "hf":
        HubPath.parse(uri)  # which refuses credentials, too
        return hugging_face.HubFiles(), path
    check_uri(uri)
    if scheme == "s3":
        return _s3(path.partition("/")[0]), path
    from pyarrow import fs

    try:
        system, inside = fs.FileSystem.from_uri(uri)
        return system, inside
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(
            f"{uri}: cannot open this storage ({error}). Use s3://, gs://, or another scheme that pyarrow.fs supports."
        ) from error


@lru_cache
def _s3(bucket: str) -> Any:
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = _retry(f"s3://{bucket}", lambda: fs.resolve_s3_region(bucket))
    options: dict[str, Any] = {"endpoint_override": re.sub(r"^https?://", "", endpoint)} if endpoint else {}
    if endpoint and endpoint.startswith("http://"):
        options["scheme"] = "http"
    return fs.S3FileSystem(
        region=region,
        connect_timeout=10,
        request_timeout=REQUEST_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        **options,
    )


def _retry(uri: str, action: Callable[[], T]) -> T:
    """Return the result of `action`, retried if a request fails. Raises FileNotFoundError, or SoupError otherwise."""
    for pause in (*PAUSES_S, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = str(error).partition("\n")[0]
            final = any(word in reason.lower() for word in FINAL)
            if pause is None or final:
                attempts = "" if final else f" after {len(PAUSES_S) + 1} attempts in {sum(PAUSES_S)} s"
                raise SoupError(
                    f"The storage failed at {uri}{attempts}: {reason}. Check that the storage is up and that this machine's "
                    "credentials are valid there; then rerun the same command."
                ) from error
            time.sleep(pause)
    raise AssertionError


def _info(uri: str) -> Any:
    fs, path = _filesystem(uri)
    return _retry(uri, lambda: fs.get_file_info(path.rstrip("/")))


def isfile(path: str) -> bool:
    """Return whether a file exists at a path or URI."""
    return _info(path).is_file if is_remote(path) else os.path.isfile(path)


def isdir(path: str) -> bool:
    """Return whether a folder exists at a path or URI."""
    from pyarrow import fs

    return _info(path).type == fs.FileType.Directory if is_remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    """Return whether a file or a folder exists at a path or URI."""
    from pyarrow import fs

    return _info(path).type != fs.FileType.NotFound if is_remote(path) else os.path.exists(path)


def stat(path: str) -> Stat:
    """Return size and version of a file. Raises FileNotFoundError."""
    if not is_remote(path):
        found = os.stat(path)
        return Stat(found.st_size, found.st_mtime_ns)
    info = _info(path)
    if not info.is_file:
        raise FileNotFoundError(f"{path} does not exist")
    return Stat(info.size, info.mtime_ns or 0)


def listdir(path: str) -> list[str]:
    """Return the sorted names in a folder; an empty list if it does not exist."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    return sorted(posixpath.basename(info.path) for info in _listed(path, recursive=False))


def walk(folder: str) -> dict[str, Stat]:
    """Return all files below a folder, sorted by their paths relative to the folder."""
    if not is_remote(folder):
        files = sorted(f for f in Path(folder).rglob("*") if f.is_file())
        return {str(f.relative_to(folder)): stat(str(f)) for f in files}
    top = _filesystem(folder)[1].rstrip("/") + "/"
    found = {info.path.removeprefix(top): info for info in _listed(folder, recursive=True) if info.is_file}
    return {name: Stat(info.size, info.mtime_ns or 0) for name, info in sorted(found.items())}


def _listed(uri: str, recursive: bool) -> list[Any]:
    from pyarrow import fs

    system, path = _filesystem(uri)
    selector = fs.FileSelector(path.rstrip("/"), recursive=recursive, allow_not_found=True)
    return _retry(uri, lambda: system.get_file_info(selector))


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
    top = _filesystem(base)[1].rstrip("/") + "/"
    found = [info.path.removeprefix(top).split("/") for info in _listed(base, recursive=deep)]
    return [f"{base}/{'/'.join(names)}" for names in found if _matches(names, parts[fixed:])]


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
    if not is_remote(path):
        return Path(path).read_bytes()
    file = RemoteFile(path, stat(path).size)
    return bytes(file.read(0, file.size))


class LocalFile:
    """A local file, memory-mapped without a file descriptor, so that thousands can be open."""

    def __init__(self, path: str) -> None:
        import torch  # its map needs no file descriptor, unlike Python's

        guard()
        self.path = path
        with opened(path) as (link, _, self.version):
            data = torch.UntypedStorage.from_file(link, False, self.version.size)
        self._data = torch.empty(0, dtype=torch.uint8).set_(data)  # type: ignore[arg-type] # it returns an UntypedStorage
        self._view: memoryview = self._data.numpy().data

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return a view, not a copy, of `nbytes` bytes at `offset`. Raises SoupError if the file has become shorter."""
        part = self._view[offset : offset + nbytes]
        if len(part) != nbytes:
            raise SoupError(
                f"{self.path} changed while it was in use: it has {len(self._view):,} bytes; expected {offset + nbytes:,}. "
                "Rerun the command."
            )
        return part

    def drop_pages(self) -> None:
        """Release the pages read so far from this process (they stay in the system's page cache)."""
        release_pages([self._data.data_ptr()])


class RemoteFile:
    """A file in remote storage, read by byte ranges; safe to use from several threads."""

    def __init__(self, uri: str, size: int) -> None:
        self.uri, self.size = uri, size
        self._system, self._path = _filesystem(uri)
        self._file: Any = None
        self._opening = threading.Lock()

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes at `offset`.

        Raises SoupError if the storage fails or the file has become shorter.
        """

        def action() -> memoryview:
            try:
                with self._opening:
                    if self._file is None:
                        self._file = self._system.open_input_file(self._path)
                    file = self._file
                return memoryview(file.read_at(nbytes, offset))
            except OSError:
                self._file = None  # the next attempt opens a new connection
                raise

        data = _retry(self.uri, action)
        if len(data) != nbytes:
            raise SoupError(
                f"{self.uri} changed while it was in use: read {len(data)} of {nbytes} bytes at offset {offset}. Rerun "
                "the command."
            )
        return data

    def drop_pages(self) -> None:
        """Do nothing: there are no pages to release."""


def open_file(path: str, size: int) -> LocalFile | RemoteFile:
    """Open a file of `size` bytes for reading by ranges."""
    return RemoteFile(path, size) if is_remote(path) else LocalFile(path)


def chunks(path: str) -> Iterator[memoryview]:
    """Yield the bytes of a file in order; a chunk is valid until the next one is taken."""
    if not is_remote(path):
        with open(path, "rb", buffering=0) as stream:
            buffer = bytearray(1 << 22)
            while n := stream.readinto(buffer):
                yield memoryview(buffer)[:n]
        return
    file = RemoteFile(path, stat(path).size)
    for offset in range(0, file.size, PART):
        yield file.read(offset, min(PART, file.size - offset))


def local_copy(path: str) -> Generator[tuple[int, int], None, str]:
    """Copy a remote file or folder into the cache; the value of this generator is its local path.

    Yields (bytes copied, bytes in total). A local path is returned unchanged. Files of the Hugging Face Hub are downloaded
    into the cache of `huggingface_hub` instead. Raises FileNotFoundError.
    """
    if not is_remote(path):
        return path
    if is_hub(path):
        return (yield from hugging_face.download(path))
    base = posixpath.basename(path.rstrip("/"))
    if path in _HELD:
        return str(_HELD[path].path / "copy" / base)
    files = {"": stat(path)} if isfile(path) else walk(path)
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

    key = content_key(path, [[name, s.size, s.version] for name, s in files.items()])
    hold = yield from cached("files", key, total, make)
    _HELD[path] = hold
    return str(hold.path / "copy" / base)


def _make_folder(target: str) -> None:
    """Make the folder of a local file."""
    with disk.writing(Path(target)):
        Path(target).parent.mkdir(parents=True, exist_ok=True)


def write_bytes(data: bytes, target: str) -> None:
    """Write a small file atomically. Raises DiskError for a local one."""
    if not is_remote(target):
        _make_folder(target)
        disk.write_bytes(Path(target), data)
        return
    with disk.writing(Path(tempfile.gettempdir())):
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with temporary as folder:
        source = Path(folder) / "data"
        disk.write_bytes(source, data)
        upload(source, target)


def upload(source: Path, target: str) -> None:
    """Copy a local file to a path or URI, atomically: a reader sees the whole file or none. Raises DiskError for a path."""
    if not is_remote(target):
        _make_folder(target)
        with open(source, "rb") as file, disk.replacing(Path(target)) as copy:
            shutil.copyfileobj(file, copy, PART)
        return
    system, path = _filesystem(target)

    def action() -> None:
        from pyarrow import fs

        objects = target.startswith(("s3://", "gs://"))  # an object appears only once it is complete
        if not objects:
            system.create_dir(posixpath.dirname(path), recursive=True)
        written = path if objects else f"{path}.tmp"
        if source.stat().st_size <= PART:
            with system.open_output_stream(written) as out:
                out.write(source.read_bytes())
        else:
            fs.copy_files(str(source), written, fs.LocalFileSystem(), system, chunk_size=PART)
        if not objects:
            system.move(written, path)

    _retry(target, action)


def remove(path: str) -> None:
    """Remove a file if it exists."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    system, inside = _filesystem(path)
    try:
        _retry(path, lambda: system.delete_file(inside))
    except FileNotFoundError:
        return

"""Files that are local, or at any URI that pyarrow.fs knows (s3://, gs://, hdfs://, ...).

What a storage drops or refuses for the moment is tried again with growing pauses, then named in the error. Endpoints and
credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...), never from a URI: URIs are written down.
"""

from __future__ import annotations

import fnmatch
import glob as local_glob
import mmap
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

from ray_soup.cache import cached, content_key
from ray_soup.errors import RecipeError, SoupError

T = TypeVar("T")
PAUSES_S = (1, 2, 4, 8)  # between one try and the next
REQUEST_S = 60  # that one request may take
PART = 1 << 24  # bytes copied at a time
FINAL = ("access_denied", "access denied", "invalid_access_key", "signature", "no_such_bucket", "forbidden", "credential")
_HELD: dict[str, Any] = {}  # copies in the cache that this process uses


@dataclass(frozen=True)
class Stat:
    size: int
    version: int
    """Time of change in ns."""


def is_remote(path: str) -> bool:
    return "://" in path


def check_uri(uri: str) -> None:
    """Raises RecipeError for a URI that carries credentials or options: it would be written into recipes and reports."""
    authority = uri.partition("://")[2].partition("/")[0]
    if "@" in authority or re.search(r"\?(?!metric=|key=)[\w.-]+=", uri):
        bare = re.sub(r"\?.*", "", uri.replace(authority, authority.rpartition("@")[2]))
        raise RecipeError(
            f"{bare}: credentials and options do not belong into a URI. Put them into the environment of driver and "
            "workers: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, or what your storage uses."
        )


def _filesystem(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it."""
    check_uri(uri)
    scheme, _, path = uri.partition("://")
    if scheme == "s3":
        return _s3(path.partition("/")[0]), path
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(uri)
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(f"{uri}: no such storage ({error}). Expected s3://, gs://, or what pyarrow.fs knows.") from error


@lru_cache
def _s3(bucket: str) -> Any:
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        region = _tried(f"s3://{bucket}", lambda: fs.resolve_s3_region(bucket))
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


def _tried(uri: str, action: Callable[[], T]) -> T:
    """What `action` returns, tried again where the storage failed. Raises FileNotFoundError as it is, else SoupError."""
    for pause in (*PAUSES_S, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = str(error).partition("\n")[0]
            final = any(word in reason.lower() for word in FINAL)
            if pause is None or final:
                tries = "" if final else f", {len(PAUSES_S) + 1} times in {sum(PAUSES_S)} s"
                raise SoupError(
                    f"The storage failed at {uri}{tries}: {reason}. Check that it is up and that this machine's "
                    "credentials reach it; then run the same command again."
                ) from error
            time.sleep(pause)
    raise AssertionError


def _info(uri: str) -> Any:
    fs, path = _filesystem(uri)
    return _tried(uri, lambda: fs.get_file_info(path.rstrip("/")))


def isfile(path: str) -> bool:
    return _info(path).is_file if is_remote(path) else os.path.isfile(path)


def isdir(path: str) -> bool:
    from pyarrow import fs

    return _info(path).type == fs.FileType.Directory if is_remote(path) else os.path.isdir(path)


def exists(path: str) -> bool:
    from pyarrow import fs

    return _info(path).type != fs.FileType.NotFound if is_remote(path) else os.path.exists(path)


def stat(path: str) -> Stat:
    """Raises FileNotFoundError."""
    if not is_remote(path):
        found = os.stat(path)
        return Stat(found.st_size, found.st_mtime_ns)
    info = _info(path)
    if not info.is_file:
        raise FileNotFoundError(f"{path} does not exist")
    return Stat(info.size, info.mtime_ns or 0)


def listdir(path: str) -> list[str]:
    """Names in a folder, sorted; none where it does not exist."""
    if not is_remote(path):
        return sorted(os.listdir(path)) if os.path.isdir(path) else []
    return sorted(posixpath.basename(info.path) for info in _listed(path, recursive=False))


def walk(folder: str) -> dict[str, Stat]:
    """All files below a folder, by their path in it."""
    if not is_remote(folder):
        files = sorted(f for f in Path(folder).rglob("*") if f.is_file())
        return {str(f.relative_to(folder)): stat(str(f)) for f in files}
    top = _filesystem(folder)[1].rstrip("/") + "/"
    files = {info.path.removeprefix(top): info for info in _listed(folder, recursive=True) if info.is_file}
    return {name: Stat(info.size, info.mtime_ns or 0) for name, info in sorted(files.items())}


def _listed(uri: str, recursive: bool) -> list[Any]:
    from pyarrow import fs

    system, path = _filesystem(uri)
    selector = fs.FileSelector(path.rstrip("/"), recursive=recursive, allow_not_found=True)
    return _tried(uri, lambda: system.get_file_info(selector))


def glob(pattern: str) -> list[str]:
    """What a pattern of *, ?, [...] and ** matches."""
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
    """Whether a glob of *, ?, [...] and ** names this path."""
    return _matches(path.split("/"), pattern.split("/"))


def _matches(names: list[str], parts: list[str]) -> bool:
    if not parts or not names:
        return not names and all(part == "**" for part in parts)
    if parts[0] == "**":
        return _matches(names, parts[1:]) or _matches(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])


def join(folder: str, *names: str) -> str:
    return "/".join([folder.rstrip("/"), *names]) if is_remote(folder) else os.path.join(folder, *names)


def read_bytes(path: str) -> bytes:
    """A small file, whole. Raises FileNotFoundError."""
    if not is_remote(path):
        return Path(path).read_bytes()
    file = RemoteFile(path, stat(path).size)
    return bytes(file.read(0, file.size))


class LocalFile:
    """The bytes of one local file, memory-mapped; what comes back is a view, not a copy."""

    def __init__(self, path: str):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)

    def read(self, offset: int, nbytes: int) -> memoryview:
        return self._view[offset : offset + nbytes]

    def drop_pages(self) -> None:
        """Let go of the pages read so far (they stay in the system's cache)."""
        self._map.madvise(mmap.MADV_DONTNEED)


class RemoteFile:
    """The bytes of one file in a storage, read by range. Can be used from several threads."""

    def __init__(self, uri: str, size: int):
        self.uri, self.size = uri, size
        self._system, self._path = _filesystem(uri)
        self._file: Any = None
        self._opening = threading.Lock()

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Raises SoupError where the storage fails, or the file is shorter than it was."""

        def action() -> memoryview:
            try:
                with self._opening:
                    if self._file is None:
                        self._file = self._system.open_input_file(self._path)
                    file = self._file
                return memoryview(file.read_at(nbytes, offset))
            except OSError:
                self._file = None  # a broken connection is opened anew
                raise

        data = _tried(self.uri, action)
        if len(data) != nbytes:
            raise SoupError(
                f"{self.uri} changed while it was in use: {len(data)} of {nbytes} bytes at {offset}. Start again."
            )
        return data

    def drop_pages(self) -> None: ...


def open_file(path: str, size: int) -> LocalFile | RemoteFile:
    return RemoteFile(path, size) if is_remote(path) else LocalFile(path)


def chunks(path: str) -> Iterator[memoryview]:
    """The bytes of a file in order."""
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
    """Yields (bytes copied, bytes in all); the value is where the file, or the folder, lies on this node: itself, or a copy
    in the cache. Raises FileNotFoundError."""
    if not is_remote(path):
        return path
    if path in _HELD:
        return str(_HELD[path].path / posixpath.basename(path.rstrip("/")))
    files = {"": stat(path)} if isfile(path) else walk(path)
    if not files:
        raise FileNotFoundError(f"{path} does not exist")
    total = sum(s.size for s in files.values())

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        done = 0
        for name in files:
            source = join(path, name) if name else path
            target = folder / posixpath.basename(path.rstrip("/")) / name if name else folder / posixpath.basename(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as file:
                for chunk in chunks(source):
                    file.write(chunk)
                    done += len(chunk)
                    yield done, total

    key = content_key(path, [[name, s.size, s.version] for name, s in files.items()])
    hold = yield from cached("files", key, total, make)
    _HELD[path] = hold
    return str(hold.path / posixpath.basename(path.rstrip("/")))


def write_bytes(data: bytes, target: str) -> None:
    """A small file, whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "data"
        source.write_bytes(data)
        upload(source, target)


def upload(source: Path, target: str) -> None:
    """Copy a local file to a path or URI; a reader sees it whole or not at all."""
    if not is_remote(target):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, f"{target}.tmp")
        os.replace(f"{target}.tmp", target)
        return
    system, path = _filesystem(target)

    def action() -> None:
        from pyarrow import fs

        objects = target.startswith(("s3://", "gs://"))  # appear when they are whole
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

    _tried(target, action)


def remove(path: str) -> None:
    """A file, if it is there."""
    if not is_remote(path):
        Path(path).unlink(missing_ok=True)
        return
    system, inside = _filesystem(path)
    try:
        _tried(path, lambda: system.delete_file(inside))
    except FileNotFoundError:
        return

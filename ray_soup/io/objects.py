"""Files in object storage, through `obstore`: s3://BUCKET/PATH, gs://BUCKET/PATH and az://CONTAINER/PATH.

Objects are written atomically. A failed request is retried with exponential backoff. Endpoints and credentials come from the
environment, see io/credentials.py.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ray_soup.errors import RecipeError
from ray_soup.io.credentials import PREFIXES, RENEWED, store_options
from ray_soup.io.redact import check_uri
from ray_soup.io.remote import Stat, storage_failed

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")
STORES = {
    **dict.fromkeys(("s3", "s3a"), "S3Store"),
    **dict.fromkeys(("gs", "gcs"), "GCSStore"),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), "AzureStore"),
}
"""The class of obstore for each scheme."""
RETRY = {
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=1), "base": 3, "max_backoff": timedelta(seconds=8)},
    "retry_timeout": timedelta(minutes=3),
}
"""Of a request: 7 attempts with exponential backoff, about 20 s in sum; none begins after 3 minutes."""
PAUSES_S = (1, 3, 8, 8)
"""Before the same list is asked for once more if its answer breaks off, which obstore does not retry."""
CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h", "allow_http": True}
"""An answer may pause for as long as `read_timeout`; `timeout` is for all of it."""
PART = 1 << 23
"""Smallest part of an upload in bytes."""
MOST_PARTS = 10_000
"""That S3 accepts."""
AT_ONCE = 4
"""Parts of one file that are uploaded at the same time."""
NO_BUCKET = re.compile("NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
NO_PATH = re.compile(r'(?:Could not parse path|object with invalid path): .*?Path "(.*?)"')
_OPEN: dict[tuple[Any, ...], tuple[Any, float]] = {}  # clients, and until when they are used, by the arguments of _store


def is_object(uri: str) -> bool:
    """Return whether the scheme of a URI is one of object storage."""
    return uri.partition("://")[0] in STORES


def object_store(uri: str) -> tuple[ObjectStore, str] | None:
    """Return the store of a bucket and the path in it; None if the scheme is not one of object storage.

    Raises RecipeError for a URI that carries credentials or names no bucket, and if the environment does not say enough.
    """
    if not is_object(uri):
        return None
    scheme, _, inside = uri.partition("://")
    check_uri(uri)
    import obstore.exceptions

    bucket, _, path = inside.partition("/")
    if not bucket:
        raise RecipeError(f"{uri} names no bucket; expected {scheme}://BUCKET/PATH. Fix it.")
    environment = tuple(sorted(one for one in os.environ.items() if one[0].startswith(PREFIXES)))
    try:
        return _store(STORES[scheme], bucket, environment), path.strip("/")
    except (obstore.exceptions.BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"{uri}: cannot open this storage ({reason}). Check the URI, and the variables in the environment that describe "
            "the storage."
        ) from error


def _store(kind: str, bucket: str, environment: tuple[tuple[str, str], ...]) -> ObjectStore:
    """Open the storage of a bucket as the environment says; one client for all files of it.

    A client without credentials is kept for a time only: a busy machine may not have answered that it has a role.
    """
    import obstore.store

    store: ObjectStore
    store, until = _OPEN.get((kind, bucket, environment), (None, 0.0))
    if time.monotonic() < until:
        return store
    options = store_options(kind, bucket)
    if kind == "S3Store":
        options["copy_if_not_exists"] = "multipart"  # it has no other conditional copy
    store = getattr(obstore.store, kind)(bucket, client_options=CLIENT, retry_config=RETRY, **options)
    kept_s = RENEWED.total_seconds() if "skip_signature" in options else float("inf")
    _OPEN[kind, bucket, environment] = (store, time.monotonic() + kept_s)
    return store


class ObjectFile:
    """A file or folder at a URI of object storage. Its methods raise SoupError if the storage fails.

    Raises RecipeError as `object_store` does, and whenever the bucket does not exist.
    """

    def __init__(self, uri: str) -> None:
        found = object_store(uri)
        assert found is not None
        self.uri, (self._store, self._path) = uri, found

    def stat(self) -> Stat | None:
        """Return size and version of a file; None if there is no such file."""
        with suppress(FileNotFoundError), failures(self.uri):
            return _stat(self._store.head(self._path)) if self._path else None
        return None

    def is_folder(self) -> bool:
        """Return whether this is a folder: the bucket, or the beginning of the path of a file."""
        with failures(self.uri):
            found = _whole(lambda: self._store.list_with_delimiter(self._path or None))
        return not self._path or bool(found["common_prefixes"]) or bool(found["objects"])

    def listed(self, recursive: bool) -> dict[str, Stat | None]:
        """Return what is in this folder by its relative path: files, and None for folders. Empty if it does not exist.

        The empty objects that stand for folders in some tools count as folders.
        """
        with failures(self.uri):
            if recursive:
                objects, folders = _whole(lambda: self._store.list(self._path or None).collect()), set[str]()
            else:
                found = _whole(lambda: self._store.list_with_delimiter(self._path or None))
                objects, folders = found["objects"], set(found["common_prefixes"])
        folders |= {path[:end] for path in (o["path"] for o in objects) for end in _slashes(path)}
        top = len(self._path) + 1 if self._path else 0
        inside = {o["path"]: _stat(o) for o in objects if o["path"] not in folders and len(o["path"]) > top}
        files = {p: s for p, s in inside.items() if s.size or self._store_has(p)}
        names = {**dict.fromkeys(folders), **files}
        return {path[top:]: names[path] for path in sorted(names) if len(path) > top}

    def _store_has(self, path: str) -> bool:
        """Return whether an empty object is a file, and not the sign of a folder."""
        with suppress(FileNotFoundError), failures(self.uri):
            self._store.head(path)
            return True
        return False

    def read(self, offset: int, nbytes: int) -> memoryview:
        """Return `nbytes` bytes at `offset`, or fewer at the end of the file. Raises FileNotFoundError."""
        if nbytes == 0:
            return memoryview(b"")
        with failures(self.uri):
            return memoryview(self._store.get_range(self._path, start=offset, length=nbytes))

    def content(self) -> bytes:
        """Return all bytes of one version. Raises FileNotFoundError."""
        if not self._path:
            raise FileNotFoundError(f"{self.uri} does not exist")
        with failures(self.uri):
            return bytes(self._store.get(self._path).bytes())

    def write(self, content: bytes | Path) -> None:
        """Write an object: these bytes, or a copy of a local file. Raises FileNotFoundError if that does not exist."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        part = max(PART, -(-size // MOST_PARTS))
        with failures(self.uri):
            self._store.put(self._path, content, chunk_size=part, max_concurrency=AT_ONCE)

    def remove(self) -> None:
        """Remove an object if it exists."""
        with suppress(FileNotFoundError), failures(self.uri):
            self._store.delete(self._path)


@contextmanager
def failures(uri: str) -> Iterator[None]:
    """Turn the errors of obstore into SoupError, RecipeError or FileNotFoundError, which name this URI."""
    import obstore.exceptions

    begin = time.monotonic()
    try:
        yield
    except (obstore.exceptions.BaseError, FileNotFoundError, ValueError) as error:
        text = str(error)
        if NO_BUCKET.search(text):
            raise RecipeError(f"{uri}: the bucket does not exist. Create it, or fix the URI.") from error
        if no_path := NO_PATH.search(text):
            raise RecipeError(
                f"{uri}: {no_path[1]!r} cannot be read: it has an empty part, or the part `.` or `..`, between its "
                "slashes. Rename this object, or choose another path."
            ) from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{uri} does not exist") from error
        tries = re.search(r"after (\d+) retries", text)
        waited = f" after {int(tries[1]) + 1} attempts in {time.monotonic() - begin:.0f} s" if tries else ""
        raise storage_failed(uri, _reason(text), waited) from error


def _whole(ask: Callable[[], T]) -> T:
    """Return the answer to a request for a list; ask once more after each of PAUSES_S if its body breaks off."""
    import obstore.exceptions

    for pause in PAUSES_S:
        try:
            return ask()
        except obstore.exceptions.GenericError as error:
            if "response body" not in str(error):
                raise
        time.sleep(pause)
    return ask()


def _slashes(path: str) -> list[int]:
    return [n for n, character in enumerate(path) if character == "/"]


def _stat(found: ObjectMeta) -> Stat:
    """Return size and version of an object; the time in whole seconds, which is all that every request gives."""
    modified: datetime = found["last_modified"]
    return Stat(found["size"], int(modified.timestamp()) * 10**9)


def _reason(text: str) -> str:
    """Return why a request failed: what the storage says, or else what the system says."""
    said, _, details = text.partition("\n\nDebug source")
    status = re.search(r"status code: (\d+ [^:\n]*)", said)
    if status:
        more = re.search(r"<Message>(.*?)</Message>", said, re.DOTALL)
        return f"{status[1]} ({more[1]})" if more else status[1]
    system = [a or b for a, b in re.findall(r'(?:message|error): "([^"]+)"|source: (TimedOut)', details)]
    return system[-1] if system else said.partition("\n")[0].rpartition(" - ")[2]

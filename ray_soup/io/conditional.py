"""Write an object in remote storage only if it is still as this process last saw it.

Object storage decides that itself, in one step: create-only writes, and compare-and-swap on the ETag. Other storage, such as
hdfs://, is read and then written: between the two, another process may write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.objects import MOST_PARTS, failures, object_store

Version = dict[str, str]
"""What identifies the content of an object: `e_tag`, and `version` where the storage has one."""
SMALL = 1 << 26
"""Bytes of the largest object that is replaced through this machine; larger ones are copied within the storage."""
LARGEST = 5 << 30
"""Bytes of the largest object that S3 copies within the storage."""


class Conflict(SoupError):
    """Another process wrote the object, or it is gone."""


@contextmanager
def _answers(uri: str) -> Iterator[None]:
    """Turn the errors of obstore in this context into Conflict, or into those of `objects.failures`."""
    import obstore.exceptions as errors

    with failures(uri):
        try:
            yield
        except (errors.AlreadyExistsError, errors.PreconditionError) as error:
            raise Conflict(f"{uri} was written by another process") from error


def _version_of(found: Any) -> Version:
    return {key: found[key] for key in ("e_tag", "version") if found.get(key) is not None}


def version(target: str) -> Version | None:
    """Return the version of the object at a URI; None if there is none."""
    found = object_store(target)
    try:
        if found is None:
            seen = storage.stat(target)
            return {"e_tag": f"{seen.size} {seen.version}"}
        import obstore

        with _answers(target):
            return _version_of(obstore.head(found[0], found[1]))
    except FileNotFoundError:
        return None


def read(target: str) -> tuple[bytes, Version] | None:
    """Return the content of a small object and its version; None if there is none."""
    found = object_store(target)
    try:
        if found is None:
            seen = version(target)
            return None if seen is None else (storage.read_bytes(target), seen)
        import obstore

        with _answers(target):
            result = obstore.get(found[0], found[1])
            return bytes(result.bytes()), _version_of(result.meta)
    except FileNotFoundError:
        return None


def create(data: bytes, target: str) -> Version:
    """Write a new object at a URI; return its version. Raises Conflict if there is one."""
    return _put(data, target, None)


def swap(data: bytes, target: str, expected: Version) -> Version:
    """Replace the object at a URI; return its new version. Raises Conflict if its version is not the expected one."""
    return _put(data, target, expected)


def _put(data: bytes, target: str, expected: Version | None) -> Version:
    found = object_store(target)
    if found is None:
        if version(target) != expected:
            raise Conflict(f"{target} was written by another process")
        storage.write_bytes(data, target)
        return version(target) or {}
    import obstore

    try:
        with _answers(target):
            mode: Any = "create" if expected is None else expected
            return _version_of(obstore.put(found[0], found[1], data, mode=mode))
    except FileNotFoundError as error:  # it was to be replaced
        raise Conflict(f"{target} was removed by another process") from error


def copy(source: str, target: str, expected: Version | None) -> None:
    """Copy an object within its storage to a URI where it replaces the expected version, or nothing.

    An object of more than SMALL bytes replaces any other one: no storage offers a conditional copy over another object. One
    of more than LARGEST bytes passes through this machine, and replaces any other one too.
    Raises Conflict if the version at the target is not the expected one, FileNotFoundError if there is no source.
    """
    into, found = object_store(target), object_store(source)
    size = storage.stat(source).size
    if expected is not None and size <= SMALL:
        _put(storage.read_bytes(source), target, expected)
        return
    if version(target) != expected:
        raise Conflict(f"{target} was written by another process")
    if into is None or found is None:
        from pyarrow import fs

        (system, inside), (_, goal) = storage.filesystem(source), storage.filesystem(target)
        fs.copy_files(inside, goal, system, system, chunk_size=storage.PART)
        return
    import obstore

    with _answers(target):
        if size > LARGEST:
            writer = obstore.open_writer(into[0], into[1], buffer_size=max(storage.PART, -(-size // MOST_PARTS)))
            for chunk in storage.chunks(source):
                writer.write(chunk)
            writer.close()  # before that, nobody sees the object
            return
        obstore.copy(found[0], found[1], into[1], overwrite=expected is not None)


def same(first: str, second: str) -> bool:
    """Return whether two objects have the same content. Raises FileNotFoundError."""
    if storage.stat(first).size != storage.stat(second).size:
        return False
    pairs = zip(storage.chunks(first), storage.chunks(second), strict=True)
    return all(bytes(one) == bytes(other) for one, other in pairs)

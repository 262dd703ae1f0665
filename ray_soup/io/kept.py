"""Files that a process on any node keeps between two attempts: on a disk, or in remote storage.

What is written at a URI is finished in the cache folder of this node and then uploaded whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.cache import scratch
from ray_soup.io.disk import replacing as replacing_on_disk


@contextmanager
def replacing(target: str) -> Iterator[IO[bytes]]:
    """Replace the file at a path or URI atomically by what is written in this context. Raises SoupError."""
    with written(target) as file, replacing_on_disk(file) as stream:
        yield stream


@contextmanager
def written(target: str) -> Iterator[Path]:
    """Provide a local path to write a file to, atomically, which then is at a path or URI. Raises SoupError."""
    if not storage.is_remote(target):
        yield Path(target)
        return
    with scratch() as folder:
        yield folder / "file"
        storage.upload(folder / "file", target)


@contextmanager
def local(target: str) -> Iterator[Path]:
    """Provide the file at a path or URI as a local file, for as long as the context lasts.

    Errors that name the local file name `target` instead. Raises FileNotFoundError, or SoupError if the storage fails.
    """
    if not storage.is_remote(target):
        yield Path(target)
        return
    with scratch() as folder:
        file = folder / "file"
        storage.download(target, file)
        try:
            yield file
        except SoupError as error:
            raise type(error)(str(error).replace(str(file), target)) from error


def found(stem: str) -> list[str]:
    """Return the files whose paths or URIs begin with `stem`, which has a folder."""
    folder, _, name = stem.rpartition("/")
    return [storage.join(folder, one) for one in storage.listdir(folder) if one.startswith(name)]

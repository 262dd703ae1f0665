"""SHA-256 of files and of ingredients."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ray_soup.io import storage
from ray_soup.io.disk import reading_threads
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.storage import LocalFile, RemoteFile

if TYPE_CHECKING:
    from ray_soup.io.ingredient import Ingredient


class StreamingHash:
    """SHA-256 of a file that is read meanwhile.

    Ranges arrive in the order of the file (`update`), and gaps between them are read from the file; or the hash itself reads
    on from where it is (`advance`).

    `in_order` becomes False once a range arrives too late. The hash is then useless: hash the file separately.
    """

    def __init__(self, source: LocalFile | RemoteFile, size: int) -> None:
        self._sha = hashlib.sha256()
        self._source = source
        self._size = size
        self._position = 0
        self.in_order = True

    def update(self, offset: int, data: memoryview) -> None:
        """Add the bytes `data` at `offset` of the file."""
        if offset < self._position or not self.in_order:
            self.in_order = False
            return
        self._feed(offset)
        self._sha.update(data)
        self._position += data.nbytes

    def advance(self, nbytes: int) -> None:
        """Hash the next `nbytes` bytes of the file, or what is left of it."""
        self._feed(min(self._size, self._position + nbytes))

    def _feed(self, stop: int) -> None:
        while self._position < stop:
            n = min(stop - self._position, 1 << 24)
            self._sha.update(self._source.read(self._position, n))
            self._position += n

    def hexdigest(self) -> str:
        """Read the rest of the file and return the hash, 64 hexadecimal digits."""
        self._feed(self._size)
        return self._sha.hexdigest()


def sha256_file(path: str, count: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file at a path or URI; `count` is called with the number of bytes of each part read."""
    sha = hashlib.sha256()
    for chunk in storage.chunks(path):
        sha.update(chunk)
        if count:
            count(len(chunk))
    return sha.hexdigest()


def combined_sha256(digests: Sequence[str]) -> str:
    """Return the hash of an ingredient: the hash of its only file, or of the list of its files' hashes."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def hash_ingredients(ingredients: Sequence[Ingredient], progress: ProgressCallback = no_progress) -> list[str]:
    """Return the SHA-256 of each ingredient. Reads all files; progress is in bytes.

    Raises IngredientError if a file has changed since its ingredient was opened.
    """
    total = sum(i.nbytes for i in ingredients)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("hashing", min(done, total), total)

    with ThreadPoolExecutor(reading_threads()) as pool:
        digests = list(pool.map(lambda i: combined_sha256([sha256_file(f, count) for f in i.files]), ingredients))
    for ingredient in ingredients:
        ingredient.check_unchanged()
    return digests

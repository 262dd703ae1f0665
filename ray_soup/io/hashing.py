"""SHA-256 of files and of ingredients, remembered as long as a file does not change.

SHA-256 rather than a faster hash, because others know a checkpoint by it: the Hub shows it for every large file and sends it
as the ETag, lists of downloads have it, `sha256sum` computes it, and older soups name their ingredients by it. So that it
costs little, it is computed once for each version of a file, if possible while the file is read for another purpose.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.cache import cache_folder, content_key
from ray_soup.io.disk import reading_threads, write_text
from ray_soup.io.mapped import Version, version_of
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.storage import LocalFile, RemoteFile

if TYPE_CHECKING:
    from ray_soup.io.ingredient import Ingredient


class PassingHash:
    """SHA-256 of the files of an ingredient, computed piece by piece while others read them, and then remembered.

    One thread at a time may call it.
    """

    def __init__(self, ingredient: Ingredient, key: str) -> None:
        """Open the files; `key` is that of `digest_key`."""
        self._ingredient, self._key = ingredient, key
        self._hashes = [StreamingHash(ingredient.raw(number), size) for number, size in enumerate(ingredient.sizes)]

    def advance(self, nbytes: int) -> None:
        """Hash the next `nbytes` bytes, or what is left of them."""
        for one in self._hashes:
            nbytes -= one.advance(nbytes)

    def finish(self) -> None:
        """Hash what is left of the files."""
        self._digest = combined_sha256([one.hexdigest() for one in self._hashes])

    def remember(self) -> None:
        """Remember the digest after `finish`. Raises IngredientError if a file has changed."""
        self._ingredient.check_unchanged()
        remember_digest(self._key, self._digest)


def passing_hashes(ingredients: Sequence[Ingredient]) -> list[PassingHash]:
    """Return a hash for each ingredient whose digest is not remembered but can be."""
    keys = [(ingredient, digest_key(ingredient)) for ingredient in ingredients]
    return [PassingHash(ingredient, key) for ingredient, key in keys if key is not None and known_digest(key) is None]


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

    def advance(self, nbytes: int) -> int:
        """Hash the next `nbytes` bytes of the file, or what is left of it; return how many these are."""
        begin = self._position
        self._feed(min(self._size, begin + nbytes))
        return self._position - begin

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


_written: dict[Version, str] = {}
"""Digests of files that this process has written and not yet asked for, by version."""


def remember_written(path: Path, digest: str) -> None:
    """Remember the SHA-256 of what this process has written to a file, until `forget_written`."""
    _written[version_of(str(path))] = digest


def forget_written(path: Path) -> str | None:
    """Forget and return the SHA-256 of what this process has written to a file; None if it is unknown or has changed."""
    return _written.pop(version_of(str(path)), None)


def sha256_written(path: Path) -> str:
    """Return the SHA-256 of a file that is finished; it is read unless `remember_written` knows what was written."""
    return forget_written(path) or sha256_file(str(path))


def combined_sha256(digests: Sequence[str]) -> str:
    """Return the hash of an ingredient: the hash of its only file, or of the list of its files' hashes."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def hash_ingredients(
    ingredients: Sequence[Ingredient], progress: ProgressCallback = no_progress, reread: bool = False
) -> list[str]:
    """Return the SHA-256 of each ingredient, remembered or computed; progress is in bytes.

    Args:
        ingredients: the ingredients.
        progress: called with "hashing", the bytes hashed so far and in total, if any are read.
        reread: read all files, whatever is remembered.

    Raises IngredientError if a file has changed since its ingredient was opened.
    """
    keys = [digest_key(ingredient) for ingredient in ingredients]
    found = [None if reread else known_digest(key) for key in keys]
    unknown = [ingredient for ingredient, digest in zip(ingredients, found, strict=True) if digest is None]
    total = sum(i.nbytes for i in unknown)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("hashing", min(done, total), total)

    with ThreadPoolExecutor(reading_threads()) as pool:
        digests = list(pool.map(lambda i: combined_sha256([sha256_file(f, count) for f in i.files]), unknown))
    for ingredient in ingredients:
        ingredient.check_unchanged()
    computed, all_digests = iter(digests), list[str]()
    for key, digest in zip(keys, found, strict=True):
        if digest is None:
            digest = next(computed)
            remember_digest(key, digest)
        all_digests.append(digest)
    return all_digests


# Digests that are remembered

SETTLED_S = 10
"""Seconds from the last change of a file until its digest may be remembered: another change within the same tick of the
clock would not show in the file's times."""


def digest_key(ingredient: Ingredient) -> str | None:
    """Return the key to remember the digest of an ingredient by, from path and version of its files.

    None: it is not remembered, because a file changed a moment ago or is in remote storage. To be taken before the files are
    read. Raises IngredientError if a file has changed since the ingredient was opened.
    """
    if any(storage.is_remote(file) for file in ingredient.files):
        return None
    ingredient.check_unchanged()
    versions = [(file, version_of(file)) for file in ingredient.files]
    if max(version.changed for _, version in versions) > time.time_ns() - SETTLED_S * 10**9:
        return None
    return content_key("sha256", [[file, *version] for file, version in versions])


def known_digest(key: str | None) -> str | None:
    """Return the SHA-256 that is remembered under a key of `digest_key`, or None."""
    if key is not None:
        with suppress(OSError, ValueError):
            found = _remembered(key).read_text(encoding="utf-8")
            if re.fullmatch("[0-9a-f]{64}", found):
                return found
    return None


def remember_digest(key: str | None, digest: str) -> None:
    """Remember the digest of an ingredient under a key of `digest_key`, unless the cache cannot be written."""
    if key is not None:
        with suppress(OSError, SoupError):
            _remembered(key).parent.mkdir(parents=True, exist_ok=True)
            write_text(_remembered(key), digest)


def _remembered(key: str) -> Path:
    return cache_folder() / "sha256" / key

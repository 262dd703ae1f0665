"""Build a direction store in one read of every ingredient.

All ingredients are read range by range, so that memory does not grow with their number. Files are hashed during the same
read, and a range is written while the next one is read.

Shapes: K ingredients, N parameters, n elements of a range, C chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_finite, common_dtype
from ray_soup.io.disk import write_at
from ray_soup.io.hashing import StreamingHash, combined_sha256, digest_key, remember_digest, sha256_file
from ray_soup.io.ingredient import Ingredient, check_unchanged, drop_pages
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import Layout
from ray_soup.mixing.shard_files import bytes_of
from ray_soup.mixing.store_format import CENTER_FILE, CHUNK, DTYPES, ROWS_FILE, StoreRecord, first_chunks, items, places_of

RANGE_BYTES = 1 << 28  # processed at a time, over all ingredients
DROP_BYTES = 1 << 30  # read between two releases of memory pages


def build_store(
    folder: Path, ingredients: Sequence[Ingredient], layout: Layout, dtype: str, threads: int
) -> Iterator[tuple[int, int]]:
    """Build the store of these ingredients in an empty folder, on `threads` threads.

    Yields (bytes done, bytes in total). Raises IngredientError for values that are not finite, and for files that
    changed meanwhile.
    """
    count = len(ingredients)
    chunks, places = first_chunks(layout), places_of(layout, dtype)
    scales = np.zeros((count, chunks[-1]), np.float32)
    squares = np.zeros((count + 1, len(layout.names)), np.float64)
    readers = [_HashingReader(ingredient) for ingredient in ingredients]
    total = sum(i.nbytes for i in ingredients)
    done = dropped = 0
    with (
        open(folder / CENTER_FILE, "wb") as center_file,
        open(folder / ROWS_FILE, "wb") as rows_file,
        ThreadPoolExecutor(threads) as pool,
        _StoreWriter(center_file, rows_file, dtype, count, layout.numel, int(places[-1])) as writer,
    ):
        for tensor, start, stop in _ranges(ingredients, layout):
            name = layout.names[tensor]
            dtype_read = torch.float64 if common_dtype(ingredients, name) == "float64" else torch.float32
            read = pool.map(_HashingReader.read, readers, repeat(name), repeat(start), repeat(stop))
            parts = [part.to(dtype_read) for part in read]
            center = np.empty(stop - start, np.float32)
            rows = np.empty((count, items(dtype, 0, stop - start).stop), DTYPES[dtype])
            first_chunk = int(chunks[tensor]) + start // CHUNK
            if not _compress(parts, dtype, center, rows, scales[:, first_chunk:], squares[:, tensor], pool, threads):
                check_finite(ingredients, name, start, [part.numpy() for part in parts])
                raise IngredientError(
                    f"The mean of the tensor {name} is not finite: its values are too large. Exclude the ingredients "
                    "that diverged."
                )
            writer.write(center, rows, int(layout.offsets[tensor]) + start, int(places[tensor]) + start)
            done += sum(p.numel() * i.tensors[name].itemsize for p, i in zip(parts, ingredients, strict=True))
            if done - dropped > DROP_BYTES:
                dropped = done
                drop_pages(ingredients)
                for reader in readers:
                    reader.drop_pages()
            yield done, total
        digests = tuple(pool.map(_HashingReader.digest, readers))
        writer.finish()
    for ingredient in ingredients:
        ingredient.check_copies()
    check_unchanged(ingredients)
    for reader, digest in zip(readers, digests, strict=True):
        reader.remember(digest)
    for ingredient in ingredients:
        ingredient.close()
    tolerance = np.array([_rounding(ingredients, name) for name in layout.names])
    variant = (squares[:-1] > tolerance**2 * squares[-1]).any(axis=0)
    StoreRecord(scales, squares[:-1], variant, digests).save(folder)
    yield total, total


def _ranges(ingredients: Sequence[Ingredient], layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Yield (tensor, start, stop) of each range, in the order of the first ingredient's files."""
    elements = max(CHUNK, RANGE_BYTES // (4 * len(ingredients)) // CHUNK * CHUNK)

    def place(tensor: int) -> tuple[int, int]:
        info = ingredients[0].tensors[layout.names[tensor]]
        return info.file, info.place

    for tensor in sorted(range(len(layout.names)), key=place):
        size = int(layout.sizes[tensor])
        for start in range(0, size, elements):
            yield tensor, start, min(start + elements, size)


def _compress(
    parts: list[torch.Tensor],
    dtype: str,
    center: NDArray[np.float32],
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    squares: NDArray[np.float64],
    pool: ThreadPoolExecutor,
    threads: int,
) -> bool:
    """Compute the center and the directions of a range; return False if the mean is not finite.

    Args:
        parts: K tensors float32 or float64 [n], the range of each ingredient.
        dtype: of the directions, by its name.
        center: float32 [n], overwritten.
        rows: float32, uint16 or int8 [K, n], or uint8 [K, bytes] (int4), overwritten.
        scales: float32 [K, chunks from this range on], overwritten for the chunks of the range.
        squares: float64 [K + 1], incremented by the sums of squares of the directions and, last, of the center.
        pool: threads that do the work.
        threads: number of parts that the range is cut into.
    """
    from ray_soup.mixing.kernels_build import (
        center_and_directions,  # numba is slow to import, and few processes build a store
    )

    arrays = [part.numpy() for part in parts]

    def work(low: int, high: int) -> tuple[bool, NDArray[np.float64]]:
        span = slice(low // CHUNK, (high + CHUNK - 1) // CHUNK)
        square = np.zeros(len(parts) + 1)
        finite = center_and_directions(
            [array[low:high] for array in arrays],
            CHUNK,
            center[low:high],
            rows[:, items(dtype, low, high)],
            scales[:, span],
            square,
        )
        return finite, square

    cuts = _cuts(len(center), threads)
    for finite, square in pool.map(work, cuts[:-1], cuts[1:]):
        if not finite:
            return False
        squares += square
    return True


def _cuts(size: int, threads: int) -> list[int]:
    """Return boundaries that cut `size` elements into one part per thread, at multiples of a chunk."""
    step = max(1, -(-size // CHUNK // threads)) * CHUNK
    return [*range(0, size, step), size]


class _HashingReader:
    """Reads an ingredient, and hashes its files on the way."""

    def __init__(self, ingredient: Ingredient) -> None:
        self._ingredient = ingredient
        self._key = digest_key(ingredient)
        self._files = [ingredient.raw(f) for f in range(len(ingredient.files))]
        self._hashes = [StreamingHash(file, size) for file, size in zip(self._files, ingredient.sizes, strict=True)]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read elements start to stop of the tensor `name`, in its own dtype [stop - start]."""
        info = self._ingredient.tensors[name]
        part = self._ingredient.read(name, start, stop)
        if info.offset is None:  # hash as many bytes of the file as were read, nearby
            self._hashes[info.file].advance(part.nbytes)
        else:  # hash what was read, while it is in the processor's cache
            self._hashes[info.file].update(info.offset + start * info.itemsize, bytes_of(part).data)
        return part

    def drop_pages(self) -> None:
        """Release the memory pages hashed so far from this process."""
        for file in self._files:
            file.drop_pages()

    def digest(self) -> str:
        """Return the SHA-256 of the ingredient. A file that was not read in order is read again."""
        pairs = zip(self._hashes, self._ingredient.files, strict=True)
        return combined_sha256([h.hexdigest() if h.in_order else sha256_file(file) for h, file in pairs])

    def remember(self, digest: str) -> None:
        """Remember the digest, once it is clear that the files have not changed meanwhile."""
        remember_digest(self._key, digest)


class _StoreWriter:
    """Writes center and rows, one range at a time, while the next range is read.

    One thread writes: concurrent writers of a file would wait for each other.
    """

    def __init__(
        self, center_file: IO[bytes], rows_file: IO[bytes], dtype: str, count: int, numel: int, places: int
    ) -> None:
        self._center_file, self._rows_file, self._dtype = center_file, rows_file, dtype
        self._row_bytes = self._bytes_before(places)
        center_file.truncate(numel * 4)
        rows_file.truncate(count * self._row_bytes)  # sparse: what is never written takes no space
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def _bytes_before(self, place: int) -> int:
        return int(items(self._dtype, 0, place).stop) * np.dtype(DTYPES[self._dtype]).itemsize

    def write(self, center: NDArray[np.float32], rows: NDArray[Any], position: int, place: int) -> None:
        """Start writing a range at parameter `position`, once the previous range has been written.

        Args:
            center: float32 [n].
            rows: float32, uint16 or int8 [K, n], or uint8 [K, bytes] (int4).
            position: first parameter of the range.
            place: its place in a row.
        """
        self.finish()
        self._pending = self._pool.submit(self._write, center, rows, position, place)

    def finish(self) -> None:
        """Wait for the last write. Raises OSError if it failed."""
        if self._pending is not None:
            self._pending.result()

    def _write(self, center: NDArray[np.float32], rows: NDArray[Any], position: int, place: int) -> None:
        write_at(self._center_file, center, position * 4)
        for k, row in enumerate(rows):
            if row.any():
                write_at(self._rows_file, row, k * self._row_bytes + self._bytes_before(place))


def _rounding(ingredients: Sequence[Ingredient], name: str) -> float:
    """Return the relative difference up to which a tensor counts as equal in all ingredients.

    This is the rounding of the float64 mean if all have one dtype, and the rounding of the coarsest dtype if they do not.
    """
    dtypes = {i.tensors[name].dtype for i in ingredients}
    coarsest = max(torch.finfo(d).eps for d in dtypes)
    return coarsest if len(dtypes) > 1 else 8 * torch.finfo(torch.float64).eps

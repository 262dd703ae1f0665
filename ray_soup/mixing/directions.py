"""Center and compressed directions of a set of ingredients, memory-mapped.

    center        theta_bar = mean of all ingredients
    direction     d_k = theta_k - theta_bar,  stored as float32, bfloat16, int8 with a scale per ingredient and chunk, or
                                              int4 with a scale per ingredient and 64 elements

A store is cut into chunks within each tensor and records the norms of whole tensors, so that one store serves every
partition into blocks. It is an entry of the node's cache, with a key made of the ingredients' paths, sizes and times of
modification and change.

Shapes: K ingredients, N parameters, T parameter tensors, B blocks, P pieces.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.cache import InUse, cached, content_key, lookup
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.build_store import build_store
from ray_soup.mixing.store_format import (
    CENTER_FILE,
    CHUNK,
    DTYPES,
    FORMAT,
    ITEMSIZE,
    ROWS_FILE,
    StoreRecord,
    first_chunks,
    items,
    places_of,
)

ROUNDING = 8 * float(np.finfo(np.float64).eps)
"""Relative difference up to which a group of rows counts as equal in all ingredients, as for a tensor of one dtype."""

__all__ = ["CHUNK", "DTYPES", "DirectionStore", "has_store", "open_store"]


@dataclass(frozen=True)
class DirectionStore:
    """An open store. Its large arrays are memory-mapped: nothing is read before it is used."""

    hold: InUse | None
    """Keeps the entry in the cache; None for a store in memory."""
    layout: Layout
    """Layout of the parameter vector."""
    dtype: str
    """float32, bfloat16, int8 or int4."""
    center: NDArray[np.float32]
    """float32 [N], the mean of all ingredients."""
    rows: NDArray[Any]
    """float32, uint16 (bits of bfloat16) or int8 [K, N], or uint8 [K, bytes] (int4), the compressed directions."""
    record: StoreRecord
    """Scales, norms and digests."""

    @property
    def scales(self) -> NDArray[np.float32]:
        """Factor of each direction's elements in each chunk, float32 [K, chunks]."""
        return self.record.scales

    @property
    def squares(self) -> NDArray[np.float64]:
        """Squared norms of the uncompressed directions, float64 [K, T]."""
        return self.record.squares

    @property
    def variant(self) -> NDArray[np.bool_]:
        """Whether a tensor differs between ingredients, bool [T]."""
        return self.record.variant

    @property
    def sha256(self) -> tuple[str, ...]:
        """SHA-256 of each ingredient, K hexadecimal digests."""
        return self.record.sha256

    @property
    def row_bytes(self) -> int:
        """Bytes of one direction, without the invariant tensors."""
        return math.ceil(int(self.layout.sizes[self.variant].sum()) * ITEMSIZE[self.dtype])

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Place of each tensor in a row, in elements, and the end of the last one, int64 [T + 1]."""
        return places_of(self.layout, self.dtype)

    def blocks(self, partition: Partition) -> tuple[Partition, NDArray[np.float64]]:
        """Remove the invariant blocks from a partition.

        Returns:
            The partition without them (their tensors get block -1), and the norms of the directions, float64 [K, B]. The
            norm of a group of rows that is invariant, in a tensor that is not, is 0.
        """
        chosen = [b for t in np.flatnonzero(self.variant) for _, _, b in partition.groups(int(t), int(self.layout.sizes[t]))]
        kept = np.unique(np.array(chosen, dtype=np.int64))
        number = np.full(partition.count, -1, dtype=np.int64)
        number[kept] = np.arange(len(kept))
        names = tuple(partition.names[b] for b in kept)
        cuts = {t: found for t, found in partition.cuts.items() if self.variant[t]}
        parts = Partition(names, number[partition.block], cuts)
        if partition.cuts:
            return parts, np.sqrt(self._squares_of_groups(parts))
        squares = partition.sum_tensors(np.where(self.variant, self.squares, 0.0))[:, kept]
        return parts, np.sqrt(squares)

    def _squares_of_groups(self, parts: Partition) -> NDArray[np.float64]:
        """Return the squared norms of the directions, float64 [K, B], where each block is a tensor or a group of its rows.

        Those of groups are summed from the compressed directions, in one pass. They are 0 where no ingredient differs from
        the center by more than the rounding of a mean in float64: such a group keeps the mean.
        """
        from ray_soup.mixing.kernels import add_squares

        squares = np.zeros((len(self.scales), parts.count))
        whole = [t for t, block in enumerate(parts.block) if block >= 0 and t not in parts.cuts]
        squares[:, parts.block[whole]] = self.squares[:, whole]
        pieces = self.pieces(parts, 0, self.layout.numel)
        first = np.searchsorted(pieces[:, 0], self.layout.offsets)
        for t in parts.cuts:
            add_squares(self.rows, self.scales, pieces[first[t] : first[t + 1]], squares)
            self.release()
            offset = self.layout.offsets[t]
            for start, stop, block in parts.groups(t, int(self.layout.sizes[t])):
                center = self.center[offset + start : offset + stop].astype(np.float64)
                if (squares[:, block] <= ROUNDING**2 * (center @ center)).all():
                    squares[:, block] = 0
        return squares

    def release(self) -> None:
        """Release the memory pages of directions read so far; they stay in the system's page cache."""
        if isinstance(self.rows, np.memmap):
            self.rows._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined] # numpy offers no other way

    def pieces(self, partition: Partition, low: int, high: int) -> NDArray[np.int64]:
        """List the pieces of parameters low to high that have directions, each within one block and one chunk.

        Args:
            partition: a partition without invariant blocks.
            low: first parameter of the slice.
            high: end of the slice (excluded).

        Returns:
            int64 [P, 5] of (start, stop, block, chunk, place), start and stop in the parameter vector, place in a row.
        """
        pieces = []
        for t, (start, stop, first) in enumerate(
            zip(self.layout.offsets, self.layout.offsets[1:], first_chunks(self.layout), strict=False)
        ):
            if not self.variant[t] or partition.block[t] < 0:
                continue
            for begin, end, block in partition.groups(t, int(stop - start)):
                for c in range(begin // CHUNK, (end + CHUNK - 1) // CHUNK):
                    s = max(start + max(c * CHUNK, begin), low)
                    e = min(start + min((c + 1) * CHUNK, end), high)
                    if s < e:
                        pieces.append((s, e, block, first + c, self.places[t] + s - start))
        return np.array(pieces, dtype=np.int64).reshape(-1, 5)


def open_store(
    ingredients: Sequence[Ingredient], layout: Layout, dtype: str, threads: int = 1
) -> Generator[tuple[int, int], None, DirectionStore]:
    """Open the store of these ingredients; build it first if this node's cache has none.

    Yields (bytes done, bytes in total) while the store is built; the value of the generator is the DirectionStore.

    Args:
        ingredients: all ingredients, bound to the model.
        layout: layout of the parameter vector.
        dtype: float32, bfloat16, int8 or int4.
        threads: number of threads that read and compress.

    Raises IngredientError for values that are not finite, SoupError if the disk is too small.
    """
    key = _key(ingredients, layout, dtype)
    count = len(ingredients)
    end = items(dtype, 0, int(places_of(layout, dtype)[-1])).stop
    nbytes = layout.numel * 4 + count * end * np.dtype(DTYPES[dtype]).itemsize
    hold = yield from cached(
        "directions", key, nbytes, lambda folder: build_store(folder, ingredients, layout, dtype, threads)
    )
    return DirectionStore(
        hold,
        layout,
        dtype,
        np.memmap(hold.path / CENTER_FILE, np.float32, "r", shape=(layout.numel,)),
        np.memmap(hold.path / ROWS_FILE, DTYPES[dtype], "r", shape=(count, end)),
        StoreRecord.load(hold.path),
    )


def has_store(ingredients: Sequence[Ingredient], layout: Layout, dtype: str) -> bool:
    """Return whether this node's cache has the store of these ingredients."""
    hold = lookup("directions", _key(ingredients, layout, dtype))
    if hold is None:
        return False
    hold.close()
    return True


def _key(ingredients: Sequence[Ingredient], layout: Layout, dtype: str) -> str:
    return content_key(FORMAT, CHUNK, dtype, [i.identity_here() for i in ingredients], layout.names, layout.shapes)

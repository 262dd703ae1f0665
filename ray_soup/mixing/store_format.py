"""Format of a direction store on disk: its chunks, dtypes and files.

A row, one direction, holds the elements of the parameter vector one after another. In int4 they are packed in groups of 128:

    bytes 0 to 3   two scales in bfloat16, of elements 0 to 63 and of elements 64 to 127
    byte 4 + i     element i in the low four bits, element 64 + i in the high ones, as integers from -8 to 7

The scale of 64 elements maps the one of largest magnitude to -8, and so may be negative. On three zoos, directions were off
by 8.5 to 9.8 % of their norm; with a scale per 128 elements by 9.2 to 10.8 %, with integers from -7 to 7 by 9.6 to 11.1 %.

Each tensor begins with a new group. A place in a row counts the zeros that fill up the last groups of tensors, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.blocks import Layout

FORMAT = 1
CHUNK = 16384  # elements that share a scale; adds 0.02 % to int8
GROUP = 128  # elements of an int4 direction that are packed together; each half of them has a scale
GROUP_BYTES = 4 + GROUP // 2
DTYPES: dict[str, type[np.float32] | type[np.uint16] | type[np.int8] | type[np.uint8]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,  # its bits
    "int8": np.int8,
    "int4": np.uint8,  # bytes of groups
}
"""NumPy dtype of a stored direction, by the name that the recipe gives it."""
ITEMSIZE: dict[str, float] = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()} | {
    "int4": GROUP_BYTES / GROUP
}
"""Bytes of one element of a direction, by dtype name."""

CENTER_FILE, ROWS_FILE = "center.bin", "rows.bin"
ARRAYS_FILE, DIGESTS_FILE = "arrays.npz", "sha256.json"


@dataclass(frozen=True)
class StoreRecord:
    """The small files of a store: scales, norms and digests."""

    scales: NDArray[np.float32]
    """float32 [K, chunks], the factor of each direction's elements in each chunk."""
    squares: NDArray[np.float64]
    """float64 [K, tensors], squared norms of the uncompressed directions."""
    variant: NDArray[np.bool_]
    """bool [tensors]: False where all ingredients hold the same values, up to the rounding of their dtype."""
    sha256: tuple[str, ...]
    """SHA-256 of each ingredient, K hexadecimal digests."""

    def save(self, folder: Path) -> None:
        """Write the record into the folder of a store."""
        np.savez(folder / ARRAYS_FILE, scales=self.scales, squares=self.squares, variant=self.variant)
        (folder / DIGESTS_FILE).write_text(json.dumps(self.sha256), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> StoreRecord:
        """Read the record from the folder of a store."""
        arrays = np.load(folder / ARRAYS_FILE)
        digests: list[str] = json.loads((folder / DIGESTS_FILE).read_text(encoding="utf-8"))
        return cls(arrays["scales"], arrays["squares"], arrays["variant"], tuple(digests))


def first_chunks(layout: Layout) -> NDArray[np.int64]:
    """Return the index of each tensor's first chunk, and the number of all chunks: int64 [tensors + 1]."""
    return np.concatenate([[0], np.cumsum((layout.sizes + CHUNK - 1) // CHUNK)]).astype(np.int64)


def places_of(layout: Layout, dtype: str) -> NDArray[np.int64]:
    """Return the place of each tensor in a row, and the end of the last one, in elements: int64 [tensors + 1]."""
    if dtype != "int4":
        return layout.offsets
    return np.concatenate([[0], np.cumsum((layout.sizes + GROUP - 1) // GROUP * GROUP)]).astype(np.int64)


def items(dtype: str, start: int, stop: int) -> slice:
    """Return the items of a row's array that hold places start to stop; in int4 those of whole groups."""
    if dtype != "int4":
        return slice(start, stop)
    return slice(start // GROUP * GROUP_BYTES, (stop + GROUP - 1) // GROUP * GROUP_BYTES)

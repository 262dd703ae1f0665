"""Format of a direction store on disk: its chunks, dtypes and files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.blocks import Layout

FORMAT = 1
CHUNK = 16384  # elements that share a scale; adds 0.02 % to int8
DTYPES: dict[str, type[np.float32] | type[np.uint16] | type[np.int8]] = {
    "float32": np.float32,
    "bfloat16": np.uint16,  # its bits
    "int8": np.int8,
}
"""NumPy dtype of a stored direction, by the name that the recipe gives it."""

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

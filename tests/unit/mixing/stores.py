"""Direction stores of ingredients on disk, and their exact counterparts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ray_soup.io.check import check_together
from ray_soup.io.find import find_checkpoints, open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import drain
from ray_soup.mixing.blocks import Layout, partition
from ray_soup.mixing.directions import DirectionStore, open_store


def bound(pattern: str, layout: Layout) -> list[Ingredient]:
    """The ingredients that the pattern names, bound to a layout."""
    return check_together(open_ingredients(pattern), layout.state_shapes, layout.tied)


def make_store(pattern: str, layout: Layout, dtype: str = "float32", threads: int = 2) -> DirectionStore:
    """The opened store of the ingredients that the pattern names."""
    return drain(open_store(bound(pattern, layout), layout, dtype, threads))


def dense(folder: Path, layout: Layout) -> np.ndarray:
    """All parameter vectors, float64 [K, N]."""
    files = find_checkpoints(str(folder))
    return np.stack([torch.cat([load_file(f)[n].flatten().double() for n in layout.names]).numpy() for f in files])


def stored_directions(store: DirectionStore) -> np.ndarray:
    """The stored directions, decompressed: float64 [K, N]."""
    if store.dtype == "int4":
        rows = np.stack([int4_elements(row) for row in store.rows])
    else:
        stored = torch.from_numpy(np.array(store.rows))
        rows = (stored.view(torch.bfloat16) if store.dtype == "bfloat16" else stored).double().numpy()
    wide = np.zeros((len(rows), store.layout.numel))
    parts = partition(store.layout, "tensor")
    for start, stop, _, chunk, place in store.pieces(store.blocks(parts)[0], 0, store.layout.numel):
        wide[:, start:stop] = rows[:, place : place + stop - start] * store.scales[:, [chunk]]
    return wide


def int4_elements(row: np.ndarray) -> np.ndarray:
    """The elements of a packed row, uint8 [bytes], as store_format describes it: float64 [elements]."""
    groups = np.array(row).reshape(-1, 68)
    scales = (groups[:, :4].copy().view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    codes = np.stack([groups[:, 4:] & 15, groups[:, 4:] >> 4], axis=1).astype(np.int64)
    codes[codes > 7] -= 16
    return (scales[:, :, None] * codes).reshape(-1)

"""Direction stores and their slices: of whole models, or of lifted adapters."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import group_of
from ray_soup.mixing import directions
from ray_soup.mixing.adapter_plane import AdapterPlane
from ray_soup.mixing.adapter_store import AdapterStore, has_adapters, open_adapters
from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.hyperplane import Hyperplane, decompressed
from ray_soup.mixing.store_format import ITEMSIZE

Plane = Hyperplane | AdapterPlane

MOST_READ = 8_000_000
"""Bytes of directions that are read before their memory is released."""


def open_store(
    ingredients: Sequence[Ingredient], layout: Layout, dtype: str, threads: int = 1
) -> Generator[tuple[int, int], None, DirectionStore]:
    """Open the store of these ingredients, as `directions.open_store` does; adapters ignore `dtype` and `threads`."""
    if group_of(ingredients) is None:
        return (yield from directions.open_store(ingredients, layout, dtype, threads))
    return (yield from open_adapters(ingredients, layout))


def has_store(ingredients: Sequence[Ingredient], layout: Layout, dtype: str) -> bool:
    """Return whether this node's cache has the store of these ingredients."""
    if group_of(ingredients) is None:
        return directions.has_store(ingredients, layout, dtype)
    return has_adapters(ingredients, layout)


def plane_on(store: DirectionStore, partition: Partition, low: int, high: int, device: torch.device, threads: int) -> Plane:
    """Prepare parameters low to high of a store for combine and project, with arguments as for Hyperplane."""
    if isinstance(store, AdapterStore):
        return AdapterPlane(store, partition, low, high, device)
    return Hyperplane(store, partition, low, high, device, threads)


def gram(plane: Plane, part: tuple[int, int]) -> NDArray[np.float64]:
    """Sum the inner products of the directions over a part of a slice, float64 [K, K].

    Args:
        plane: the slice.
        part: (index, parts), which selects every `parts`-th piece of the slice, from piece `index` on.
    """
    if isinstance(plane, AdapterPlane):
        return plane.gram(part)
    total = np.zeros((len(plane.store.rows),) * 2)
    for _, rows in _pieces(plane, part):
        total += (rows @ rows.T).double().numpy()
    return total


def gram_of_blocks(plane: Plane, part: tuple[int, int]) -> NDArray[np.float64]:
    """Sum the inner products of the directions in each block over a part of a slice, float64 [B, K, K].

    Arguments as for `gram`.
    """
    if isinstance(plane, AdapterPlane):
        return plane.gram_of_blocks(part)
    total = np.zeros((plane.blocks, *(len(plane.store.rows),) * 2))
    for block, rows in _pieces(plane, part):
        total[block] += (rows @ rows.T).double().numpy()
    return total


def _pieces(plane: Hyperplane, part: tuple[int, int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the block and all directions, float32 [K, n], of each piece in a part of a slice, and release what was read."""
    read = 0.0
    for piece in plane.pieces[part[0] :: part[1]]:
        rows = decompressed(plane.store, piece)
        yield int(piece[2]), rows
        read += rows.numel() * ITEMSIZE[plane.store.dtype]
        if read > MOST_READ:
            plane.store.release()
            read = 0.0
    plane.store.release()

"""GPU kernels for combine and project, in Triton; each passes over the compressed rows once.

A tile is a run of elements of one block and one chunk. Rows are decompressed in registers. The sums of the tiles of a block
are added up in float64 in a fixed order, so that results are bit-identical on the same GPU.

Shapes: m ingredients of the model batch, B blocks, C chunks, n elements of a slice, T tiles, P pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

TILE = 1024  # elements


class Kernel(Protocol):
    """A Triton kernel: indexing it with a grid returns the function that launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return the launcher for a grid of program instances."""


def jit(function: Callable[..., None]) -> Kernel:
    """Compile a kernel with Triton when it is first launched."""
    return cast(Kernel, triton.jit(function))


@dataclass(frozen=True)
class Tiles:
    """A slice of the parameter vector cut into T tiles, on the device."""

    starts: torch.Tensor
    """int64 [T], first element of each tile, counted from the start of the slice."""
    counts: torch.Tensor
    """int32 [T], number of elements of each tile, at most TILE."""
    blocks: torch.Tensor
    """int32 [T], block of each tile."""
    chunks: torch.Tensor
    """int32 [T], chunk of each tile."""
    of_block: torch.Tensor
    """int64 [B], number of tiles of each block; those of a block are consecutive."""


def cut(pieces: NDArray[np.int64], low: int, blocks: int, device: torch.device) -> Tiles:
    """Cut pieces into tiles, in the order of blocks.

    Args:
        pieces: int64 [P, 4] of (start, stop, block, chunk), start and stop in the parameter vector.
        low: first parameter of the slice.
        blocks: B, the number of blocks.
        device: where the tiles are stored.
    """
    pieces = pieces[np.argsort(pieces[:, 2], kind="stable")]
    tiles_of = (pieces[:, 1] - pieces[:, 0] + TILE - 1) // TILE
    piece = np.repeat(np.arange(len(pieces)), tiles_of)
    within = np.arange(len(piece)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    starts = pieces[piece, 0] + within * TILE
    counts = np.minimum(TILE, pieces[piece, 1] - starts)
    of_block = np.bincount(pieces[piece, 2], minlength=blocks)

    def sent(values: NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(device, dtype)

    return Tiles(
        sent(starts - low, torch.int64),
        sent(counts, torch.int32),
        sent(pieces[piece, 2], torch.int32),
        sent(pieces[piece, 3], torch.int32),
        sent(of_block, torch.int64),
    )


# The parameters of kernels are annotated with tl.tensor, pointers and integers alike: Triton looks annotations up, and would
# compile for a narrower type if they named one.


@jit
def _combine(
    out: tl.tensor,
    base: tl.tensor,
    rows: tl.tensor,
    x: tl.tensor,
    scales: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    blocks: tl.tensor,
    chunks: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    x_stride: tl.tensor,
    scale_stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    at = tl.load(starts + tile) + lane
    inside = lane < tl.load(counts + tile)
    block, chunk = tl.load(blocks + tile), tl.load(chunks + tile)
    total = tl.load(base + at, mask=inside, other=0.0)
    for j in range(m):
        factor = tl.load(x + j * x_stride + block) * tl.load(scales + j * scale_stride + chunk)
        row = tl.load(rows + tl.cast(j, tl.int64) * stride + at, mask=inside, other=0.0).to(tl.float32)
        total += factor * row
    tl.store(out + at, total, mask=inside)


@jit
def _project(
    sums: tl.tensor,
    gradient: tl.tensor,
    rows: tl.tensor,
    scales: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    chunks: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    scale_stride: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    lane = tl.arange(0, TILE)
    at = tl.load(starts + tile) + lane
    inside = lane < tl.load(counts + tile)
    chunk = tl.load(chunks + tile)
    g = tl.load(gradient + at, mask=inside, other=0.0)
    for j in range(m):
        row = tl.load(rows + tl.cast(j, tl.int64) * stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + tile * m + j, tl.sum(g * row) * tl.load(scales + j * scale_stride + chunk))


def combine(
    out: torch.Tensor, base: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, tiles: Tiles, x: torch.Tensor
) -> None:
    """Compute out = base + sum_j x[j, block] * scales[j, chunk] * rows[j] within the tiles; the rest is left to the caller.

    Args:
        out: float32 [n], overwritten within the tiles.
        base: float32 [n].
        rows: int8, bfloat16 or float32 [m, n], the compressed directions of the model batch.
        scales: float32 [m, C].
        tiles: the tiles of the slice.
        x: float32 [m, B].
    """
    if len(tiles.starts):
        _combine[(len(tiles.starts),)](
            out, base, rows, x, scales, tiles.starts, tiles.counts, tiles.blocks, tiles.chunks, len(rows), rows.stride(0),
            x.stride(0), scales.stride(0), TILE=TILE,
        )  # fmt: skip


def project(gradient: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Sum scales[j, chunk] * rows[j] * gradient over the elements of each block.

    Args:
        gradient: float32 [n].
        rows: int8, bfloat16 or float32 [m, n], the compressed directions of the model batch.
        scales: float32 [m, C].
        tiles: the tiles of the slice.

    Returns:
        float64 [m, B], on the device.
    """
    sums = torch.empty(len(tiles.starts), len(rows), device=gradient.device)
    if len(tiles.starts):
        _project[(len(tiles.starts),)](
            sums, gradient, rows, scales, tiles.starts, tiles.counts, tiles.chunks, len(rows), rows.stride(0),
            scales.stride(0), TILE=TILE,
        )  # fmt: skip
    return torch.segment_reduce(sums.double(), "sum", lengths=tiles.of_block, axis=0, initial=0.0).T

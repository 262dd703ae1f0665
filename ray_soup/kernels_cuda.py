"""Combine and project on a GPU: one pass over the compressed rows each, in Triton.

A tile is a stretch of numbers of one block and one chunk. Rows are widened in registers; sums go from tile to block in
float64 in a fixed order, so that the same GPU gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

TILE = 1024  # numbers


@dataclass(frozen=True)
class Tiles:
    """A slice that begins at number `low` of the parameter vector, cut into T tiles; on the device."""

    starts: torch.Tensor
    """int64 [T], from the slice's first number."""
    counts: torch.Tensor
    """int32 [T], at most TILE."""
    blocks: torch.Tensor
    """int32 [T]."""
    chunks: torch.Tensor
    """int32 [T]."""
    of_block: torch.Tensor
    """int64 [B]: how many tiles each block has; those of a block lie one after the other."""


def cut(pieces: np.ndarray, low: int, blocks: int, device: torch.device) -> Tiles:
    """Tiles of pieces int64 [P, 4] as (start, stop, block, chunk), in the order of blocks."""
    pieces = pieces[np.argsort(pieces[:, 2], kind="stable")]
    many = (pieces[:, 1] - pieces[:, 0] + TILE - 1) // TILE
    piece = np.repeat(np.arange(len(pieces)), many)
    number = np.arange(len(piece)) - np.repeat(np.cumsum(many) - many, many)
    starts = pieces[piece, 0] + number * TILE
    counts = np.minimum(TILE, pieces[piece, 1] - starts)
    of_block = np.bincount(pieces[piece, 2], minlength=blocks)

    def there(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(device, dtype)

    return Tiles(
        there(starts - low, torch.int64), there(counts, torch.int32), there(pieces[piece, 2], torch.int32),
        there(pieces[piece, 3], torch.int32), there(of_block, torch.int64),
    )  # fmt: skip


@triton.jit
def _combine(
    out, base, rows, x, scales, starts, counts, blocks, chunks, m, stride, x_stride, scale_stride, TILE: tl.constexpr
):
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


@triton.jit
def _project(sums, gradient, rows, scales, starts, counts, chunks, m, stride, scale_stride, TILE: tl.constexpr):
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
    """out = base + sum_j x[j, block] scales[j, chunk] rows[j] where there are tiles; base elsewhere is left to the caller.

    out, base float32 [n]; rows [m, n] int8, bfloat16 or float32; scales float32 [m, chunks]; x float32 [m, B].
    """
    if len(tiles.starts):
        _combine[(len(tiles.starts),)](
            out, base, rows, x, scales, tiles.starts, tiles.counts, tiles.blocks, tiles.chunks, len(rows), rows.stride(0),
            x.stride(0), scales.stride(0), TILE=TILE,
        )  # fmt: skip


def project(gradient: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """sum over the numbers of each block of scales[j, chunk] rows[j] gradient: float64 [m, B], on the device."""
    sums = torch.empty(len(tiles.starts), len(rows), device=gradient.device)
    if len(tiles.starts):
        _project[(len(tiles.starts),)](
            sums, gradient, rows, scales, tiles.starts, tiles.counts, tiles.chunks, len(rows), rows.stride(0),
            scales.stride(0), TILE=TILE,
        )  # fmt: skip
    return torch.segment_reduce(sums.double(), "sum", lengths=tiles.of_block, axis=0, initial=0.0).T

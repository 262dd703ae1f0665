"""GPU kernels for combine and project, in Triton; each passes over the compressed rows once.

A tile is a run of elements of one block and one chunk; in int4, it begins with a group of mixing.store_format, some of whose
elements may be outside. Rows are decompressed in registers. The sums of the tiles of a block
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

from ray_soup.mixing.store_format import GROUP, GROUP_BYTES

TILE = 1024  # elements


class Kernel(Protocol):
    """A Triton kernel: indexing it with a grid returns the function that launches it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return the launcher for a grid of program instances."""


def jit(function: Callable[..., None]) -> Kernel:
    """Compile a kernel with Triton when it is first launched."""
    return cast(Kernel, triton.jit(function))


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call."""
    return cast(Callable[..., Any], triton.jit(function))


@dataclass(frozen=True)
class Tiles:
    """A slice of the parameter vector cut into T tiles, on the device."""

    starts: torch.Tensor
    """int64 [T], first element of each tile, counted from the start of the slice."""
    begins: torch.Tensor
    """int32 [T], number of elements at the start of each tile that are outside: 0, except in int4."""
    counts: torch.Tensor
    """int32 [T], number of elements of each tile with those, at most TILE."""
    places: torch.Tensor
    """int64 [T], place of the first element in the rows of the slice."""
    blocks: torch.Tensor
    """int32 [T], block of each tile."""
    chunks: torch.Tensor
    """int32 [T], chunk of each tile."""
    of_block: torch.Tensor
    """int64 [B], number of tiles of each block; those of a block are consecutive."""


def cut(pieces: NDArray[np.int64], low: int, first: int, blocks: int, device: torch.device, group: int = 1) -> Tiles:
    """Cut pieces into tiles, in the order of blocks.

    Args:
        pieces: int64 [P, 5] of (start, stop, block, chunk, place), start and stop in the parameter vector, place in a row.
        low: first parameter of the slice.
        first: place at which the rows of the slice begin.
        blocks: B, the number of blocks.
        device: where the tiles are stored.
        group: number of elements that are packed together; a tile begins with the first of them.
    """
    pieces = pieces[np.argsort(pieces[:, 2], kind="stable")]
    before = pieces[:, 4] % group
    tiles_of = (pieces[:, 1] - pieces[:, 0] + before + TILE - 1) // TILE
    piece = np.repeat(np.arange(len(pieces)), tiles_of)
    within = np.arange(len(piece)) - np.repeat(np.cumsum(tiles_of) - tiles_of, tiles_of)
    offsets = within * TILE - before[piece]
    starts = pieces[piece, 0] + offsets
    counts = np.minimum(TILE, pieces[piece, 1] - starts)
    of_block = np.bincount(pieces[piece, 2], minlength=blocks)

    def sent(values: NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(values).to(device, dtype)

    return Tiles(
        sent(starts - low, torch.int64),
        sent(np.maximum(-offsets, 0), torch.int32),
        sent(counts, torch.int32),
        sent(pieces[piece, 4] + offsets - first, torch.int64),
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


@device_function
def _decompressed(
    rows: tl.tensor, words: tl.tensor, group: tl.tensor, byte: tl.tensor, inside: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The elements that a byte of each group holds, float32; `group` is where it begins, in bytes."""
    scales = tl.load(words + group // 4, mask=inside, other=0)
    codes = tl.load(rows + group + 4 + byte, mask=inside, other=0).to(tl.int32)
    first = ((codes << 28) >> 28).to(tl.float32) * (scales << 16).to(tl.float32, bitcast=True)
    second = (codes >> 4).to(tl.float32) * ((scales >> 16) << 16).to(tl.float32, bitcast=True)
    return first, second


@device_function
def _lanes(
    begins: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    tile: tl.tensor,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The two elements of each lane of a tile, whether they are inside, their byte and where its group begins, in bytes."""
    lane = tl.arange(0, LANES)
    byte = lane % (GROUP // 2)
    lower = lane // (GROUP // 2) * GROUP + byte
    upper = lower + GROUP // 2
    begin, count = tl.load(begins + tile), tl.load(counts + tile)
    lower_inside, upper_inside = (lower >= begin) & (lower < count), (upper >= begin) & (upper < count)
    group = (tl.load(places + tile) // GROUP + lane // (GROUP // 2)) * GROUP_BYTES
    return lower, upper, lower_inside, upper_inside, byte, group


@jit
def _combine_packed(
    out: tl.tensor,
    base: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    x: tl.tensor,
    starts: tl.tensor,
    begins: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    blocks: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    x_stride: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    lower, upper, lower_inside, upper_inside, byte, group = _lanes(
        begins, counts, places, tile, TILE // 2, GROUP, GROUP_BYTES
    )
    start, block = tl.load(starts + tile), tl.load(blocks + tile)
    total = tl.load(base + start + lower, mask=lower_inside, other=0.0)
    upper_total = tl.load(base + start + upper, mask=upper_inside, other=0.0)
    for j in range(m):
        factor = tl.load(x + j * x_stride + block)
        first, second = _decompressed(rows, words, tl.cast(j, tl.int64) * stride + group, byte, lower_inside | upper_inside)
        total += factor * first
        upper_total += factor * second
    tl.store(out + start + lower, total, mask=lower_inside)
    tl.store(out + start + upper, upper_total, mask=upper_inside)


@jit
def _project_packed(
    sums: tl.tensor,
    gradient: tl.tensor,
    rows: tl.tensor,
    words: tl.tensor,
    starts: tl.tensor,
    begins: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    lower, upper, lower_inside, upper_inside, byte, group = _lanes(
        begins, counts, places, tile, TILE // 2, GROUP, GROUP_BYTES
    )
    start = tl.load(starts + tile)
    g = tl.load(gradient + start + lower, mask=lower_inside, other=0.0)
    upper_g = tl.load(gradient + start + upper, mask=upper_inside, other=0.0)
    for j in range(m):
        first, second = _decompressed(rows, words, tl.cast(j, tl.int64) * stride + group, byte, lower_inside | upper_inside)
        tl.store(sums + tile * m + j, tl.sum(g * first + upper_g * second))


def combine(
    out: torch.Tensor, base: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, tiles: Tiles, x: torch.Tensor
) -> None:
    """Compute out = base + sum_j x[j, block] * scales[j, chunk] * rows[j] within the tiles; the rest is left to the caller.

    Args:
        out: float32 [n], overwritten within the tiles.
        base: float32 [n].
        rows: float32, bfloat16 or int8 [m, n], or uint8 [m, bytes] (int4), the compressed directions of the model batch.
        scales: float32 [m, C]; those of int4 are in its rows.
        tiles: the tiles of the slice.
        x: float32 [m, B].
    """
    if len(tiles.starts) and rows.dtype == torch.uint8:
        _combine_packed[(len(tiles.starts),)](
            out, base, rows.view(torch.int8), rows.view(torch.int32), x, tiles.starts, tiles.begins, tiles.counts,
            tiles.places, tiles.blocks, len(rows), rows.stride(0), x.stride(0), TILE=TILE, GROUP=GROUP,
            GROUP_BYTES=GROUP_BYTES,
        )  # fmt: skip
    elif len(tiles.starts):
        _combine[(len(tiles.starts),)](
            out, base, rows, x, scales, tiles.starts, tiles.counts, tiles.blocks, tiles.chunks, len(rows), rows.stride(0),
            x.stride(0), scales.stride(0), TILE=TILE,
        )  # fmt: skip


def project(gradient: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, tiles: Tiles) -> torch.Tensor:
    """Sum scales[j, chunk] * rows[j] * gradient over the elements of each block.

    Args:
        gradient: float32 [n].
        rows: float32, bfloat16 or int8 [m, n], or uint8 [m, bytes] (int4), the compressed directions of the model batch.
        scales: float32 [m, C]; those of int4 are in its rows.
        tiles: the tiles of the slice.

    Returns:
        float64 [m, B], on the device.
    """
    sums = torch.empty(len(tiles.starts), len(rows), device=gradient.device)
    if len(tiles.starts) and rows.dtype == torch.uint8:
        _project_packed[(len(tiles.starts),)](
            sums, gradient, rows.view(torch.int8), rows.view(torch.int32), tiles.starts, tiles.begins, tiles.counts,
            tiles.places, len(rows), rows.stride(0), TILE=TILE, GROUP=GROUP, GROUP_BYTES=GROUP_BYTES,
        )  # fmt: skip
    elif len(tiles.starts):
        _project[(len(tiles.starts),)](
            sums, gradient, rows, scales, tiles.starts, tiles.counts, tiles.chunks, len(rows), rows.stride(0),
            scales.stride(0), TILE=TILE,
        )  # fmt: skip
    return torch.segment_reduce(sums.double(), "sum", lengths=tiles.of_block, axis=0, initial=0.0).T

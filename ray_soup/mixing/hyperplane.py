"""Combine directions into parameters, and project gradients onto directions.

    combine   theta[b] = base[b] + sum_j x[j, b] * d_j[b]
    project   dL/dx[j, b] = < d_j[b], (dL/dtheta)[b] >

Both run over the directions of one model batch, for one slice of the parameter vector. On a CPU, compiled loops read the
compressed rows in place from the memory-mapped store, once, on all threads of the actor. On a GPU, the compressed rows stay
in GPU memory, and Triton kernels pass over them once. Without Triton, torch decompresses one direction at a time; this path
runs everywhere and is the reference for the others.

Shapes: N parameters, n = high - low parameters of the slice, K ingredients, m ingredients of the model batch, B blocks.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.store_format import CHUNK, DTYPES, GROUP, GROUP_BYTES, StoreRecord, items, places_of

if TYPE_CHECKING:
    from ray_soup.mixing.kernels_cuda import Tiles


class Hyperplane:
    """The directions of a model batch, restricted to parameters low to high.

    Attributes:
        store: the store that holds the directions.
        low: first parameter of the slice.
        high: end of the slice (excluded).
        device: where combine and project run.
        blocks: B, the number of blocks.
        pieces: int64 [P, 5] of (start, stop, block, chunk, place), the pieces of the slice that have directions.
        places: the places that `rows` holds, (first, end); in int4 from the group of the first piece to that of the last.
        chosen: int64 [m], the ingredients of the model batch.
    """

    def __init__(
        self,
        store: DirectionStore,
        partition: Partition,
        low: int,
        high: int,
        device: torch.device,
        threads: int = 1,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """Prepare a slice of the store; `choose` must follow.

        Args:
            store: an open store.
            partition: A partition without invariant blocks, from `store.blocks`.
            low: first parameter of the slice.
            high: end of the slice (excluded).
            device: where combine and project run.
            threads: number of threads that combine and project use on a CPU.
            pool: their threads, which several slices may share; None: new ones.
        """
        self.store, self.low, self.high, self.device = store, low, high, device
        self.blocks = partition.count
        self.pieces = store.pieces(partition, low, high)
        self.chosen: NDArray[np.int64] = np.zeros(0, np.int64)
        self._pool = pool or ThreadPoolExecutor(threads)
        self._cuts = self._even_cuts(threads)
        ends = np.concatenate([[low], self.pieces[:, 1]])
        starts = np.concatenate([self.pieces[:, 0], [high]])
        self._gaps = [(s - low, e - low) for s, e in zip(ends, starts, strict=True) if s < e]  # invariant tensors
        self.places = (low, high) if store.dtype != "int4" else _groups_of(self.pieces)
        self._resident = self._scales = torch.empty(0)
        self._tiles: Tiles | None = None
        if device.type == "cuda" and find_spec("triton") is not None:
            from ray_soup.mixing.kernels_cuda import cut

            group = GROUP if store.dtype == "int4" else 1
            self._tiles = cut(self.pieces, low, self.places[0], self.blocks, device, group)

    def _even_cuts(self, threads: int) -> list[tuple[int, int]]:
        """Cut the pieces into one range (first, last + 1) per thread, with about the same number of parameters each."""
        ends = np.cumsum(self.pieces[:, 1] - self.pieces[:, 0])
        total = int(ends[-1]) if len(ends) else 0
        bounds = np.searchsorted(ends, [total * t // threads for t in range(1, threads)], side="left")
        marks = [0, *(int(b) for b in bounds), len(self.pieces)]
        return list(itertools.pairwise(marks))

    def choose(self, chosen: NDArray[np.int64], release: bool = True) -> None:
        """Make the ingredients `chosen`, int64 [m], the model batch, and release the previous one unless it is to stay."""
        chosen = np.asarray(chosen, dtype=np.int64)
        if release:
            self.release()
        if self.device.type != "cpu":
            self.chosen = chosen[:0]
            nothing = self.rows()
            self._resident = nothing.new_empty((len(chosen), nothing.shape[1]), device=self.device)
            for j in range(len(chosen)):  # one at a time: the host never holds a copy of all
                self.chosen = chosen[j : j + 1]
                self._resident[j] = self.rows()[0]
        self.chosen = chosen
        if self.device.type != "cpu":
            self._scales = _sent(torch.from_numpy(self.store.scales[self.chosen]), self.device)

    def rows(self) -> torch.Tensor:
        """Return a copy of the compressed directions of the model batch.

        float32, bfloat16 or int8 [m, n], or uint8 [m, bytes] (int4) of the groups in `places`.
        """
        span = items(self.store.dtype, *self.places)
        rows = torch.from_numpy(np.ascontiguousarray(self.store.rows[self.chosen, span]))
        return rows.view(torch.bfloat16) if self.store.dtype == "bfloat16" else rows

    def widened(self, row: torch.Tensor) -> torch.Tensor:
        """Convert one of `rows()` to float32 [n], in int4 with its scales; 0 for parameters without a direction."""
        if self.store.dtype != "int4":
            return row.float()
        values, wide = unpacked(row), torch.zeros(self.high - self.low, device=row.device)
        for start, stop, _, _, place in self.pieces:
            first = place - self.places[0]
            wide[start - self.low : stop - self.low] = values[first : first + stop - start]
        return wide

    def free(self) -> None:
        """Release the GPU memory of the model batch."""
        self._resident = self._scales = torch.empty(0)

    def release(self) -> None:
        """Release the GPU memory of the model batch and the store's memory pages read so far."""
        self.free()
        self.store.release()

    def combine(self, out: torch.Tensor, base: torch.Tensor, x: NDArray[np.float32]) -> None:
        """Compute out = base + sum_j x[j] d_j for the slice.

        Args:
            out: float32 [n], overwritten.
            base: float32 [n].
            x: float32 [m, B].
        """
        if self.device.type != "cpu" and self._tiles is None:
            combine_in_torch(self, self._resident, out, base, x)
            return
        for start, stop in self._gaps:
            out[start:stop] = base[start:stop]
        if self._tiles is not None:
            from ray_soup.mixing import kernels_cuda

            x_sent = _sent(torch.from_numpy(np.ascontiguousarray(x)), self.device)
            kernels_cuda.combine(out, base, self._resident, self._scales, self._tiles, x_sent)
            return
        from ray_soup.mixing.kernels import combine

        out_array, base_array = out.numpy(), base.numpy()
        store = self.store

        def work(cut: tuple[int, int]) -> None:
            pieces = self.pieces[cut[0] : cut[1]]
            combine(out_array, base_array, store.rows, store.scales, pieces, self.low, self.chosen, x)

        list(self._pool.map(work, self._cuts))

    def project(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """Compute < d_j[b], gradient[b] > for the slice.

        Args:
            gradient: float32 [n], dL/dtheta.

        Returns:
            float64 [m, B].
        """
        if self._tiles is not None:
            from ray_soup.mixing import kernels_cuda

            return kernels_cuda.project(gradient, self._resident, self._scales, self._tiles).cpu().numpy()
        if self.device.type != "cpu":
            return project_in_torch(self, self._resident, gradient)
        from ray_soup.mixing.kernels import project

        gradient_array = gradient.numpy()
        store = self.store

        def work(cut: tuple[int, int]) -> NDArray[np.float64]:
            sums = np.zeros((len(self.chosen), self.blocks))
            pieces = self.pieces[cut[0] : cut[1]]
            project(gradient_array, store.rows, store.scales, pieces, self.low, self.chosen, sums)
            return sums

        total: NDArray[np.float64] = np.sum(list(self._pool.map(work, self._cuts)), axis=0)
        return total


def _groups_of(pieces: NDArray[np.int64]) -> tuple[int, int]:
    """Return the first place of the group in which pieces, int64 [P, 5], begin, and the place at which they end."""
    if not len(pieces):
        return 0, 0
    start, stop, _, _, place = pieces[-1].tolist()
    return int(pieces[0, 4]) // GROUP * GROUP, place + stop - start


def _sent(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy an array to the device; a copy to a GPU starts from pinned memory and is asynchronous."""
    return (array.pin_memory() if device.type == "cuda" else array).to(device, non_blocking=True)


def synthetic_plane(dtype: str, count: int, numel: int, device: torch.device, threads: int) -> Hyperplane:
    """Make a hyperplane of one block in memory, for timing combine and project.

    Args:
        dtype: float32, bfloat16, int8 or int4.
        count: m, the number of directions.
        numel: N, the number of parameters.
        device: where combine and project run.
        threads: number of threads that they use on a CPU.
    """
    chunks = -(-numel // CHUNK)
    layout = Layout(("synthetic",), ((numel,),))
    record = StoreRecord(np.ones((count, chunks), np.float32), np.ones((count, 1)), np.ones(1, bool), ())
    random = np.random.default_rng(0)
    if dtype == "int4":
        groups = int(places_of(layout, dtype)[-1]) // GROUP
        packed = random.integers(0, 256, (count, groups, GROUP_BYTES), np.uint8)
        packed[:, :, :4] = (0x80, 0x3F, 0x80, 0x3F)  # the bits of 1 in bfloat16
        rows = packed.reshape(count, -1)
    else:
        floats = np.arange(100, dtype=np.float32)
        values = (floats.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else floats.astype(DTYPES[dtype])
        rows = values[random.integers(0, 100, (count, numel), np.int8)]
    store = DirectionStore(None, layout, dtype, np.zeros(numel, np.float32), rows, record)
    plane = Hyperplane(store, Partition(("model",), np.zeros(1, np.int64)), 0, numel, device, threads)
    plane.choose(np.arange(count))
    return plane


def decompressed(store: DirectionStore, piece: NDArray[np.int64]) -> torch.Tensor:
    """Return all directions in a piece, int64 [5] of (start, stop, block, chunk, place): float32 [K, stop - start]."""
    start, stop, _, chunk, place = piece.tolist()
    rows = torch.from_numpy(np.ascontiguousarray(store.rows[:, items(store.dtype, place, place + stop - start)]))
    scales = torch.from_numpy(store.scales[:, [chunk]])
    if store.dtype == "int4":
        return unpacked(rows)[:, place % GROUP :][:, : stop - start] * scales
    return (rows.view(torch.bfloat16) if store.dtype == "bfloat16" else rows).float() * scales


def unpacked(rows: torch.Tensor) -> torch.Tensor:
    """Decompress int4 directions, uint8 [..., bytes] of whole groups: float32 [..., elements]."""
    groups = rows.reshape(*rows.shape[:-1], -1, GROUP_BYTES)
    scales = groups[..., :4].contiguous().view(torch.bfloat16).float()
    codes = groups[..., 4:].contiguous().view(torch.int8)
    halves = torch.stack([(codes << 4) >> 4, codes >> 4], dim=-2)  # shifts to the right keep the sign
    values: torch.Tensor = halves * scales[..., None]
    return values.flatten(-3)


def _segments(plane: Hyperplane, device: torch.device) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Return lengths, blocks and chunks, int64 each, of the slice's pieces and the gaps between them (block -1)."""
    lengths, blocks, chunks = [], [], []
    position = plane.low
    for start, stop, block, chunk in [*plane.pieces[:, :4], (plane.high, plane.high, -1, 0)]:
        if start > position:
            lengths.append(start - position)
            blocks.append(-1)
            chunks.append(0)
        if stop > start:
            lengths.append(stop - start)
            blocks.append(block)
            chunks.append(chunk)
        position = stop
    return torch.tensor(lengths, device=device), np.array(blocks, np.int64), np.array(chunks, np.int64)


def combine_in_torch(
    plane: Hyperplane, rows: torch.Tensor, out: torch.Tensor, base: torch.Tensor, x: NDArray[np.float32]
) -> None:
    """Compute `Hyperplane.combine` in torch alone, one direction at a time.

    Args:
        plane: the hyperplane.
        rows: the compressed directions of the model batch, from `plane.rows()`, on the device to compute on.
        out: float32 [n], overwritten.
        base: float32 [n].
        x: float32 [m, B].
    """
    lengths, blocks, chunks = _segments(plane, rows.device)
    out.copy_(base)
    for j, k in enumerate(plane.chosen):
        factors = np.where(blocks >= 0, x[j, blocks] * plane.store.scales[k, chunks], 0).astype(np.float32)
        factor = torch.repeat_interleave(torch.from_numpy(factors).to(rows.device), lengths, output_size=len(out))
        out.addcmul_(factor, plane.widened(rows[j]))


def project_in_torch(plane: Hyperplane, rows: torch.Tensor, gradient: torch.Tensor) -> NDArray[np.float64]:
    """Compute `Hyperplane.project` in torch alone, one direction at a time.

    Args:
        plane: the hyperplane.
        rows: the compressed directions of the model batch, from `plane.rows()`, on the device to compute on.
        gradient: float32 [n], dL/dtheta.

    Returns:
        float64 [m, B].
    """
    lengths, blocks, chunks = _segments(plane, rows.device)
    sums = torch.stack([torch.segment_reduce(gradient * plane.widened(row), "sum", lengths=lengths) for row in rows])
    per_segment = sums.cpu().double().numpy() * plane.store.scales[plane.chosen][:, chunks]
    out = np.zeros((len(plane.chosen), plane.blocks))
    for block in range(plane.blocks):
        out[:, block] = per_segment[:, blocks == block].sum(axis=1)
    return out

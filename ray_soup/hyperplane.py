"""Combine and project.

    combine   theta[b] = base[b] + sum_j x[j, b] * d_j[b]
    project   dL/dx[j, b] = < d_j[b], (dL/dtheta)[b] >

over the directions of one model batch, for one slice of the parameter vector. On the CPU, compiled loops read the compressed
rows where they lie in the store's map, once, on as many threads as the actor has. On a GPU the rows are resident
there in their compressed form, and Triton's kernels pass over them once. Where neither is there a direction at a time is
widened in torch; this path runs everywhere and is the reference for the others.
"""

from __future__ import annotations

import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ray_soup.blocks import Layout, Partition
from ray_soup.directions import CHUNK, DTYPES, DirectionStore

ITEMSIZE = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
"""Bytes of a number of a direction."""


class Hyperplane:
    """The directions `chosen` [m] of a store, between the numbers low and high of the parameter vector."""

    def __init__(
        self,
        store: DirectionStore,
        partition: Partition,
        low: int,
        high: int,
        device: torch.device,
        threads: int = 1,
    ):
        self.store, self.low, self.high, self.device = store, low, high, device
        self.blocks = partition.count
        self.pieces = store.pieces(partition, low, high)
        self.chosen = np.zeros(0, np.int64)
        self._pool = ThreadPoolExecutor(threads)
        self._cuts = self._even_cuts(threads)
        ends = np.concatenate([[low], self.pieces[:, 1]])
        starts = np.concatenate([self.pieces[:, 0], [high]])
        self._gaps = [(s - low, e - low) for s, e in zip(ends, starts, strict=True) if s < e]  # invariant tensors
        self._resident = self._scales = torch.empty(0)
        self._tiles: Any = None
        if device.type == "cuda" and find_spec("triton") is not None:
            from ray_soup.kernels_cuda import cut

            self._tiles = cut(self.pieces, low, self.blocks, device)

    def _even_cuts(self, threads: int) -> list[tuple[int, int]]:
        """Pieces for each thread, as (first, last + 1), of about as many numbers each."""
        ends = np.cumsum(self.pieces[:, 1] - self.pieces[:, 0])
        total = int(ends[-1]) if len(ends) else 0
        bounds = np.searchsorted(ends, [total * t // threads for t in range(1, threads)], side="left")
        marks = [0, *(int(b) for b in bounds), len(self.pieces)]
        return list(itertools.pairwise(marks))

    def choose(self, chosen: np.ndarray) -> None:
        """Make `chosen` the model batch; what the one before held is let go."""
        self.chosen = np.asarray(chosen, dtype=np.int64)
        self.release()
        if self.device.type != "cpu":
            self._resident = _sent(self.rows(), self.device)
            self._scales = _sent(torch.from_numpy(self.store.scales[self.chosen]), self.device)

    def rows(self) -> torch.Tensor:
        """The compressed directions of the model batch, copied out of the store: [m, high - low]."""
        rows = torch.from_numpy(np.ascontiguousarray(self.store.rows[self.chosen, self.low : self.high]))
        return rows.view(torch.bfloat16) if self.store.dtype == "bfloat16" else rows

    def release(self) -> None:
        """Let go of the pages of the store that were read; they stay in the system's cache."""
        self._resident = self._scales = torch.empty(0)
        if isinstance(self.store.rows, np.memmap):
            self.store.rows._mmap.madvise(mmap.MADV_DONTNEED)

    def combine(self, out: torch.Tensor, base: torch.Tensor, x: np.ndarray) -> None:
        """out[low:high] = base + sum_j x[j] d_j. out, base float32 [high - low]; x float32 [m, B]."""
        if self.device.type != "cpu" and self._tiles is None:
            combine_wide(self, self._resident, out, base, x)
            return
        for start, stop in self._gaps:
            out[start:stop] = base[start:stop]
        if self._tiles is not None:
            from ray_soup import kernels_cuda

            x_there = _sent(torch.from_numpy(np.ascontiguousarray(x)), self.device)
            kernels_cuda.combine(out, base, self._resident, self._scales, self._tiles, x_there)
            return
        from ray_soup.kernels import combine

        out_numbers, base_numbers = out.numpy(), base.numpy()
        store = self.store
        list(
            self._pool.map(
                lambda cut: combine(
                    out_numbers, base_numbers, store.rows, store.scales, self.pieces[cut[0] : cut[1]], self.low,
                    self.chosen, x,
                ),
                self._cuts,
            )
        )  # fmt: skip

    def project(self, gradient: torch.Tensor) -> np.ndarray:
        """< d_j[b], gradient[b] > as float64 [m, B]. gradient float32 [high - low]."""
        if self._tiles is not None:
            from ray_soup import kernels_cuda

            return kernels_cuda.project(gradient, self._resident, self._scales, self._tiles).cpu().numpy()
        if self.device.type != "cpu":
            return project_wide(self, self._resident, gradient)
        from ray_soup.kernels import project

        numbers = gradient.numpy()
        store = self.store

        def work(cut: tuple[int, int]) -> np.ndarray:
            sums = np.zeros((len(self.chosen), self.blocks))
            pieces = self.pieces[cut[0] : cut[1]]
            project(numbers, store.rows, store.scales, pieces, self.low, self.chosen, sums)
            return sums

        return np.sum(list(self._pool.map(work, self._cuts)), axis=0)


def _sent(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On its way to the device, from pinned memory where that is a GPU: nothing waits for it here."""
    return (array.pin_memory() if device.type == "cuda" else array).to(device, non_blocking=True)


def made_up_plane(dtype: str, count: int, numbers: int, device: torch.device, threads: int) -> Hyperplane:
    """Directions of one block that belong to nothing, in memory: to time what is done with real ones."""
    chunks = -(-numbers // CHUNK)
    rows = np.random.default_rng(0).integers(0, 100, (count, numbers), np.int8)
    values = np.arange(100, dtype=np.float32)
    values = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else values.astype(DTYPES[dtype])
    layout = Layout(("made up",), ((numbers,),))
    hold: Any = None
    store = DirectionStore(
        hold, layout, dtype, np.zeros(numbers, np.float32), values[rows], np.ones((count, chunks), np.float32),
        np.ones((count, 1)), np.ones(1, bool), (),
    )  # fmt: skip
    plane = Hyperplane(store, Partition(("model",), np.zeros(1, np.int64)), 0, numbers, device, threads)
    plane.choose(np.arange(count))
    return plane


def widened(store: DirectionStore, start: int, stop: int, chunk: int) -> torch.Tensor:
    """All directions between the numbers start and stop of one chunk, float32 [K, stop - start]."""
    rows = torch.from_numpy(np.ascontiguousarray(store.rows[:, start:stop]))
    rows = rows.view(torch.bfloat16) if store.dtype == "bfloat16" else rows
    return rows.float() * torch.from_numpy(store.scales[:, [chunk]])


def _segments(plane: Hyperplane, device: torch.device) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """The slice as segments of one block and chunk, those between pieces too: lengths, blocks (-1 between), chunks."""
    lengths, blocks, chunks = [], [], []
    position = plane.low
    for start, stop, block, chunk in [*plane.pieces, (plane.high, plane.high, -1, 0)]:
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


def combine_wide(plane: Hyperplane, rows: torch.Tensor, out: torch.Tensor, base: torch.Tensor, x: np.ndarray) -> None:
    """`Hyperplane.combine` in torch alone, on the device of `rows`, a direction at a time."""
    lengths, blocks, chunks = _segments(plane, rows.device)
    out.copy_(base)
    for j, k in enumerate(plane.chosen):
        factors = np.where(blocks >= 0, x[j, blocks] * plane.store.scales[k, chunks], 0).astype(np.float32)
        factor = torch.repeat_interleave(torch.from_numpy(factors).to(rows.device), lengths, output_size=len(out))
        out.addcmul_(factor, rows[j].float())


def project_wide(plane: Hyperplane, rows: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    """`Hyperplane.project` in torch alone, on the device of `rows`, a direction at a time."""
    lengths, blocks, chunks = _segments(plane, rows.device)
    sums = torch.stack([torch.segment_reduce(gradient * row.float(), "sum", lengths=lengths) for row in rows])
    per_segment = sums.cpu().double().numpy() * plane.store.scales[plane.chosen][:, chunks]
    out = np.zeros((len(plane.chosen), plane.blocks))
    for block in range(plane.blocks):
        out[:, block] = per_segment[:, blocks == block].sum(axis=1)
    return out

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
import torch
from numpy.typing import NDArray

from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.store_format import CHUNK, DTYPES, StoreRecord

if TYPE_CHECKING:
    from ray_soup.mixing.kernels_cuda import Tiles

ITEMSIZE = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
"""Bytes of one element of a direction, by dtype name."""


class Hyperplane:
    """The directions of a model batch, restricted to parameters low to high.

    Attributes:
        store: the store that holds the directions.
        low: first parameter of the slice.
        high: end of the slice (excluded).
        device: where combine and project run.
        blocks: B, the number of blocks.
        pieces: int64 [P, 4] of (start, stop, block, chunk), the pieces of the slice that have directions.
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
        self._resident = self._scales = torch.empty(0)
        self._tiles: Tiles | None = None
        if device.type == "cuda" and find_spec("triton") is not None:
            from ray_soup.mixing.kernels_cuda import cut

            self._tiles = cut(self.pieces, low, self.blocks, device)

    def _even_cuts(self, threads: int) -> list[tuple[int, int]]:
        """Cut the pieces into one range (first, last + 1) per thread, with about the same number of parameters each."""
        ends = np.cumsum(self.pieces[:, 1] - self.pieces[:, 0])
        total = int(ends[-1]) if len(ends) else 0
        bounds = np.searchsorted(ends, [total * t // threads for t in range(1, threads)], side="left")
        marks = [0, *(int(b) for b in bounds), len(self.pieces)]
        return list(itertools.pairwise(marks))

    def choose(self, chosen: NDArray[np.int64], release: bool = True) -> None:
        """Make the ingredients `chosen`, int64 [m], the model batch, and release the previous one unless it is to stay."""
        self.chosen = np.asarray(chosen, dtype=np.int64)
        if release:
            self.release()
        if self.device.type != "cpu":
            self._resident = _sent(self.rows(), self.device)
            self._scales = _sent(torch.from_numpy(self.store.scales[self.chosen]), self.device)

    def rows(self) -> torch.Tensor:
        """Return a copy of the compressed directions of the model batch, float32, bfloat16 or int8 [m, n]."""
        rows = torch.from_numpy(np.ascontiguousarray(self.store.rows[self.chosen, self.low : self.high]))
        return rows.view(torch.bfloat16) if self.store.dtype == "bfloat16" else rows

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


def _sent(array: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy an array to the device; a copy to a GPU starts from pinned memory and is asynchronous."""
    return (array.pin_memory() if device.type == "cuda" else array).to(device, non_blocking=True)


def synthetic_plane(dtype: str, count: int, numel: int, device: torch.device, threads: int) -> Hyperplane:
    """Make a hyperplane of one block in memory, for timing combine and project.

    Args:
        dtype: float32, bfloat16 or int8.
        count: m, the number of directions.
        numel: N, the number of parameters.
        device: where combine and project run.
        threads: number of threads that they use on a CPU.
    """
    chunks = -(-numel // CHUNK)
    rows = np.random.default_rng(0).integers(0, 100, (count, numel), np.int8)
    floats = np.arange(100, dtype=np.float32)
    values = (floats.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else floats.astype(DTYPES[dtype])
    layout = Layout(("synthetic",), ((numel,),))
    record = StoreRecord(np.ones((count, chunks), np.float32), np.ones((count, 1)), np.ones(1, bool), ())
    store = DirectionStore(None, layout, dtype, np.zeros(numel, np.float32), values[rows], record)
    plane = Hyperplane(store, Partition(("model",), np.zeros(1, np.int64)), 0, numel, device, threads)
    plane.choose(np.arange(count))
    return plane


def decompressed(store: DirectionStore, start: int, stop: int, chunk: int) -> torch.Tensor:
    """Return all directions for parameters start to stop, which must be in one chunk: float32 [K, stop - start]."""
    rows = torch.from_numpy(np.ascontiguousarray(store.rows[:, start:stop]))
    rows = rows.view(torch.bfloat16) if store.dtype == "bfloat16" else rows
    return rows.float() * torch.from_numpy(store.scales[:, [chunk]])


def _segments(plane: Hyperplane, device: torch.device) -> tuple[torch.Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Return lengths, blocks and chunks, int64 each, of the slice's pieces and the gaps between them (block -1)."""
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


def combine_in_torch(
    plane: Hyperplane, rows: torch.Tensor, out: torch.Tensor, base: torch.Tensor, x: NDArray[np.float32]
) -> None:
    """Compute `Hyperplane.combine` in torch alone, one direction at a time.

    Args:
        plane: the hyperplane.
        rows: float32, bfloat16 or int8 [m, n], the compressed directions of the model batch, on the device to compute on.
        out: float32 [n], overwritten.
        base: float32 [n].
        x: float32 [m, B].
    """
    lengths, blocks, chunks = _segments(plane, rows.device)
    out.copy_(base)
    for j, k in enumerate(plane.chosen):
        factors = np.where(blocks >= 0, x[j, blocks] * plane.store.scales[k, chunks], 0).astype(np.float32)
        factor = torch.repeat_interleave(torch.from_numpy(factors).to(rows.device), lengths, output_size=len(out))
        out.addcmul_(factor, rows[j].float())


def project_in_torch(plane: Hyperplane, rows: torch.Tensor, gradient: torch.Tensor) -> NDArray[np.float64]:
    """Compute `Hyperplane.project` in torch alone, one direction at a time.

    Args:
        plane: the hyperplane.
        rows: float32, bfloat16 or int8 [m, n], the compressed directions of the model batch, on the device to compute on.
        gradient: float32 [n], dL/dtheta.

    Returns:
        float64 [m, B].
    """
    lengths, blocks, chunks = _segments(plane, rows.device)
    sums = torch.stack([torch.segment_reduce(gradient * row.float(), "sum", lengths=lengths) for row in rows])
    per_segment = sums.cpu().double().numpy() * plane.store.scales[plane.chosen][:, chunks]
    out = np.zeros((len(plane.chosen), plane.blocks))
    for block in range(plane.blocks):
        out[:, block] = per_segment[:, blocks == block].sum(axis=1)
    return out

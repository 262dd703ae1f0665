"""Combine and project for lifted adapters, with the interface of mixing.hyperplane.Hyperplane.

    combine   theta = base + value * w[owner, b],     w[k, b] = x[k, b] - 1/K sum_j x[j, b],  x = 0 for what does not move
    project   dL/dx[j, b] = G[j, b] - 1/K sum_k G[k, b],     G[k, b] = sum over the elements of k in b of value * gradient

Both pass once over the values of all adapters (mixing.adapter_store), in float32, whatever the size of the model batch.

Shapes: n = high - low elements of the slice, K ingredients, m of the model batch, B blocks, R columns of a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.lazy import torch
from ray_soup.mixing.adapter_store import AdapterStore
from ray_soup.mixing.blocks import Partition

RANGE = 1 << 22  # elements of a difference that are multiplied at a time


@dataclass(frozen=True)
class _Factor:
    """The part of a factor B in the slice."""

    start: int
    """First element in the slice's vector."""
    stop: int
    """End in the slice's vector (excluded)."""
    offset: int
    """First element in the tensor."""
    block: int
    owners: torch.Tensor
    """int64 [R], the owner of each column; K for a column of an adapter that is not open."""

    def rows(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (start, stop, owners [columns]) of the incomplete first row, of all complete rows, and of the last one."""
        width = len(self.owners)
        first = min(-self.offset % width, self.stop - self.start)
        if first:
            begin = self.offset % width
            yield self.start, self.start + first, self.owners[begin : begin + first]
        whole = (self.stop - self.start - first) // width * width
        if whole:
            yield self.start + first, self.start + first + whole, self.owners
        rest = self.start + first + whole
        if rest < self.stop:
            yield rest, self.stop, self.owners[: self.stop - rest]


@dataclass(frozen=True)
class _Difference:
    """The part of a whole tensor in the slice, for one adapter that contains it."""

    start: int
    stop: int
    place: int
    """Where the values of this part begin in the store's differences."""
    block: int
    owner: int


class AdapterPlane:
    """The directions of a model batch of lifted adapters, restricted to parameters low to high.

    Attributes:
        store: the store that holds the values.
        low: first parameter of the slice.
        high: end of the slice (excluded).
        device: where combine and project run.
        blocks: B, the number of blocks.
        chosen: int64 [m], the ingredients of the model batch.
    """

    def __init__(self, store: AdapterStore, partition: Partition, low: int, high: int, device: torch.device) -> None:
        """Prepare a slice of the store; `choose` must follow. `partition` has no invariant blocks: from `store.blocks`."""
        self.store, self.low, self.high, self.device = store, low, high, device
        self.blocks, self._block = partition.count, partition.block
        self.chosen: NDArray[np.int64] = np.zeros(0, np.int64)
        self._tensors: list[int] = []
        self._factors: list[_Factor] = []
        self._differences: list[_Difference] = []
        offsets = store.layout.offsets
        for t in range(len(store.layout.names)):
            begin, block = int(offsets[t]), int(partition.block[t])
            first, stop = max(begin, low), min(int(offsets[t + 1]), high)
            if block < 0 or not store.variant[t]:
                continue
            if low <= begin < high:
                self._tensors.append(t)
            if first >= stop:
                continue
            span = (first - low, stop - low)
            if t in store.columns:
                owners = torch.from_numpy(np.where(store.columns[t] < 0, store.count, store.columns[t]))
                self._factors.append(_Factor(*span, first - begin, block, owners.to(device)))
            for owner, place in store.owners.get(t, ()):
                self._differences.append(_Difference(*span, place + first - begin, block, owner))
        self._values: torch.Tensor | None = None
        self._apart: torch.Tensor | None = None

    def choose(self, chosen: NDArray[np.int64]) -> None:
        """Make the ingredients `chosen`, int64 [m], the model batch."""
        self.chosen = np.asarray(chosen, dtype=np.int64)
        if self._values is None:  # a view of the file on a CPU
            self._values = _tensor(self.store.rows[0, self.low : self.high], self.device)
            self._apart = _tensor(self.store.differences, self.device) if self._differences else torch.empty(0)

    def release(self) -> None:
        """Release the device's copy of the values."""
        self._values = self._apart = None

    def _held(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._values is not None
        assert self._apart is not None
        return self._values, self._apart

    def combine(self, out: torch.Tensor, base: torch.Tensor, x: NDArray[np.float32]) -> None:
        """Compute out = base + sum_j x[j] d_j for the slice.

        Args:
            out: float32 [n], overwritten.
            base: float32 [n].
            x: float32 [m, B].
        """
        values, apart = self._held()
        weights = np.zeros((self.store.count + 1, self.blocks))  # the last row: of adapters that are not open
        weights[self.chosen] = x
        weights[:-1] -= weights[:-1].sum(axis=0) / self.store.count
        w = torch.from_numpy(weights.astype(np.float32)).to(self.device)
        if out is not base:
            out.copy_(base)
        for part in self._factors:
            by_owner = w[:, part.block]
            for start, stop, owners in part.rows():
                shape = (-1, len(owners))
                out[start:stop].view(shape).addcmul_(values[start:stop].view(shape), by_owner[owners])
        for one in self._differences:
            length = one.stop - one.start
            out[one.start : one.stop].addcmul_(apart[one.place : one.place + length], w[one.owner, one.block])

    def project(self, gradient: torch.Tensor) -> NDArray[np.float64]:
        """Compute < d_j[b], gradient[b] > for the slice.

        Args:
            gradient: float32 [n], dL/dtheta.

        Returns:
            float64 [m, B].
        """
        values, apart = self._held()
        sums = torch.zeros(self.store.count + 1, self.blocks, dtype=torch.float64, device=self.device)
        for part in self._factors:
            for start, stop, owners in part.rows():
                shape = (-1, len(owners))
                products = values[start:stop].view(shape) * gradient[start:stop].view(shape)
                sums[:, part.block].index_add_(0, owners, products.sum(dim=0, dtype=torch.float64))
        for one in self._differences:
            for first in range(one.start, one.stop, RANGE):
                stop = min(first + RANGE, one.stop)
                place = one.place + first - one.start
                products = apart[place : place + stop - first] * gradient[first:stop]
                sums[one.owner, one.block] += products.sum(dtype=torch.float64)
        found = sums[:-1].cpu().numpy()
        total: NDArray[np.float64] = (found - found.mean(axis=0))[self.chosen]
        return total

    def gram(self, part: tuple[int, int]) -> NDArray[np.float64]:
        """Sum the inner products of the directions over every `part[1]`-th tensor that begins in the slice: [K, K]."""
        chosen = self._tensors[part[0] :: part[1]]
        total: NDArray[np.float64] = self.store.gram[chosen].sum(axis=0)
        return total

    def gram_of_blocks(self, part: tuple[int, int]) -> NDArray[np.float64]:
        """Sum the inner products in each block over the same tensors: [B, K, K]."""
        total = np.zeros((self.blocks, *self.store.gram.shape[1:]))
        for t in self._tensors[part[0] :: part[1]]:
            total[self._block[t]] += self.store.gram[t]
        return total


def _tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor on a device: on a CPU a view, which must not be written to."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.from_numpy(array)
    return found if device.type == "cpu" else found.to(device)

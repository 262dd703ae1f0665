"""Whole tensors before groups of their rows: what blocks: auto learns first, where it cuts tensors.

Coefficients of their own for groups of rows fit more, and noise too. So whole tensors are learned first, and their rows
apart only from there on. While they move together, one coordinate per ingredient and tensor t stands for all its groups:

    x[:, b] = X[:, t(b)],      dL/dX[:, t] = sum of dL/dx[:, b] over the groups b of t,      N[k, t]^2 = sum of n[k, b]^2.

Shapes: m ingredients of the model batch, K ingredients, B blocks, T tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.blocks import Partition
from ray_soup.mixing.coefficients import to_x
from ray_soup.recipe import Learn
from ray_soup.soups.coordinates import Moving, moving_coordinates


@dataclass(frozen=True)
class Together:
    """The parametrization of MEHL soups in which the groups of rows of a tensor move together."""

    of: Moving
    """The parametrization of whole tensors."""
    of_rows: NDArray[np.float64]
    """float64 [m, B], norms of the directions in each group."""
    tensor: NDArray[np.int64]
    """int64 [B], the tensor of each group."""

    @property
    def norms(self) -> NDArray[np.float64]:
        """Norms of the directions in each tensor, float64 [m, T]."""
        return self.of.norms

    @property
    def learns_factor(self) -> bool:
        """Whether a factor on the logits is learned."""
        return self.of.learns_factor

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute z, float64 [m, T], from y, float64 [m, B], whose groups are where their tensor is."""
        return self.of.from_y(_of_tensors(y, self.of_rows, self.norms, self.tensor))

    def to_y(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute y, float64 [m, B], from z, float64 [m, T]."""
        y: NDArray[np.float64] = self.x(z) * self.of_rows
        return y

    def x(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute x, float64 [m, B], from z, float64 [m, T]."""
        x: NDArray[np.float64] = self.of.x(z)[:, self.tensor]
        return x

    def gradient(self, z: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dz, float64 [m, T], from z and dL/dx, float64 [m, B]."""
        return self.of.gradient(z, summed(by_x, self.tensor))

    def coefficients(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients, float64 [m, B], from z, float64 [m, T]."""
        found: NDArray[np.float64] = self.of.coefficients(z)[:, self.tensor]
        return found


def summed(values: NDArray[np.float64], tensor: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum over the groups of each tensor: float64 [..., B] to float64 [..., T]; `tensor` is int64 [B] and does not fall."""
    found: NDArray[np.float64] = np.add.reduceat(values, np.flatnonzero(np.diff(tensor, prepend=-1)), axis=-1)
    return found


def _of_tensors(
    y: NDArray[np.float64], norms: NDArray[np.float64], whole: NDArray[np.float64], tensor: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the coordinates of whole tensors, float64 [m, T], from those of their groups: X N = sum of y n / N."""
    return to_x(summed(y * norms, tensor), whole)


def tensor_of_each(parts: Partition, sizes: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Return the tensor of each of the B groups, int64 [B], numbered from 0; None if no tensor is cut."""
    if not parts.cuts:
        return None
    tensors = [t for t in range(len(parts.block)) if parts.block[t] >= 0]
    found = np.zeros(parts.count, dtype=np.int64)
    for t in tensors:
        for _, _, block in parts.groups(t, int(sizes[t])):
            found[block] = t
    return np.unique(found, return_inverse=True)[1]


def moving_together(
    learn: Learn,
    norms: NDArray[np.float64],
    gram: NDArray[np.float64] | None,
    chosen: NDArray[np.int64],
    y: NDArray[np.float64],
    tensor: NDArray[np.int64],
) -> Together:
    """Return the parametrization of a model batch in which the groups of rows of each tensor move together.

    Args:
        learn: the settings.
        norms: float64 [K, B], norms of the directions.
        gram: float64 [B, K, K], their inner products, or None, as for `moving_coordinates`.
        chosen: int64 [m], the ingredients of the model batch.
        y: float64 [K, B], where the turn begins: groups are where their tensor is.
        tensor: int64 [B], the tensor of each group.
    """
    whole = np.sqrt(summed(norms**2, tensor))
    inner = None if gram is None else summed(gram.transpose(1, 2, 0), tensor).transpose(2, 0, 1)
    of = moving_coordinates(learn, False, whole, inner, chosen, _of_tensors(y, norms, whole, tensor))
    return Together(of, norms[chosen], tensor)

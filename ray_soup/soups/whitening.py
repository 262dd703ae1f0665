"""Coordinates in which the directions of each block are orthonormal, or half-way there: learn.whiten.

In units of the norms, coordinates y of similar ingredients point the same way: a step moves the soup far along what they
share, and hardly along what tells them apart. With the cosines C of the directions,

    C[b, j, k] = < d_j[b], d_k[b] > / (n[j, b] n[k, b])
    y[:, b]    = rest[:, b] + C[b]^(-w/2) z[:, b],        dL/dz = C^(-w/2) dL/dy,

so that with w = 1 |z| is how far the soup has moved in a block, and w = 0 would change nothing. `rest` is the part of y at
the start of a turn that z cannot express: it does not move the soup. Weight decay of z still pulls to the uniform soup.

Shapes: m ingredients of the model batch, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.coefficients import to_coefficients, to_x
from ray_soup.soups.optimize import without_noise

FLOOR = 1e-3
"""Smallest eigenvalue of C that is divided by, as a share of the largest. Along what tells near-duplicates apart, a unit of
z would otherwise be a huge step of opposite coefficients. int8 directions are accurate to about 1 %, so eigenvalues below
1e-4 are rounding; the floor is a little above, and bounds a unit of z to 32 units of y."""
NULL = 1e-6
"""Share of the largest eigenvalue up to which one is zero but for rounding in float32, as that of equal ingredients."""


@dataclass(frozen=True)
class Whitened:
    """The parametrization of MEHL soups in coordinates z, whose unit is a move of length 1 in any direction if w = 1."""

    norms: NDArray[np.float64]
    """float64 [m, B], norms of the directions."""
    matrices: NDArray[np.float64]
    """float64 [B, m, m], C^(-w/2) of each block; symmetric."""
    inverses: NDArray[np.float64]
    """float64 [B, m, m], their pseudo-inverses."""
    rest: NDArray[np.float64]
    """float64 [m, B], the part of y where the turn begins that no z expresses."""
    learns_factor: ClassVar[bool] = False

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute z from y: float64 [m, B] each."""
        return _times(self.inverses, y)

    def to_y(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute y from z: float64 [m, B] each."""
        y: NDArray[np.float64] = self.rest + _times(self.matrices, z)
        return y

    def x(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute x = y / n: float64 [m, B] each."""
        return to_x(self.to_y(z), self.norms)

    def gradient(self, z: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dz: float64 [m, B] each. Rounding noise is removed before it is amplified."""
        return _times(self.matrices, without_noise(to_x(by_x, self.norms)))

    def coefficients(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from z: float64 [m, B] each."""
        return to_coefficients(self.x(z))


def whitened(
    norms: NDArray[np.float64], gram: NDArray[np.float64], y: NDArray[np.float64], sum_to_zero: bool, share: float = 1.0
) -> Whitened:
    """Return the whitened parametrization of a model batch.

    Args:
        norms: float64 [m, B], norms of the directions.
        gram: float64 [B, m, m], inner products of the directions in each block.
        y: float64 [m, B], where the turn begins.
        sum_to_zero: whether these are the directions of all ingredients, whose sum is zero. What compression makes of that
            sum is then left out: it is no direction of the soup.
        share: w, how far they are whitened, 0 to 1.
    """
    cosines = _divided(gram, norms.T[:, :, None] * norms.T[:, None, :])
    cosines = (cosines + cosines.transpose(0, 2, 1)) / 2
    if sum_to_zero:
        unit = _divided(norms, np.linalg.norm(norms, axis=0, keepdims=True)).T
        outside = np.eye(len(norms)) - unit[:, :, None] * unit[:, None, :]
        cosines = outside @ cosines @ outside
    values, vectors = np.linalg.eigh(cosines)
    largest = values.max(axis=1, keepdims=True)
    roots = np.maximum(values, FLOOR * largest) ** (share / 2)
    roots = np.where(values > NULL * largest, roots, 0.0)
    matrices, inverses = (
        (vectors * scale[:, None, :]) @ vectors.transpose(0, 2, 1) for scale in (_divided(np.ones_like(roots), roots), roots)
    )
    return Whitened(norms, matrices, inverses, y - _times(matrices, _times(inverses, y)))


def _times(matrices: NDArray[np.float64], columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Multiply the matrix of each block, [B, m, m], with its column of [m, B]: float64 [m, B]."""
    product: NDArray[np.float64] = (matrices @ columns.T[:, :, None])[:, :, 0].T.copy()
    return product


def _divided(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Divide, and return 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=np.broadcast_to(b, a.shape) > 0)

"""What the optimizer moves in a turn: unit-scaled coordinates, whitened ones, or those of learn.lr: auto.

An optimizer of Adam's kind moves every coordinate by about the learning rate, so that a good rate depends on how far apart
the ingredients are, and on how many coordinates move at a time. learn.lr: auto takes both out. It moves

    z[:, b] = y[:, b] / u[b],        u[b] = s[b]^POWER r^(1 - POWER),        r = root mean square of s,

where s[b] is how far apart the ingredients are in block b: the median over pairs j, k of |d_j[b] - d_k[b]| / sqrt(2), or,
without the inner products of the directions, the median of the norms |d_k[b]|. With u = s, tensors in which the ingredients
hardly differ, such as biases, would hardly move; with u = r, all blocks would move equally far. The learning rate is
LENGTH / sqrt(m B), which makes the first step about LENGTH r long, or MOST if that is less.

Shapes: m ingredients of the model batch, K ingredients, B blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.coefficients import Affine, Softmax
from ray_soup.recipe import Learn
from ray_soup.soups.optimize import parametrization, without_noise
from ray_soup.soups.whitening import Whitened, whitened

LENGTH = 0.8
"""Length of the first step in units of how far the ingredients are apart. Chosen on small zoos, where 0.4 to 1.6 differ
little."""
MOST = 0.1
"""Largest learning rate that fits: with few coordinates, steps of LENGTH would be as long as the way to the best soup."""
FIXED = 0.01
"""Learning rate where auto does not fit one to the ingredients."""
ROUNDING = 1e-6
"""Share of the squared lengths of two directions up to which the square of their distance is 0 but for rounding."""
POWER = 0.75
"""How much the unit of a block depends on how far the ingredients differ in it: also chosen on small zoos."""


@dataclass(frozen=True)
class Relative:
    """The parametrization of MEHL soups in coordinates z, whose unit follows how far the ingredients are apart."""

    of: Affine | Whitened
    """The parametrization that z is a scaling of."""
    unit: NDArray[np.float64]
    """float64 [B], u, the unit of z in each block."""
    learns_factor: ClassVar[bool] = False

    @property
    def norms(self) -> NDArray[np.float64]:
        """Norms of the directions, float64 [m, B]."""
        return self.of.norms

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute z from y: float64 [m, B] each."""
        z: NDArray[np.float64] = self.of.from_y(y) / self.unit
        return z

    def to_y(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute y from z: float64 [m, B] each."""
        return self.of.to_y(z * self.unit)

    def x(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the factors x of the directions from z: float64 [m, B] each."""
        return self.of.x(z * self.unit)

    def gradient(self, z: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dz from z and dL/dx: float64 [m, B] each."""
        gradient: NDArray[np.float64] = without_noise(self.of.gradient(z * self.unit, by_x)) * self.unit
        return gradient

    def coefficients(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from z: float64 [m, B] each."""
        return self.of.coefficients(z * self.unit)


Moving = Affine | Softmax | Whitened | Relative


def moving_coordinates(
    learn: Learn,
    softmax: bool,
    norms: NDArray[np.float64],
    gram: NDArray[np.float64] | None,
    chosen: NDArray[np.int64],
    y: NDArray[np.float64],
) -> Moving:
    """Return the parametrization of a model batch.

    Args:
        learn: the settings.
        softmax: whether the method has positive coefficients.
        norms: float64 [K, B], norms of the directions.
        gram: float64 [B, K, K], inner products of the directions in each block, for learn.whiten; otherwise None.
        chosen: int64 [m], the ingredients of the model batch.
        y: float64 [K, B], where the turn begins.
    """
    if softmax:
        return parametrization(True, norms[chosen])
    of: Affine | Whitened = Affine(norms[chosen])
    if gram is not None:
        of = whitened(norms[chosen], gram[:, chosen][:, :, chosen], y[chosen], len(chosen) == len(norms), learn.whiten)
    if not _fits(learn):
        return of
    apart = _median(norms) if gram is None else _apart(gram)
    unit = apart**POWER * np.sqrt((apart**2).mean()) ** (1 - POWER)
    return Relative(of, np.where(unit > 0, unit, 1.0))


def _apart(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median distance between two ingredients in each block, over sqrt(2), float64 [B].

    One ingredient that is far from all others changes their distances from the center, but not those between them.
    """
    one, other = np.triu_indices(gram.shape[1], 1)
    lengths = gram[:, one, one] + gram[:, other, other]
    squares = lengths - 2 * gram[:, one, other]
    squares = np.where(squares > ROUNDING * lengths, squares, 0.0)
    apart: NDArray[np.float64] = np.sqrt(_median(squares.T) / 2)
    return apart


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median of each column of [n, B], float64 [B]; where it is 0, as among copies, the mean."""
    found: NDArray[np.float64] = np.median(values, axis=0)
    return np.where(found > 0, found, values.mean(axis=0))


def _fits(learn: Learn) -> bool:
    """Return whether the learning rate fits the ingredients: steps of SGD are as long as the gradient."""
    return learn.lr == "auto" and learn.optimizer == "adamw"


def largest_rate(learn: Learn, coordinates: int) -> float:
    """Return the learning rate before its schedule, given how many coordinates move at a time."""
    if learn.lr != "auto":
        return learn.lr
    return min(LENGTH / math.sqrt(coordinates), MOST) if _fits(learn) else FIXED

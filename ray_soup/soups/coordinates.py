"""What the optimizer moves in a turn: unit-scaled coordinates, whitened ones, or those of learn.lr: auto.

An optimizer of Adam's kind moves every coordinate by about the learning rate, so that a good rate depends on how far apart
the ingredients are, and on how many coordinates move at a time. learn.lr: auto takes both out. It moves

    z[:, b] = y[:, b] / s[b],        s[b] = mean_k n[k, b]        (K ingredients, n the norms of their directions)

with the learning rate LENGTH / sqrt(m B), which makes the first step about LENGTH long: a step moves each block in
proportion to how far the ingredients differ in it.

Shapes: m ingredients of the model batch, K ingredients, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.coefficients import Affine, Softmax
from ray_soup.recipe import Learn
from ray_soup.soups.optimize import parametrization, without_noise
from ray_soup.soups.whitening import Whitened, whitened

LENGTH = 0.8
"""Length of the first step in units of the spread of the ingredients: chosen on small zoos; 0.4 to 1.6 differ little."""


@dataclass(frozen=True)
class Relative:
    """The parametrization of MEHL soups in coordinates z, whose unit is the mean distance of ingredients from the center."""

    of: Affine | Whitened
    """The parametrization that z is a scaling of."""
    spread: NDArray[np.float64]
    """float64 [B], the mean norm of the directions in each block."""
    learns_factor: ClassVar[bool] = False

    @property
    def norms(self) -> NDArray[np.float64]:
        """Norms of the directions, float64 [m, B]."""
        return self.of.norms

    def from_y(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute z from y: float64 [m, B] each."""
        z: NDArray[np.float64] = self.of.from_y(y) / self.spread
        return z

    def to_y(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute y from z: float64 [m, B] each."""
        return self.of.to_y(z * self.spread)

    def x(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the factors x of the directions from z: float64 [m, B] each."""
        return self.of.x(z * self.spread)

    def gradient(self, z: NDArray[np.float64], by_x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute dL/dz from z and dL/dx: float64 [m, B] each."""
        gradient: NDArray[np.float64] = without_noise(self.of.gradient(z * self.spread, by_x)) * self.spread
        return gradient

    def coefficients(self, z: NDArray[np.float64]) -> NDArray[np.float64]:
        """Compute the coefficients of the ingredients from z: float64 [m, B] each."""
        return self.of.coefficients(z * self.spread)


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
        of = whitened(norms[chosen], gram[:, chosen][:, :, chosen], y[chosen], len(chosen) == len(norms))
    if learn.lr != "auto":
        return of
    spread = np.median(norms, axis=0)
    return Relative(of, np.where(spread > 0, spread, 1.0))


def largest_rate(learn: Learn, coordinates: int) -> float:
    """Return the learning rate before its schedule, given how many coordinates move at a time."""
    return LENGTH / float(np.sqrt(coordinates)) if learn.lr == "auto" else learn.lr

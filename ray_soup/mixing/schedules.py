"""Weights of the checkpoints of one run that amount to a decay of its learning rate.

    theta_soup = sum_j c_j theta_j = theta_0 + sum_i w_i (theta_i - theta_{i-1}),    w_i = sum_{j >= i} c_j

The update that leads to checkpoint i is scaled by w_i, as if the learning rate had been scaled by it (WSM, Tian et al. 2025,
arXiv 2507.17634). So the weights of a decay are the differences of its values, c_i = w_i - w_{i+1}, with w_0 = 1 and
w_W = 0. Values are taken as in Megatron-LM (#5114), at i / W for equidistant checkpoints: the decay would reach 0 one
interval after the last of them. Equal weights are then a linear decay.

Shapes: W checkpoints, ordered by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}
"""Decays of the learning rate, from 1 at 0 to 0 at 1."""
EQUAL = "uniform"
"""The shape of equal weights, whatever the distances between checkpoints."""
DECAYS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Decays of an exponential moving average that are tried."""
MOST_WINDOWS = 32
"""With more checkpoints, only some windows are tried."""
_GRID = 2.0**53  # sums of multiples of 1 / _GRID up to 1 are exact in float64


def weights_of(decay: Sequence[float]) -> NDArray[np.float64]:
    """Compute c_i = w_i - w_{i+1} from the values w of a decay, w_0 = 1: float64 [W].

    The values are rounded to multiples of 2^-53, so that the weights sum to exactly 1 in any order.
    """
    w = np.round(np.asarray(decay, dtype=np.float64) * _GRID) / _GRID
    found: NDArray[np.float64] = -np.diff(w, append=0)
    return found


def decay_of(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute w_i, the sum of the weights from checkpoint i on: float64 [W, ...] each."""
    found: NDArray[np.float64] = np.cumsum(weights[::-1], axis=0)[::-1]
    return found


def schedule(shape: str, steps: Sequence[int]) -> NDArray[np.float64]:
    """Return the weights, float64 [W], of the checkpoints at these steps.

    Args:
        shape: a key of SHAPES, for a decay by step, or EQUAL.
        steps: the W steps, ascending.
    """
    if shape == EQUAL:
        return schedule("linear", range(len(steps)))
    span, count = steps[-1] - steps[0], len(steps)
    places = [(step - steps[0]) * (count - 1) / (span * count) for step in steps] if count > 1 else [0.0]
    return weights_of([SHAPES[shape](place) for place in places])


def average(decay: float, count: int) -> NDArray[np.float64]:
    """Return the weights, float64 [W], of `count` checkpoints in their exponential moving average.

    e_0 = theta_0, e_i = decay e_{i-1} + (1 - decay) theta_i, so that w_i = 1 - decay^(W - i) for i > 0.
    """
    return weights_of([1.0, *(1 - decay ** (count - i) for i in range(1, count))])


def are_even(steps: Sequence[int]) -> bool:
    """Return whether steps, in any order, are equidistant, so that equal weights are a linear decay."""
    return len(np.unique(np.diff(np.sort(np.asarray(steps))))) <= 1


def windows(count: int) -> list[int]:
    """Return the windows to try for `count` checkpoints: 2 to count, or powers of the square root of 2 if that is many."""
    if count <= MOST_WINDOWS:
        return list(range(2, count + 1)) or [count]
    grown = (round(2 ** (n / 2)) for n in range(2, 2 * count.bit_length() + 2))
    return sorted({count, *(window for window in grown if window < count)})

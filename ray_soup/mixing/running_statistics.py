"""Running statistics of BatchNorm and related layers: their names, and their means over batches.

A soup's activations differ from those of every ingredient, so the mean of the ingredients' statistics does not fit them.
Sums over parts of the batches (recalibration.py) add up: actors share the batches, and the result does not depend on the
number of actors, up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import SoupError

KEYS = ("running_mean", "running_var", "num_batches_tracked")
Statistics = dict[str, NDArray[Any]]
"""Arrays by buffer name: running_mean and running_var float32 [channels], num_batches_tracked int64 []."""
Sums = dict[str, NDArray[Any]]
"""Sums over batches by buffer name: of means and variances float64 [channels], of the number of batches float64 []."""


def buffers_of(layers: Iterable[str]) -> list[str]:
    """Return the state dict names of the buffers of these layers."""
    return [f"{layer}.{key}" if layer else key for layer in layers for key in KEYS]


def averaged(parts: Sequence[Sums]) -> Statistics:
    """Turn sums over parts of the batches into statistics.

    The parts are added in order and divided by the number of batches once. A layer that saw no input is omitted.

    Raises SoupError if a statistic is not finite.
    """
    sums: dict[str, Any] = {name: sum(part[name] for part in parts) for name in parts[0]}
    found: Statistics = {}
    for layer in [name.removesuffix(KEYS[2]) for name in sums if name.endswith(KEYS[2])]:
        mean, var, count = (layer + key for key in KEYS)
        if sums[count] == 0:
            continue
        for name in (mean, var):
            found[name] = (sums[name] / sums[count]).astype(np.float32)
            if not np.isfinite(found[name]).all():
                raise SoupError(f"The soup's {name} is not finite: its activations are too large. Lower learn.lr.")
        found[count] = np.asarray(sums[count], dtype=np.int64)
    return found

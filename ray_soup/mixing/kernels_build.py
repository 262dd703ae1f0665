"""CPU loops that build a direction store, compiled with numba; each passes over memory once.

Shapes: K ingredients, C chunks, n elements of a range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.compiled import add_rows, addresses, carray, implements, jit, pointer, types
from ray_soup.mixing.kernels_int4 import pack
from ray_soup.mixing.store_format import GROUP, GROUP_BYTES


@jit
def _direction(
    row: NDArray[Any],
    mean: NDArray[np.float64],
    largest_and_square: NDArray[np.float64],
    direction: NDArray[np.float32],
) -> None:
    """Compute direction = row - mean, its largest absolute value and its sum of squares."""
    largest = np.uint32(0)  # of the bits without the sign: their order is that of the values, and the loop vectorizes
    square = 0.0
    for i in range(mean.size):
        d = np.float32(row[i] - mean[i])
        direction[i] = d
        largest = max(largest, d.view(np.uint32) & np.uint32(0x7FFFFFFF))
        square += np.float64(d) * np.float64(d)
    largest_and_square[0] = np.uint32(largest).view(np.float32)
    largest_and_square[1] = square


def _store(direction: Any, largest: Any, row: Any, start: Any) -> Any: ...


@implements(_store)
def _store_as(direction: Any, largest: Any, row: Any, start: Any) -> Callable[..., Any]:
    """Write a direction to a row, from element `start` on, in its dtype; returns the scale that restores the elements."""
    if row.dtype == types.int8:

        def store(direction: Any, largest: Any, row: Any, start: Any) -> Any:
            scale = np.float32(largest / np.float32(127.0))
            inverse = np.float32(0.0) if scale == 0.0 else np.float32(1.0) / scale
            out = row[start : start + direction.size]
            for i in range(direction.size):
                out[i] = np.int8(np.rint(direction[i] * inverse))
            return scale

    elif row.dtype == types.uint16:

        def store(direction: Any, largest: Any, row: Any, start: Any) -> Any:
            bits = direction.view(np.uint32)
            out = row[start : start + direction.size]
            for i in range(direction.size):  # round to nearest, ties to even
                out[i] = np.uint16(
                    (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
            return np.float32(1.0)

    elif row.dtype == types.uint8:

        def store(direction: Any, largest: Any, row: Any, start: Any) -> Any:
            pack(direction, row[start // GROUP * GROUP_BYTES :])
            return np.float32(1.0)

    else:

        def store(direction: Any, largest: Any, row: Any, start: Any) -> Any:
            row[start : start + direction.size] = direction
            return np.float32(1.0)

    return store


def center_and_directions(
    parts: Sequence[NDArray[Any]],
    chunk: int,
    center: NDArray[np.float32],
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    squares: NDArray[np.float64],
) -> bool:
    """Compute the center and the directions of a range of the parameter vector, chunk by chunk.

    Args:
        parts: K arrays float32 or float64 [n], the range of each ingredient.
        chunk: number of elements of a chunk.
        center: float32 [n], overwritten.
        rows: float32, uint16 (bits of bfloat16) or int8 [K, n], or uint8 [K, bytes] (int4), overwritten.
        scales: float32 [K, C], overwritten.
        squares: float64 [K + 1], incremented by the sums of squares of the directions and, last, of the center.

    Returns:
        False if the mean is not finite.
    """
    found = addresses(parts, len(center))
    return bool(_center_and_directions(found, parts[0][:0], chunk, center, rows, scales, squares))


@jit
def _center_and_directions(
    addresses: NDArray[np.uint64],
    like: NDArray[Any],
    chunk: int,
    center: NDArray[np.float32],
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    squares: NDArray[np.float64],
) -> bool:
    ingredients = addresses.size
    mean, ones = np.empty(chunk, np.float64), np.ones(ingredients)
    direction = np.empty(chunk, np.float32)
    found = np.empty(2, np.float64)
    finite = True
    for c in range((center.size + chunk - 1) // chunk):
        start, stop = c * chunk, min((c + 1) * chunk, center.size)
        m = mean[: stop - start]
        d = direction[: stop - start]
        m[:] = 0.0
        add_rows(m, ones, addresses, like, start, stop)
        to = center[start:stop]
        square = 0.0
        for i in range(m.size):
            m[i] /= ingredients
            to[i] = m[i]
            square += m[i] * m[i]
        finite = finite and np.isfinite(square)
        squares[ingredients] += square
        for k in range(ingredients):
            row = carray(pointer(addresses[k], like), (center.size,))[start:stop]
            _direction(row, m, found, d)
            squares[k] += found[1]
            scales[k, c] = _store(d, np.float32(found[0]), rows[k], start)
    return finite

"""CPU loops over all elements of a soup, compiled with numba; each passes over memory once.

The loops release the GIL, so that callers can split the work over threads; the results do not depend on the split.
Rows are read in place, as float32, bfloat16 (given as its uint16 bits), int8, or int4 (uint8, packed as kernels_int4 says).

Shapes: K ingredients, m ingredients of the model batch, B blocks, C chunks, P pieces, n elements of a range.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.compiled import add_rows, addresses, implements, intrinsic, ir, jit, types
from ray_soup.mixing.kernels_int4 import add_groups, dot_groups, square_of_groups

SPAN = 2048  # elements per step: their float64 sums stay in the first-level cache
STRETCH = 8192  # elements of a direction per step: several pages, which the processor's prefetcher follows


@intrinsic
def _bfloat16_bits_to_float32(_context: Any, _bits: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), code


def _as_float32(number: Any) -> Any: ...


@implements(_as_float32, inline="always")
def _as_float32_of(number: Any) -> Callable[..., Any]:
    if number == types.uint16:

        def convert(number: Any) -> Any:
            return _bfloat16_bits_to_float32(number)

    else:

        def convert(number: Any) -> Any:
            return np.float32(number)

    return convert


def mix(rows: Sequence[NDArray[Any]], factors: NDArray[np.float64], out: NDArray[Any]) -> bool:
    """Compute out[i] = sum_k factors[k] * rows[k][i], accumulated in float64 in the order of k.

    Args:
        rows: K arrays float32 or float64 [n].
        factors: float64 [K].
        out: float32 or float64 [n], overwritten.

    Returns:
        False if a sum is not finite.
    """
    if factors.shape != (len(rows),):
        raise ValueError(f"{len(rows)} rows, but factors {list(factors.shape)}")
    return bool(_mix(addresses(rows, len(out)), rows[0][:0], factors, out))


@jit
def _mix(addresses: NDArray[np.uint64], like: NDArray[Any], factors: NDArray[np.float64], out: NDArray[Any]) -> bool:
    total = np.empty(SPAN, np.float64)
    not_finite = 0.0
    for start in range(0, out.size, SPAN):
        stop = min(start + SPAN, out.size)
        part = total[: stop - start]
        part[:] = 0.0
        add_rows(part, factors, addresses, like, start, stop)
        to = out[start:stop]
        for i in range(part.size):
            to[i] = part[i]
            not_finite += to[i] - to[i]  # stays 0 as long as all sums are finite; NaN from then on
    return not_finite == 0.0


@jit
def _add_scaled_rows(
    total: NDArray[np.float32],
    rows: NDArray[Any],
    four: NDArray[np.int64],
    factors: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Compute total += sum_j factors[j] * rows[four[j], start:stop] for four rows."""
    a0, a1, a2, a3 = factors[0], factors[1], factors[2], factors[3]
    r0, r1 = rows[four[0], start:stop], rows[four[1], start:stop]
    r2, r3 = rows[four[2], start:stop], rows[four[3], start:stop]
    for i in range(total.size):
        total[i] += (a0 * _as_float32(r0[i]) + a1 * _as_float32(r1[i])) + (a2 * _as_float32(r2[i]) + a3 * _as_float32(r3[i]))


def _add_rows(total: Any, rows: Any, four: Any, factors: Any, start: Any, stop: Any) -> Any: ...


@implements(_add_rows, inline="always")
def _add_rows_of(total: Any, rows: Any, four: Any, factors: Any, start: Any, stop: Any) -> Callable[..., Any]:
    if rows.dtype == types.uint8:

        def add(total: Any, rows: Any, four: Any, factors: Any, start: Any, stop: Any) -> Any:
            add_groups(total, rows, four, factors, start, stop)

    else:

        def add(total: Any, rows: Any, four: Any, factors: Any, start: Any, stop: Any) -> Any:
            _add_scaled_rows(total, rows, four, factors, start, stop)

    return add


@jit
def combine(
    out: NDArray[np.float32],
    base: NDArray[np.float32],
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    pieces: NDArray[np.int64],
    low: int,
    chosen: NDArray[np.int64],
    x: NDArray[np.float32],
) -> None:
    """Compute out[i] = base[i] + sum_j x[j, block] * scales[chosen[j], chunk] * rows[chosen[j], i], over the pieces.

    Args:
        out: float32 [n], overwritten within the pieces; its element 0 is parameter `low` of the parameter vector.
        base: float32 [n], aligned with out.
        rows: float32, uint16 (bits of bfloat16) or int8 [K, N], or uint8 [K, bytes] (int4), the compressed directions.
        scales: float32 [K, C].
        pieces: int64 [P, 5] of (start, stop, block, chunk, place), start and stop in the parameter vector, place in a row.
        low: first parameter of the slice.
        chosen: int64 [m], the ingredients of the model batch.
        x: float32 [m, B].
    """
    m = chosen.size
    padded = (m + 3) // 4 * 4
    four = np.zeros(padded, np.int64)
    four[:m] = chosen
    factors = np.zeros(padded, np.float32)
    for p in range(pieces.shape[0]):
        start, stop, block, chunk, place = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3], pieces[p, 4]
        for j in range(m):
            factors[j] = x[j, block] * scales[chosen[j], chunk]
        for s in range(start, stop, STRETCH):
            e = min(s + STRETCH, stop)
            total = out[s - low : e - low]
            total[:] = base[s - low : e - low]
            for j in range(0, padded, 4):
                _add_rows(total, rows, four[j : j + 4], factors[j : j + 4], s - start + place, e - start + place)


@jit
def _square_of_row(row: NDArray[Any]) -> float:
    total = 0.0
    for i in range(row.size):
        value = np.float64(_as_float32(row[i]))
        total += value * value
    return total


def _square(rows: Any, k: Any, start: Any, stop: Any) -> Any: ...


@implements(_square, inline="always")
def _square_of(rows: Any, k: Any, start: Any, stop: Any) -> Callable[..., Any]:
    if rows.dtype == types.uint8:

        def square(rows: Any, k: Any, start: Any, stop: Any) -> Any:
            return square_of_groups(rows[k], start, stop)

    else:

        def square(rows: Any, k: Any, start: Any, stop: Any) -> Any:
            return _square_of_row(rows[k, start:stop])

    return square


@jit
def add_squares(
    rows: NDArray[Any], scales: NDArray[np.float32], pieces: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    """Compute out[k, block] += sum_i (scales[k, chunk] * rows[k, i])^2, over the pieces.

    Arguments are as for `combine`; `out`, float64 [K, B], is incremented by the sums.
    """
    for p in range(pieces.shape[0]):
        start, stop, block, chunk, place = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3], pieces[p, 4]
        for k in range(rows.shape[0]):
            scale = np.float64(scales[k, chunk])
            out[k, block] += _square(rows, k, place, place + stop - start) * scale * scale


@jit
def _dots(
    gradient: NDArray[np.float32],
    rows: NDArray[Any],
    four: NDArray[np.int64],
    sums: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Compute sums[j] = <gradient, rows[four[j], start:stop]> for four rows."""
    r0, r1 = rows[four[0], start:stop], rows[four[1], start:stop]
    r2, r3 = rows[four[2], start:stop], rows[four[3], start:stop]
    s0 = s1 = s2 = s3 = np.float32(0.0)
    for i in range(gradient.size):
        g = gradient[i]
        s0 += g * _as_float32(r0[i])
        s1 += g * _as_float32(r1[i])
        s2 += g * _as_float32(r2[i])
        s3 += g * _as_float32(r3[i])
    sums[0] = s0
    sums[1] = s1
    sums[2] = s2
    sums[3] = s3


def _dots_of_rows(gradient: Any, rows: Any, four: Any, sums: Any, start: Any, stop: Any) -> Any: ...


@implements(_dots_of_rows, inline="always")
def _dots_of_rows_of(gradient: Any, rows: Any, four: Any, sums: Any, start: Any, stop: Any) -> Callable[..., Any]:
    if rows.dtype == types.uint8:

        def dots(gradient: Any, rows: Any, four: Any, sums: Any, start: Any, stop: Any) -> Any:
            dot_groups(gradient, rows, four, sums, start, stop)

    else:

        def dots(gradient: Any, rows: Any, four: Any, sums: Any, start: Any, stop: Any) -> Any:
            _dots(gradient, rows, four, sums, start, stop)

    return dots


@jit
def project(
    gradient: NDArray[np.float32],
    rows: NDArray[Any],
    scales: NDArray[np.float32],
    pieces: NDArray[np.int64],
    low: int,
    chosen: NDArray[np.int64],
    out: NDArray[np.float64],
) -> None:
    """Compute out[j, block] += sum_i scales[chosen[j], chunk] * rows[chosen[j], i] * gradient[i], over the pieces.

    Args:
        gradient: float32 [n]; its element 0 is parameter `low` of the parameter vector.
        rows: float32, uint16 (bits of bfloat16) or int8 [K, N], or uint8 [K, bytes] (int4), the compressed directions.
        scales: float32 [K, C].
        pieces: int64 [P, 5] of (start, stop, block, chunk, place), start and stop in the parameter vector, place in a row.
        low: first parameter of the slice.
        chosen: int64 [m], the ingredients of the model batch.
        out: float64 [m, B], incremented by the sums.
    """
    m = chosen.size
    padded = (m + 3) // 4 * 4
    four = np.zeros(padded, np.int64)
    four[:m] = chosen
    sums = np.empty(4, np.float64)
    piece = np.empty(padded, np.float64)
    for p in range(pieces.shape[0]):
        start, stop, block, chunk, place = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3], pieces[p, 4]
        piece[:] = 0.0
        for s in range(start, stop, STRETCH):
            e = min(s + STRETCH, stop)
            for j in range(0, padded, 4):
                part = gradient[s - low : e - low]
                _dots_of_rows(part, rows, four[j : j + 4], sums, s - start + place, e - start + place)
                piece[j : j + 4] += sums
        for j in range(m):
            out[j, block] += piece[j] * scales[chosen[j], chunk]

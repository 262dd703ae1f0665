"""The loops that touch every number of a soup, compiled for the CPU at hand: each passes over memory once.

They release the GIL, so that a caller splits the work over threads; no loop depends on how it was split. Rows are read where
they lie, as float32, int8 or bfloat16 (given as its uint16 bits).
"""

from __future__ import annotations

import os
from typing import Any

from ray_soup.cache import cache_folder

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

SPAN = 2048  # numbers worked on at a time: what is accumulated in float64 stays in the first-level cache
STRETCH = 8192  # likewise of directions: rows are read in stretches of several pages, which the processor fetches ahead

jit = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@intrinsic
def _bfloat16_bits_to_float32(_context: Any, _bits: Any) -> Any:
    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16)), ir.FloatType())

    return types.float32(types.uint16), code


def _as_float32(number): ...


@overload(_as_float32, inline="always")
def _as_float32_of(number):
    if number == types.uint16:
        return lambda number: _bfloat16_bits_to_float32(number)
    return lambda number: np.float32(number)


@intrinsic
def _pointer(_context: Any, _address: Any, like: Any) -> Any:
    """The address as a pointer to numbers of the dtype of the array `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.uint64, like), code


@jit
def _add_scaled(total, factor, row):
    for i in range(total.size):
        total[i] += factor * row[i]


@jit
def mix(addresses, like, factors, out):
    """out[i] = sum over k of factors[k] * row_k[i], accumulated in float64 in the order of k.

    Row k begins at addresses[k] (uint64 [K]) and holds out.size numbers of the dtype of `like`. Returns False if a sum is
    not finite.
    """
    total = np.empty(SPAN, np.float64)
    not_finite = 0.0
    for start in range(0, out.size, SPAN):
        stop = min(start + SPAN, out.size)
        part = total[: stop - start]
        part[:] = 0.0
        for k in range(addresses.size):
            row = numba.carray(_pointer(addresses[k], like), (out.size,))
            _add_scaled(part, factors[k], row[start:stop])
        to = out[start:stop]
        for i in range(part.size):
            to[i] = part[i]
            not_finite += to[i] - to[i]  # 0, or not a number from the first infinity on
    return not_finite == 0.0


@jit
def _direction(row, mean, largest_and_square, direction):
    """direction = row - mean; largest absolute value and sum of squares."""
    largest = np.uint32(0)  # of the bits without the sign, which are in the order of the numbers: a loop of vectors
    square = 0.0
    for i in range(mean.size):
        d = np.float32(row[i] - mean[i])
        direction[i] = d
        largest = max(largest, d.view(np.uint32) & np.uint32(0x7FFFFFFF))
        square += np.float64(d) * np.float64(d)
    largest_and_square[0] = np.uint32(largest).view(np.float32)
    largest_and_square[1] = square


def _store(direction, largest, out): ...


@overload(_store)
def _store_as(direction, largest, out):
    """Write a direction in the dtype of `out`; returns the scale that it is to be multiplied with."""
    if out.dtype == types.int8:

        def store(direction, largest, out):
            scale = np.float32(largest / np.float32(127.0))
            inverse = np.float32(0.0) if scale == 0.0 else np.float32(1.0) / scale
            for i in range(direction.size):
                out[i] = np.int8(np.rint(direction[i] * inverse))
            return scale

    elif out.dtype == types.uint16:

        def store(direction, largest, out):
            bits = direction.view(np.uint32)
            for i in range(direction.size):  # round to nearest, ties to even
                out[i] = np.uint16(
                    (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
            return np.float32(1.0)

    else:

        def store(direction, largest, out):
            out[:] = direction
            return np.float32(1.0)

    return store


@jit
def center_and_directions(addresses, like, chunk, center, rows, scales, squares):
    """Center and directions of a range of the parameter vector, chunk by chunk.

    center [n] float32 and rows [K, n] (int8, uint16 bits of bfloat16, or float32) are written, scales [K, chunks] too;
    squares [K + 1] gains the directions' sums of squares and, last, that of the center. Ingredient k begins at
    addresses[k] and holds n numbers of the dtype of `like`. Returns False if the mean is not finite.
    """
    ingredients = addresses.size
    mean = np.empty(chunk, np.float64)
    direction = np.empty(chunk, np.float32)
    found = np.empty(2, np.float64)
    finite = True
    for c in range((center.size + chunk - 1) // chunk):
        start, stop = c * chunk, min((c + 1) * chunk, center.size)
        m = mean[: stop - start]
        d = direction[: stop - start]
        m[:] = 0.0
        for k in range(ingredients):
            _add_scaled(m, 1.0, numba.carray(_pointer(addresses[k], like), (center.size,))[start:stop])
        to = center[start:stop]
        square = 0.0
        for i in range(m.size):
            m[i] /= ingredients
            to[i] = m[i]
            square += m[i] * m[i]
        finite = finite and np.isfinite(square)
        squares[ingredients] += square
        for k in range(ingredients):
            row = numba.carray(_pointer(addresses[k], like), (center.size,))[start:stop]
            _direction(row, m, found, d)
            squares[k] += found[1]
            scales[k, c] = _store(d, np.float32(found[0]), rows[k, start:stop])
    return finite


@jit
def _add_scaled_rows(total, rows, four, factors, start, stop):
    """total += sum of factors[j] * rows[four[j], start:stop] for four rows."""
    a0, a1, a2, a3 = factors[0], factors[1], factors[2], factors[3]
    r0, r1 = rows[four[0], start:stop], rows[four[1], start:stop]
    r2, r3 = rows[four[2], start:stop], rows[four[3], start:stop]
    for i in range(total.size):
        total[i] += (a0 * _as_float32(r0[i]) + a1 * _as_float32(r1[i])) + (a2 * _as_float32(r2[i]) + a3 * _as_float32(r3[i]))


@jit
def combine(out, base, rows, scales, pieces, low, chosen, x):
    """out[i] = base[i] + sum over j of x[j, block] * scales[chosen[j], chunk] * rows[chosen[j], i], over the pieces.

    out, base float32, their number 0 being number `low` of the parameter vector; rows [K, N]; scales [K, chunks];
    pieces int64 [P, 4] as (start, stop, block, chunk); chosen int64 [m]; x float32 [m, B].
    """
    m = chosen.size
    padded = (m + 3) // 4 * 4
    four = np.zeros(padded, np.int64)
    four[:m] = chosen
    factors = np.zeros(padded, np.float32)
    for p in range(pieces.shape[0]):
        start, stop, block, chunk = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
        for j in range(m):
            factors[j] = x[j, block] * scales[chosen[j], chunk]
        for s in range(start, stop, STRETCH):
            e = min(s + STRETCH, stop)
            total = out[s - low : e - low]
            total[:] = base[s - low : e - low]
            for j in range(0, padded, 4):
                _add_scaled_rows(total, rows, four[j : j + 4], factors[j : j + 4], s, e)


@jit
def _dots(gradient, rows, four, sums, start, stop):
    """sums[j] = <gradient, rows[four[j], start:stop]> for four rows."""
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


@jit
def project(gradient, rows, scales, pieces, low, chosen, out):
    """out[j, block] += sum over i of scales[chosen[j], chunk] * rows[chosen[j], i] * gradient[i], over the pieces.

    Arguments as in `combine`; out float64 [m, B].
    """
    m = chosen.size
    padded = (m + 3) // 4 * 4
    four = np.zeros(padded, np.int64)
    four[:m] = chosen
    sums = np.empty(4, np.float64)
    piece = np.empty(padded, np.float64)
    for p in range(pieces.shape[0]):
        start, stop, block, chunk = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
        piece[:] = 0.0
        for s in range(start, stop, STRETCH):
            e = min(s + STRETCH, stop)
            for j in range(0, padded, 4):
                _dots(gradient[s - low : e - low], rows, four[j : j + 4], sums, s, e)
                piece[j : j + 4] += sums
        for j in range(m):
            out[j, block] += piece[j] * scales[chosen[j], chunk]

"""CPU loops over all elements of a soup, compiled with numba; each passes over memory once.

The loops release the GIL, so that callers can split the work over threads; the results do not depend on the split.
Rows are read in place, as float32, int8 or bfloat16 (given as its uint16 bits).

Shapes: K ingredients, m ingredients of the model batch, B blocks, C chunks, P pieces, n elements of a range.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from ray_soup.io.cache import cache_folder

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "numba"))  # numba reads it when it is imported

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic as numba_intrinsic
from numba.extending import overload as numba_overload
from numpy.typing import NDArray

SPAN = 2048  # elements per step: their float64 sums stay in the first-level cache
STRETCH = 8192  # elements of a direction per step: several pages, which the processor's prefetcher follows

carray = numba.carray  # type: ignore[attr-defined] # an array over memory; numba does not export it in its types

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile a loop with numba. The fast-math flags allow vector sums, but keep NaN and infinity intact."""
    decorate = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})
    return cast(F, decorate(function))


def intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a generator of LLVM code callable from compiled loops, without its leading typing context."""
    made: Callable[..., Any] = numba_intrinsic(function)
    return made


def implements(stub: Callable[..., Any], **options: Any) -> Callable[[F], F]:
    """Register the decorated function as the implementation of `stub` in compiled loops, chosen by argument types."""
    decorate: Callable[[F], F] = numba_overload(stub, **options)
    return decorate


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


@intrinsic
def _pointer(_context: Any, _address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the dtype of the array `like`."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.uint64, like), code  # type: ignore[no-untyped-call]


@jit
def _add_scaled(total: NDArray[np.float64], factor: float, row: NDArray[Any]) -> None:
    for i in range(total.size):
        total[i] += factor * row[i]


def addresses(rows: Sequence[NDArray[Any]], size: int) -> NDArray[np.uint64]:
    """Return the memory address of each row, uint64 [K], for loops that read `size` elements of one dtype from it.

    Compiled loops check nothing, so this is the only place where an address is taken. The rows have to outlive its use.

    Raises ValueError for a row that is not [size], contiguous and aligned, or whose dtype is not that of the first.
    """
    for k, row in enumerate(rows):
        if row.shape != (size,) or row.dtype != rows[0].dtype or not (row.flags.c_contiguous and row.flags.aligned):
            raise ValueError(
                f"row {k} is {row.dtype} {list(row.shape)} with the strides {row.strides}; expected {rows[0].dtype} "
                f"[{size}], contiguous and aligned"
            )
    return np.array([row.ctypes.data for row in rows], dtype=np.uint64)


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
        for k in range(addresses.size):
            row = carray(_pointer(addresses[k], like), (out.size,))
            _add_scaled(part, factors[k], row[start:stop])
        to = out[start:stop]
        for i in range(part.size):
            to[i] = part[i]
            not_finite += to[i] - to[i]  # stays 0 as long as all sums are finite; NaN from then on
    return not_finite == 0.0


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


def _store(direction: Any, largest: Any, out: Any) -> Any: ...


@implements(_store)
def _store_as(direction: Any, largest: Any, out: Any) -> Callable[..., Any]:
    """Write a direction in the dtype of `out`; returns the scale that restores it by multiplication."""
    if out.dtype == types.int8:

        def store(direction: Any, largest: Any, out: Any) -> Any:
            scale = np.float32(largest / np.float32(127.0))
            inverse = np.float32(0.0) if scale == 0.0 else np.float32(1.0) / scale
            for i in range(direction.size):
                out[i] = np.int8(np.rint(direction[i] * inverse))
            return scale

    elif out.dtype == types.uint16:

        def store(direction: Any, largest: Any, out: Any) -> Any:
            bits = direction.view(np.uint32)
            for i in range(direction.size):  # round to nearest, ties to even
                out[i] = np.uint16(
                    (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                )
            return np.float32(1.0)

    else:

        def store(direction: Any, largest: Any, out: Any) -> Any:
            out[:] = direction
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
        rows: int8, uint16 (bits of bfloat16) or float32 [K, n], overwritten.
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
            _add_scaled(m, 1.0, carray(_pointer(addresses[k], like), (center.size,))[start:stop])
        to = center[start:stop]
        square = 0.0
        for i in range(m.size):
            m[i] /= ingredients
            to[i] = m[i]
            square += m[i] * m[i]
        finite = finite and np.isfinite(square)
        squares[ingredients] += square
        for k in range(ingredients):
            row = carray(_pointer(addresses[k], like), (center.size,))[start:stop]
            _direction(row, m, found, d)
            squares[k] += found[1]
            scales[k, c] = _store(d, np.float32(found[0]), rows[k, start:stop])
    return finite


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
        rows: int8, uint16 (bits of bfloat16) or float32 [K, N], the compressed directions.
        scales: float32 [K, C].
        pieces: int64 [P, 4] of (start, stop, block, chunk), start and stop in the parameter vector.
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
def add_squares(
    rows: NDArray[Any], scales: NDArray[np.float32], pieces: NDArray[np.int64], out: NDArray[np.float64]
) -> None:
    """Compute out[k, block] += sum_i (scales[k, chunk] * rows[k, i])^2, over the pieces.

    Arguments are as for `combine`; `out`, float64 [K, B], is incremented by the sums.
    """
    for p in range(pieces.shape[0]):
        start, stop, block, chunk = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
        for k in range(rows.shape[0]):
            row = rows[k, start:stop]
            total = 0.0
            for i in range(row.size):
                value = np.float64(_as_float32(row[i]))
                total += value * value
            scale = np.float64(scales[k, chunk])
            out[k, block] += total * scale * scale


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
        rows: int8, uint16 (bits of bfloat16) or float32 [K, N], the compressed directions.
        scales: float32 [K, C].
        pieces: int64 [P, 4] of (start, stop, block, chunk), start and stop in the parameter vector.
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
        start, stop, block, chunk = pieces[p, 0], pieces[p, 1], pieces[p, 2], pieces[p, 3]
        piece[:] = 0.0
        for s in range(start, stop, STRETCH):
            e = min(s + STRETCH, stop)
            for j in range(0, padded, 4):
                _dots(gradient[s - low : e - low], rows, four[j : j + 4], sums, s, e)
                piece[j : j + 4] += sums
        for j in range(m):
            out[j, block] += piece[j] * scales[chosen[j], chunk]

"""CPU loops over int4 directions, compiled with numba.

Rows are packed in groups, as mixing.store_format says. A group is decompressed in registers, by vectors of LLVM that become
the instructions of any processor. An element is computed in the same way wherever a range begins: bits do not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.mixing.compiled import cgutils, intrinsic, ir, jit, types
from ray_soup.mixing.store_format import GROUP, GROUP_BYTES

HALF = GROUP // 2  # elements that share a scale
LANES = 16  # of a vector; a processor with shorter ones takes several

_i8, _i16, _i32, _i64, _float = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_floats, _words, _bytes = (ir.VectorType(kind, LANES) for kind in (_float, _i32, _i8))
_CONTRACT = ("contract",)  # a product and a sum may be one instruction, for each element alike
_SHIFT = 28  # moves the low four bits of a word to its sign
SMALLEST = np.float32(np.finfo(np.float32).tiny * 2.0**_SHIFT)  # scale; times 2^-28, a smaller one would lose bits


def _vector(builder: Any, start: Any, offset: int, kind: Any = _floats) -> Any:
    """The address of the vector that begins `offset` elements from `start` on."""
    return builder.bitcast(builder.gep(start, [ir.Constant(_i64, offset)]), kind.as_pointer())


def _same(builder: Any, value: Any) -> Any:
    """A vector of one float."""
    undefined = ir.Constant(_floats, ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_words, [0] * LANES))


def _scales(builder: Any, group: Any) -> tuple[Any, Any]:
    """The floats that the integers of `_codes` are multiplied by, for both halves of the group at an address."""
    both = builder.load(builder.bitcast(group, _i32.as_pointer()), align=1)
    first = builder.bitcast(builder.shl(both, ir.Constant(_i32, 16)), _float)
    second = builder.bitcast(builder.and_(both, ir.Constant(_i32, 0xFFFF0000)), _float)
    return builder.fmul(first, ir.Constant(_float, 2.0**-_SHIFT), flags=_CONTRACT), second


def _codes(builder: Any, group: Any, byte: int) -> tuple[Any, Any]:
    """The integers of LANES bytes of a group from `byte` on, as floats: the low ones times 2^28, and the high ones."""
    packed = builder.load(_vector(builder, group, 4 + byte, _bytes), align=1)
    wide = builder.sext(packed, _words)
    low = builder.shl(wide, ir.Constant(_words, [_SHIFT] * LANES))
    high = builder.ashr(wide, ir.Constant(_words, [4] * LANES))
    return builder.sitofp(low, _floats), builder.sitofp(high, _floats)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)


def _loop(context: Any, builder: Any, signature: Any, arguments: Any, work: Callable[..., None]) -> None:
    """Call `work` with the address of each group's first float, and those of the group in each of four rows.

    The first arguments of the loops below: array, start, four rows, group, count. The groups from `group` on belong to the
    floats of the array from `start` on.
    """
    array, *rows = (context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 2, 3, 4, 5))
    start, group, count = arguments[1], arguments[6], arguments[7]
    with cgutils.for_range(builder, count) as loop:
        floats = builder.gep(array, [builder.add(start, builder.mul(loop.index, ir.Constant(_i64, GROUP)))])
        place = builder.mul(builder.add(group, loop.index), ir.Constant(_i64, GROUP_BYTES))
        work(floats, [builder.gep(row, [place]) for row in rows])


@intrinsic
def _add(_context: Any, total: Any, _start: Any, r0: Any, r1: Any, r2: Any, r3: Any, _g: Any, _n: Any, factors: Any) -> Any:
    """Compute total[start : start + n * GROUP] += sum_j factors[j] * groups g to g + n of four rows."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(factors)(context, builder, arguments[8]).data
        each = [builder.load(builder.gep(data, [ir.Constant(_i64, j)])) for j in range(4)]

        def work(floats: Any, groups: Any) -> None:
            scales = [
                [_same(builder, builder.fmul(scale, factor)) for scale in _scales(builder, group)]
                for group, factor in zip(groups, each, strict=True)
            ]
            for byte in range(0, HALF, LANES):
                places = [_vector(builder, floats, number * HALF + byte) for number in range(2)]
                sums = [builder.load(place, align=4) for place in places]
                for j, group in enumerate(groups):
                    for number, codes in enumerate(_codes(builder, group, byte)):
                        sums[number] = _multiply_add(builder, scales[j][number], codes, sums[number])
                for place, value in zip(places, sums, strict=True):
                    builder.store(value, place, align=4)

        _loop(context, builder, signature, arguments, work)
        return context.get_dummy_value()

    rows = (r0, r1, r2, r3)
    return types.void(total, types.int64, *rows, types.int64, types.int64, factors), code


@intrinsic
def _dot(_context: Any, floats: Any, _start: Any, r0: Any, r1: Any, r2: Any, r3: Any, _g: Any, _n: Any, sums: Any) -> Any:
    """Compute sums[j] += <floats[start : start + n * GROUP], groups g to g + n of row j> for four rows."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        zero = ir.Constant(_floats, [0.0] * LANES)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(4)]  # type: ignore[no-untyped-call]

        def work(floats: Any, groups: Any) -> None:
            for total, group in zip(totals, groups, strict=True):
                halves = [zero, zero]
                for byte in range(0, HALF, LANES):
                    for number, codes in enumerate(_codes(builder, group, byte)):
                        value = builder.load(_vector(builder, floats, number * HALF + byte), align=4)
                        halves[number] = _multiply_add(builder, value, codes, halves[number])
                for half, scale in zip(halves, _scales(builder, group), strict=True):
                    builder.store(_multiply_add(builder, half, _same(builder, scale), builder.load(total)), total)

        _loop(context, builder, signature, arguments, work)
        data = context.make_array(sums)(context, builder, arguments[8]).data
        for j, total in enumerate(totals):
            place = builder.gep(data, [ir.Constant(_i64, j)])
            value = builder.load(place)
            wide = builder.fpext(builder.load(total), ir.VectorType(ir.DoubleType(), LANES))
            for lane in range(LANES):
                value = builder.fadd(value, builder.extract_element(wide, ir.Constant(_i32, lane)))
            builder.store(value, place)
        return context.get_dummy_value()

    rows = (r0, r1, r2, r3)
    return types.void(floats, types.int64, *rows, types.int64, types.int64, sums), code


@jit
def _edge(start: int, stop: int, last: bool) -> tuple[int, int, int]:
    """Return the first or last group of elements start to stop, and which elements of it are taken.

    There are none if the whole group is taken, or if the first group is the last one.
    """
    group = stop // GROUP if last else start // GROUP
    begin, end = max(start - group * GROUP, 0), min(stop - group * GROUP, GROUP)
    if (last and group == start // GROUP) or end - begin == GROUP:
        return group, 0, 0
    return group, begin, end


@jit
def add_groups(
    total: NDArray[np.float32],
    rows: NDArray[np.uint8],
    four: NDArray[np.int64],
    factors: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Compute total += sum_j factors[j] * rows[four[j]] for four rows, of which elements start to stop are taken.

    Args:
        total: float32 [stop - start].
        rows: uint8 [K, bytes], packed rows.
        four: int64 [4].
        factors: float32 [4].
        start: first element.
        stop: end (excluded).
    """
    r0, r1, r2, r3 = rows[four[0]], rows[four[1]], rows[four[2]], rows[four[3]]
    first = (start + GROUP - 1) // GROUP
    _add(total, first * GROUP - start, r0, r1, r2, r3, first, stop // GROUP - first, factors)
    for last in (False, True):
        group, begin, end = _edge(start, stop, last)
        if begin < end:
            at = group * GROUP - start
            edge = np.zeros(GROUP, np.float32)
            edge[begin:end] = total[at + begin : at + end]
            _add(edge, 0, r0, r1, r2, r3, group, 1, factors)
            total[at + begin : at + end] = edge[begin:end]


@jit
def dot_groups(
    gradient: NDArray[np.float32],
    rows: NDArray[np.uint8],
    four: NDArray[np.int64],
    sums: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Compute sums[j] = <gradient, rows[four[j]]> for four rows, of which elements start to stop are taken.

    Arguments as for `add_groups`; `gradient` is float32 [stop - start], and `sums`, float64 [4], is overwritten.
    """
    r0, r1, r2, r3 = rows[four[0]], rows[four[1]], rows[four[2]], rows[four[3]]
    first = (start + GROUP - 1) // GROUP
    sums[:] = 0
    _dot(gradient, first * GROUP - start, r0, r1, r2, r3, first, stop // GROUP - first, sums)
    for last in (False, True):
        group, begin, end = _edge(start, stop, last)
        if begin < end:
            at = group * GROUP - start
            edge = np.zeros(GROUP, np.float32)
            edge[begin:end] = gradient[at + begin : at + end]
            _dot(edge, 0, r0, r1, r2, r3, group, 1, sums)


@jit
def square_of_groups(row: NDArray[np.uint8], start: int, stop: int) -> float:
    """Return the sum of squares of elements start to stop of a packed row, uint8 [bytes]."""
    square = 0.0
    values = np.empty(GROUP, np.float32)
    factors = np.array([1, 0, 0, 0], np.float32)
    for group in range(start // GROUP, (stop + GROUP - 1) // GROUP):
        values[:] = 0
        _add(values, 0, row, row, row, row, group, 1, factors)
        for i in range(max(start - group * GROUP, 0), min(stop - group * GROUP, GROUP)):
            square += np.float64(values[i]) * np.float64(values[i])
    return square


@jit
def pack(direction: NDArray[np.float32], out: NDArray[np.uint8]) -> None:
    """Compress a direction.

    The scale of a half is such that its element of largest magnitude becomes -8, and is kept but for rounding of the scale.

    Args:
        direction: float32 [n].
        out: uint8 [GROUP_BYTES for each started group of the direction], overwritten.
    """
    values = np.empty(HALF, np.float32)
    codes = np.empty((2, HALF), np.int32)
    for group in range((direction.size + GROUP - 1) // GROUP):
        to = out[group * GROUP_BYTES : (group + 1) * GROUP_BYTES]
        for number in range(2):
            start = group * GROUP + number * HALF
            part = direction[start : start + HALF]
            values[:] = 0
            values[: part.size] = part
            scale_bits = _quantize(values, codes[number])
            to[2 * number] = scale_bits & np.uint32(0xFF)
            to[2 * number + 1] = scale_bits >> np.uint32(8)
        for i in range(HALF):
            to[4 + i] = np.uint8((codes[0, i] & 15) | ((codes[1, i] & 15) << 4))


@jit
def _quantize(values: NDArray[np.float32], codes: NDArray[np.int32]) -> Any:
    """Write integers from -8 to 7; return the bits in bfloat16 of the scale that restores values by multiplication."""
    largest = smallest = np.float32(0.0)
    for i in range(HALF):
        largest = max(largest, values[i])
        smallest = min(smallest, values[i])
    extreme = largest if largest > -smallest else smallest
    bits = np.float32(extreme / np.float32(-8.0)).view(np.uint32)
    bits = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    scale = np.uint32(bits << np.uint32(16)).view(np.float32)
    if not abs(scale) >= SMALLEST:
        codes[:] = 0
        return np.uint32(0)
    inverse = np.float32(1.0) / scale
    for i in range(HALF):
        codes[i] = max(np.int32(-8), min(np.int32(7), np.int32(np.rint(values[i] * inverse))))
    return np.uint32(bits)

"""Read ranges of tensors: of one that is stored whole, with any strides, or in pieces that are cut in any dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ray_soup.io.formats import Piece, TensorInfo
from ray_soup.io.lazy import torch

MOST_CELLS = 1 << 24  # cells of the grid that the borders of pieces make
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and end of a part of a tensor in each dimension."""


def elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return elements `start` to `stop` of a tensor, counted row by row: [stop - start], contiguous and aligned.

    This is a view where the tensor allows that, otherwise a copy of no more than these elements.
    """
    if tensor.is_contiguous():
        part = tensor.reshape(-1)[start:stop]
    else:
        parts = [p.reshape(-1) for p in _cut(tensor, start, stop)]
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
    part = part.resolve_neg().contiguous()
    return part.clone() if part.data_ptr() % part.itemsize else part


def _cut(tensor: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
    """Return views of a tensor that together hold elements `start` to `stop`, in order."""
    if tensor.dim() == 1:
        return [tensor[start:stop]]
    size = tensor[0].numel()  # of a row
    first, last = -(-start // size), stop // size  # rows that are needed in full
    if first > last:  # within one row
        return _cut(tensor[last], start - last * size, stop - last * size)
    parts = [tensor[first:last]] if first < last else []
    head = _cut(tensor[first - 1], start - (first - 1) * size, size) if start < first * size else []
    tail = _cut(tensor[last], 0, stop - last * size) if stop > last * size else []
    return [*head, *parts, *tail]


def joined(info: TensorInfo, start: int, stop: int, tensor: Callable[[Piece], torch.Tensor]) -> torch.Tensor:
    """Return elements `start` to `stop` of a tensor in pieces, counted row by row: [stop - start], contiguous and aligned.

    Args:
        info: the tensor; its pieces fill it without overlapping, as `fault_of` checks.
        start: first element.
        stop: end of the range (excluded), more than `start`.
        tensor: returns the view of a piece; it is called for the pieces that have elements in the range only.
    """
    boxes = list(_boxes(info.shape, start, stop))
    if len(boxes) == 1:
        whole = next((p for p in info.pieces if _common(_box_of(p), boxes[0]) == boxes[0]), None)
        if whole is not None:
            return elements(tensor(whole)[_within(whole.begin, boxes[0])], 0, stop - start)
    found = torch.empty(stop - start, dtype=info.dtype)
    done = 0
    for low, high in boxes:
        shape = [h - n for n, h in zip(low, high, strict=True)]
        target = found[done : done + math.prod(shape)].view(shape)
        done += math.prod(shape)
        for piece in info.pieces:
            common = _common(_box_of(piece), (low, high))
            if common is not None:
                target[_within(low, common)] = tensor(piece)[_within(piece.begin, common)]
    return found


def fault_of(shape: tuple[int, ...], pieces: Sequence[Piece]) -> str:
    """Return why pieces do not fill a tensor of this shape exactly once; empty if they do."""
    for piece in pieces:
        if len(piece.begin) != len(shape) or len(piece.shape) != len(shape):
            return f"a piece has {len(piece.shape)} dimensions"
        if any(b + n > size for b, n, size in zip(piece.begin, piece.shape, shape, strict=True)):
            return f"the piece of shape {list(piece.shape)} at {list(piece.begin)} is outside"
    filled = [piece for piece in pieces if piece.numel]
    total = sum(piece.numel for piece in filled)
    if total != math.prod(shape):
        which = "more" if total > math.prod(shape) else "fewer"
        return f"its {len(filled)} pieces have {which} elements than it: {total:,} instead of {math.prod(shape):,}"
    if len(filled) < 2:
        return ""
    import numpy as np

    cuts = [
        np.unique([n for p in filled for n in (p.begin[d], p.begin[d] + p.shape[d])]).tolist() for d in range(len(shape))
    ]
    if math.prod(len(cut) for cut in cuts) > MOST_CELLS:
        return f"its {len(filled)} pieces are cut in too many places"
    taken = np.zeros([len(cut) - 1 for cut in cuts], bool)
    at = [{n: index for index, n in enumerate(cut)} for cut in cuts]
    for piece in filled:
        cells = tuple(slice(where[b], where[b + n]) for where, b, n in zip(at, piece.begin, piece.shape, strict=True))
        if taken[cells].any():
            return f"the piece of shape {list(piece.shape)} at {list(piece.begin)} overlaps another one"
        taken[cells] = True
    return ""


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the parts that elements `start` to `stop` of a tensor consist of, in order."""
    if not shape:
        yield (), ()
        return
    size = math.prod(shape[1:])  # of a row
    first, last = -(-start // size), stop // size  # rows that are needed in full
    if first > last:  # within one row
        yield from _in_row(last, shape[1:], start - last * size, stop - last * size)
        return
    if start < first * size:
        yield from _in_row(first - 1, shape[1:], start - (first - 1) * size, size)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last, *shape[1:])
    if stop > last * size:
        yield from _in_row(last, shape[1:], 0, stop - last * size)


def _in_row(row: int, shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for low, high in _boxes(shape, start, stop):
        yield (row, *low), (row + 1, *high)


def _box_of(piece: Piece) -> Box:
    return piece.begin, tuple(b + n for b, n in zip(piece.begin, piece.shape, strict=True))


def _common(one: Box, other: Box) -> Box | None:
    """Return the part that two boxes have in common; None if there is none."""
    low, high = tuple(map(max, one[0], other[0])), tuple(map(min, one[1], other[1]))
    return None if any(n >= h for n, h in zip(low, high, strict=True)) else (low, high)


def _within(begin: tuple[int, ...], box: Box) -> tuple[slice, ...]:
    """Return the index of a box in a tensor that begins at `begin`."""
    return tuple(slice(low - b, high - b) for b, low, high in zip(begin, *box, strict=True))

"""Targets in the columns of a table: numbers, and nested lists of numbers that are equally long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.task.raw_examples import IGNORED, Source

UNKNOWN = {"labels": "-1 where a label is not known", "numbers": "NaN, in a column of floats, where a number is not known"}
"""What to write for a target that is not scored, by the kind of targets; for the others it is IGNORED."""


def holds_targets(column: Any) -> bool:
    """Return whether a column of this Arrow type can hold targets that are not classes: numbers, or lists of them."""
    from pyarrow import types

    while (inner := _storage(column) or _of_list(column)) is not None:
        column = inner
    if types.is_dictionary(column):
        column = column.value_type
    return bool(types.is_integer(column) or types.is_floating(column) or types.is_boolean(column))


def _of_list(column: Any) -> Any:
    """Return the type of the values of lists; None for another type."""
    from pyarrow import types

    lists = types.is_list(column) or types.is_large_list(column) or types.is_fixed_size_list(column)
    return column.value_type if lists else None


def _storage(column: Any) -> Any:
    """Return the type that an extension type is stored as, such as a tensor or an Array2D of `datasets`; else None."""
    import pyarrow as pa

    return column.storage_type if isinstance(column, pa.BaseExtensionType) else None


def read_targets(source: Source, file: str, column: str, arrays: Iterable[Any]) -> np.ndarray:
    """Read the targets of a file.

    Args:
        source: the source.
        file: the name of the file, for messages.
        column: the name of the column.
        arrays: its Arrow arrays, without damage.

    Returns numbers [n, ...], integers as int64 if targets are any numbers. Nulls among floats are NaN then, because pandas
    writes NaN as null. Raises RecipeError for other nulls, and for lists that are not equally long.
    """
    found, row = list[np.ndarray](), 0
    for array in arrays:
        start = row

        def where(at: int, start: int = start) -> str:
            return f"row {start + at} of {file}"

        part = _dense(source, column, array, where)
        if found and part.shape[1:] != found[0].shape[1:]:
            raise _ragged(source, column, where(0), part.shape[1:], f"row 0 of {file}", found[0].shape[1:])
        if len(part):
            found.append(part)
        row += len(part)
    return np.concatenate(found) if found else np.zeros(0)


def join_targets(source: Source, column: str, files: Sequence[str], targets: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenate the targets of several files. Raises RecipeError if their lists are not equally long."""
    some = [(file, part) for file, part in zip(files, targets, strict=True) if len(part)]
    for file, part in some[1:]:
        if part.shape[1:] != some[0][1].shape[1:]:
            first = f"row 0 of {some[0][0]}"
            raise _ragged(source, column, f"row 0 of {file}", part.shape[1:], first, some[0][1].shape[1:])
    return np.concatenate([part for _, part in some]) if some else np.zeros(0, np.int64)


def _dense(source: Source, column: str, array: Any, where: Callable[[int], str]) -> np.ndarray:
    """Return an Arrow array of numbers, or of nested lists of them, as an array [n, ...].

    `where` describes a row. Raises RecipeError.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    shape, each = [len(array)], 1  # each: the values of one row, so far
    floats = False
    while True:
        leaf = _of_list(array.type) is None and _storage(array.type) is None
        floats = leaf and source.targets == "numbers" and pa.types.is_floating(array.type)
        if array.null_count and not floats:
            raise _null(source, column, array, where, each, len(shape) > 1)
        if leaf:
            break
        if isinstance(array.type, pa.FixedShapeTensorType):
            values, size = array.storage.flatten(), array.type.storage_type.list_size
            if values.null_count:  # which become 0 in an array
                raise _null(source, column, values, where, each * size, True)
            tensors: np.ndarray = array.to_numpy_ndarray()
            return _converted(source, tensors.reshape(*shape, *tensors.shape[1:]))
        if _storage(array.type) is not None:
            array = array.storage
            continue
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        odd = np.flatnonzero(lengths != lengths[:1])
        if len(odd):
            found = lengths[odd[0]], lengths[0]
            raise _ragged(source, column, where(int(odd[0]) // each), found[:1], where(0), found[1:])
        shape.append(int(lengths[0]) if len(lengths) else 0)
        each *= max(1, shape[-1])
        array = array.flatten()
    return _converted(source, array.to_numpy(zero_copy_only=False).reshape(shape))


def _converted(source: Source, found: np.ndarray) -> np.ndarray:
    """Return integers as int64 if targets are any numbers: torch cannot compute with all others."""
    integers = source.targets == "numbers" and found.dtype.kind in "iu"
    return found.astype(np.int64) if integers and found.dtype != np.uint64 else found


def _null(source: Source, column: str, array: Any, where: Callable[[int], str], each: int, inside: bool) -> RecipeError:
    """Return the error about the first null of an array, which has `each` values for a row, `inside` the targets."""
    at = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
    return source.error(
        f"{where(at // each)} has no target: {'a value' if inside else 'it'} is null in '{column}'. Remove the row, or "
        f"write {UNKNOWN.get(source.targets, f'{IGNORED} where nothing is scored')}."
    )


def _ragged(
    source: Source, column: str, place: str, shape: Sequence[int], other: str, expected: Sequence[int]
) -> RecipeError:
    def text(sizes: Sequence[int]) -> str:
        return f"a list of {' x '.join(str(int(size)) for size in sizes)} elements" if len(sizes) else "a single number"

    return source.error(
        f"the target at {place} is {text(shape)}, and that at {other} is {text(expected)} ('{column}'); expected lists of "
        "one length, with one number for each label, token or pixel. Save multi-hot lists, or pad them."
    )

"""Examples that a user's function returns as a map-style dataset."""

from __future__ import annotations

import operator
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from ray_soup.task.classes import Classes
from ray_soup.task.functions import call, import_function
from ray_soup.task.raw_examples import LARGEST, NUMBERS, PART, RawExamples, Source, check_finite

INPUT, TARGET = "the input", "the target"  # names that no argument of a model has
TARGETS = ("labels", "label", "targets", "target")
"""The entry of a dictionary that is the target."""
EXPECTED = "expected a map-style dataset, with len() and pairs (input, label), or dictionaries with an entry `labels`"


def read_function(source: Source) -> Generator[tuple[int, int], None, RawExamples]:
    """Read all items of the dataset that a function returns.

    Yields (items read, total). Raises RecipeError if the function or its dataset fails, or if its items are not pairs of an
    array and an integer label, with arrays of one shape and dtype.
    """
    dataset = call(source.key, source.spec, import_function(source.spec, source.key))
    total = call(source.key, f"{source.spec}: len() of its dataset", len, dataset)
    items: list[dict[str, np.ndarray]] = []
    for row in range(total):
        item = call(source.key, f"{source.spec}: item {row} of its dataset", operator.getitem, dataset, row)
        named = _named(source, row, item)
        if items:
            _check_alike(source, row, named, items[0])
        items.append(named)
        if row % PART == 0:
            yield row, total
    stacked = {name: np.stack([item[name] for item in items]) for name in items[0]} if items else {TARGET: np.zeros(0, int)}
    labels = stacked.pop(TARGET)
    for name, arrays in stacked.items():
        stacked[name] = arrays if arrays.dtype.isnative else arrays.astype(arrays.dtype.newbyteorder("="))
        check_finite(source, stacked[name])
    inputs = stacked[INPUT] if list(stacked) == [INPUT] else stacked
    classes = _classes(source, dataset, labels.tolist()) if source.targets == "classes" else None
    return RawExamples(source, labels, inputs if stacked else np.zeros(0), classes=classes)


def _named(source: Source, row: int, item: Any) -> dict[str, np.ndarray]:
    """Return the arrays of an item by name: its targets as TARGET, an input without a name as INPUT. Raises RecipeError."""
    if isinstance(item, Mapping):
        named = {str(name): value for name, value in item.items()}
        found = [name for name in TARGETS if name in named]
        if len(found) != 1 or len(named) < 2:
            raise source.error(
                f"item {row} of its dataset has the entries {', '.join(named)[:200]}; expected inputs and one of "
                f"{', '.join(TARGETS)}. Change what the dataset returns."
            )
        named = {TARGET if name == found[0] else name: value for name, value in named.items()}
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        named = {INPUT: item[0], TARGET: item[1]}
    else:
        what = f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, (tuple, list)) else ''}"
        raise source.error(f"item {row} of its dataset is a {what}; {EXPECTED}. Change what the dataset returns.")
    where = f"{source.spec}: item {row} of its dataset, converted to arrays,"
    arrays = {name: call(source.key, where, _array, value) for name, value in named.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in NUMBERS and name != TARGET:
            what = "the input" if name == INPUT else f"the entry '{name}'"
            raise source.error(
                f"{what} of item {row} is a {type(named[name]).__name__} of {array.dtype}; expected an array of numbers. "
                "Change what the dataset returns."
            )
    arrays[TARGET] = _target(source, row, named[TARGET], arrays[TARGET])
    return arrays


def _target(source: Source, row: int, given: Any, array: np.ndarray) -> np.ndarray:
    """Check the target of an item. Raises RecipeError."""
    if source.targets != "classes":
        if array.dtype.kind not in NUMBERS:
            raise source.error(f"the target of item {row} is {str(given)[:80]!r}; expected numbers. Change it.")
        return array
    if array.size != 1 or array.dtype.kind not in NUMBERS or not _is_label(array.item()):
        raise source.error(
            f"the label of item {row} is {str(given)[:80]!r}; expected the number of a class, counted from 0. Change what "
            "the dataset returns."
        )
    return np.asarray(int(array.item()))


def _check_alike(source: Source, row: int, item: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> None:
    """Check that an item has the entries of the first one, with their shapes and dtypes. Raises RecipeError."""
    if list(item) != list(first):
        raise source.error(
            f"item {row} has the entries {', '.join(item)}, and item 0 {', '.join(first)}. Return the same entries for all."
        )
    for name, array in item.items():
        if (array.shape, array.dtype) != (first[name].shape, first[name].dtype):
            what = {INPUT: "the input", TARGET: "the target"}.get(name, f"the entry '{name}'")
            raise source.error(
                f"{what} of item {row} is {array.dtype} {list(array.shape)}, and that of item 0 is {first[name].dtype} "
                f"{list(first[name].shape)}. Return {'inputs' if name != TARGET else 'targets'} of one shape and dtype."
            )


def _array(value: Any) -> np.ndarray:
    """Convert an array, a tensor, a PIL image or a number to an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value)


def _is_label(value: float) -> bool:
    """Return whether a number is an integer that fits into int64; NaN and infinity are not."""
    return 0 <= value <= LARGEST and int(value) == value


def _classes(source: Source, dataset: Any, labels: list[int]) -> Classes | None:
    """Return the names in the dataset's attribute `classes`, which those of torchvision have, if they fit the labels."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return None
    fits = len(set(names)) == len(names) > max(labels, default=0)
    return Classes(source.key, source.spec, tuple(names)) if fits else None

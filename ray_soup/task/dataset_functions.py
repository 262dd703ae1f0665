"""Examples that a user's function returns as a map-style dataset."""

from __future__ import annotations

import operator
from collections.abc import Generator
from typing import Any

import numpy as np

from ray_soup.task.classes import Classes
from ray_soup.task.functions import call, import_function
from ray_soup.task.raw_examples import LARGEST, NUMBERS, PART, RawExamples, Source, check_finite

EXPECTED = "expected a map-style dataset, with len() and pairs (input, label)"


def read_function(source: Source) -> Generator[tuple[int, int], None, RawExamples]:
    """Read all items of the dataset that a function returns.

    Yields (items read, total). Raises RecipeError if the function or its dataset fails, or if its items are not pairs of an
    array and an integer label, with arrays of one shape and dtype.
    """
    dataset = call(source.key, source.spec, import_function(source.spec, source.key))
    total = call(source.key, f"{source.spec}: len() of its dataset", len, dataset)
    images: list[np.ndarray] = []
    labels: list[int] = []
    for row in range(total):
        item = call(source.key, f"{source.spec}: item {row} of its dataset", operator.getitem, dataset, row)
        image, label = _pair(source, row, item)
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            raise source.error(
                f"the input of item {row} is {image.dtype} {list(image.shape)}, and that of item 0 is {images[0].dtype} "
                f"{list(images[0].shape)}. Return inputs of one shape and dtype."
            )
        images.append(image)
        labels.append(label)
        if row % PART == 0:
            yield row, total
    arrays = np.stack(images) if images else np.zeros(0)
    if not arrays.dtype.isnative:
        arrays = arrays.astype(arrays.dtype.newbyteorder("="))
    check_finite(source, arrays)
    return RawExamples(source, np.array(labels, dtype=np.int64), arrays, classes=_classes(source, dataset, labels))


def _pair(source: Source, row: int, item: Any) -> tuple[np.ndarray, int]:
    """Return the input and the label of an item. Raises RecipeError."""
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        found = f"{type(item).__name__}{f' of {len(item)}' if isinstance(item, (tuple, list, dict)) else ''}"
        raise source.error(f"item {row} of its dataset is a {found}; {EXPECTED}. Change what the dataset returns.")
    where = f"{source.spec}: item {row} of its dataset, converted to arrays,"
    image, label = (call(source.key, where, _array, value) for value in item)
    if image.dtype.kind not in NUMBERS:
        raise source.error(
            f"the input of item {row} is a {type(item[0]).__name__} of {image.dtype}; expected an array of numbers. Change "
            "what the dataset returns."
        )
    if label.size != 1 or label.dtype.kind not in NUMBERS or not _is_label(label.item()):
        raise source.error(
            f"the label of item {row} is {str(item[1])[:80]!r}; expected the number of a class, counted from 0. Change what "
            "the dataset returns."
        )
    return image, int(label.item())


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

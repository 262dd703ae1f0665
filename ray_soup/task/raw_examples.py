"""Labeled examples in their stored form, and the errors that name their source."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.task.classes import Classes

KINDS = (
    "an .npz or .parquet file; a folder of Parquet files, of CLASS/image files, or written by `save_to_disk`; or "
    "module:function"
)
PART = 256
"""Number of examples decoded between two reports of progress."""
NUMBERS = "biuf"
"""Kinds of dtype that inputs may have: bool, integers and real numbers."""
LARGEST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Source:
    """A source of examples as the recipe names it, which every error about it begins with."""

    key: str
    """The recipe key, such as data.fit."""
    spec: str
    """A path, a URI or `module:function`."""

    def error(self, text: str) -> RecipeError:
        """Return the error `text` about this source."""
        return RecipeError(f"{self.key}: {self.spec}: {text}")


def row_number(row: int) -> str:
    """Describe the place of a row of a source that has one file."""
    return f"row {row}"


@dataclass(frozen=True)
class RawExamples:
    """Labels, and inputs that are either arrays or still to be preprocessed. Raises RecipeError for unusable labels."""

    source: Source
    """The source as the recipe names it."""
    labels: np.ndarray
    """int64 [n]."""
    arrays: np.ndarray | None = None
    """Inputs [n, ...] of any numeric dtype, passed to the model unchanged."""
    parts: Callable[[], Iterator[list[Any]]] = lambda: iter(())
    """If `arrays` is None: yields the source in parts, lists of encoded images, paths of image files, or texts."""
    identity: tuple[Any, ...] = ()
    """JSON values that change with the files; empty for a function."""
    classes: Classes | None = None
    """Names of the classes, if the source knows them."""
    where: Callable[[int], str] = row_number
    """Describes the place of a row, as in "row 3 of b.parquet"."""
    notes: tuple[str, ...] = ()
    """What was left out of the source, and what was assumed about it."""

    def __post_init__(self) -> None:
        error, labels = self.source.error, self.labels
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise error(
                f"labels are {labels.dtype} {list(labels.shape)}; expected int64 [n]. Store one integer per example."
            )
        if self.arrays is not None:
            check_inputs(self.source, self.arrays)
        if len(labels) == 0 or (self.arrays is not None and len(self.arrays) != len(labels)):
            count = len(labels) if self.arrays is None else len(self.arrays)
            raise error(
                f"{count} inputs and {len(labels)} labels; expected one label per input, and at least one of each. Save "
                "the data again."
            )
        wrong = np.flatnonzero((labels < 0) | (labels > LARGEST))
        if len(wrong):
            raise error(
                f"label {labels[wrong[0]]} at {self.where(int(wrong[0]))} ({len(wrong)} out of range); expected the number "
                "of a class, counted from 0. Remove unlabeled examples, or fix the labels."
            )
        object.__setattr__(self, "labels", labels.astype(np.int64))


def check_inputs(source: Source, arrays: np.ndarray) -> None:
    """Check that inputs are an array [n, ...] of real numbers that torch has a dtype for. Raises RecipeError."""
    if arrays.ndim == 0 or arrays.dtype.kind not in NUMBERS or arrays.dtype.itemsize > 8:
        raise source.error(
            f"images are {arrays.dtype} {list(arrays.shape)}; expected an array [n, ...] of bool, integers, float16, "
            "float32 or float64. Convert them."
        )


def check_finite(source: Source, arrays: np.ndarray, first: int = 0) -> None:
    """Check that inputs [n, ...], which are the rows from `first` on, contain neither NaN nor infinity.

    Raises RecipeError, which names the row.
    """
    if arrays.dtype.kind != "f":
        return
    step = max(1, (1 << 26) // max(1, arrays[:1].nbytes))
    for start in range(0, len(arrays), step):
        finite = np.isfinite(arrays[start : start + step])
        if not finite.all():
            row = start + int(np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))[0])
            raise source.error(
                f"row {first + row} contains NaN or infinite values. Remove the example, or fix how it is computed."
            )


def check_regular(source: Source, path: str | Path) -> os.stat_result:
    """Return the status of a file. Raises RecipeError if it is missing, or a FIFO, a socket or a device."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise source.error(f"{path} cannot be read ({error.strerror}). Restore or remove it.") from error
    if not stat.S_ISREG(found.st_mode):
        raise source.error(f"{path} is a folder, FIFO, socket or device; expected a regular file. Remove or replace it.")
    return found


def identity_of(source: Source, files: Sequence[Path]) -> list[Any]:
    """Identify files by path, size in bytes, and times of modification and last change in ns. Raises RecipeError."""
    found = [(file, check_regular(source, file)) for file in files]
    return [[str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns] for file, status in found]


def reason(error: BaseException) -> str:
    """Return the first line of an error's text, of at most 300 characters; its type if it has no text."""
    text = str(error).strip().partition("\n")[0][:300]
    return text or type(error).__name__

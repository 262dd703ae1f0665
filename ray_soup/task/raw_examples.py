"""Labeled examples in their stored form, and the errors that name their source."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.cache import InUse
from ray_soup.task.classes import Classes

KINDS = (
    "an .npz or .parquet file; a folder of Parquet files, of CLASS/image files, or written by `save_to_disk`; or "
    "module:function"
)
PART = 256
"""Number of examples decoded between two reports of progress."""
Arrays = np.ndarray | dict[str, np.ndarray]
"""Inputs [n, ...]: one array, or several by the names of the model's arguments."""
Encoded = bytes | Path
"""An encoded image, or the file of one."""
NUMBERS = "biuf"
"""Kinds of dtype that inputs may have: bool, integers and real numbers."""
LARGEST = np.iinfo(np.int64).max
IGNORED = -100
"""The target of a unit that is not scored, as in torch and transformers."""
VOID = 255
"""The class of a pixel that is not scored, as in PASCAL VOC and torchvision."""


@dataclass(frozen=True)
class Source:
    """A source of examples as the recipe names it, which every error about it begins with."""

    key: str
    """The recipe key, such as data.fit."""
    spec: str
    """A path, a URI or `module:function`."""
    targets: str = "classes"
    """The kind of targets that the objective needs."""
    seen: list[list[Any]] = field(default_factory=list, compare=False, repr=False)
    """What `identity_of` has found out about its files so far."""

    def error(self, text: str) -> RecipeError:
        """Return the error `text` about this source."""
        return RecipeError(f"{self.key}: {self.spec}: {text}")

    def check_unchanged(self) -> None:
        """Raise RecipeError if one of its files has changed since it was identified, which is before it is read."""
        for file, size, modified, _ in self.seen:
            now = check_regular(self, Path(file))
            if (now.st_size, now.st_mtime_ns) != (size, modified):
                raise self.error(f"{file} changed while it was read. Rerun the command.")


def row_number(row: int) -> str:
    """Describe the place of a row of a source that has one file."""
    return f"row {row}"


@dataclass(frozen=True)
class RawExamples:
    """Targets, and inputs that are either arrays or still to be preprocessed. Raises RecipeError for unusable targets."""

    source: Source
    """The source as the recipe names it."""
    labels: np.ndarray
    """Targets: for classification int64 [n], otherwise [n, ...]."""
    arrays: Arrays | None = None
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
    groups: np.ndarray | None = None
    """Number of the document that each example is a part of, int64 [n]; None: each stands for itself."""
    bytes: np.ndarray | None = None
    """Bytes of text that each example scores, float64 [n]; None if examples are not text."""
    lengths: np.ndarray | None = None
    """Tokens of each example, int64 [n]; None if examples are not padded."""
    cut: float | None = None
    """Share of the texts or documents that have more tokens than fit into one example; None if examples are not text."""
    masks: tuple[Encoded, ...] = ()
    """Encoded images with the class of each pixel, as long as `labels` does not hold them."""
    hold: InUse | None = None
    """The cache entry of `arrays`, if they are in the cache: it must not be evicted while they are in use."""

    def __post_init__(self) -> None:
        error, labels = self.source.error, self.labels
        check_targets(self.source, labels)
        arrays = [] if self.arrays is None else parts_of(self.arrays)
        for part in arrays:
            check_inputs(self.source, part)
        wrong = [len(part) for part in arrays if len(part) != len(labels)]
        if len(labels) == 0 or wrong:
            raise error(
                f"{wrong[0] if wrong else 0} inputs and {len(labels)} labels; expected one label per input, and at least "
                "one of each. Save the data again."
            )
        object.__setattr__(self, "labels", usable_targets(self.source, labels, self.where, self.lengths is not None))


def parts_of(arrays: Arrays) -> list[np.ndarray]:
    """Return the arrays of inputs, of which there is one unless they have names."""
    return list(arrays.values()) if isinstance(arrays, dict) else [arrays]


def check_targets(source: Source, targets: np.ndarray) -> None:
    """Check shape and dtype of targets. Raises RecipeError."""
    kinds = {"classes": "iu", "units": "iu", "pixels": "iu"}.get(source.targets, NUMBERS)
    one_each = source.targets == "classes"
    fits = targets.ndim == 1 if one_each else targets.ndim >= 1
    if fits and targets.dtype.kind in kinds and targets.dtype.itemsize <= 8:
        return
    if one_each:
        raise source.error(
            f"labels are {targets.dtype} {list(targets.shape)}; expected int64 [n]. Store one integer per example, or set "
            "`objective:` in the recipe if the task is not classification."
        )
    wanted = "integers [n, ...]" if kinds == "iu" else "numbers [n, ...]"
    raise source.error(f"targets are {targets.dtype} {list(targets.shape)}; expected {wanted}. Convert them.")


def usable_targets(
    source: Source, targets: np.ndarray, where: Callable[[int], str] = row_number, narrow: bool = False
) -> np.ndarray:
    """Check the values of targets, and return them as int64, or float32 if the objective takes any numbers.

    With `narrow`, classes in int32 remain in int32: `Examples.batch` converts those of a batch.

    Raises RecipeError, which names the row.
    """
    kind = source.targets
    if kind == "numbers":
        found = targets if targets.dtype.kind in "iu" else targets.astype(np.float32)
        wrong = np.isinf(found) if found.dtype.kind == "f" else np.zeros(0, bool)
        expected = "finite numbers, or NaN for a target that is not known. Fix the targets."
    elif kind == "labels":
        found = targets.astype(np.float32)
        wrong = ~(found <= 1)
        expected = "0 or 1 for each label, or a negative number where it is not known. Fix the targets."
    else:
        found = targets if narrow and targets.dtype == np.int32 else targets.astype(np.int64)
        if kind == "pixels":
            found[targets == VOID] = IGNORED
        large = targets > LARGEST if targets.dtype.kind == "u" else np.zeros(targets.shape, bool)
        wrong = ((found < 0) & ((found != IGNORED) | (kind == "classes"))) | large
        expected = "the number of a class, counted from 0. Remove unlabeled examples, or fix the labels."
        if kind != "classes":
            expected = f"the number of a class, counted from 0, or {IGNORED} where nothing is scored. Fix the targets."
    if wrong.any():
        rows = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
        row = int(rows[0])
        value = targets[row][wrong[row]].flat[0] if targets.ndim > 1 else targets[row]
        what = "label" if kind == "classes" else "target"
        raise source.error(f"{what} {value} at {where(row)} ({len(rows)} out of range); expected {expected}")
    return found


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
    statuses = [(file, check_regular(source, file)) for file in files]
    found = [[str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns] for file, status in statuses]
    source.seen.extend(found)
    return found


def reason(error: BaseException) -> str:
    """Return the first line of an error's text, of at most 300 characters; its type if it has no text."""
    text = str(error).strip().partition("\n")[0][:300]
    return text or type(error).__name__

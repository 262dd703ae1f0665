"""Examples as cached arrays, their split into fit, select and test, and seeded batches.

Arrays are passed to the model unchanged. Encoded images and texts are decoded, preprocessed and kept in the node's cache as
a memory-mapped array: images in uint8 if the rest of the preprocessing is arithmetic on pixels, which `Examples.batch` does.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup.errors import RecipeError
from ray_soup.io.cache import InUse, cached, content_key, lookup
from ray_soup.io.disk import reading_threads
from ray_soup.recipe import Data
from ray_soup.task.preprocess import Preprocess, Tail, cut_tail, input_kind, preprocess_identity
from ray_soup.task.sources import RawExamples, read_source


@dataclass(frozen=True)
class Split:
    """The rows of one source that belong to a split."""

    source: str
    """fit, select, test or test_NAME. If select is a share of fit, the source of both is fit."""
    rows: np.ndarray
    """int32 [n]."""

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, count: int) -> list[Split]:
        """Cut the split into `count` runs of rows of nearly equal length."""
        return [Split(self.source, rows) for rows in np.array_split(self.rows, count)]


@dataclass(frozen=True)
class Examples:
    """Decoded inputs and labels of one source."""

    spec: str
    """The source as the recipe names it."""
    images: np.ndarray
    """Inputs [n, ...] of any dtype: images or token ids."""
    labels: np.ndarray
    """int64 [n]."""
    tail: Tail | None = None
    """Arithmetic that turns `images` into the model's inputs; None if they already are."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label, of a folder of images."""
    hold: InUse | None = None
    """The cache entry of `images`, which must not be evicted while they are in use."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather inputs [n, ...] and labels int64 [n] of `rows`, int [n], on a device."""
        images, labels = torch.from_numpy(np.ascontiguousarray(self.images[rows])), torch.from_numpy(self.labels[rows])
        if device.type == "cuda":
            images, labels = (t.pin_memory().to(device, non_blocking=True) for t in (images, labels))
        return (images if self.tail is None else self.tail(images)), labels

    def check_labels(self, classes: int) -> None:
        """Check that all labels are in 0 to classes - 1. Raises RecipeError."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            from_one = self.labels.min() == 1 and self.labels.max() == classes
            cure = "The labels seem to count from 1: subtract 1" if from_one else "Fix the labels or the model"
            raise RecipeError(
                f"{self.spec}: label {self.labels[wrong[0]]} at row {wrong[0]} ({len(wrong)} out of range); the model has "
                f"{classes} classes, so labels are 0 to {classes - 1}. {cure}."
            )


def load_source(spec: str, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, Examples]:
    """Read a source, and decode and preprocess its examples if the cache does not hold them yet.

    Yields (examples decoded, total). Raises RecipeError if an example cannot be decoded.
    """
    raw = yield from read_source(spec, input_kind(preprocess))
    if raw.arrays is not None:
        return Examples(spec, raw.arrays, raw.labels)
    decode, tail, first = _decoder(raw, preprocess)
    count = len(raw.labels)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        shape = (count, *first.shape)
        array = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=first.dtype, shape=shape)
        done = 0
        for part in _decoded(raw, decode, first):
            array[done : done + len(part)] = part
            done += len(part)
            yield done, count
        array.flush()

    hold = yield from cached("data", _key(raw, preprocess), first.nbytes * count, make)
    return Examples(spec, np.load(hold.path / "images.npy", mmap_mode="r"), raw.labels, tail, raw.classes, hold)


def load_sources(data: Data, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, dict[str, Examples]]:
    """Load the sources of fit, select and test that the recipe names, by the names of Data.sources.

    Yields (examples decoded, total) of one source at a time. Raises RecipeError.
    """
    sources: dict[str, Examples] = {}
    for name, spec in data.sources().items():
        sources[name] = yield from load_source(spec, preprocess)
    _check_classes({name: (e.spec, e.classes) for name, e in sources.items()})
    return sources


def _key(raw: RawExamples, preprocess: Preprocess | None) -> str:
    return content_key("v2", raw.identity, preprocess_identity(preprocess))


def _decoder(raw: RawExamples, preprocess: Preprocess | None) -> tuple[Callable[[Any], np.ndarray], Tail | None, np.ndarray]:
    """Return the function that decodes one image, path or text; the rest of the preprocessing; and the first array.

    Raises RecipeError if the first example cannot be decoded.
    """
    if preprocess is None:
        raise RecipeError(
            f"data: {raw.spec} contains encoded images or texts, and the model has no preprocessing for them. Return "
            "(model, preprocess) from the model's function, or use an .npz file of arrays."
        )
    value = next(raw.parts())[0]
    if input_kind(preprocess) == "text":

        def text(value: str) -> np.ndarray:
            return np.asarray(preprocess(value))

        return text, None, _naming_row(raw, 0, text, value)

    found = _naming_row(raw, 0, lambda value: cut_tail(preprocess, _open_image(value)), value)
    body, tail = found or (lambda image: np.asarray(preprocess(image)), None)

    def image(value: Any) -> np.ndarray:
        return body(_open_image(value))

    return image, tail, _naming_row(raw, 0, image, value)


def _open_image(value: bytes | Path) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
        return image.convert("RGB")


def _naming_row(raw: RawExamples, row: int, work: Callable[[Any], Any], value: Any) -> Any:
    """Call `work(value)`; its errors become a RecipeError that names the source and the row."""
    try:
        return work(value)
    except (OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        where = f" ({value.name})" if isinstance(value, Path) else ""
        raise RecipeError(
            f"data: {raw.spec}: the example at row {row}{where} cannot be decoded ({error}). Repair or remove it."
        ) from error


def _decoded(raw: RawExamples, decode: Callable[[Any], np.ndarray], first: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the decoded source in stacked parts; in threads, because PIL releases the GIL while it decodes and resizes."""

    def array(row: int, value: Any) -> np.ndarray:
        found: np.ndarray = _naming_row(raw, row, decode, value)
        if found.shape != first.shape or found.dtype != first.dtype:
            raise RecipeError(
                f"data: {raw.spec}: row {row} becomes {found.dtype} {list(found.shape)} and row 0 {first.dtype} "
                f"{list(first.shape)}. Change the preprocessing so that all examples have the same shape."
            )
        return found

    done = 0
    with ThreadPoolExecutor(reading_threads()) as pool:
        for values in raw.parts():
            yield np.stack(list(pool.map(array, range(done, done + len(values)), values)))
            done += len(values)


def _check_classes(found: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    """Check that image folders have the same classes, because labels are positions in the list of classes.

    `found` maps the name of a source to its spec and its classes, which are empty for other kinds of sources. Raises
    RecipeError.
    """
    named = {name: source for name, source in found.items() if source[1]}
    for name, (spec, classes) in named.items():
        first, (other, theirs) = next(iter(named.items()))
        if classes != theirs:
            odd = sorted(set(classes) ^ set(theirs))
            raise RecipeError(
                f"data.{name} ({spec}) has {len(classes)} class folders and data.{first} ({other}) {len(theirs)}; not "
                f"in both: {', '.join(odd[:4])}. A label is a position in the sorted list of folders: create the missing "
                "folders, empty."
            )


def digests(spec: str, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, np.ndarray]:
    """Hash each example of a source in its decoded and preprocessed form: uint64 [n], 64-bit BLAKE2b.

    The hashes of files are kept in the cache. Yields (examples hashed, total).
    """
    return (yield from _digests((yield from read_source(spec, input_kind(preprocess))), preprocess))


def _digests(raw: RawExamples, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, np.ndarray]:
    if not raw.identity:
        assert raw.arrays is not None
        return _hashed(raw.arrays)
    key = content_key("digests", _key(raw, None if raw.arrays is not None else preprocess))

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        done, found = 0, []
        for part in _arrays_of(raw, preprocess):
            found.append(_hashed(part))
            done += len(part)
            yield done, len(raw.labels)
        np.save(folder / "digests.npy", np.concatenate(found))

    hold = yield from cached("digests", key, 0, make)
    found: np.ndarray = np.load(hold.path / "digests.npy")
    hold.close()
    return found


def _arrays_of(raw: RawExamples, preprocess: Preprocess | None) -> Iterator[np.ndarray]:
    """Yield the inputs of a source in parts; decoded ones come from the cache if it has them."""
    arrays = raw.arrays
    if arrays is None:
        hold = lookup("data", _key(raw, preprocess))
        if hold is None:  # data.train need not be in the cache, and is not put there for its digests alone
            decode, _, first = _decoder(raw, preprocess)
            yield from _decoded(raw, decode, first)
            return
        arrays = np.load(hold.path / "images.npy", mmap_mode="r")
    yield from (arrays[first : first + 4096] for first in range(0, len(arrays), 4096))


def _hashed(arrays: np.ndarray) -> np.ndarray:
    hashes = (hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8).digest() for array in arrays)
    return np.frombuffer(b"".join(hashes), np.uint64)


def check_leaks(data: Data, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, dict[str, np.ndarray]]:
    """Hash all examples, and check that none is in two of train, fit, select and the test sets; test sets may overlap.

    Yields (examples hashed, total) of one source at a time; the value is the digests of each, uint64 [n]. Raises
    RecipeError for a shared example.
    """
    found: dict[str, np.ndarray] = {}
    classes: dict[str, tuple[str, tuple[str, ...]]] = {}
    sources = {**({"train": data.train} if data.train is not None else {}), **data.sources()}
    for name, spec in sources.items():
        raw = yield from read_source(spec, input_kind(preprocess))
        classes[name] = (spec, raw.classes)
        _check_classes(classes)
        found[name] = yield from _digests(raw, preprocess)
        for other, theirs in found.items():
            shared = np.flatnonzero(np.isin(found[name], theirs))
            both_test = name.startswith("test") and other.startswith("test")  # one may contain the other
            if not both_test and other != name and len(shared):
                first = shared[0]
                twin = np.flatnonzero(theirs == found[name][first])[0]
                raise RecipeError(
                    f"data.{_key_of(name)} and data.{_key_of(other)} share examples ({len(shared)} of {len(found[name])}): "
                    f"row {first} of {spec} is row {twin} of {sources[other]}. Figures on examples that the ingredients "
                    "were trained on, or that choices were made on, are optimistic. Remove these rows from one of the two."
                )
    return found


def _key_of(name: str) -> str:
    """Return the recipe key of a source below `data`."""
    return name.replace("test_", "test.", 1)


def cut_splits(data: Data, sizes: dict[str, int], fit_digests: np.ndarray | None, seed: int) -> dict[str, Split]:
    """Make a split of each source; if data.select is a share, draw select from fit.

    Args:
        data: the recipe's section `data`.
        sizes: number of examples of each source.
        fit_digests: uint64 [sizes["fit"]], hashes of the examples; equal examples go to the same split.
        seed: seed of the random draw.

    Raises RecipeError if fit is too small to be divided.
    """
    splits = {name: Split(name, np.arange(size, dtype=np.int32)) for name, size in sizes.items()}
    if "fit" in splits and isinstance(data.select, float):
        size = sizes["fit"]
        chosen = round(size * data.select)
        if not 0 < chosen < size:
            raise RecipeError(
                f"data: {data.fit} has {size} examples: too few to set aside {data.select} of them for select. Add "
                "examples, or change data.select."
            )
        order = np.random.default_rng([seed, 0]).permutation(size).astype(np.int32)
        if fit_digests is not None:
            _, first, group = np.unique(fit_digests[order], return_index=True, return_inverse=True)
            order = order[np.argsort(first[group], kind="stable")]
            while chosen < size - 1 and fit_digests[order[chosen]] == fit_digests[order[chosen - 1]]:
                chosen += 1
        splits["select"] = Split("fit", np.sort(order[:chosen]))
        splits["fit"] = Split("fit", np.sort(order[chosen:]))
    return splits


def calibration_batches(fit: Split, batch_size: int, seed: int, most: int) -> list[Split]:
    """Draw batches of fit to compute running statistics on: at most `most` examples, in an order determined by `seed`.

    A short last batch is left out, unless it is the only one.
    """
    rows = np.random.default_rng([seed, 3]).permutation(fit.rows)[:most]
    whole = max(len(rows) // batch_size, 1)
    return [Split(fit.source, rows[i * batch_size : (i + 1) * batch_size]) for i in range(whole)]


def batch_positions(n: int, batch_size: int, *seeds: int) -> list[np.ndarray]:
    """Cut one pass over n examples into batches: positions int32 [batch_size] each; the last may be shorter.

    `seeds` determine the order.
    """
    order = np.random.default_rng(seeds).permutation(n).astype(np.int32)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]

"""Sources of labelled examples as cached arrays; the cut into splits; seeded batches.

Arrays go to the model as they are. What has to be decoded and preprocessed lies in the cache of the node as a memory-mapped
array: images in uint8 where the rest of their preprocessing is arithmetic on pixels, which `Examples.batch` does.
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

from ray_soup.cache import InUse, cached, content_key, lookup
from ray_soup.checkpoints import reading_threads
from ray_soup.errors import RecipeError
from ray_soup.preprocess import Preprocess, Tail, cut_tail, identity, takes
from ray_soup.recipe import Data
from ray_soup.sources import Raw, read


@dataclass(frozen=True)
class Split:
    """Rows int32 of one source. Where select is a share of fit, both are rows of the source `fit`."""

    source: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, count: int) -> list[Split]:
        """Cut into as many parts in a row."""
        return [Split(self.source, rows) for rows in np.array_split(self.rows, count)]


@dataclass(frozen=True)
class Examples:
    """A source: images (or texts), any shape with the batch first, and int64 labels; the model takes them after `tail`."""

    spec: str
    images: np.ndarray
    labels: np.ndarray
    tail: Tail | None = None
    classes: tuple[str, ...] = ()
    hold: InUse | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of `rows`."""
        images, labels = torch.from_numpy(np.ascontiguousarray(self.images[rows])), torch.from_numpy(self.labels[rows])
        if device.type == "cuda":
            images, labels = (t.pin_memory().to(device, non_blocking=True) for t in (images, labels))
        return (images if self.tail is None else self.tail(images)), labels

    def check_labels(self, classes: int) -> None:
        """Raises RecipeError for a label that the model has no output for."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            from_one = self.labels.min() == 1 and self.labels.max() == classes
            cure = "They seem to count from 1: subtract 1" if from_one else "Correct the labels or the model"
            raise RecipeError(
                f"{self.spec}: label {self.labels[wrong[0]]} at row {wrong[0]} ({len(wrong)} such); the model has "
                f"{classes} classes, so labels are 0 to {classes - 1}. {cure}."
            )


def load_source(spec: str, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, Examples]:
    """Yields (images decoded, images in all); the value of the generator is its Examples. Raises RecipeError."""
    raw = yield from read(spec, takes(preprocess))
    if raw.arrays is not None:
        return Examples(spec, raw.arrays, raw.labels)
    one, tail, first = _decoder(raw, preprocess)
    count = len(raw.labels)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        shape = (count, *first.shape)
        array = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=first.dtype, shape=shape)
        done = 0
        for part in _decoded(raw, one, first):
            array[done : done + len(part)] = part
            done += len(part)
            yield done, count
        array.flush()

    hold = yield from cached("data", _key(raw, preprocess), first.nbytes * count, make)
    return Examples(spec, np.load(hold.path / "images.npy", mmap_mode="r"), raw.labels, tail, raw.classes, hold)


def _key(raw: Raw, preprocess: Preprocess | None) -> str:
    return content_key("v2", raw.identity, identity(preprocess))


def _decoder(raw: Raw, preprocess: Preprocess | None) -> tuple[Callable[[Any], np.ndarray], Tail | None, np.ndarray]:
    """What makes an array of bytes, a path or a text; the rest of the preprocessing; and the first array. Raises
    RecipeError."""
    if preprocess is None:
        raise RecipeError(
            f"data: {raw.spec} holds what is to be preprocessed and the model brings no preprocessing. Let the model's "
            "function return (model, preprocess), or give .npz."
        )
    value = next(raw.parts())[0]
    if takes(preprocess) == "text":

        def text(value: str) -> np.ndarray:
            return np.asarray(preprocess(value))

        return text, None, _named(raw, 0, text, value)

    found = _named(raw, 0, lambda value: cut_tail(preprocess, _image(value)), value)
    whole, tail = found or (lambda image: np.asarray(preprocess(image)), None)

    def image(value: Any) -> np.ndarray:
        return whole(_image(value))

    return image, tail, _named(raw, 0, image, value)


def _image(value: Any) -> Any:
    from PIL import Image

    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
        return image.convert("RGB")


def _named(raw: Raw, row: int, work: Callable[[Any], Any], value: Any) -> Any:
    try:
        return work(value)
    except (OSError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        where = f" ({value.name})" if isinstance(value, Path) else ""
        raise RecipeError(f"data: {raw.spec}: the image at row {row}{where} cannot be decoded ({error}).") from error


def _decoded(raw: Raw, one: Callable[[Any], np.ndarray], first: np.ndarray) -> Iterator[np.ndarray]:
    """The arrays of the source, some at a time. Threads: PIL lets others run while it decodes and resizes."""

    def array(row: int, value: Any) -> np.ndarray:
        found = _named(raw, row, one, value)
        if found.shape != first.shape or found.dtype != first.dtype:
            raise RecipeError(
                f"data: {raw.spec}: row {row} becomes {found.dtype} {list(found.shape)} and row 0 {first.dtype} "
                f"{list(first.shape)}. Let the preprocessing give all the same shape."
            )
        return found

    done = 0
    with ThreadPoolExecutor(reading_threads()) as pool:
        for values in raw.parts():
            yield np.stack(list(pool.map(array, range(done, done + len(values)), values)))
            done += len(values)


def load_sources(data: Data, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, dict[str, Examples]]:
    """Yields (images decoded, in all) of the source at work; the value is {source: Examples}, of fit, select and the test
    sets those that the recipe names. Raises RecipeError."""
    sources: dict[str, Examples] = {}
    for name, spec in data.sources().items():
        sources[name] = yield from load_source(spec, preprocess)
    _check_classes({name: (e.spec, e.classes) for name, e in sources.items()})
    return sources


def _check_classes(found: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    """Labels of folders of images are places in the list of their classes: it must be the same one. Raises RecipeError."""
    named = {name: source for name, source in found.items() if source[1]}
    for name, (spec, classes) in named.items():
        first, (other, theirs) = next(iter(named.items()))
        if classes != theirs:
            odd = sorted(set(classes) ^ set(theirs))
            raise RecipeError(
                f"data.{name} ({spec}) has {len(classes)} folders of classes and data.{first} ({other}) {len(theirs)}; not "
                f"in both: {', '.join(odd[:4])}. A label is a place in the sorted list: make the missing folders, "
                "empty ones."
            )


def digests(spec: str, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, np.ndarray]:
    """A 64-bit hash of each example as it is kept, decoded and preprocessed: uint64 [n].

    Yields (done, in all). Kept in the cache for files.
    """
    return (yield from _digests((yield from read(spec, takes(preprocess))), preprocess))


def _digests(raw: Raw, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, np.ndarray]:
    if not raw.identity:
        assert raw.arrays is not None
        return _hashed(raw.arrays)
    key = content_key("digests", _key(raw, None if raw.arrays is not None else preprocess))

    def parts() -> Iterator[np.ndarray]:
        hold = None if raw.arrays is not None else lookup("data", _key(raw, preprocess))
        if raw.arrays is None and hold is None:  # what the ingredients were trained on need not be kept here
            one, _, first = _decoder(raw, preprocess)
            yield from _decoded(raw, one, first)
            return
        arrays = raw.arrays if hold is None else np.load(hold.path / "images.npy", mmap_mode="r")
        yield from (arrays[first : first + 4096] for first in range(0, len(arrays), 4096))

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        done, found = 0, []
        for part in parts():
            found.append(_hashed(part))
            done += len(part)
            yield done, len(raw.labels)
        np.save(folder / "digests.npy", np.concatenate(found))

    hold = yield from cached("digests", key, 0, make)
    found = np.load(hold.path / "digests.npy")
    hold.close()
    return found


def _hashed(arrays: np.ndarray) -> np.ndarray:
    hashes = (hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=8).digest() for array in arrays)
    return np.frombuffer(b"".join(hashes), np.uint64)


def check_leaks(data: Data, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, dict[str, np.ndarray]]:
    """No example may be in two of fit, select, the test sets and the data that the ingredients were fine-tuned on. Raises
    RecipeError.

    Yields (done, in all); the value is the digests of each.
    """
    found: dict[str, np.ndarray] = {}
    classes: dict[str, tuple[str, tuple[str, ...]]] = {}
    sources = {**({"train": data.train} if data.train is not None else {}), **data.sources()}
    for name, spec in sources.items():
        raw = yield from read(spec, takes(preprocess))
        classes[name] = (spec, raw.classes)
        _check_classes(classes)
        found[name] = yield from _digests(raw, preprocess)
        for other, theirs in found.items():
            shared = np.flatnonzero(np.isin(found[name], theirs))
            both_test = name.startswith("test") and other.startswith("test")  # one may be a part of the other
            if not both_test and other != name and len(shared):
                first = shared[0]
                twin = np.flatnonzero(theirs == found[name][first])[0]
                raise RecipeError(
                    f"data.{_key_of(name)} and data.{_key_of(other)} share images ({len(shared)} of {len(found[name])}): "
                    f"row {first} of {spec} is row {twin} of {sources[other]}. Figures on images that steered the choice, "
                    "or trained the ingredients, would flatter. Take these rows out of one of the two."
                )
    return found


def _key_of(name: str) -> str:
    """A source as the recipe names it."""
    return name.replace("test_", "test.", 1)


def cut(data: Data, sizes: dict[str, int], fit_digests: np.ndarray | None, seed: int) -> dict[str, Split]:
    """Fit, select and test, those that there are, as rows of the sources with these sizes. A select share is drawn from
    fit by `seed`; images that are equal stay together. Raises RecipeError."""
    splits = {name: Split(name, np.arange(size, dtype=np.int32)) for name, size in sizes.items()}
    if "fit" in splits and isinstance(data.select, float):
        size = sizes["fit"]
        chosen = round(size * data.select)
        if not 0 < chosen < size:
            raise RecipeError(f"data: {data.fit} has {size} examples: too few to take {data.select} for select.")
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
    """Batches to compute running statistics on: at most so many images of fit, in an order that `seed` fixes. A last batch
    that is short is left out, unless it is the only one."""
    rows = np.random.default_rng([seed, 3]).permutation(fit.rows)[:most]
    whole = max(len(rows) // batch_size, 1)
    return [Split(fit.source, rows[i * batch_size : (i + 1) * batch_size]) for i in range(whole)]


def batch_positions(n: int, batch_size: int, *seeds: int) -> list[np.ndarray]:
    """One pass over n examples in an order that `seeds` fix: int32 positions, batch by batch; the last may be short."""
    order = np.random.default_rng(seeds).permutation(n).astype(np.int32)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]

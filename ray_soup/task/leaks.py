"""Hashes of examples, and the check that no example is in two of train, fit, select and the test sets."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.cache import cached, content_key, lookup
from ray_soup.io.progress import labelled
from ray_soup.recipe import Data
from ray_soup.task.classes import reference
from ray_soup.task.data import decoded_key, renumbered, with_labels_of
from ray_soup.task.decode import decoder_of
from ray_soup.task.preprocess import Preprocess
from ray_soup.task.raw_examples import RawExamples, Source, parts_of
from ray_soup.task.sources import key_of, named_sources
from ray_soup.task.tokenized import digests_of_documents, open_source

Rows = np.ndarray | list[np.ndarray]
"""Inputs of several examples, of equal or of different lengths."""


def digests(spec: str, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, np.ndarray]:
    """Hash each example of a source in its decoded and preprocessed form: uint64 [n], 64-bit BLAKE2b.

    The hashes of files are kept in the cache. Yields (examples hashed, total).
    """
    return (yield from _digests((yield from open_source(Source("data", spec), preprocess)), preprocess))


def _digests(raw: RawExamples, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, np.ndarray]:
    """Hash each example; one that is a part of a document has the hash of the document."""
    found = yield from _of_examples(raw, preprocess)
    return found if raw.groups is None else digests_of_documents(found, raw.groups)


def _of_examples(raw: RawExamples, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, np.ndarray]:
    if not raw.identity:
        assert raw.arrays is not None
        return _hashed(*(_unpadded(array, raw.lengths) for array in parts_of(raw.arrays)))
    key = content_key("digests", decoded_key(raw, None if raw.arrays is not None else preprocess))

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        done, found = 0, []
        for part in _arrays_of(raw, preprocess):
            found.append(_hashed(*part))
            done += len(part[0])
            yield done, len(raw.labels)
        np.save(folder / "digests.npy", np.concatenate(found))

    hold = yield from cached("digests", key, 0, make)
    found: np.ndarray = np.load(hold.path / "digests.npy")
    hold.close()
    return found


def _arrays_of(raw: RawExamples, preprocess: Preprocess | None) -> Iterator[Sequence[Rows]]:
    """Yield the inputs of a source in parts; decoded ones come from the cache if it has them."""
    arrays = None if raw.arrays is None else parts_of(raw.arrays)
    if arrays is None:
        hold = lookup("data", decoded_key(raw, preprocess))
        if hold is None:  # data.train need not be in the cache, and is not put there for its digests alone
            yield from ([part] for part in decoder_of(raw, preprocess).parts())
            return
        arrays = [np.load(hold.path / "images.npy", mmap_mode="r")]
    for first in range(0, len(arrays[0]), 4096):
        lengths = None if raw.lengths is None else raw.lengths[first : first + 4096]
        yield [_unpadded(array[first : first + 4096], lengths) for array in arrays]


def _unpadded(array: np.ndarray, lengths: np.ndarray | None) -> Rows:
    """Cut each row to its length, because sources are padded to different lengths."""
    return array if lengths is None else [row[..., :length] for row, length in zip(array, lengths, strict=True)]


def _hashed(*arrays: Rows) -> np.ndarray:
    """Hash each example, whose inputs are one row of each array: uint64 [n]."""
    hashes = []
    for row in range(len(arrays[0])):
        one = hashlib.blake2b(digest_size=8)
        for array in arrays:
            one.update(np.ascontiguousarray(array[row]).data)
        hashes.append(one.digest())
    return np.frombuffer(b"".join(hashes), np.uint64)


def check_leaks(
    data: Data, preprocess: Preprocess | None = None, targets: str = "classes"
) -> Generator[tuple[str, int, int], None, dict[str, np.ndarray]]:
    """Hash all examples, and check that none is in two of train, fit, select and the test sets; test sets may overlap.

    Yields (what is done, units done, total) of one source at a time; the value is the digests of each, uint64 [n].
    Raises RecipeError for a shared example.
    """
    found: dict[str, np.ndarray] = {}
    raws: dict[str, RawExamples] = {}
    sources = named_sources(data, targets)
    for name, source in sources.items():
        raw = raws[name] = yield from labelled("reading data", open_source(source, preprocess))
        found[name] = yield from labelled("comparing examples", _digests(raw, preprocess))
        for other, theirs in found.items():
            shared = np.flatnonzero(np.isin(found[name], theirs))
            both_test = name.startswith("test") and other.startswith("test")  # one may contain the other
            if not both_test and other != name and len(shared):
                first = shared[0]
                twin = np.flatnonzero(theirs == found[name][first])[0]
                raise RecipeError(
                    f"{key_of(name)} and {key_of(other)} share examples ({len(shared)} of {len(found[name])}): "
                    f"{_row(raw, first)} of {source.spec} is {_row(raws[other], twin)} of {sources[other].spec}. "
                    "Figures on examples that the ingredients were trained on, or that choices were made on, are "
                    "optimistic. Remove these rows from one of the two."
                )
    _check_numbering(data, raws)
    return found


def _row(raw: RawExamples, row: int) -> str:
    """Describe the place of an example, or of the document that it is a part of."""
    return f"row {row}" if raw.groups is None else raw.where(row)


def _check_numbering(data: Data, raws: Mapping[str, RawExamples]) -> None:
    """Check that classes have the same labels when sources are loaded separately, as data.train is for training.

    The names of a URI or a function are known only to its reader. Raises RecipeError.
    """
    shared = reference([raw.classes for raw in raws.values() if raw.classes is not None])
    if shared is None or any(raw.source.targets != "classes" for raw in raws.values()):
        return
    used = renumbered(data, {name: raw for name, raw in raws.items() if name != "train"})
    used |= renumbered(data, {name: raw for name, raw in raws.items() if name == "train"})
    for name, raw in raws.items():
        found = with_labels_of(shared, raw)
        if not np.array_equal(found.labels, used[name].labels):
            row = int(np.flatnonzero(found.labels != used[name].labels)[0])
            raise raw.source.error(
                f"label {used[name].labels[row]} at {raw.where(row)} is label {found.labels[row]} in {shared.key} "
                f"({shared.spec}), by the names of the classes: {shared}. Store both with the same classes in the same "
                "order."
            )

"""Examples as cached arrays, their split into fit, select and test, and seeded batches.

Arrays are passed to the model unchanged. Encoded images and texts are decoded, preprocessed and kept in the node's cache as
a memory-mapped array: images in uint8 if the rest of the preprocessing is arithmetic on pixels, which `Examples.batch` does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ray_soup.errors import RecipeError
from ray_soup.io.cache import InUse, cached, content_key, lookup
from ray_soup.recipe import Data
from ray_soup.task.classes import Classes, differing, reference, renumbering, unlike_image_folder
from ray_soup.task.decode import Decoder, decoder_of
from ray_soup.task.preprocess import Preprocess, Tail, input_kind, preprocess_identity
from ray_soup.task.raw_examples import RawExamples, Source, row_number
from ray_soup.task.sources import key_of, named_sources, peek_classes, read_source


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
    classes: Classes | None = None
    """The names of the classes by label, if the source knows them."""
    hold: InUse | None = None
    """The cache entry of `images`, which must not be evicted while they are in use."""
    key: str = "data"
    """The recipe key of the source."""
    where: Callable[[int], str] = row_number
    """Describes the place of a row."""
    notes: tuple[str, ...] = ()
    """What was left out of the source, and what was assumed about its labels."""

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather inputs [n, ...] and labels int64 [n] of `rows`, int [n], on a device."""
        images, labels = torch.from_numpy(np.ascontiguousarray(self.images[rows])), torch.from_numpy(self.labels[rows])
        if device.type == "cuda":
            images, labels = (t.pin_memory().to(device, non_blocking=True) for t in (images, labels))
        return (images if self.tail is None else self.tail(images)), labels

    def check_labels(self, classes: int) -> None:
        """Check that all labels are in 0 to classes - 1, and that class folders are the model's classes.

        Raises RecipeError.
        """
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            from_one = self.labels.min() == 1 and self.labels.max() == classes
            cure = "The labels seem to count from 1: subtract 1" if from_one else "Fix the labels or the model"
            raise RecipeError(
                f"{self.key}: {self.spec}: label {self.labels[wrong[0]]} at {self.where(int(wrong[0]))} ({len(wrong)} out "
                f"of range); the model has {classes} classes, so labels are 0 to {classes - 1}. {cure}."
            )
        names = self.classes
        if names is not None and names.by_position and len(names.names) != classes:
            raise RecipeError(
                f"{self.key}: {self.spec}: the class folders of the data have {len(names.names)} names ({names}), and the "
                f"model has {classes} classes. A label is the position of a folder among them, so every class needs a "
                f"folder with an image in one of the sources. {' '.join(self.notes)} Add or remove folders, or store the "
                "labels: use Parquet or .npz."
            )


def check_model_names(examples: Examples, id2label: object) -> None:
    """Check that classes which the model's config and the data both name have the same label in both.

    Args:
        examples: a source.
        id2label: names by label in the config of a model of transformers; anything else is ignored.

    Raises RecipeError.
    """
    if examples.classes is None or not isinstance(id2label, Mapping):
        return
    labels = {str(name): label for label, name in id2label.items()}
    for label, name in enumerate(examples.classes.names):
        if labels.get(name, label) != label:
            raise RecipeError(
                f"{examples.key}: {examples.spec}: class '{name}' has label {label}, and label {labels[name]} in the "
                "model's config.json (id2label). Save the data with the labels of the model."
            )


def load_named(data: Data, name: str, preprocess: Preprocess | None) -> Generator[tuple[int, int], None, Examples]:
    """Load train, fit, select, test or test_NAME, with the labels that equal classes have in all sources of the recipe.

    The examples are decoded and preprocessed if the cache does not hold them yet.

    Yields (examples decoded, total). Raises RecipeError.
    """
    raw = yield from read_source(named_sources(data)[name], input_kind(preprocess))
    raw = _renumbered(data, {name: raw})[name]
    return (yield from _decoded(raw, preprocess, _decoder(raw, preprocess)))


def load_sources(
    data: Data, preprocess: Preprocess | None, check: Callable[[dict[str, Examples]], object] | None = None
) -> Generator[tuple[int, int], None, dict[str, Examples]]:
    """Load the sources of fit, select and test that the recipe names, by the names of Data.sources.

    Args:
        data: the recipe's section `data`.
        preprocess: the model's preprocessing.
        check: called before all is decoded, with the labels and the first input of each source.

    Yields (examples decoded, total) of one source at a time. Raises RecipeError.
    """
    raws: dict[str, RawExamples] = {}
    for name in data.sources():
        raws[name] = yield from read_source(named_sources(data)[name], input_kind(preprocess))
    raws = _renumbered(data, raws)
    decoders = {name: _decoder(raw, preprocess) for name, raw in raws.items()}
    if check is not None:
        check({name: _preview(raw, decoders[name]) for name, raw in raws.items()})
    sources: dict[str, Examples] = {}
    for name, raw in raws.items():
        sources[name] = yield from _decoded(raw, preprocess, decoders[name])
    return sources


def _renumbered(data: Data, raws: Mapping[str, RawExamples]) -> dict[str, RawExamples]:
    """Give equal names of classes equal labels in all sources; the names of local sources that are not in `raws` count too.

    Raises RecipeError.
    """
    known = []
    for name, source in named_sources(data).items():
        classes = raws[name].classes if name in raws else peek_classes(source)
        if classes is not None:
            known.append(classes)
    shared = reference(known)
    return dict(raws) if shared is None else {name: _with_labels_of(shared, raw) for name, raw in raws.items()}


def _with_labels_of(shared: Classes, raw: RawExamples) -> RawExamples:
    """Renumber a source by the names of its classes."""
    own = raw.classes
    if own is None:
        return raw
    mapping = renumbering(own, shared, np.unique(raw.labels).tolist())
    names = replace(shared, by_position=own.by_position and shared.by_position)
    order = unlike_image_folder(shared)
    notes = (*raw.notes, order) if order else raw.notes
    if mapping is None:
        return replace(raw, classes=names, notes=notes)
    note = f"{own.key}: labels were renumbered by name, to those of {shared.key}: {differing(own, mapping)}."
    return replace(raw, labels=mapping[raw.labels], classes=names, notes=(*notes, note))


def _preview(raw: RawExamples, decoder: Decoder | None) -> Examples:
    """Return all labels of a source with its first input only."""
    if decoder is None:
        assert raw.arrays is not None
        return _examples(raw, raw.arrays[:1])
    return _examples(raw, decoder.first[None], decoder.tail)


def _examples(raw: RawExamples, images: np.ndarray, tail: Tail | None = None, hold: InUse | None = None) -> Examples:
    source = raw.source
    return Examples(source.spec, images, raw.labels, tail, raw.classes, hold, source.key, raw.where, raw.notes)


def _decoder(raw: RawExamples, preprocess: Preprocess | None) -> Decoder | None:
    """Return the decoder of a source; None for arrays, which are not decoded."""
    return decoder_of(raw, preprocess) if raw.arrays is None else None


def _decoded(
    raw: RawExamples, preprocess: Preprocess | None, decoder: Decoder | None
) -> Generator[tuple[int, int], None, Examples]:
    """Decode and preprocess the examples of a source if they are neither arrays nor in the cache."""
    if decoder is None:
        assert raw.arrays is not None
        return _examples(raw, raw.arrays)
    count, first = len(raw.labels), decoder.first

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False, "shape": (count, *first.shape)}
        done = 0
        with open(folder / "images.npy", "wb") as file:  # not memory-mapped: a full disk would kill the process (SIGBUS)
            np.lib.format.write_array_header_1_0(file, header)
            for part in decoder.parts():
                file.write(np.ascontiguousarray(part, first.dtype).data)
                done += len(part)
                yield done, count

    hold = yield from cached("data", _key(raw, preprocess), first.nbytes * count, make)
    return _examples(raw, np.load(hold.path / "images.npy", mmap_mode="r"), decoder.tail, hold)


def _key(raw: RawExamples, preprocess: Preprocess | None) -> str:
    return content_key("v3", raw.identity, preprocess_identity(preprocess))


def digests(spec: str, preprocess: Preprocess | None = None) -> Generator[tuple[int, int], None, np.ndarray]:
    """Hash each example of a source in its decoded and preprocessed form: uint64 [n], 64-bit BLAKE2b.

    The hashes of files are kept in the cache. Yields (examples hashed, total).
    """
    return (yield from _digests((yield from read_source(Source("data", spec), input_kind(preprocess))), preprocess))


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
            yield from decoder_of(raw, preprocess).parts()
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
    raws: dict[str, RawExamples] = {}
    sources = named_sources(data)
    for name, source in sources.items():
        raw = raws[name] = yield from read_source(source, input_kind(preprocess))
        found[name] = yield from _digests(raw, preprocess)
        for other, theirs in found.items():
            shared = np.flatnonzero(np.isin(found[name], theirs))
            both_test = name.startswith("test") and other.startswith("test")  # one may contain the other
            if not both_test and other != name and len(shared):
                first = shared[0]
                twin = np.flatnonzero(theirs == found[name][first])[0]
                raise RecipeError(
                    f"{key_of(name)} and {key_of(other)} share examples ({len(shared)} of {len(found[name])}): "
                    f"row {first} of {source.spec} is row {twin} of {sources[other].spec}. Figures on examples that "
                    "the ingredients were trained on, or that choices were made on, are optimistic. Remove these rows from "
                    "one of the two."
                )
    _check_numbering(data, raws)
    return found


def _check_numbering(data: Data, raws: Mapping[str, RawExamples]) -> None:
    """Check that classes have the same labels when sources are loaded separately, as data.train is for training.

    The names of a URI or a function are known only to its reader. Raises RecipeError.
    """
    used = _renumbered(data, {name: raw for name, raw in raws.items() if name != "train"})
    used |= _renumbered(data, {name: raw for name, raw in raws.items() if name == "train"})
    shared = reference([raw.classes for raw in raws.values() if raw.classes is not None])
    if shared is None:
        return
    for name, raw in raws.items():
        found = _with_labels_of(shared, raw)
        if not np.array_equal(found.labels, used[name].labels):
            row = int(np.flatnonzero(found.labels != used[name].labels)[0])
            raise raw.source.error(
                f"label {used[name].labels[row]} at {raw.where(row)} is label {found.labels[row]} in {shared.key} "
                f"({shared.spec}), by the names of the classes: {shared}. Store both with the same classes in the same "
                "order."
            )


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

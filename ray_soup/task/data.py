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

from ray_soup.errors import RecipeError
from ray_soup.io.cache import InUse, cached, content_key
from ray_soup.io.lazy import torch
from ray_soup.io.progress import labelled
from ray_soup.recipe import Data
from ray_soup.task.classes import Classes, reference, relabeled, unlike_image_folder
from ray_soup.task.decode import Decoder, decoder_of
from ray_soup.task.objective import Inputs
from ray_soup.task.preprocess import Preprocess, Tail, preprocess_identity
from ray_soup.task.raw_examples import IGNORED, Arrays, RawExamples, row_number
from ray_soup.task.sources import named_sources, peek_classes
from ray_soup.task.tokenized import open_source

SAMPLED = 256
"""Examples of a source from which `Examples.digest` is computed."""


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
    images: Arrays
    """Inputs [n, ...] of any dtype: images or token ids; several arrays by the names of the model's arguments."""
    labels: np.ndarray
    """Targets: for classification int64 [n], otherwise [n, ...]."""
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
    groups: np.ndarray | None = None
    """Number of the document that each example is a part of, int64 [n]; None: each stands for itself."""
    bytes: np.ndarray | None = None
    """Bytes of text that each example scores, float64 [n]; None if examples are not text."""
    lengths: np.ndarray | None = None
    """Tokens of each example, int64 [n]: inputs and targets are cut to the longest in a batch. None: they stay whole."""
    cut: float | None = None
    """Share of the texts or documents that have more tokens than fit into one example; None if examples are not text."""

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return a hash of the targets, lengths and tokens of SAMPLED examples from all over the source.

        Decoded images are left out: other versions of a decoder may round them differently.
        """
        rows = np.unique(np.linspace(0, max(0, len(self) - 1), SAMPLED).astype(np.int64))[: len(self)]
        inputs = self.images.values() if isinstance(self.images, dict) else [self.images]
        tokens = [array for array in inputs if array.dtype.kind in "iu" and array.dtype != np.uint8]
        found = [array[rows] for array in (self.labels, self.lengths, self.groups, *tokens) if array is not None]
        hashes = [hashlib.blake2b(np.ascontiguousarray(part).data).hexdigest() for part in found]
        return content_key(len(self), [str(part.dtype) for part in found], hashes)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[Inputs, torch.Tensor]:
        """Gather inputs [n, ...] and targets [n, ...] of `rows`, int [n], on a device."""
        end = None if self.lengths is None else int(self.lengths[rows].max(initial=1))
        whole = self.images.shape[-1] if isinstance(self.images, np.ndarray) else 0
        integers = self.labels.dtype in (np.int64, np.int32)
        per_token = integers and self.labels.ndim > 1 and self.labels.shape[-1] == whole

        def gathered(array: np.ndarray, cut: bool = True) -> torch.Tensor:
            part = torch.from_numpy(np.ascontiguousarray(array[rows][..., : end if cut else None]))
            return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part

        targets = gathered(self.labels, cut=per_token)
        if per_token and self.lengths is not None:
            targets = targets.long()
        if isinstance(self.images, dict):
            return {name: gathered(array) for name, array in self.images.items()}, targets
        images = gathered(self.images)
        return (images if self.tail is None else self.tail(images)), targets

    def check_labels(self, classes: int, targets: str = "classes") -> None:
        """Check that all labels are in 0 to classes - 1, and that class folders are the model's classes.

        Args:
            classes: number of classes of the model.
            targets: the kind of targets; those that are not classes may contain IGNORED.

        Raises RecipeError.
        """
        odd = (self.labels < 0) | (self.labels >= classes)
        odd = odd if targets == "classes" else (odd & (self.labels != IGNORED)).reshape(len(odd), -1).any(axis=1)
        wrong = np.flatnonzero(odd)
        if len(wrong) and targets != "classes":
            own = self.labels[wrong[0]]
            raise RecipeError(
                f"{self.key}: {self.spec}: target {own[(own != IGNORED) & ((own < 0) | (own >= classes))].flat[0]} at "
                f"{self.where(int(wrong[0]))} ({len(wrong)} examples out of range); the model has {classes} classes, so "
                f"targets are 0 to {classes - 1}, or {IGNORED} where nothing is scored. Fix the targets or the model."
            )
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


def load_named(
    data: Data, name: str, preprocess: Preprocess | None, targets: str = "classes"
) -> Generator[tuple[int, int], None, Examples]:
    """Load train, fit, select, test or test_NAME, with the labels that equal classes have in all sources of the recipe.

    The examples are decoded and preprocessed if the cache does not hold them yet.

    Yields (examples decoded, total). Raises RecipeError.
    """
    raw = yield from open_source(named_sources(data, targets)[name], preprocess)
    raw = renumbered(data, {name: raw})[name]
    return (yield from _decoded(raw, preprocess, _decoder(raw, preprocess)))


def load_sources(
    data: Data,
    preprocess: Preprocess | None,
    check: Callable[[dict[str, Examples]], object] | None = None,
    targets: str = "classes",
) -> Generator[tuple[str, int, int], None, dict[str, Examples]]:
    """Load the sources of fit, select and test that the recipe names, by the names of Data.sources.

    Args:
        data: the recipe's section `data`.
        preprocess: the model's preprocessing.
        check: called before all is decoded, with the labels and the first input of each source.
        targets: the kind of targets that the objective needs.

    Yields (what is done, units done, total) of one source at a time. Raises RecipeError.
    """
    raws: dict[str, RawExamples] = {}
    for name in data.sources():
        raws[name] = yield from labelled("reading data", open_source(named_sources(data, targets)[name], preprocess))
    raws = renumbered(data, raws)
    decoders = {name: _decoder(raw, preprocess) for name, raw in raws.items()}
    if check is not None:
        check({name: _preview(raw, decoders[name]) for name, raw in raws.items()})
    sources: dict[str, Examples] = {}
    for name, raw in raws.items():
        sources[name] = yield from labelled("decoding data", _decoded(raw, preprocess, decoders[name]))
    return sources


def renumbered(data: Data, raws: Mapping[str, RawExamples]) -> dict[str, RawExamples]:
    """Give equal names of classes equal labels in all sources; the names of local sources that are not in `raws` count too.

    Raises RecipeError.
    """
    if any(raw.source.targets != "classes" for raw in raws.values()):
        tags = [raw.classes for raw in raws.values() if raw.classes is not None]
        return {name: with_labels_of(tags[0], raw) for name, raw in raws.items()} if tags else dict(raws)
    known = []
    for name, source in named_sources(data).items():
        classes = raws[name].classes if name in raws else peek_classes(source)
        if classes is not None:
            known.append(classes)
    shared = reference(known)
    return dict(raws) if shared is None else {name: with_labels_of(shared, raw) for name, raw in raws.items()}


def with_labels_of(shared: Classes, raw: RawExamples) -> RawExamples:
    """Renumber a source by the names of its classes."""
    own = raw.classes
    if own is None:
        return raw
    labels, note = relabeled(raw.labels, own, shared)
    names = replace(shared, by_position=own.by_position and shared.by_position)
    order = unlike_image_folder(shared)
    notes = (*raw.notes, order) if order else raw.notes
    return replace(raw, labels=labels, classes=names, notes=(*notes, note) if note else notes)


def _preview(raw: RawExamples, decoder: Decoder | None) -> Examples:
    """Return all labels of a source with its first input only."""
    if decoder is None:
        assert raw.arrays is not None
        return _examples(raw, {n: a[:1] for n, a in raw.arrays.items()} if isinstance(raw.arrays, dict) else raw.arrays[:1])
    return _examples(raw, decoder.first[None], decoder.tail)


def _examples(raw: RawExamples, images: Arrays, tail: Tail | None = None, hold: InUse | None = None) -> Examples:
    source, hold = raw.source, hold or raw.hold
    return Examples(
        source.spec, images, raw.labels, tail, raw.classes, hold, source.key, raw.where, raw.notes, raw.groups, raw.bytes,
        raw.lengths, raw.cut,
    )  # fmt: skip


def _decoder(raw: RawExamples, preprocess: Preprocess | None) -> Decoder | None:
    """Return the decoder of a source; None for arrays, which are not decoded."""
    return decoder_of(raw, preprocess) if raw.arrays is None else None


def _decoded(
    raw: RawExamples, preprocess: Preprocess | None, decoder: Decoder | None
) -> Generator[tuple[int, int], None, Examples]:
    """Decode and preprocess the examples of a source if they are neither arrays nor in the cache."""
    if decoder is None:
        assert raw.arrays is not None
        raw.source.check_unchanged()
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

    hold = yield from cached("data", decoded_key(raw, preprocess), first.nbytes * count, make)
    raw.source.check_unchanged()
    return _examples(raw, np.load(hold.path / "images.npy", mmap_mode="r"), decoder.tail, hold)


def decoded_key(raw: RawExamples, preprocess: Preprocess | None) -> str:
    """Return the cache key of a source's examples, decoded and preprocessed."""
    return content_key("v3", raw.identity, preprocess_identity(preprocess))


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

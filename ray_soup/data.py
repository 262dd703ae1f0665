"""Sources of labelled images as cached arrays; the cut into splits; seeded batches.

A source is `.npz` (arrays `images` and `labels`, handed to the model as they are), Parquet (a column of image bytes and one
of labels, decoded and preprocessed as the model wants it), or `module:function` (returns a map-style dataset of pairs).
What had to be decoded lies in the cache of the node as a memory-mapped array.
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup import storage
from ray_soup.cache import InUse, cached, content_key
from ray_soup.errors import RecipeError
from ray_soup.models import import_function
from ray_soup.recipe import Data, is_function

SOURCES = ("fit", "select", "test")


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
    """A source: images, any shape with the batch first, and int64 labels."""

    spec: str
    images: np.ndarray
    labels: np.ndarray
    hold: InUse | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of `rows`."""
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        return images.to(device, non_blocking=True), torch.from_numpy(self.labels[rows]).to(device, non_blocking=True)

    def check_labels(self, classes: int) -> None:
        """Raises RecipeError for a label that the model has no output for."""
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= classes))
        if len(wrong):
            raise RecipeError(
                f"{self.spec}: label {self.labels[wrong[0]]} at row {wrong[0]} ({len(wrong)} such); the model has "
                f"{classes} classes, so labels are 0 to {classes - 1}. Correct the labels or the model."
            )


Preprocess = Callable[[Any], torch.Tensor] | None


def load_source(spec: str, preprocess: Preprocess) -> Generator[tuple[int, int], None, Examples]:
    """Yields (images decoded, images in all); the value of the generator is its Examples. Raises RecipeError."""
    if is_function(spec):
        return (yield from _from_function(spec))
    path = yield from _here(spec)
    if path.endswith(".npz"):
        return _from_npz(spec, path)
    if path.endswith(".parquet") or os.path.isdir(path):
        return (yield from _from_parquet(spec, path, preprocess))
    raise RecipeError(f"data: {spec} is of no known kind. Expected .npz, .parquet, or module:function.")


def _here(spec: str) -> Generator[tuple[int, int], None, str]:
    """Where the source lies on this node; what is remote is copied into its cache. Raises RecipeError."""
    try:
        path = yield from storage.local_copy(spec)
    except FileNotFoundError:
        path = spec
    if not os.path.exists(path):
        raise RecipeError(
            f"data: {spec} does not exist on {socket.gethostname()}. Expected .npz, .parquet, or module:function, where "
            "every node sees it."
        )
    return path


def _checked(spec: str, images: np.ndarray, labels: np.ndarray) -> Examples:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise RecipeError(f"data: {spec}: labels are {labels.dtype} {list(labels.shape)}; expected int64 [n].")
    if len(images) != len(labels) or len(images) == 0:
        raise RecipeError(f"data: {spec}: {len(images)} images and {len(labels)} labels; expected as many of both.")
    return Examples(spec, images, labels.astype(np.int64))


def _from_npz(spec: str, path: str) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if missing:
                raise RecipeError(f"data: {spec} holds {arrays.files}; expected the arrays 'images' and 'labels'.")
            return _checked(spec, arrays["images"], arrays["labels"])
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise RecipeError(f"data: {spec} cannot be read as .npz ({error}). Write it with numpy.savez.") from error


def _from_function(spec: str) -> Generator[tuple[int, int], None, Examples]:
    dataset = import_function(spec)()
    total = len(dataset)
    images, labels = [], []
    for i in range(total):
        image, label = dataset[i]
        images.append(np.asarray(image))
        labels.append(int(label))
        if i % 256 == 0:
            yield i, total
    return _checked(spec, np.stack(images), np.array(labels, dtype=np.int64))


def _from_parquet(spec: str, path: str, preprocess: Preprocess) -> Generator[tuple[int, int], None, Examples]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"data: {spec} cannot be read as Parquet ({error}).") from error
    image_column = next((c for c in table.column_names if _is_image(table.schema.field(c).type)), None)
    label_column = next((c for c in table.column_names if pa.types.is_integer(table.schema.field(c).type)), None)
    if image_column is None or label_column is None:
        raise RecipeError(
            f"data: {spec} has the columns {table.column_names}; expected one of image bytes and one of integer labels."
        )
    if preprocess is None:
        raise RecipeError(
            f"data: {spec} holds image bytes and the model brings no preprocessing. Let the model's function return "
            "(model, preprocess), or give .npz."
        )
    labels = table.column(label_column).to_numpy()
    images = table.column(image_column)
    stats = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in _files(path)]
    first = _decode(spec, 0, images[0].as_py(), preprocess)
    nbytes = first.nbytes * len(images)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        from concurrent.futures import ThreadPoolExecutor

        shape = (len(images), *first.shape)
        array = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=first.dtype, shape=shape)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), 256):
                values = images.slice(start, 256).to_pylist()
                rows = range(start, start + len(values))
                decoded = pool.map(lambda row, value: _decode(spec, row, value, preprocess), rows, values)
                for row, image in zip(rows, decoded, strict=True):
                    array[row] = image
                yield start, len(images)
        array.flush()

    hold = yield from cached("data", content_key(stats, image_column, repr(preprocess)), nbytes, make)
    return replace(_checked(spec, np.load(hold.path / "images.npy", mmap_mode="r"), labels), hold=hold)


def _files(path: str) -> list[Path]:
    return sorted(Path(path).rglob("*.parquet")) if os.path.isdir(path) else [Path(path)]


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _decode(spec: str, row: int, value: Any, preprocess: Callable[[Any], torch.Tensor]) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(value["bytes"] if isinstance(value, dict) else value)) as image:
            return preprocess(image.convert("RGB")).numpy()
    except (OSError, TypeError, ValueError) as error:
        raise RecipeError(f"data: {spec}: the image at row {row} cannot be decoded ({error}).") from error


def load_sources(data: Data, preprocess: Preprocess) -> Generator[tuple[int, int], None, dict[str, Examples]]:
    """Yields (images decoded, in all) of the source at work; the value is {source: Examples}, of fit, select and test
    those that the recipe names. Raises RecipeError."""
    sources: dict[str, Examples] = {}
    for name in SOURCES:
        spec = getattr(data, name)
        if isinstance(spec, str):
            sources[name] = yield from load_source(spec, preprocess)
    return sources


def digests(spec: str) -> Generator[tuple[int, int], None, np.ndarray]:
    """A 64-bit hash of what each example's image is made from: the bytes in a Parquet file, else the array. uint64 [n].

    Yields (done, in all). Kept in the cache for files.
    """
    if is_function(spec):
        return _hashed((yield from load_source(spec, None)).images)
    path = yield from _here(spec)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        if spec.endswith(".npz"):
            found = _hashed(_from_npz(spec, path).images)
        else:
            parts = []
            for column, done, total in _image_column(path):
                parts.append(_hashed([v["bytes"] if isinstance(v, dict) else v for v in column.to_pylist()]))
                yield done, total
            found = np.concatenate(parts)
        np.save(folder / "digests.npy", found)
        yield len(found), len(found)

    key = content_key("digests", [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in _files(path)])
    hold = yield from cached("digests", key, 0, make)
    found = np.load(hold.path / "digests.npy")
    hold.close()
    return found


def _hashed(images: Sequence[Any] | np.ndarray) -> np.ndarray:
    def one(image: Any) -> bytes:
        data = np.ascontiguousarray(image).data if isinstance(image, np.ndarray) else image
        return hashlib.blake2b(data, digest_size=8).digest()

    return np.frombuffer(b"".join(map(one, images)), np.uint64)


def _image_column(path: str) -> Iterator[tuple[Any, int, int]]:
    import pyarrow.parquet as pq

    done, readers = 0, [pq.ParquetFile(file) for file in _files(path)]
    total = sum(reader.metadata.num_rows for reader in readers)
    for reader in readers:
        column = next(field.name for field in reader.schema_arrow if _is_image(field.type))
        for batch in reader.iter_batches(1024, columns=[column]):
            done += len(batch)
            yield batch.column(0), done, total


def check_leaks(data: Data) -> Generator[tuple[int, int], None, dict[str, np.ndarray]]:
    """No image may be in two of fit, select, test and the data that the ingredients were fine-tuned on. Raises RecipeError.

    Yields (done, in all); the value is the digests of each.
    """
    found: dict[str, np.ndarray] = {}
    for name in ("train", *SOURCES):
        spec = getattr(data, name)
        if not isinstance(spec, str):
            continue
        found[name] = yield from digests(spec)
        for other, theirs in found.items():
            shared = np.flatnonzero(np.isin(found[name], theirs))
            if other != name and len(shared):
                first = shared[0]
                twin = np.flatnonzero(theirs == found[name][first])[0]
                raise RecipeError(
                    f"data.{name} and data.{other} share images ({len(shared)} of {len(found[name])}): row {first} of "
                    f"{spec} is row {twin} of {getattr(data, other)}. Figures on images that steered the choice, or trained "
                    "the ingredients, would flatter. Take these rows out of one of the two."
                )
    return found


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

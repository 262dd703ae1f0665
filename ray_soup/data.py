"""The splits as cached arrays; seeded batches.

A source is `.npz` (arrays `images` and `labels`, handed to the model as they are), Parquet (a column of image bytes and one
of labels, decoded and preprocessed as the model wants it), or `module:function` (returns a map-style dataset of pairs).
What had to be decoded lies in the cache of the node as a memory-mapped array.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup.cache import InUse, cached, content_key
from ray_soup.errors import RecipeError
from ray_soup.models import import_function
from ray_soup.recipe import Data, is_function

SPLITS = ("fit", "select", "test")


@dataclass(frozen=True)
class Examples:
    """Images, any shape with the batch first, and int64 labels; `rows` are those of the split."""

    source: str
    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    hold: InUse | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, positions: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at `positions` of the split."""
        rows = self.rows[positions]
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        return images.to(device, non_blocking=True), torch.from_numpy(self.labels[rows]).to(device, non_blocking=True)

    def check_labels(self, classes: int) -> None:
        """Raises RecipeError for a label that the model has no output for."""
        labels = self.labels[self.rows]
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise RecipeError(
                f"{self.source}: label {labels[wrong[0]]} at row {self.rows[wrong[0]]} ({len(wrong)} such); the model "
                f"has {classes} classes, so labels are 0 to {classes - 1}. Correct the labels or the model."
            )


@dataclass
class Loaded:
    """One source in memory or mapped; `hold` keeps its place in the cache."""

    images: np.ndarray
    labels: np.ndarray
    hold: InUse | None = None


Preprocess = Callable[[Any], torch.Tensor] | None


def load_source(spec: str, preprocess: Preprocess) -> Generator[tuple[int, int], None, Loaded]:
    """Yields (images decoded, images in all); the value of the generator is Loaded. Raises RecipeError."""
    if is_function(spec):
        return (yield from _from_function(spec))
    if not os.path.exists(spec):
        raise RecipeError(f"data: {spec} does not exist. Expected .npz, .parquet, or module:function.")
    if spec.endswith(".npz"):
        return _from_npz(spec)
    if spec.endswith(".parquet") or os.path.isdir(spec):
        return (yield from _from_parquet(spec, preprocess))
    raise RecipeError(f"data: {spec} is of no known kind. Expected .npz, .parquet, or module:function.")


def _checked(spec: str, images: np.ndarray, labels: np.ndarray) -> Loaded:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise RecipeError(f"data: {spec}: labels are {labels.dtype} {list(labels.shape)}; expected int64 [n].")
    if len(images) != len(labels) or len(images) == 0:
        raise RecipeError(f"data: {spec}: {len(images)} images and {len(labels)} labels; expected as many of both.")
    return Loaded(images, labels.astype(np.int64))


def _from_npz(spec: str) -> Loaded:
    try:
        with np.load(spec, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if missing:
                raise RecipeError(f"data: {spec} holds {arrays.files}; expected the arrays 'images' and 'labels'.")
            return _checked(spec, arrays["images"], arrays["labels"])
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise RecipeError(f"data: {spec} cannot be read as .npz ({error}). Write it with numpy.savez.") from error


def _from_function(spec: str) -> Generator[tuple[int, int], None, Loaded]:
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


def _from_parquet(spec: str, preprocess: Preprocess) -> Generator[tuple[int, int], None, Loaded]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(spec)
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
    files = [Path(spec)] if os.path.isfile(spec) else sorted(Path(spec).rglob("*.parquet"))
    stats = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
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
    loaded = _checked(spec, np.load(hold.path / "images.npy", mmap_mode="r"), labels)
    loaded.hold = hold
    return loaded


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


def load_splits(data: Data, seed: int, preprocess: Preprocess) -> Generator[tuple[int, int], None, dict[str, Examples]]:
    """Yields (images decoded, in all) of the source at work; the value is {split: Examples}, of fit, select and test
    those that the recipe names. A select share is drawn from fit by `seed`. Raises RecipeError."""
    splits: dict[str, Examples] = {}
    for name in SPLITS:
        spec = getattr(data, name)
        if isinstance(spec, str):
            loaded = yield from load_source(spec, preprocess)
            rows = np.arange(len(loaded.labels))
            splits[name] = Examples(spec, loaded.images, loaded.labels, rows, loaded.hold)
    if "fit" in splits and isinstance(data.select, float):
        fit = splits["fit"]
        chosen = round(len(fit) * data.select)
        if not 0 < chosen < len(fit):
            raise RecipeError(f"data: {fit.source} has {len(fit)} examples: too few to take {data.select} for select.")
        order = np.random.default_rng([seed, 0]).permutation(len(fit))
        splits["select"] = replace(fit, rows=np.sort(order[:chosen]))
        splits["fit"] = replace(fit, rows=np.sort(order[chosen:]))
    return splits


def batch_positions(n: int, batch_size: int, *seeds: int) -> list[np.ndarray]:
    """One pass over n examples in an order that `seeds` fix: int32 positions, batch by batch; the last may be short."""
    order = np.random.default_rng(seeds).permutation(n).astype(np.int32)
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]

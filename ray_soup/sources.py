"""Labelled examples as they lie there, before anything is decoded: `.npz`, Parquet, a folder of images, a dataset that
Hugging Face `datasets` saved, or a function."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup import storage
from ray_soup.errors import RecipeError
from ray_soup.models import import_function
from ray_soup.recipe import Data, is_function

KINDS = "an .npz or .parquet file, a folder of Parquet files, of CLASS/image files or of `save_to_disk`, or module:function"
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's ImageFolder
NAMES = {"image": ("image", "img", "images"), "text": ("text", "sentence"), "label": ("label", "labels", "cls")}
PART = 256  # examples that are decoded between two signs of life


@dataclass(frozen=True)
class Raw:
    """Labels int64 [n], and either arrays [n, ...] that go to the model as they are, or what is to be preprocessed: parts of
    the source in a row, of bytes or paths of image files, or of texts."""

    spec: str
    labels: np.ndarray
    arrays: np.ndarray | None = None
    parts: Callable[[], Iterator[list[Any]]] = lambda: iter(())
    identity: tuple[Any, ...] = ()
    """Changes with the files; empty for a function."""
    classes: tuple[str, ...] = ()
    """What the labels of a folder of images stand for."""

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or not np.issubdtype(self.labels.dtype, np.integer):
            raise RecipeError(
                f"data: {self.spec}: labels are {self.labels.dtype} {list(self.labels.shape)}; expected int64 [n]."
            )
        if len(self.labels) == 0 or (self.arrays is not None and len(self.arrays) != len(self.labels)):
            count = len(self.labels) if self.arrays is None else len(self.arrays)
            raise RecipeError(
                f"data: {self.spec}: {count} images and {len(self.labels)} labels; expected as many of both, and some."
            )
        object.__setattr__(self, "labels", self.labels.astype(np.int64))


def read(spec: str, takes: str = "image") -> Generator[tuple[int, int], None, Raw]:
    """Yields (done, in all) where that lasts. `takes`: whether a table's column of images or of texts is wanted. Raises
    RecipeError."""
    if is_function(spec):
        return (yield from _function(spec))
    path = yield from _here(spec)
    if os.path.isdir(path):
        return _folder(spec, Path(path), takes)
    if path.endswith(".npz"):
        return _npz(spec, path)
    if path.endswith(".parquet"):
        return _parquet(spec, [Path(path)], takes)
    raise RecipeError(f"data: {spec} is of no known kind. Expected {KINDS}.")


def _here(spec: str) -> Generator[tuple[int, int], None, str]:
    """Where the source lies on this node; what is remote is copied into its cache. Raises RecipeError."""
    try:
        path = yield from storage.local_copy(spec)
    except FileNotFoundError:
        path = spec
    _check_exists(path)
    return path


def check_there(data: Data) -> None:
    """Raises RecipeError for a local source that this machine does not see."""
    for spec in (data.train, *data.sources().values()):
        if spec is not None and not is_function(spec) and not storage.is_remote(spec):
            _check_exists(spec)


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise RecipeError(
            f"data: {path} does not exist on {socket.gethostname()}. Expected {KINDS}, where every node sees it."
        )


def _identity(files: Sequence[Path]) -> list[Any]:
    stats = [(file, file.stat()) for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _function(spec: str) -> Generator[tuple[int, int], None, Raw]:
    dataset = import_function(spec)()
    total = len(dataset)
    images, labels = [], []
    for i in range(total):
        image, label = dataset[i]
        images.append(np.asarray(image))
        labels.append(int(label))
        if i % PART == 0:
            yield i, total
    return Raw(spec, np.array(labels, dtype=np.int64), np.stack(images) if images else np.zeros(0))


def _npz(spec: str, path: str) -> Raw:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if missing:
                raise RecipeError(f"data: {spec} holds {arrays.files}; expected the arrays 'images' and 'labels'.")
            images = _mapped(path, "images.npy")
            images = arrays["images"] if images is None else images
            return Raw(spec, arrays["labels"], images, identity=(_identity([Path(path)]),))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RecipeError(f"data: {spec} cannot be read as .npz ({error}). Write it with numpy.savez.") from error


def _mapped(path: str, member: str) -> np.ndarray | None:
    """An array that lies uncompressed in a zip file, memory-mapped: actors of a node share its pages."""
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(member).compress_type != zipfile.ZIP_STORED:
            return None
        start = archive.getinfo(member).header_offset
    with open(path, "rb") as file:
        file.seek(start + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(start + 30 + name + extra)
        version = np.lib.format.read_magic(file)
        if version > (2, 0):
            return None
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = header(file)
        if dtype.hasobject or not shape or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if in_columns else "C")


def _folder(spec: str, folder: Path, takes: str) -> Raw:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise RecipeError(f"data: {spec} holds the splits {', '.join(splits)}. Name one of them, as in {spec}/{splits[0]}.")
    if (folder / "state.json").exists():
        return _arrow(spec, folder, takes)
    parquet = sorted(folder.rglob("*.parquet"))
    if parquet:
        return _parquet(spec, parquet, takes)
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files, labels = [], []
    for number, name in enumerate(classes):
        for inside, _, names in sorted(os.walk(folder / name, followlinks=True)):
            some = [Path(inside, file) for file in sorted(names) if file.lower().endswith(IMAGES)]
            files += some
            labels += [number] * len(some)
    if not files:
        raise RecipeError(f"data: {spec} holds no data that is known. Expected {KINDS}.")
    identity = ("folder", _identity(files))

    def parts() -> Iterator[list[Any]]:
        return (list(files[first : first + PART]) for first in range(0, len(files), PART))

    return Raw(spec, np.array(labels, dtype=np.int64), parts=parts, identity=identity, classes=tuple(classes))


def _parquet(spec: str, files: Sequence[Path], takes: str) -> Raw:
    import pyarrow.parquet as pq

    def batches(file: Path, column: str) -> Iterator[Any]:
        with pq.ParquetFile(file) as reader:
            for batch in reader.iter_batches(PART, columns=[column]):
                yield batch.column(0)

    return _table(spec, files, "Parquet", pq.read_schema, batches, takes)


def _arrow(spec: str, folder: Path, takes: str) -> Raw:
    """A dataset as `save_to_disk` leaves it, read without the library: Arrow streams, and their names in state.json."""
    import pyarrow as pa

    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"data: {spec}: state.json names no data files ({error}). Save it anew.") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise RecipeError(f"data: {spec} is a selection of its files' rows. Save it anew after `flatten_indices()`.")

    def opened(file: Path) -> Any:
        try:
            return pa.ipc.open_stream(pa.memory_map(str(file)))
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(pa.memory_map(str(file)))
            return pa.RecordBatchReader.from_batches(reader.schema, map(reader.get_batch, range(reader.num_record_batches)))

    def batches(file: Path, column: str) -> Iterator[Any]:
        for batch in opened(file):
            values = batch.column(column)
            yield from (values.slice(first, PART) for first in range(0, len(values), PART))

    return _table(spec, files, "Arrow", lambda file: opened(file).schema, batches, takes)


def _table(
    spec: str,
    files: Sequence[Path],
    kind: str,
    schema_of: Callable[[Path], Any],
    batches: Callable[[Path, str], Iterator[Any]],
    takes: str,
) -> Raw:
    """Files of columns: one of them of images or texts, one of labels."""
    import pyarrow as pa

    try:
        schemas = [schema_of(file) for file in files]
        of_values, of_labels = _columns(spec, schemas[0], takes)
        for file, schema in zip(files, schemas, strict=True):
            for column in (of_values, of_labels):
                if column not in schema.names or schema.field(column).type != schemas[0].field(column).type:
                    raise RecipeError(f"data: {spec}: {file.name} has not the column {column} that {files[0].name} has.")
        labels = [a.to_numpy(zero_copy_only=False) for file in files for a in batches(file, of_labels)]
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"data: {spec} cannot be read as {kind} ({error}).") from error

    def parts() -> Iterator[list[Any]]:
        for file in files:
            for values in batches(file, of_values):
                yield [v["bytes"] if isinstance(v, dict) else v for v in values.to_pylist()]

    joined = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    return Raw(spec, joined, parts=parts, identity=(of_values, of_labels, _identity(files)))


def _columns(spec: str, schema: Any, takes: str) -> tuple[str, str]:
    """The columns of values and of labels: by their names, else the only one of its type. Raises RecipeError."""
    import pyarrow as pa

    def is_image(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" for field in kind)
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def is_text(kind: Any) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    wanted = {takes: is_text if takes == "text" else is_image, "label": pa.types.is_integer}
    chosen = []
    for what, fits in wanted.items():
        found = [field.name for field in schema if fits(field.type)]
        named = [name for name in NAMES[what] if name in found]
        if not named and len(found) != 1:
            has = f"has the columns {', '.join(schema.names)}" if not found else f"has several of them: {', '.join(found)}"
            values = "texts" if takes == "text" else "image bytes"
            raise RecipeError(
                f"data: {spec} {has}; expected one of {values} and one of integer labels. Where there are more, the one "
                f"called {' or '.join(NAMES[what])} is taken."
            )
        chosen.append((named or found)[0])
    return chosen[0], chosen[1]

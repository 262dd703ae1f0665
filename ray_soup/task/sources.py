"""Labeled examples in their stored form, before anything is decoded.

A source is an `.npz` file, Parquet, a folder of images, a dataset that `save_to_disk` of Hugging Face `datasets` wrote, or a
function.
"""

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

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.recipe import Data, is_function
from ray_soup.task.functions import import_function

KINDS = (
    "an .npz or .parquet file; a folder of Parquet files, of CLASS/image files, or written by `save_to_disk`; or "
    "module:function"
)
IMAGES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, those of torchvision's ImageFolder."""
NAMES = {"image": ("image", "img", "images"), "text": ("text", "sentence"), "label": ("label", "labels", "cls")}
"""Names of columns, in order of preference."""
PART = 256
"""Number of examples decoded between two reports of progress."""


@dataclass(frozen=True)
class RawExamples:
    """Labels, and inputs that are either arrays or still to be preprocessed."""

    spec: str
    """The source as the recipe names it."""
    labels: np.ndarray
    """int64 [n]."""
    arrays: np.ndarray | None = None
    """Inputs [n, ...] of any dtype, passed to the model unchanged."""
    parts: Callable[[], Iterator[list[Any]]] = lambda: iter(())
    """If `arrays` is None: yields the source in parts, lists of encoded images, paths of image files, or texts."""
    identity: tuple[Any, ...] = ()
    """JSON values that change with the files; empty for a function."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label, of a folder of images."""

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or not np.issubdtype(self.labels.dtype, np.integer):
            raise RecipeError(
                f"data: {self.spec}: labels are {self.labels.dtype} {list(self.labels.shape)}; expected int64 [n]. Store "
                "one integer per example."
            )
        if len(self.labels) == 0 or (self.arrays is not None and len(self.arrays) != len(self.labels)):
            count = len(self.labels) if self.arrays is None else len(self.arrays)
            raise RecipeError(
                f"data: {self.spec}: {count} inputs and {len(self.labels)} labels; expected one label per input, and at "
                "least one of each. Save the data again."
            )
        object.__setattr__(self, "labels", self.labels.astype(np.int64))


def read_source(spec: str, kind: str = "image") -> Generator[tuple[int, int], None, RawExamples]:
    """Open a source of examples, from this machine or from a copy in the node's cache.

    Args:
        spec: a path, a URI or `module:function`.
        kind: "image" or "text": which column of a table to read.

    Yields (done, total) while it copies or calls a function. Raises RecipeError if the source cannot be read.
    """
    if is_function(spec):
        return (yield from _function(spec))
    path = yield from _local_path(spec)
    if os.path.isdir(path):
        return _folder(spec, Path(path), kind)
    if path.endswith(".npz"):
        return _npz(spec, path)
    if path.endswith(".parquet"):
        return _parquet(spec, [Path(path)], kind)
    raise RecipeError(f"data: {spec} is not a supported source. Expected {KINDS}. Convert it to one of these.")


def check_sources_exist(data: Data) -> None:
    """Check that all local sources exist on this machine. Raises RecipeError."""
    for spec in (data.train, *data.sources().values()):
        if spec is not None and not is_function(spec) and not storage.is_remote(spec):
            _check_exists(spec)


def _local_path(spec: str) -> Generator[tuple[int, int], None, str]:
    try:
        path = yield from storage.local_copy(spec)
    except FileNotFoundError:
        path = spec
    _check_exists(path)
    return path


def _check_exists(path: str) -> None:
    if not os.path.exists(path):
        raise RecipeError(
            f"data: {path} does not exist on {socket.gethostname()}. Expected {KINDS}. Put it where every node can read it: "
            "a shared disk, or a URI."
        )


def _identity(files: Sequence[Path]) -> list[Any]:
    """Identify files by path, size in bytes and modification time in ns."""
    stats = [(file, file.stat()) for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _function(spec: str) -> Generator[tuple[int, int], None, RawExamples]:
    dataset = import_function(spec)()
    total = len(dataset)
    images, labels = [], []
    for i in range(total):
        image, label = dataset[i]
        images.append(np.asarray(image))
        labels.append(int(label))
        if i % PART == 0:
            yield i, total
    return RawExamples(spec, np.array(labels, dtype=np.int64), np.stack(images) if images else np.zeros(0))


def _npz(spec: str, path: str) -> RawExamples:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"images", "labels"} - set(arrays.files)
            if missing:
                raise RecipeError(
                    f"data: {spec} contains {arrays.files}; expected the arrays 'images' and 'labels'. Save them under "
                    "these names."
                )
            images = _mapped(path, "images.npy")
            images = arrays["images"] if images is None else images
            return RawExamples(spec, arrays["labels"], images, identity=(_identity([Path(path)]),))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise RecipeError(f"data: {spec} cannot be read as .npz ({error}). Save it with numpy.savez.") from error


def _mapped(path: str, member: str) -> np.ndarray | None:
    """Memory-map an uncompressed array of a zip file, so that the actors of a node share its pages.

    Returns None if the array is compressed, empty, or in another format.
    """
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
        shape, column_major, dtype = header(file)
        if dtype.hasobject or not shape or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if column_major else "C")


def _folder(spec: str, folder: Path, kind: str) -> RawExamples:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text()).get("splits", [])
        raise RecipeError(f"data: {spec} contains the splits {', '.join(splits)}. Choose one, as in {spec}/{splits[0]}.")
    if (folder / "state.json").exists():
        return _arrow(spec, folder, kind)
    parquet = sorted(folder.rglob("*.parquet"))
    if parquet:
        return _parquet(spec, parquet, kind)
    return _image_folder(spec, folder)


def _image_folder(spec: str, folder: Path) -> RawExamples:
    """Read CLASS/image files; a label is the position of CLASS in the sorted list of folders."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        for inside, _, names in sorted(os.walk(folder / name, followlinks=True)):
            some = [Path(inside, file) for file in sorted(names) if file.lower().endswith(IMAGES)]
            files += some
            labels += [number] * len(some)
    if not files:
        raise RecipeError(f"data: {spec} contains no supported data. Expected {KINDS}. Check the path.")
    identity = ("folder", _identity(files))

    def parts() -> Iterator[list[Any]]:
        return (list(files[first : first + PART]) for first in range(0, len(files), PART))

    return RawExamples(spec, np.array(labels, dtype=np.int64), parts=parts, identity=identity, classes=tuple(classes))


def _parquet(spec: str, files: Sequence[Path], kind: str) -> RawExamples:
    import pyarrow.parquet as pq

    def batches(file: Path, column: str) -> Iterator[Any]:
        with pq.ParquetFile(file) as reader:
            for batch in reader.iter_batches(PART, columns=[column]):
                yield batch.column(0)

    return _table(spec, files, kind, file_format="Parquet", schema_of=pq.read_schema, batches=batches)


def _arrow(spec: str, folder: Path, kind: str) -> RawExamples:
    """Read a dataset written by `save_to_disk` without the library `datasets`: Arrow streams that state.json lists."""
    import pyarrow as pa

    try:
        state = json.loads((folder / "state.json").read_text())
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"data: {spec}: state.json names no data files ({error}). Save the dataset again.") from error
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise RecipeError(
            f"data: {spec} is a selection of the rows of its files. Save the dataset again after `flatten_indices()`."
        )

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

    def schema_of(file: Path) -> Any:
        return opened(file).schema

    return _table(spec, files, kind, file_format="Arrow", schema_of=schema_of, batches=batches)


def _table(
    spec: str,
    files: Sequence[Path],
    kind: str,
    *,
    file_format: str,
    schema_of: Callable[[Path], Any],
    batches: Callable[[Path, str], Iterator[Any]],
) -> RawExamples:
    """Read files of columns, one of which holds images or texts and one labels."""
    import pyarrow as pa

    try:
        schemas = [schema_of(file) for file in files]
        of_values, of_labels = _columns(spec, schemas[0], kind)
        for file, schema in zip(files, schemas, strict=True):
            for column in (of_values, of_labels):
                if column not in schema.names or schema.field(column).type != schemas[0].field(column).type:
                    raise RecipeError(
                        f"data: {spec}: {file.name} has no column '{column}' of type {schemas[0].field(column).type} "
                        f"({files[0].name} has it). Save all files with the same columns."
                    )
        labels = [a.to_numpy(zero_copy_only=False) for file in files for a in batches(file, of_labels)]
    except (pa.ArrowException, OSError) as error:
        raise RecipeError(f"data: {spec} cannot be read as {file_format} ({error}). Save it again.") from error

    def parts() -> Iterator[list[Any]]:
        for file in files:
            for values in batches(file, of_values):
                yield [v["bytes"] if isinstance(v, dict) else v for v in values.to_pylist()]

    joined = np.concatenate(labels) if labels else np.zeros(0, np.int64)
    return RawExamples(spec, joined, parts=parts, identity=(of_values, of_labels, _identity(files)))


def _columns(spec: str, schema: Any, kind: str) -> tuple[str, str]:
    """Choose the columns of values and of labels: by NAMES, or the only one of the right type. Raises RecipeError."""
    import pyarrow as pa

    def is_image(column: Any) -> bool:
        if pa.types.is_struct(column):
            return any(field.name == "bytes" for field in column)
        return bool(pa.types.is_binary(column) or pa.types.is_large_binary(column))

    def is_text(column: Any) -> bool:
        return bool(pa.types.is_string(column) or pa.types.is_large_string(column))

    wanted = {kind: is_text if kind == "text" else is_image, "label": pa.types.is_integer}
    chosen = []
    for what, fits in wanted.items():
        found = [field.name for field in schema if fits(field.type)]
        named = [name for name in NAMES[what] if name in found]
        if not named and len(found) != 1:
            has = (
                f"has several candidate columns: {', '.join(found)}"
                if found
                else f"has the columns {', '.join(schema.names)}"
            )
            values = "texts" if kind == "text" else "image bytes"
            raise RecipeError(
                f"data: {spec} {has}; expected one column of {values} and one of integer labels. If there are several, "
                f"call the right one {' or '.join(NAMES[what])}."
            )
        chosen.append((named or found)[0])
    return chosen[0], chosen[1]

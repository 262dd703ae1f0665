"""Examples in columns: Parquet, and the Arrow files that `save_to_disk` of Hugging Face `datasets` writes."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.task.classes import Classes
from ray_soup.task.hub import class_names, features_of, lfs_hint, listed_files, read_json
from ray_soup.task.raw_examples import LARGEST, PART, Encoded, RawExamples, Source, identity_of, reason
from ray_soup.task.target_columns import holds_targets, join_targets, read_targets

NAMES = {
    "image": ("image", "img", "images", "pixel_values"),
    "text": ("text", "sentence"),
    "label": ("label", "labels", "cls", "target", "targets"),
}
"""Names of columns, in order of preference."""
MASKS = ("mask", "masks", "annotation", "annotations", "label", "labels", "target", "targets")
"""Names of a column of images with the class of each pixel, in order of preference."""
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


@dataclass(frozen=True)
class Format:
    """How to read the files of a table."""

    name: str
    schema: Callable[[Path], Any]
    batches: Callable[[Path, str], Iterator[Any]]
    """Yields a column of a file in Arrow arrays of at most PART rows."""
    has_nulls: Callable[[Path, str], bool]
    """Whether the bytes of an image column may contain nulls, as far as can be found out without reading them."""


def read_parquet(source: Source, root: Path, files: Sequence[Path], kind: str | None) -> RawExamples:
    """Read Parquet files below the folder `root`. Raises RecipeError."""
    return _read(source, root, files, kind, parquet())


def parquet() -> Format:
    """Return how to read a Parquet file."""
    import pyarrow.parquet as pq

    def batches(file: Path, column: str) -> Iterator[Any]:
        with pq.ParquetFile(file, page_checksum_verification=True) as reader:
            for batch in reader.iter_batches(PART, columns=[column]):
                yield batch.column(0)

    def has_nulls(file: Path, column: str) -> bool:
        metadata = pq.read_metadata(file)
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            chunks = [row_group.column(number) for number in range(metadata.num_columns)]
            found = [chunk.statistics for chunk in chunks if chunk.path_in_schema in (column, f"{column}.bytes")]
            if not found or any(s is None or not s.has_null_count or s.null_count for s in found):
                return True
        return False

    return Format("Parquet", pq.read_schema, batches, has_nulls)


def read_saved(source: Source, folder: Path, kind: str | None) -> RawExamples:
    """Read a dataset written by `save_to_disk` without the library `datasets`: Arrow streams that state.json lists.

    Raises RecipeError.
    """
    info = folder / "dataset_info.json"
    features = read_json(source, info).get("features") if info.exists() else None
    return _read(source, folder, listed_files(source, folder), kind, arrow(), features)


def arrow() -> Format:
    """Return how to read an Arrow file that `save_to_disk` wrote."""
    import pyarrow as pa

    def opened(file: Path) -> Any:
        memory = pa.memory_map(str(file))
        if memory.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(memory)
            return pa.RecordBatchReader.from_batches(reader.schema, map(reader.get_batch, range(reader.num_record_batches)))
        memory.seek(max(0, memory.size() - len(END_OF_STREAM)))
        if memory.read() != END_OF_STREAM:
            raise ValueError("the stream has no end: the file is truncated")
        memory.seek(0)
        return pa.ipc.open_stream(memory)

    def batches(file: Path, column: str) -> Iterator[Any]:
        for batch in opened(file):
            values = batch.column(column)
            yield from (values.slice(first, PART) for first in range(0, len(values), PART))

    def schema(file: Path) -> Any:
        return opened(file).schema

    return Format("Arrow", schema, batches, lambda file, column: True)


def _read(
    source: Source, root: Path, files: Sequence[Path], kind: str | None, how: Format, features: Any = None
) -> RawExamples:
    """Read files of columns, one of which holds images or texts and one labels.

    Args:
        source: the source.
        root: the folder that images which are stored as paths are in.
        files: files with the same columns.
        kind: "image" or "text"; None: whichever there is.
        how: how to read a file.
        features: the features in dataset_info.json, if there are any.
    """
    identity = identity_of(source, files)
    _check_distinct(source, files)
    schemas = [_guarded(source, file, how, partial(_decoded, how, file)) for file in files]
    of_values, of_labels = _columns(source, schemas[0], kind)
    for file, schema in zip(files, schemas, strict=True):
        _check_schema(source, files[0], schemas[0], file, schema, (of_values, of_labels))
    table, masks = _Table(source, root, how, of_values), list[Encoded]()
    of_masks = _Table(source, root, how, of_labels) if _kind(schemas[0].field(of_labels).type) == "image" else None
    counts, labels, linked = [], [], []
    for file in files:
        linked += table.linked(file)
        if of_masks is None:
            labels.append(_labels(source, file, how, of_labels))
        else:  # zeros, until the masks are decoded
            linked += of_masks.linked(file)
            found = [value for part in of_masks.values(file) for value in part]
            masks += found
            labels.append(np.zeros(len(found), np.int64))
        counts.append(len(labels[-1]))
    starts = np.cumsum([0, *counts]).tolist()

    def where(row: int) -> str:
        number = bisect.bisect_right(starts, row) - 1
        return f"row {row}" if len(files) == 1 else f"row {row - starts[number]} of {files[number].name}"

    def parts() -> Iterator[list[Any]]:
        for file in files:
            yield from table.values(file)

    names = _names(source, files, schemas, of_labels, features) if source.targets == "classes" else None
    joined = join_targets(source, of_labels, [file.name for file in files], labels)
    if names is not None:
        beyond = np.flatnonzero(joined >= len(names.names))
        if len(beyond):
            raise source.error(
                f"label {joined[beyond[0]]} at {where(int(beyond[0]))}; the column '{of_labels}' has {len(names.names)} "
                "names of classes. Fix the labels, or their names."
            )
    whole = (of_values, of_labels, identity, identity_of(source, linked)) if linked else (of_values, of_labels, identity)
    return RawExamples(source, joined, None, parts, whole, names, where, masks=tuple(masks))


@dataclass(frozen=True)
class _Table:
    """The column of inputs of a table."""

    source: Source
    root: Path
    how: Format
    column: str

    def values(self, file: Path) -> Iterator[list[Any]]:
        """Yield encoded images, paths of images, or texts."""
        row = 0
        for array in _checked(self.source, file, self.how, self.column):
            values = array.to_pylist()
            yield [self._value(file, row + number, value) for number, value in enumerate(values)]
            row += len(values)

    def _value(self, file: Path, row: int, value: Any) -> Any:
        if isinstance(value, dict):
            return value["bytes"] if value["bytes"] is not None else self._path(file, row, value.get("path"))
        if value is None:
            raise self.source.error(f"row {row} of {file.name}, column '{self.column}': null. Remove the row.")
        return value

    def linked(self, file: Path) -> list[Path]:
        """Return the files that a column of images refers to instead of holding their bytes. Raises RecipeError."""
        import pyarrow as pa
        import pyarrow.compute as pc

        struct = pa.types.is_struct(self.how.schema(file).field(self.column).type)
        if not self.how.has_nulls(file, self.column):
            return []
        found, row = [], 0
        for array in _checked(self.source, file, self.how, self.column):
            held = pc.struct_field(array, "bytes") if struct else array
            for at in np.flatnonzero(held.is_null().to_numpy(zero_copy_only=False)).tolist():
                found.append(self._path(file, row + at, (array[at].as_py() or {}).get("path")))
            row += len(array)
        return found

    def _path(self, file: Path, row: int, path: Any) -> Path:
        """Return the file that an image without bytes refers to, which must be inside the source's folder."""
        where = f"row {row} of {file.name}, column '{self.column}'"
        if not isinstance(path, str) or not path:
            raise self.source.error(f"{where}: null. Remove the row.")
        root = self.root.resolve()
        for folder in (file.parent, self.root):
            found = folder / path
            if "\0" not in path and found.is_file() and found.resolve().is_relative_to(root):
                return found
        raise self.source.error(
            f"{where} has no image bytes, and its path {path!r} is not a file in {self.root}. Save the images in the table."
        )


def _checked(source: Source, file: Path, how: Format, column: str) -> Iterator[Any]:
    """Yield validated arrays of a column, with the values of dictionaries in place. Raises RecipeError."""
    import pyarrow as pa

    batches, row = iter(how.batches(file, column)), 0
    while (array := _guarded(source, file, how, lambda: next(batches, None))) is not None:
        try:
            array.validate(full=True)
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
        except pa.ArrowException as error:
            raise source.error(
                f"rows {row} to {row + len(array) - 1} of {file.name}, column '{column}', are damaged or not UTF-8 "
                f"({reason(error)}). Repair or remove them."
            ) from error
        yield array
        row += len(array)


def columns_of(source: Source, file: Path, how: Format) -> list[str]:
    """Return the names of the columns of a file. Raises RecipeError if it is damaged."""
    return list(_guarded(source, file, how, partial(_decoded, how, file)).names)


def values_of(source: Source, file: Path, how: Format, column: str) -> Iterator[Any]:
    """Yield the values of a column as Python objects. Raises RecipeError if the file is damaged."""
    return (value for array in _checked(source, file, how, column) for value in array.to_pylist())


def _guarded(source: Source, file: Path, how: Format, action: Callable[[], Any]) -> Any:
    """Call pyarrow on a file, which may be damaged. Raises RecipeError."""
    try:
        return action()
    except RecipeError:
        raise
    except Exception as error:  # pyarrow raises almost anything for a damaged file
        raise source.error(
            f"{file.name} cannot be read as {how.name} ({reason(error)}).{lfs_hint(file)} Save or download it again."
        ) from error


def _decoded(how: Format, file: Path) -> Any:
    """Return the schema of a file, after trying to decode the names in it."""
    schema = how.schema(file)
    _ = [(name, _kind(field.type)) for name, field in zip(schema.names, schema, strict=True)]
    return schema


def _labels(source: Source, file: Path, how: Format, column: str) -> np.ndarray:
    """Read the targets of a file: for classification int64 [n]. Raises RecipeError for nulls and for unusable targets."""
    if source.targets != "classes":
        return read_targets(source, file.name, column, _checked(source, file, how, column))
    found, row = [np.zeros(0, np.int64)], 0
    for array in _checked(source, file, how, column):
        if array.null_count:
            first = row + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
            raise source.error(
                f"row {first} of {file.name} has no label: '{column}' is null. Remove examples without a label."
            )
        values = array.to_numpy(zero_copy_only=False)
        beyond = np.flatnonzero(values > LARGEST)
        if len(beyond):
            raise source.error(
                f"label {values[beyond[0]]} at row {row + beyond[0]} of {file.name} is too large for int64. Fix it."
            )
        found.append(values.astype(np.int64))
        row += len(array)
    return np.concatenate(found)


def names_in(source: Source, files: Sequence[Path], how: Format, column: str) -> Classes | None:
    """Return the names of classes that files of a table know for a column. Raises RecipeError if they disagree."""
    info = files[0].parent / "dataset_info.json"  # of a folder that `save_to_disk` wrote
    features = read_json(source, info).get("features") if info.exists() else None
    schemas = [_guarded(source, file, how, partial(_decoded, how, file)) for file in files]
    return _names(source, files, schemas, column, features)


def _names(source: Source, files: Sequence[Path], schemas: Sequence[Any], column: str, features: Any) -> Classes | None:
    """Return the names of classes of a ClassLabel column. Raises RecipeError if files disagree."""
    names = class_names(features, column)  # `datasets` prefers dataset_info.json to the metadata of the files
    if names:
        return Classes(source.key, source.spec, names)
    found = [Classes(file.name, source.spec, class_names(features_of(schema.metadata), column))
             for file, schema in zip(files, schemas, strict=True)]  # fmt: skip
    named = [classes for classes in found if classes.names]
    for classes in named:
        if classes.names != named[0].names:
            raise source.error(
                f"{classes.key} has the classes {classes}, and {named[0].key} has {named[0]}. Save all files with the same "
                "features."
            )
    return Classes(source.key, source.spec, named[0].names) if named else None


def _check_distinct(source: Source, files: Sequence[Path]) -> None:
    """Check that no file is listed twice by way of a link. Raises RecipeError."""
    seen: dict[str, Path] = {}
    for file in files:
        twin = seen.setdefault(os.path.realpath(file), file)
        if twin is not file:
            raise source.error(f"{file} and {twin} are the same file. Remove the link: every file counts once.")


def _check_schema(source: Source, first_file: Path, first: Any, file: Path, schema: Any, columns: tuple[str, str]) -> None:
    """Check that a file has the columns of the first file, once each, with types that can be read alike."""
    of_values, of_labels = columns
    of_images = source.targets == "classes" or _kind(first.field(of_labels).type) == "image"
    for column, what in ((of_values, _kind), (of_labels, _kind if of_images else holds_targets)):
        if schema.names.count(column) > 1:
            raise source.error(f"{file.name} has {schema.names.count(column)} columns named '{column}'. Rename all but one.")
        kinds = [what(s.field(column).type) if column in s.names else "" for s in (first, schema)]
        if kinds[0] != kinds[1]:
            raise source.error(
                f"{file.name} has no column '{column}' of type {first.field(column).type} ({first_file.name} has it). Save "
                "all files with the same columns."
            )


def _kind(column: Any) -> str:
    """Return what a column of this Arrow type can hold: "image", "text", "label" or nothing."""
    from pyarrow import types

    if types.is_dictionary(column):
        column = column.value_type
    if types.is_struct(column):
        bytes_type = next((field.type for field in column if field.name == "bytes"), None)
        return "image" if bytes_type is not None and (_is_binary(bytes_type) or types.is_null(bytes_type)) else ""
    if types.is_integer(column):
        return "label"
    if _is_binary(column):
        return "image"
    return "text" if types.is_string(column) or types.is_large_string(column) else ""


def _is_binary(column: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(column) or types.is_large_binary(column))


def _columns(source: Source, schema: Any, kind: str | None) -> tuple[str, str]:
    """Choose the columns of values and of labels: by NAMES, or the only one of the right type. Raises RecipeError."""
    kinds = [_kind(field.type) for field in schema]
    if kind is None:
        kind = "image" if "image" in kinds else "text"
    chosen, masks = [], MASKS if source.targets == "pixels" else ()
    for what in (kind, "label"):
        found = [n for n, holds in zip(schema.names, kinds, strict=True) if holds == what and n not in masks]
        if what == "label" and source.targets != "classes":
            of_images = [n for n, holds in zip(schema.names, kinds, strict=True) if holds == "image" and n in masks]
            found = [*of_images, *(field.name for field in schema if holds_targets(field.type))]
        named = [name for name in ((*masks, *NAMES[what]) if what == "label" else NAMES[what]) if name in found]
        if not named and len(set(found)) != 1:
            has = f"several candidate columns: {', '.join(found)}" if found else f"the columns are {', '.join(schema.names)}"
            values = "texts" if kind == "text" else "image bytes"
            wanted = "integer labels" if source.targets == "classes" else "numbers or lists of numbers"
            wanted = f"masks or {wanted}" if masks else wanted
            raise source.error(
                f"{has}; expected one column of {values} and one of {wanted}. If there are several, call the right "
                f"one {' or '.join(NAMES[what])}."
            )
        chosen.append((named or found)[0])
    return chosen[0], chosen[1]

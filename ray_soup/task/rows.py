"""Rows of tables by the names of their columns: Parquet, JSON lines, `save_to_disk` folders, and functions' datasets."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray_soup.recipe import is_function
from ray_soup.task import hub
from ray_soup.task.classes import Classes
from ray_soup.task.folders import find_files
from ray_soup.task.functions import call, import_function
from ray_soup.task.raw_examples import Source, check_regular, identity_of, reason
from ray_soup.task.sources import local_path, only_split
from ray_soup.task.tables import Format, arrow, columns_of, names_in, parquet, values_of

JSON = (".jsonl", ".json")
SUFFIXES = (".parquet", *JSON)
KINDS = "a .parquet, .jsonl or .json file, a folder of these, a folder written by `save_to_disk`, or module:function"
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Files of rows, or the dataset of a function."""

    source: Source
    columns: tuple[str, ...]
    """The names of the columns: for JSON the keys of the first row."""
    parts: Sequence[tuple[str, Callable[[Sequence[str]], Iterator[Row]]]]
    """The name of each file, and a function that yields the wanted columns of its rows; None where a row has none."""
    identity: tuple[Any, ...] = ()
    """JSON values that change with the files; empty for a function."""
    nbytes: int = 0
    """Size of the files in bytes."""
    classes: Callable[[str], Classes | None] = lambda column: None
    """Returns the names of classes in a column of integers, or of lists of them, if the files know any."""


def open_table(source: Source) -> Generator[tuple[int, int], None, Table]:
    """Open a source of rows, from this machine, a copy in the node's cache, or a function.

    Yields (done, total) while it copies. Raises RecipeError if the source cannot be read.
    """
    if is_function(source.spec):
        return _of_function(source)
    return table_of(source, (yield from local_path(source, SUFFIXES)))


def table_of(source: Source, path: str | list[Path]) -> Table:
    """Open files of rows on this machine. Raises RecipeError."""
    files, how = _files(source, path)
    identity = identity_of(source, files)
    columns = _columns(source, files[0], how)
    for file in files[1:] if how is not None else ():
        missing = sorted(set(columns) ^ set(_columns(source, file, how)))
        if missing:
            names = f"{file.name} and {files[0].name}"
            raise source.error(f"{names} do not both have the column '{missing[0]}'. Save them alike.")
    return Table(
        source, tuple(columns), [(file.name, _reader(source, file, how)) for file in files], (identity,),
        sum(file.stat().st_size for file in files), Table.classes if how is None else partial(names_in, source, files, how),
    )  # fmt: skip


def _files(source: Source, path: str | list[Path]) -> tuple[list[Path], Format | None]:
    """Return the files of a source, and how to read them: None for JSON. Raises RecipeError."""
    if isinstance(path, list):
        files = path
    elif os.path.isdir(path):
        folder = only_split(source, Path(path))
        if (folder / "state.json").exists():
            return hub.listed_files(source, folder), arrow()
        scan = find_files(source, folder, SUFFIXES)
        files = [file for suffix in SUFFIXES for file in scan.everything(suffix) if file.name != "dataset_infos.json"]
        if files:
            hub.one_split(source, folder, files, source.spec)
    else:
        check_regular(source, path)
        files = [Path(path)] if path.endswith(SUFFIXES) else []
    kinds = {file.suffix.lower() == ".parquet" for file in files}
    if len(kinds) != 1:
        what = "has both Parquet and JSON files" if files else "is not a supported source"
        raise source.error(f"{what}. Expected {KINDS}, with rows of texts or tokens. Convert it to one of these.")
    return files, parquet() if kinds == {True} else None


def _reader(source: Source, file: Path, how: Format | None) -> Callable[[Sequence[str]], Iterator[Row]]:
    if how is None:
        return lambda columns: ({name: row.get(name) for name in columns} for row in _json_rows(source, file))

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        known = [name for name in columns if name in columns_of(source, file, how)]
        values = [values_of(source, file, how, name) for name in known]
        return (dict.fromkeys(columns) | dict(zip(known, row, strict=True)) for row in zip(*values, strict=True))

    return rows


def _columns(source: Source, file: Path, how: Format | None) -> list[str]:
    """Return the columns of a file, of JSON the keys of the first row. Raises RecipeError."""
    if how is not None:
        return columns_of(source, file, how)
    first = next(_json_rows(source, file), None)
    if first is None:
        raise source.error(f"{file.name} has no rows. Save it again.")
    return list(first)


def _json_rows(source: Source, file: Path) -> Iterator[Row]:
    """Yield the objects of a JSON file: one per line, or one array of them. Raises RecipeError."""
    check_regular(source, file)
    number = 0
    try:
        with open(file, encoding="utf-8-sig") as opened:
            if file.suffix.lower() == ".json" and opened.read(4096).lstrip()[:1] == "[":
                opened.seek(0)
                found: Iterator[tuple[int, Any]] = enumerate(json.load(opened))
            else:
                opened.seek(0)
                found = ((line, json.loads(text)) for line, text in enumerate(opened) if text.strip())
            for number, row in found:
                if not isinstance(row, dict):
                    raise ValueError(f"a {type(row).__name__} instead of an object")
                yield row
                number += 1
    except (OSError, ValueError, RecursionError) as error:
        raise source.error(
            f"{file.name} cannot be read as JSON after {number} lines ({reason(error)}).{hub.lfs_hint(file)} Expected one "
            "object per line, or one array of objects. Save it again."
        ) from error


def _of_function(source: Source) -> Table:
    """Read all items of the dataset that a function returns. Raises RecipeError."""
    dataset = call(source.key, source.spec, import_function(source.spec, source.key))
    total = call(source.key, f"{source.spec}: len() of its dataset", len, dataset)
    items = [
        call(source.key, f"{source.spec}: item {row} of its dataset", operator.getitem, dataset, row) for row in range(total)
    ]
    for row, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise source.error(
                f"item {row} of its dataset is a {type(item).__name__}; expected a dictionary with the columns of a row, "
                "such as `text`. Change what the dataset returns."
            )
    if not items:
        raise source.error("its dataset has no items. Return at least one.")

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        return ({name: _plain(item.get(name)) for name in columns} for item in items)

    return Table(source, tuple(map(str, items[0])), [("", rows)])


def _plain(value: Any) -> Any:
    """Turn tensors and arrays into lists."""
    return value.tolist() if hasattr(value, "tolist") else value

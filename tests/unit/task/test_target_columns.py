"""Targets in columns of Parquet and Arrow files: the same arrays as in an .npz file, or a refusal that names the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import load_named
from ray_soup.task.raw_examples import IGNORED
from tests.unit.task.images import as_tensor, png

ROWS = 300
"""More than pyarrow reads at a time."""
RANDOM = np.random.default_rng(0)
HOT = RANDOM.integers(0, 2, (ROWS, 5))
FLOATS = RANDOM.normal(size=(ROWS, 2)).astype(np.float32)
MASKS = RANDOM.integers(0, 4, (ROWS, 3, 2)).astype(np.uint8)
UNKNOWN = np.where(RANDOM.random((ROWS, 2)) < 0.2, np.nan, FLOATS).astype(np.float32)
"""NaN stands for a number that is not known; pandas writes it as null."""


def nested(values: np.ndarray, of: Any = None) -> pa.Array:
    return pa.array(values.tolist(), of)


def with_nulls(values: np.ndarray) -> list[Any]:
    return [None if isinstance(x, float) and np.isnan(x) else x for x in values.tolist()]


def fixed(values: np.ndarray, of: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), of), values.shape[1])


def tensors(values: np.ndarray) -> pa.Array:
    flat = fixed(values.reshape(len(values), -1), pa.uint8())
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), values.shape[1:]), flat)


SAME: dict[str, tuple[str, np.ndarray, Any]] = {
    "multi-hot lists": ("labels", HOT, nested(HOT)),
    "multi-hot lists of booleans": ("labels", HOT, nested(HOT > 0)),
    "multi-hot lists of one size": ("labels", HOT, fixed(HOT, pa.int8())),
    "large lists": ("labels", HOT, nested(HOT, pa.large_list(pa.float32()))),
    "numbers": ("numbers", FLOATS[:, 0], pa.array(FLOATS[:, 0])),
    "float16": ("numbers", FLOATS[:, 0].astype(np.float16), pa.array(FLOATS[:, 0].astype(np.float16))),
    "integers": ("numbers", HOT[:, 0], pa.array(HOT[:, 0], pa.uint16())),
    "lists of numbers": ("numbers", FLOATS, nested(FLOATS, pa.list_(pa.float32()))),
    "NaN": ("numbers", UNKNOWN[:, 0], pa.array(UNKNOWN[:, 0])),
    "nulls for NaN": ("numbers", UNKNOWN[:, 0], pa.array(with_nulls(UNKNOWN[:, 0]))),
    "nulls for NaN in lists": ("numbers", UNKNOWN, pa.array([with_nulls(row) for row in UNKNOWN])),
    "pixels": ("pixels", MASKS, nested(MASKS, pa.list_(pa.list_(pa.uint8())))),
    "pixels in lists of one size": ("pixels", MASKS, nested(MASKS, pa.list_(pa.list_(pa.int16(), 2), 3))),
    "tensors": ("pixels", MASKS, tensors(MASKS)),
    "a dictionary": ("numbers", HOT[:, 0], pa.array(HOT[:, 0]).dictionary_encode()),
}


def pictures(count: int = ROWS) -> list[bytes]:
    return [png(Image.fromarray(np.array([[n // 256, n % 256]], np.uint8))) for n in range(count)]


def load(file: Path, targets: str) -> np.ndarray:
    return drain(load_named(Data(test=str(file)), "test", as_tensor, targets)).labels


@pytest.mark.parametrize("name", SAME)
def test_targets_are_those_of_an_npz_file(tmp_path: Path, name: str) -> None:
    """In one file, in two of which one is empty, and in a dataset that `save_to_disk` wrote."""
    targets, array, column = SAME[name]
    np.savez(tmp_path / "a.npz", images=np.zeros((ROWS, 1)), targets=array)
    expected = load(tmp_path / "a.npz", targets)
    table = pa.table({"image": pictures(), "target": column})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "parts").mkdir()
    for part, rows in enumerate((slice(0, 0), slice(0, 7), slice(7, ROWS))):
        pq.write_table(table.slice(rows.start, rows.stop - rows.start), tmp_path / "parts" / f"{part}.parquet")
    (tmp_path / "saved").mkdir()
    with pa.ipc.new_stream(tmp_path / "saved" / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    for place in ("a.parquet", "parts", "saved"):
        found = load(tmp_path / place, targets)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_targets_of_a_data_frame(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"image": pictures(3), "target": [0.5, float("nan"), 2.0]})
    frame.to_parquet(tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet")["target"].null_count == 1
    np.testing.assert_array_equal(load(tmp_path / "a.parquet", "numbers"), np.array([0.5, np.nan, 2], np.float32))


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a null": ("pixels", [[1], None, [2]], "row 1 of a.parquet has no target: it is null in 'target'. Remove the row, or "
               f"write {IGNORED} where nothing is scored."),
    "a null in a list": ("labels", [[1, 0], [0, 1], [None, 1]], "row 2 of a.parquet has no target: a value is null in "
                         "'target'. Remove the row, or write -1 where a label is not known."),
    "a null list among numbers": ("numbers", [[1.0], None, [2.0]], "row 1 of a.parquet has no target: it is null"),
    "a null among integers": ("numbers", [1, None, 2], "Remove the row, or write NaN, in a column of floats"),
    "a null deep in a mask": ("pixels", [[[1, 2]], [[3, None]], [[1, 1]]], "row 1 of a.parquet has no target: a value is"),
    "ragged lists": ("labels", [[1, 0], [0, 1], [1]], "the target at row 2 of a.parquet is a list of 1 elements, and that "
                     "at row 0 of a.parquet is a list of 2 elements ('target'); expected lists of one length, with one "),
    "a ragged mask": ("pixels", [[[1, 2], [1, 2]], [[1, 2], [1]], [[1], [2]]], "the target at row 1 of a.parquet is a list"),
    "a null in a tensor": ("numbers", pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (2,)), pa.array([[0, 1], [2, 3], [4, None]], pa.list_(pa.float32(), 2))
    ), "row 2 of a.parquet has no target: a value is null in 'target'. Remove the row, or write NaN"),
    "texts": ("labels", ["a", "b", "c"], "one of numbers or lists of numbers"),
    "lists of texts": ("labels", [["a"], ["b"], ["c"]], "one of numbers or lists of numbers"),
    "soft labels beyond 1": ("labels", [[0.0, 1.5], [0.0, 1.0], [0.0, 1.0]], "target 1.5 at row 0 (1 out of range)"),
    "infinity": ("numbers", [0.0, 1.0, float("inf")], "target inf at row 2 (1 out of range); expected finite numbers"),
    "lists for classes": ("classes", [[0], [1], [2]], "one of integer labels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_targets_that_cannot_be_used_are_refused_by_row(tmp_path: Path, name: str) -> None:
    targets, column, said = REFUSED[name]
    pq.write_table(pa.table({"image": pictures(3), "target": column}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError) as refused:
        load(tmp_path / "a.parquet", targets)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (
            [[1, 0, 0]] * 3,
            "the target at row 0 of 1.parquet is a list of 3 elements, and that at row 0 of 0.parquet is a "
            "list of 2 elements ('target')",
        ),
        ([1, 0, 1], "the target at row 0 of 1.parquet is a single number, and that at row 0 of 0.parquet is a list"),
        (None, "1.parquet has no column 'target' of type list<element: int64> (0.parquet has it)"),
        (["a", "b", "c"], "1.parquet has no column 'target' of type list<element: int64> (0.parquet has it)"),
    ],
)
def test_targets_of_several_files_must_be_alike(tmp_path: Path, second: Any, said: str) -> None:
    for number, column in enumerate(([[1, 0]] * 3, second)):
        columns = {"image": pictures(3), **({} if column is None else {"target": column})}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, "labels")
    assert said in str(refused.value)


def test_a_list_in_a_later_part_of_a_file_is_named_by_its_row(tmp_path: Path) -> None:
    """Only what pyarrow reads at a time is compared at once."""
    column = [[1, 0]] * 256 + [[1, 0, 1]] * 44
    pq.write_table(pa.table({"image": pictures(), "target": column}), tmp_path / "a.parquet")
    with pytest.raises(RecipeError, match=r"the target at row 256 of a\.parquet is a list of 3 elements"):
        load(tmp_path / "a.parquet", "labels")

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import Split, batch_positions, calibration_batches, cut_splits, load_sources
from ray_soup.task.leaks import check_leaks
from tests.tiny import digits
from tests.unit.task.images import as_tensor, repeated, write_parquet


def splits_of(data: Data, seed: int = 1) -> dict[str, Split]:
    sizes = {name: len(examples) for name, examples in drain(load_sources(data, as_tensor)).items()}
    return cut_splits(data, sizes, drain(check_leaks(data, as_tensor)).get("fit"), seed)


def test_select_is_drawn_from_fit_by_the_seed(tmp_path: Path) -> None:
    images, labels = digits()
    np.savez(tmp_path / "a.npz", images=images[:50], labels=labels[:50])
    found = [splits_of(Data(fit=str(tmp_path / "a.npz"), select=0.3), seed) for seed in (1, 1, 2)]
    assert (len(found[0]["fit"]), len(found[0]["select"])) == (35, 15)
    for one in found:
        assert sorted([*one["fit"].rows, *one["select"].rows]) == list(range(50))
    np.testing.assert_array_equal(found[0]["select"].rows, found[1]["select"].rows)
    assert not np.array_equal(found[0]["select"].rows, found[2]["select"].rows)


def test_a_fit_that_is_too_small_to_be_divided_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"fit\.npz has 2 examples: too few to set aside 0\.2 of them for select"):
        cut_splits(Data(fit="fit.npz"), {"fit": 2}, None, 1)


def write_repeated(folder: Path, kind: str) -> str:
    if kind == "function":
        return "tests.unit.task.images:repeated"
    images, labels = zip(*repeated(), strict=True)
    if kind == "npz":
        np.savez(folder / "a.npz", images=np.stack(images), labels=np.array(labels))
        return str(folder / "a.npz")
    write_parquet(folder / "a.parquet", [Image.fromarray(image) for image in images], labels)
    return str(folder / "a.parquet")


@pytest.mark.parametrize("kind", ["npz", "parquet", "function"])
def test_equal_images_go_to_the_same_split(tmp_path: Path, kind: str) -> None:
    """Ten images, each five times, in any order."""
    spec = write_repeated(tmp_path, kind)
    images = drain(load_sources(Data(fit=spec), as_tensor))["fit"].images
    for seed in range(10):
        splits = splits_of(Data(fit=spec, select=0.3), seed)
        fit, select = ({images[row].tobytes() for row in splits[name].rows} for name in ("fit", "select"))
        assert not fit & select
        assert len(fit | select) == 10
        assert sorted([*splits["fit"].rows, *splits["select"].rows]) == list(range(50))
        assert len(splits["select"]) >= 15


@pytest.mark.parametrize("name", ["train", "select", "test"])
def test_an_image_in_two_splits_is_refused(tmp_path: Path, name: str) -> None:
    images, labels = digits()
    np.savez(tmp_path / "fit.npz", images=images[:50], labels=labels[:50])
    np.savez(tmp_path / "other.npz", images=images[49:99], labels=labels[49:99])
    data = Data(**{"fit": str(tmp_path / "fit.npz"), name: str(tmp_path / "other.npz")})
    with pytest.raises(RecipeError, match=rf"data\.fit|data\.{name}") as refused:
        drain(check_leaks(data))
    assert "share examples (1 of 50)" in str(refused.value)
    np.savez(tmp_path / "other.npz", images=images[50:99], labels=labels[50:99])
    assert set(drain(check_leaks(data))) == {"fit", name}


def test_each_of_several_test_sets_is_checked_for_leaks(tmp_path: Path) -> None:
    images, labels = digits()
    for name, rows in {"fit": slice(50), "a": slice(50, 90), "b": slice(60, 99), "c": slice(49, 60)}.items():
        np.savez(tmp_path / f"{name}.npz", images=images[rows], labels=labels[rows])
    tests = {name: str(tmp_path / f"{name}.npz") for name in "ab"}
    fit = str(tmp_path / "fit.npz")
    assert list(drain(check_leaks(Data(fit=fit, test=tests)))) == ["fit", "test_a", "test_b"]  # test sets may overlap
    tests["c"] = str(tmp_path / "c.npz")
    with pytest.raises(RecipeError, match=r"data\.test\.c and data\.fit share examples \(1 of 11\): row 0"):
        drain(check_leaks(Data(fit=fit, test=tests)))


def test_one_pass_takes_every_example_once() -> None:
    batches = batch_positions(103, 20, 1, 2)
    assert [len(b) for b in batches] == [20] * 5 + [3]
    assert sorted(np.concatenate(batches)) == list(range(103))


def test_calibration_takes_whole_batches_up_to_a_limit() -> None:
    fit = Split("fit", np.arange(100, 203, dtype=np.int32))
    batches = calibration_batches(fit, 20, 1, 70)
    assert [(b.source, len(b)) for b in batches] == [("fit", 20)] * 3
    rows = np.concatenate([b.rows for b in batches])
    assert len(set(rows)) == 60
    assert set(rows) <= set(fit.rows)
    assert [len(b) for b in calibration_batches(fit, 500, 1, 1000)] == [103]  # a single batch may be short


def test_parts_of_a_split_are_the_split() -> None:
    split = Split("test", np.arange(10, dtype=np.int32))
    parts = split.parts(3)
    assert [len(part) for part in parts] == [4, 3, 3]
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), split.rows)

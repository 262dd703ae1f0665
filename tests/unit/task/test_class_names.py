"""Labels by the names of classes: class folders, ClassLabel columns, saved datasets and functions."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from ray_soup.task.classes import Classes, in_order, reference, renumbering
from ray_soup.task.data import Examples, check_model_names, load_named, load_sources
from ray_soup.task.leaks import check_leaks
from ray_soup.task.sources import check_sources
from tests.unit.task.images import as_tensor, png

ANIMALS = ("ant", "bee", "cat", "dog")


def picture(value: int, offset: int = 0) -> Image.Image:
    """An image whose first pixel is `value`; images of other offsets differ elsewhere."""
    pixels = np.full((4, 4), offset, np.uint8)
    pixels[0, 0] = value
    return Image.fromarray(pixels)


def write_folders(folder: Path, names: Sequence[str], values: Sequence[int] | None = None, offset: int = 0) -> str:
    """Write one image per class folder; its first pixel is the class's value, by default its position in `names`."""
    for name, value in zip(names, values or range(len(names)), strict=True):
        (folder / name).mkdir(parents=True)
        picture(value, offset).save(folder / name / "0.png")
    return str(folder)


def write_table(file: Path, names: Sequence[str], labels: Sequence[int], values: Sequence[int], offset: int = 0) -> str:
    """Write Parquet with a ClassLabel column, as `datasets` does."""
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    table = pa.table({"image": [png(picture(value, offset)) for value in values], "label": labels})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file)
    return str(file)


def loaded(**data: Any) -> dict[str, Examples]:
    check_sources(Data(**data))
    return drain(load_sources(Data(**data), as_tensor))


def matches(examples: Examples) -> bool:
    """Whether every label is the value that the image shows."""
    return examples.images[:, 0, 0].tolist() == examples.labels.tolist()


def test_folders_named_by_integers_are_in_numeric_order(tmp_path: Path) -> None:
    fit = loaded(fit=write_folders(tmp_path / "fit", [str(n) for n in range(12)]))["fit"]
    assert fit.labels.tolist() == list(range(12))
    assert matches(fit)
    (note,) = fit.notes
    assert note.startswith(
        "The names of the class folders are integers, so labels follow their numeric order (0=0, 1=1, 2=2,"
    )
    assert in_order(["10", "9", "-1"]) == ("-1", "9", "10")
    assert in_order(["10", "9", "b"]) == ("10", "9", "b")
    with pytest.raises(RecipeError, match=r"class folders of the data have 12 names .* the model has 13 classes"):
        fit.check_labels(13)


def test_folders_named_by_text_are_sorted_as_by_torchvision(tmp_path: Path) -> None:
    fit = loaded(fit=write_folders(tmp_path / "fit", sorted(["b10", "b9", "B", "a"])))["fit"]
    assert matches(fit)
    assert fit.notes == ()


@pytest.mark.parametrize("odd", [".ipynb_checkpoints", "__pycache__", "__MACOSX"])
def test_hidden_folders_are_not_classes(tmp_path: Path, odd: str) -> None:
    write_folders(tmp_path / "fit", ANIMALS)
    write_folders(tmp_path / "fit", [odd])
    write_folders(tmp_path / "fit" / "bee", [odd])
    (tmp_path / "fit" / "dog" / "._0.png").write_bytes(b"x")
    fit = loaded(fit=str(tmp_path / "fit"))["fit"]
    assert fit.labels.tolist() == [0, 1, 2, 3]
    assert matches(fit)
    assert f"hidden files and folders in {tmp_path / 'fit'} were ignored (3): {odd}, bee/{odd}, dog/._0.png" in fit.notes[0]
    fit.check_labels(4)


def test_folders_without_images_are_not_classes(tmp_path: Path) -> None:
    write_folders(tmp_path / "fit", ANIMALS)
    (tmp_path / "fit" / "bat").mkdir()
    (tmp_path / "fit" / "bat" / "readme.txt").write_text("none")
    picture(9).save(tmp_path / "fit" / "overview.png")
    fit = loaded(fit=str(tmp_path / "fit"))["fit"]
    assert matches(fit)
    assert fit.notes[0].endswith("are not classes (1): bat.")
    assert fit.notes[1].endswith("that are in no class folder were ignored (1).")
    fit.check_labels(4)
    with pytest.raises(
        RecipeError, match=r"have 4 names .* the model has 5 classes.* every class needs .* not classes \(1\): bat"
    ):
        fit.check_labels(5)


def test_a_set_that_lacks_classes_has_the_labels_of_the_others(tmp_path: Path) -> None:
    found = loaded(
        fit=write_folders(tmp_path / "fit", ANIMALS[:3]),
        test={
            "some": write_folders(tmp_path / "some", ("bee", "dog"), (1, 3), offset=1),
            "numbers": write_table(tmp_path / "a.parquet", ANIMALS, [0, 2], [0, 2], offset=2),
        },
    )
    assert all(map(matches, found.values()))
    folders = loaded(fit=str(tmp_path / "fit"), test=str(tmp_path / "some"))
    assert all(map(matches, folders.values()))
    assert "labels were renumbered by name, to those of data.fit: bee: 0 -> 1, dog: 1 -> 3." in folders["test"].notes[0]
    for examples in folders.values():
        examples.check_labels(4)
        with pytest.raises(RecipeError, match="have 4 names"):
            examples.check_labels(10)


@pytest.mark.parametrize("names", [("ant", "bee", "cow"), ("0", "1", "2", "3", "5")])
def test_a_class_that_the_stored_names_lack_is_refused(tmp_path: Path, names: Sequence[str]) -> None:
    data = {
        "fit": write_table(tmp_path / "fit.parquet", ANIMALS, [0, 1, 2, 3], [0, 1, 2, 3]),
        "test": write_folders(tmp_path / "test", names, offset=1),
    }
    said = r"data\.test: .*/test.* data\.fit \(.*fit\.parquet\).* 0=ant, 1=bee, 2=cat, 3=dog"
    for work in (lambda: check_sources(Data(**data)), lambda: drain(load_sources(Data(**data), as_tensor))):
        with pytest.raises(RecipeError, match=said):
            work()


def test_folders_named_by_their_label_agree_with_any_names(tmp_path: Path) -> None:
    found = loaded(
        fit=write_table(tmp_path / "fit.parquet", ANIMALS, [3, 0], [3, 0]),
        test=write_folders(tmp_path / "test", "0123", offset=1),
    )
    assert all(map(matches, found.values()))


@pytest.mark.parametrize("key", ["train", "select", "test"])
def test_orders_of_class_labels_are_compared_by_name(tmp_path: Path, key: str) -> None:
    data = {
        "fit": write_table(tmp_path / "a.parquet", ANIMALS, [0, 1, 2, 3], [0, 1, 2, 3]),
        key: write_table(tmp_path / "b.parquet", ANIMALS[::-1], [0, 1, 2, 3], [3, 2, 1, 0], offset=1),
    }
    found = loaded(**data)
    assert found["fit"].images[:, 0, 0].tolist() == [0, 1, 2, 3]
    if key == "train":  # the ingredients were trained on it: its numbering counts
        assert found["fit"].labels.tolist() == [3, 2, 1, 0]
        assert drain(load_named(Data(**data), "train", as_tensor)).labels.tolist() == [0, 1, 2, 3]
    else:
        assert all(map(matches, found.values()))
    drain(check_leaks(Data(**data), as_tensor))


@pytest.mark.parametrize("key", ["select", "test"])
def test_class_folders_of_fit_keep_their_order(tmp_path: Path, key: str) -> None:
    """Ingredients trained with ImageFolder have that order, whatever labels a test set stores."""
    write_table(tmp_path / "b.parquet", ANIMALS[::-1], [0, 1, 2, 3], [3, 2, 1, 0], offset=1)
    found = loaded(**{"fit": write_folders(tmp_path / "fit", ANIMALS), key: str(tmp_path / "b.parquet")})
    assert all(map(matches, found.values()))
    assert "labels were renumbered by name, to those of data.fit: dog: 0 -> 3" in found[key].notes[0]


def test_stored_labels_that_contradict_class_folders_with_fewer_classes_are_refused(tmp_path: Path) -> None:
    data = {
        "fit": write_folders(tmp_path / "fit", ANIMALS[:3], offset=2),
        "test": write_table(tmp_path / "b.parquet", ANIMALS[::-1], [0, 1, 2, 3], [3, 2, 1, 0], offset=1),
    }
    said = (
        r"data\.fit: .*/fit: its class folders lack 'dog', .* where 'ant' has label 3; by the order of the folders it is 0"
    )
    for work in (lambda: check_sources(Data(**data)), lambda: drain(load_sources(Data(**data), as_tensor))):
        with pytest.raises(RecipeError, match=said):
            work()
    data["train"] = write_folders(tmp_path / "train", ANIMALS)
    assert all(map(matches, loaded(**data).values()))


def test_a_saved_dataset_and_a_folder_get_equal_labels(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "ant"])})
    saved = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "label": [0, 1]}, features=features)
    saved.save_to_disk(tmp_path / "saved")
    folder = write_folders(tmp_path / "test", ("ant", "dog"), (1, 0), offset=1)
    found = loaded(fit=str(tmp_path / "saved"), test=folder)
    assert all(map(matches, found.values()))
    assert found["test"].labels.tolist() == [1, 0]


class Named(list[Any]):
    classes = ("dog", "ant")


def named() -> Named:
    return Named([(np.full((4, 4), 0, np.uint8), 0), (np.full((4, 4), 1, np.uint8), 1)])


def test_the_classes_of_a_function_count_too(tmp_path: Path) -> None:
    spec = f"{__name__}:named"
    folder = write_folders(tmp_path / "test", ("ant", "dog"), (1, 0), offset=2)
    assert loaded(fit=spec, test=folder)["test"].labels.tolist() == [1, 0]
    with pytest.raises(RecipeError, match=r"label 0 at row 0 \(ant/0\.png\) is label 1 in data\.train"):
        drain(check_leaks(Data(train=spec, test=folder), as_tensor))


class More(list[Any]):
    classes = ("aardvark", "ant", "dog")


def more() -> More:
    return More([(np.full((4, 4), 7 + label, np.uint8), label) for label in range(3)])


def test_labels_that_training_did_not_use_are_refused(tmp_path: Path) -> None:
    """Training alone does not see the names of a function, and numbers the folders without them."""
    folder = write_folders(tmp_path / "train", ("ant", "dog"))
    data = Data(train=folder, fit=f"{__name__}:more")
    assert drain(load_named(data, "train", as_tensor)).labels.tolist() == [0, 1]
    with pytest.raises(RecipeError, match=r"data\.train: .*label 0 at row 0 \(ant/0\.png\) is label 1 in data\.fit"):
        drain(check_leaks(data, as_tensor))


def test_names_in_the_config_of_the_model_are_compared(tmp_path: Path) -> None:
    fit = loaded(fit=write_folders(tmp_path / "fit", ANIMALS))["fit"]
    for names in (None, {}, dict(enumerate(ANIMALS)), {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2", 3: "LABEL_3"}):
        check_model_names(fit, names)
    with pytest.raises(RecipeError, match=r"data\.fit: .*: class 'ant' has label 0, and label 1 in the model's config"):
        check_model_names(fit, {0: "bee", 1: "ant", 2: "cat", 3: "dog"})


def test_names_that_are_equal_need_no_renumbering() -> None:
    def classes(names: str, by_position: bool = False) -> Classes:
        return Classes("data.fit", "x", tuple(names), by_position)

    assert renumbering(classes("abc"), classes("abc"), [0, 1, 2]) is None
    assert renumbering(classes("abd"), classes("abc"), [0, 1]) is None  # d does not occur
    assert np.array_equal(renumbering(classes("cab"), classes("abc"), [0, 1, 2]), [2, 0, 1])
    assert renumbering(Classes("", "", ("07", "7x")), Classes("", "", ("07", "7x")), [0]) is None
    assert np.array_equal(renumbering(Classes("", "", ("07", "8")), Classes("", "", ("8", "7")), [0, 1]), [1, 0])
    assert reference([]) is None
    assert reference([classes("ab", True), classes("ca", True)]).names == tuple("abc")
    assert reference([classes("ab", True), classes("ba")]).names == tuple("ab")
    assert reference([classes("ab", True), classes("abc")]).names == tuple("abc")

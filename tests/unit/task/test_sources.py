from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io.progress import drain
from ray_soup.recipe import Data
from ray_soup.task.data import Examples, load_named, load_sources
from ray_soup.task.leaks import digests
from ray_soup.task.raw_examples import Source
from ray_soup.task.sources import check_sources, read_source
from tests.tiny import digits
from tests.unit.task.images import as_tensor, in_every_kind, pictures, png, preprocessings, write_parquet


def load(spec: Path | str, preprocess: Any = as_tensor) -> Examples:
    return drain(load_named(Data(test=str(spec)), "test", preprocess))


def everything(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    return examples.batch(np.arange(len(examples)), torch.device("cpu"))


@pytest.mark.parametrize("column", ["bytes", "struct of bytes"])
def test_parquet_npz_and_a_function_hold_the_same(tmp_path: Path, column: str) -> None:
    images, labels = digits()
    if column == "bytes":
        encoded = [png(Image.fromarray(image)) for image in images[:30]]
        pq.write_table(pa.table({"image": encoded, "label": labels[:30]}), tmp_path / "a.parquet")
    else:
        write_parquet(tmp_path / "a.parquet", [Image.fromarray(image) for image in images[:30]], labels[:30])
    np.savez(tmp_path / "a.npz", images=images[:30], labels=labels[:30])
    for spec in (str(tmp_path / "a.parquet"), str(tmp_path / "a.npz"), "tests.unit.task.images:pairs"):
        found_images, found_labels = everything(drain(load_sources(Data(test=spec), as_tensor))["test"])
        np.testing.assert_array_equal(found_images.numpy(), images[:30])
        np.testing.assert_array_equal(found_labels.numpy(), labels[:30])


def test_every_kind_of_source_gives_equal_arrays_and_digests(tmp_path: Path) -> None:
    images = [Image.fromarray(image) for image in digits()[0][:10]]
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]  # in the order in which a folder has them
    found = {}
    for kind, spec in in_every_kind(tmp_path, images, labels).items():
        examples = load(spec)
        found[kind] = (*everything(examples), drain(digests(spec, as_tensor)))
        assert isinstance(examples.images, np.memmap) == (kind != "b.npz"), kind
    for kind, (arrays, targets, hashes) in found.items():
        assert torch.equal(arrays, found["a.npz"][0]), kind
        assert targets.tolist() == labels, kind
        np.testing.assert_array_equal(hashes, found["a.npz"][2])
    assert len(set(found["a.npz"][2].tolist())) == 10


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Labels are read before images, so that those of one version could go with those of another."""
    refused = set()
    for kind, spec in in_every_kind(tmp_path, [Image.fromarray(image) for image in digits()[0][:10]], [0, 1] * 5).items():
        work = load_named(Data(test=str(spec)), "test", as_tensor)
        if next(work, None) is None:
            continue  # arrays, which are mapped into memory
        whole = Path(spec)
        file = (
            whole
            if whole.is_file()
            else sorted(f for f in whole.rglob("*") if f.suffix in (".png", ".parquet", ".arrow"))[-1]
        )
        time.sleep(0.02)  # the clock of a file system ticks every 10 ms or less often
        file.write_bytes(file.read_bytes())
        with pytest.raises(RecipeError, match=rf"data\.test: .*{re.escape(file.name)} changed while it was read\. Rerun"):
            drain(work)
        refused.add(kind)
        assert len(load(spec)) == 10
    assert len(refused) > 2, refused


def test_a_saved_dataset_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_dict({"image": pictures(), "label": [0, 1] * 3}, features=features)
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"fit": saved}).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"fit": saved, "test": saved}).save_to_disk(tmp_path / "all")
    preprocess = preprocessings()["timm"][0]
    found, labels = everything(load(tmp_path / "saved", preprocess))
    assert torch.equal(found, torch.stack([preprocess(image) for image in pictures()]))
    assert labels.tolist() == [0, 1] * 3
    assert len(load(tmp_path / "one", preprocess)) == 6
    with pytest.raises(RecipeError, match=r"contains the splits fit, test\. Choose one, as in .*all/fit"):
        load(tmp_path / "all", preprocess)


class Letters:
    """A preprocessing of texts."""

    takes = "text"

    def __call__(self, text: str) -> np.ndarray:
        return np.array([ord(letter) for letter in f"{text:<8}"[:8]], dtype=np.int64)


def test_texts_are_tokens_for_a_model_that_takes_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two", "three"], "label": [1, 2, 3]}), tmp_path / "a.parquet")
    tokens, labels = everything(load(tmp_path / "a.parquet", Letters()))
    assert tokens.dtype == torch.int64
    assert ["".join(map(chr, row)).strip() for row in tokens.tolist()] == ["one", "two", "three"]
    assert labels.tolist() == [1, 2, 3]


def test_columns_are_chosen_by_name_or_refused(tmp_path: Path) -> None:
    image = png(pictures(1)[0])
    pq.write_table(pa.table({"cls": [3], "id": [7], "mask": [b"x"], "img": [image]}), tmp_path / "a.parquet")
    assert everything(load(tmp_path / "a.parquet"))[1].tolist() == [3]
    pq.write_table(pa.table({"fine": [3], "coarse": [7], "image": [image]}), tmp_path / "b.parquet")
    with pytest.raises(RecipeError, match=r"b\.parquet: several candidate columns: fine, coarse; expected"):
        load(tmp_path / "b.parquet")


def test_files_of_a_parquet_folder_must_have_the_same_columns(tmp_path: Path) -> None:
    image = png(pictures(1)[0])
    pq.write_table(pa.table({"image": [image], "label": [3]}), tmp_path / "a.parquet")
    for column in ({"fine": [3]}, {"label": [3], "kind": ["x"]}):
        pq.write_table(pa.table({"image": [image], **column}), tmp_path / "b.parquet")
        if "label" in column:
            assert len(load(tmp_path)) == 2  # other columns may differ
            continue
        with pytest.raises(RecipeError, match=r"b\.parquet has no column 'label' .*\(a\.parquet has it\)"):
            load(tmp_path)


def test_errors_name_the_file_and_the_row(tmp_path: Path) -> None:
    images = [Image.fromarray(image) for image in digits()[0][:30]]
    write_parquet(tmp_path / "broken.parquet", images, range(30), broken=7)
    with pytest.raises(RecipeError, match=r"broken\.parquet: the example at row 7 cannot be decoded"):
        load(tmp_path / "broken.parquet")
    write_parquet(tmp_path / "good.parquet", images, range(30))
    with pytest.raises(RecipeError, match="the model has no preprocessing"):
        load(tmp_path / "good.parquet", preprocess=None)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(RecipeError, match="expected one column of image bytes and one of integer labels"):
        load(tmp_path / "text.parquet")
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2)), labels=np.zeros(2, np.int64))
    with pytest.raises(RecipeError, match=r"a\.npz: 3 inputs and 2 labels"):
        load(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"b\.npz: cannot be read as \.npz"):
        load(tmp_path / "b.npz")


ODD: dict[str, tuple[Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]], str]] = {
    "labels from 1": (lambda x, y: {"images": x, "labels": y + 1}, "labels are 0 to 9. The labels seem to count from 1"),
    "labels as floats": (
        lambda x, y: {"images": x, "labels": y.astype(float)}, r"labels are float64 \[600\]; expected int64 \[n\]",
    ),
    "one-hot labels": (lambda x, y: {"images": x, "labels": np.eye(10, dtype=int)[y]}, r"labels are int64 \[600, 10\]"),
    "no examples": (lambda x, y: {"images": x[:0], "labels": y[:0]}, "0 inputs and 0 labels; expected one label per input"),
    "objects": (lambda x, y: {"images": np.array([None] * 600), "labels": y}, r"images are object \[600\]; expected an"),
    "another name": (lambda x, y: {"x": x, "y": y}, r"found \['x', 'y'\]; expected the arrays 'images' and"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_arrays_are_refused_with_what_was_expected(tmp_path: Path, odd: str) -> None:
    change, said = ODD[odd]
    images, labels = digits()
    np.savez(tmp_path / "odd.npz", **change(images[:600], labels[:600]))
    with pytest.raises(RecipeError, match=rf"odd\.npz.*{said}"):
        load(tmp_path / "odd.npz", None).check_labels(10)


def test_one_wrong_label_is_named_with_its_row() -> None:
    labels = np.array([0, 1, 2, 10, 3])
    with pytest.raises(
        RecipeError, match=r"data: a\.npz: label 10 at row 3 \(1 out of range\); the model has 10 classes, .* Fix the"
    ):
        Examples("a.npz", np.zeros((5, 2)), labels).check_labels(10)
    Examples("a.npz", np.zeros((5, 2)), labels).check_labels(11)


def test_a_missing_source_is_named_with_the_machine(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.npz")
    said = re.escape(f"data.test.a: {missing}: does not exist on {socket.gethostname()}")
    with pytest.raises(RecipeError, match=said):
        drain(read_source(Source("data.test.a", missing)))
    with pytest.raises(RecipeError, match=said):
        check_sources(Data(fit="a.module:function", test={"a": missing}))
    check_sources(Data(fit="a.module:function", test="s3://bucket/no.npz"))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RecipeError, match=r"data\.fit: .*a\.csv: is not a supported source"):
        drain(read_source(Source("data.fit", str(tmp_path / "a.csv"))))


def test_images_of_a_changed_preprocessing_are_decoded_again(tmp_path: Path) -> None:
    """Also if only the body of a lambda changed, which torchvision prints as Lambda()."""
    from torchvision import transforms

    write_parquet(tmp_path / "a.parquet", pictures(2), range(2))
    small = transforms.Resize((8, 8))
    plain = load(tmp_path / "a.parquet", transforms.Compose([small, transforms.Lambda(lambda image: np.asarray(image))]))
    turned = load(
        tmp_path / "a.parquet", transforms.Compose([small, transforms.Lambda(lambda image: 255 - np.asarray(image))])
    )
    np.testing.assert_array_equal(turned.images, 255 - plain.images)

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_soup.cache import drained
from ray_soup.data import Examples, Split, batch_positions, check_leaks, cut, digests, load_source, load_sources
from ray_soup.errors import RecipeError
from ray_soup.preprocess import identity
from ray_soup.recipe import Data, make_recipe
from tests.tiny import digits


def as_tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("L")).copy())


def pairs() -> list[tuple[np.ndarray, int]]:
    images, labels = digits()
    return list(zip(images[:30], labels[:30].tolist(), strict=True))


def write_parquet(path: Path, broken: int | None = None, hub: bool = True) -> None:
    images, labels = digits()
    values = []
    for row, image in enumerate(images[:30]):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        content = b"no image" if row == broken else file.getvalue()
        values.append({"bytes": content, "path": f"{row}.png"} if hub else content)
    pq.write_table(pa.table({"image": values, "label": labels[:30]}), path)


def sources(data: Data, preprocess: Any = as_tensor) -> dict[str, Examples]:
    return drained(load_sources(data, preprocess))


def splits(data: Data, seed: int = 1) -> dict[str, Split]:
    return cut(data, {k: len(v) for k, v in sources(data).items()}, drained(check_leaks(data, as_tensor)).get("fit"), seed)


def everything(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    return examples.batch(np.arange(len(examples)), torch.device("cpu"))


@pytest.mark.parametrize("hub", [True, False])
def test_parquet_npz_and_a_function_hold_the_same(tmp_path: Path, hub: bool) -> None:
    write_parquet(tmp_path / "a.parquet", hub=hub)
    images, labels = digits()
    np.savez(tmp_path / "a.npz", images=images[:30], labels=labels[:30])
    for spec in (str(tmp_path / "a.parquet"), str(tmp_path / "a.npz"), "tests.test_data:pairs"):
        found_images, found_labels = everything(sources(Data(test=spec))["test"])
        np.testing.assert_array_equal(found_images.numpy(), images[:30])
        np.testing.assert_array_equal(found_labels.numpy(), labels[:30])


def test_select_is_cut_from_fit_by_the_seed(tmp_path: Path) -> None:
    images, labels = digits()
    np.savez(tmp_path / "a.npz", images=images[:50], labels=labels[:50])
    cut = [splits(Data(fit=str(tmp_path / "a.npz"), select=0.3), seed) for seed in (1, 1, 2)]
    assert (len(cut[0]["fit"]), len(cut[0]["select"])) == (35, 15)
    for one in cut:
        assert sorted([*one["fit"].rows, *one["select"].rows]) == list(range(50))
    np.testing.assert_array_equal(cut[0]["select"].rows, cut[1]["select"].rows)
    assert not np.array_equal(cut[0]["select"].rows, cut[2]["select"].rows)


@pytest.mark.parametrize("kind", ["npz", "parquet", "function"])
def test_equal_images_stay_on_one_side_of_the_cut(tmp_path: Path, kind: str) -> None:
    """Ten images, each five times over, in any order."""
    spec = five_times(tmp_path, kind)
    images = sources(Data(fit=spec))["fit"].images
    for seed in range(10):
        cut_so = splits(Data(fit=spec, select=0.3), seed)
        fit, select = ({images[row].tobytes() for row in cut_so[name].rows} for name in ("fit", "select"))
        assert not fit & select
        assert len(fit | select) == 10
        assert sorted([*cut_so["fit"].rows, *cut_so["select"].rows]) == list(range(50))
        assert len(cut_so["select"]) >= 15


def repeated() -> list[tuple[np.ndarray, int]]:
    images, labels = digits()
    rows = np.random.default_rng(0).permutation(50) % 10
    return [(images[row], int(labels[row])) for row in rows]


def five_times(folder: Path, kind: str) -> str:
    if kind == "function":
        return "tests.test_data:repeated"
    images, labels = zip(*repeated(), strict=True)
    if kind == "npz":
        np.savez(folder / "a.npz", images=np.stack(images), labels=np.array(labels))
        return str(folder / "a.npz")
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    pq.write_table(pa.table({"image": files, "label": labels}), folder / "a.parquet")
    return str(folder / "a.parquet")


@pytest.mark.parametrize("name", ["train", "select", "test"])
def test_an_image_in_two_splits_is_refused(tmp_path: Path, name: str) -> None:
    images, labels = digits()
    np.savez(tmp_path / "fit.npz", images=images[:50], labels=labels[:50])
    np.savez(tmp_path / "other.npz", images=images[49:99], labels=labels[49:99])
    data = Data(**{"fit": str(tmp_path / "fit.npz"), name: str(tmp_path / "other.npz")})
    with pytest.raises(RecipeError, match=rf"data\.fit|data\.{name}") as refused:
        drained(check_leaks(data))
    assert "share images (1 of 50)" in str(refused.value)
    np.savez(tmp_path / "other.npz", images=images[50:99], labels=labels[50:99])
    assert set(drained(check_leaks(data))) == {"fit", name}


def test_one_pass_takes_every_example_once() -> None:
    batches = batch_positions(103, 20, 1, 2)
    assert [len(b) for b in batches] == [20] * 5 + [3]
    assert sorted(np.concatenate(batches)) == list(range(103))


def test_data_faults_name_the_file(tmp_path: Path) -> None:
    write_parquet(tmp_path / "broken.parquet", broken=7)
    with pytest.raises(RecipeError, match=r"broken\.parquet: the image at row 7 cannot be decoded"):
        sources(Data(test=str(tmp_path / "broken.parquet")))
    write_parquet(tmp_path / "good.parquet")
    with pytest.raises(RecipeError, match="the model brings no preprocessing"):
        sources(Data(test=str(tmp_path / "good.parquet")), preprocess=None)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(RecipeError, match="expected one of image bytes and one of integer labels"):
        sources(Data(test=str(tmp_path / "text.parquet")))
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 2)), labels=np.zeros(2, np.int64))
    with pytest.raises(RecipeError, match=r"a\.npz: 3 images and 2 labels"):
        sources(Data(test=str(tmp_path / "a.npz")))
    (tmp_path / "b.npz").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"b\.npz cannot be read"):
        sources(Data(test=str(tmp_path / "b.npz")))


ODD: dict[str, tuple[Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]], str]] = {
    "labels from 1": (lambda x, y: {"images": x, "labels": y + 1}, "labels are 0 to 9. They seem to count from 1"),
    "labels as floats": (
        lambda x, y: {"images": x, "labels": y.astype(float)}, r"labels are float64 \[600\]; expected int64 \[n\]",
    ),
    "one-hot labels": (lambda x, y: {"images": x, "labels": np.eye(10, dtype=int)[y]}, r"labels are int64 \[600, 10\]"),
    "other channels": (
        lambda x, y: {"images": np.stack([x] * 3, 1), "labels": y}, r"made \[3, 10\] of one image of .* \[3, 8, 8\]",
    ),
    "no examples": (lambda x, y: {"images": x[:0], "labels": y[:0]}, "0 images and 0 labels; expected as many of both"),
    "objects": (lambda x, y: {"images": np.array([None] * 600), "labels": y}, r"cannot be read as \.npz \(Object arrays"),
    "another name": (lambda x, y: {"x": x, "labels": y}, r"holds \['x', 'labels'\]; expected the arrays 'images' and"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_arrays_are_refused_with_what_was_expected(zoo: Path, tmp_path: Path, odd: str) -> None:
    from tests.conftest import InProcess, values

    change, said = ODD[odd]
    with np.load(zoo / "test.npz") as arrays:
        np.savez(tmp_path / "odd.npz", **change(arrays["images"], arrays["labels"]))
    data = {"fit": str(zoo / "heldout.npz"), "test": str(tmp_path / "odd.npz")}
    with pytest.raises(RecipeError, match=said):
        InProcess(make_recipe(values(zoo, data=data)))


def pictures(count: int = 6) -> list[Image.Image]:
    """Of several sizes, smooth as photographs are."""
    random = np.random.default_rng(0)
    small = [Image.fromarray(random.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((70 + 5 * k, 90 - 3 * k), Image.Resampling.BICUBIC) for k, image in enumerate(small)]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def preprocessings() -> dict[str, tuple[Any, type]]:
    """Preprocessings and the dtype that their images are kept in."""
    import open_clip
    from timm.data import create_transform
    from torchvision import transforms as v1
    from torchvision.transforms import v2
    from torchvision.transforms._presets import ImageClassification

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    on_tensors = [v2.ToImage(), v2.Resize(40), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)]
    return {
        "open_clip": (open_clip.image_transform(32, is_train=False), np.uint8),
        "timm": (create_transform(32), np.uint8),
        "weights": (ImageClassification(crop_size=32, resize_size=40), np.uint8),
        "v1": (v1.Compose([v1.Resize((32, 32)), v1.PILToTensor(), v1.ConvertImageDtype(torch.float32),
                           v1.Normalize(mean, std)]), np.uint8),
        "v2": (v2.Compose([*on_tensors, v2.Normalize(mean, std)]), np.uint8),
        "grey": (v1.Compose([v1.Grayscale(), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize([0.5], [0.2])]), np.uint8),
        "more": (v1.Compose([v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(mean, std), v1.RandomErasing(0)]), np.float32),
        "unscaled": (v2.Compose([v2.ToImage(), v2.CenterCrop(32), v2.ToDtype(torch.float32), v2.Normalize(mean, std)]),
                     np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["open_clip", "timm", "weights", "v1", "v2", "grey", "more", "unscaled"])
def test_images_kept_in_uint8_reach_the_model_with_the_same_bits(tmp_path: Path, name: str) -> None:
    preprocess, dtype = preprocessings()[name]
    pq.write_table(pa.table({"image": [png(i) for i in pictures()], "label": range(6)}), tmp_path / "a.parquet")
    examples = drained(load_source(str(tmp_path / "a.parquet"), preprocess))
    assert examples.images.dtype == dtype
    assert (examples.tail is not None) == (dtype == np.uint8)
    expected = torch.stack([torch.as_tensor(preprocess(image)) for image in pictures()])
    found, labels = everything(examples)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert labels.tolist() == list(range(6))
    again = drained(load_source(str(tmp_path / "a.parquet"), preprocessings()[name][0]))
    assert again.hold.path == examples.hold.path  # one entry of the cache for all who preprocess so


class Darker:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image) * self.by)


def test_a_preprocessing_is_known_by_what_it_does() -> None:
    assert identity(Darker(0.5)) == identity(Darker(0.5)) != identity(Darker(0.6))
    assert identity(as_tensor) != identity(pairs)
    assert " at 0x" not in str([identity(p) for p, _ in preprocessings().values()])


def in_every_kind(folder: Path, images: list[Image.Image], labels: list[int]) -> dict[str, str]:
    """The same images as a folder of files, Parquet in one file and in several, a dataset of `save_to_disk`, and .npz."""
    import json

    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / "images" / f"class_{label}").mkdir(parents=True, exist_ok=True)
        image.save(folder / "images" / f"class_{label}" / f"{number}.png")
    values = [{"bytes": png(image), "path": None} for image in images]
    tables = [
        pa.table({"image": values[part], "row": labels[part], "label": labels[part]}) for part in (slice(4), slice(4, None))
    ]
    (folder / "parts").mkdir()
    pq.write_table(pa.concat_tables(tables), folder / "one.parquet")
    (folder / "saved").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "parts" / f"{number}.parquet")
        with pa.ipc.new_stream(folder / "saved" / f"data-{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": f"data-{number}.arrow"} for number in range(2)]}
    (folder / "saved" / "state.json").write_text(json.dumps(state))
    (folder / "saved" / "dataset_info.json").write_text("{}")
    np.savez(folder / "a.npz", images=np.stack([np.asarray(i.convert("L")) for i in images]), labels=np.array(labels))
    np.savez_compressed(
        folder / "b.npz", images=np.stack([np.asarray(i.convert("L")) for i in images]), labels=np.array(labels)
    )
    return {name: str(folder / name) for name in ("images", "one.parquet", "parts", "saved", "a.npz", "b.npz")}


def test_every_kind_of_source_gives_equal_arrays_and_digests(tmp_path: Path) -> None:
    images = [Image.fromarray(image) for image in digits()[0][:10]]
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]  # in the order in which a folder has them
    found = {}
    for kind, spec in in_every_kind(tmp_path, images, labels).items():
        examples = drained(load_source(spec, as_tensor))
        found[kind] = (*everything(examples), drained(digests(spec, as_tensor)))
        assert isinstance(examples.images, np.memmap) == (kind != "b.npz"), kind
    for kind, (arrays, targets, hashes) in found.items():
        assert torch.equal(arrays, found["a.npz"][0]), kind
        assert targets.tolist() == labels, kind
        np.testing.assert_array_equal(hashes, found["a.npz"][2])
    assert len(set(found["a.npz"][2].tolist())) == 10


def test_a_saved_dataset_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_dict({"image": pictures(), "label": [0, 1] * 3}, features=features)
    saved.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict({"fit": saved}).save_to_disk(tmp_path / "all")
    preprocess = preprocessings()["timm"][0]
    found, labels = everything(drained(load_source(str(tmp_path / "saved"), preprocess)))
    assert torch.equal(found, torch.stack([preprocess(image) for image in pictures()]))
    assert labels.tolist() == [0, 1] * 3
    with pytest.raises(RecipeError, match=r"holds the splits fit\. Name one of them"):
        drained(load_source(str(tmp_path / "all"), preprocess))


class Letters:
    takes = "text"

    def __call__(self, text: str) -> np.ndarray:
        return np.array([ord(letter) for letter in f"{text:<8}"[:8]], dtype=np.int64)


def test_texts_are_tokens_for_a_model_that_takes_texts(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", "two", "three"], "label": [1, 2, 3]}), tmp_path / "a.parquet")
    tokens, labels = everything(drained(load_source(str(tmp_path / "a.parquet"), Letters())))
    assert tokens.dtype == torch.int64
    assert ["".join(map(chr, row)).strip() for row in tokens.tolist()] == ["one", "two", "three"]
    assert labels.tolist() == [1, 2, 3]


def test_columns_are_chosen_by_name_or_refused(tmp_path: Path) -> None:
    image = png(pictures(1)[0])
    pq.write_table(pa.table({"cls": [3], "id": [7], "mask": [b"x"], "img": [image]}), tmp_path / "a.parquet")
    assert everything(drained(load_source(str(tmp_path / "a.parquet"), as_tensor)))[1].tolist() == [3]
    pq.write_table(pa.table({"fine": [3], "coarse": [7], "image": [image]}), tmp_path / "b.parquet")
    with pytest.raises(RecipeError, match=r"b\.parquet has several of them: fine, coarse; expected"):
        drained(load_source(str(tmp_path / "b.parquet"), as_tensor))


def test_folders_of_images_must_have_the_same_classes(tmp_path: Path) -> None:
    for name, classes in {"a": "xyz", "b": "xz"}.items():
        for number, label in enumerate(classes):
            (tmp_path / name / label).mkdir(parents=True)
            pictures()[number + 3 * (name == "b")].save(tmp_path / name / label / "0.png")
    data = Data(fit=str(tmp_path / "a"), test=str(tmp_path / "b"))
    to_32 = preprocessings()["timm"][0]
    with pytest.raises(RecipeError, match=r"data\.test .* has 2 folders of classes and data\.fit .* 3; not in both: y"):
        sources(data, to_32)
    (tmp_path / "b" / "y").mkdir()
    assert everything(sources(data, to_32)["test"])[1].tolist() == [0, 2]


def test_each_of_several_test_sets_is_held_against_the_others_for_leaks(tmp_path: Path) -> None:
    images, labels = digits()
    for name, rows in {"fit": slice(50), "a": slice(50, 90), "b": slice(60, 99), "c": slice(49, 60)}.items():
        np.savez(tmp_path / f"{name}.npz", images=images[rows], labels=labels[rows])
    data = {"fit": str(tmp_path / "fit.npz"), "test": {name: str(tmp_path / f"{name}.npz") for name in "ab"}}
    assert list(drained(check_leaks(Data(**data)))) == ["fit", "test_a", "test_b"]  # a test set may be a part of another
    data["test"]["c"] = str(tmp_path / "c.npz")
    with pytest.raises(RecipeError, match=r"data\.test\.c and data\.fit share images \(1 of 11\): row 0"):
        drained(check_leaks(Data(**data)))


def test_micro_batches_that_are_gathered_ahead_are_those_asked_for(zoo: Path) -> None:
    from tests.conftest import InProcess, values

    shard = InProcess(make_recipe(values(zoo, learn__micro_batch=7))).shards[0]
    for count in (0, 5, 7, 30):
        rows = np.random.default_rng(count).permutation(600)[:count].astype(np.int32)
        found = list(shard._micro_batches(Split("test", rows)))
        assert [len(labels) for _, labels in found] == [7] * (count // 7) + ([count % 7] if count % 7 else [])
        expected = shard.examples["test"].batch(rows, torch.device("cpu"))
        for column, whole in zip(zip(*found, strict=True), expected, strict=False):
            assert torch.equal(torch.cat(column), whole)

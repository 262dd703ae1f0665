from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ray_soup.cache import drained
from ray_soup.data import Examples, Split, batch_positions, check_leaks, cut, load_sources
from ray_soup.errors import RecipeError
from ray_soup.recipe import Data
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
    return cut(data, {k: len(v) for k, v in sources(data).items()}, drained(check_leaks(data)).get("fit"), seed)


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

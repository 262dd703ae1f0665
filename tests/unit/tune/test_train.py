"""Training of single models: resuming, precision, augmentation, and the linear probe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.hashing import sha256_file
from ray_soup.io.progress import drain
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.tune.augment import Augment
from ray_soup.tune.probe import probe
from ray_soup.tune.records import Hyperparameters
from ray_soup.tune.train import train
from tests import tiny
from tests.conftest import values

HYPER: Hyperparameters = {
    "lr": 2e-3, "wd": 0.01, "epochs": 3, "label_smoothing": 0.1, "mixup": 0.2, "shift": 1, "randaugment": 9, "seed": 5,
}  # fmt: skip


def changed(**changes: Any) -> Hyperparameters:
    return {**HYPER, **changes}  # type: ignore[typeddict-item]


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    data = {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")}
    return make_recipe(values(folder, data=data, **changes))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train_an_epoch(recipe: Recipe, init: str, file: Path | str) -> None:
    started = train(recipe, HYPER, init, str(file))
    assert next(started)[1] == 3
    started.close()


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_resumed_training_is_bit_identical(zoo: Path, tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    recipe, init = recipe_of(zoo), str(zoo / "zoo" / "model_0.safetensors")
    parts = str(tmp_path / "parts") if place == "disk" else f"{request.getfixturevalue('s3')}/parts"
    (tmp_path / "parts").mkdir()
    whole = drain(train(recipe, HYPER, init, str(tmp_path / "whole.safetensors")))
    for _ in range(2):
        train_an_epoch(recipe, init, f"{parts}/model.safetensors")
    assert list(storage.walk(parts)) == ["model.state"]
    assert drain(train(recipe, HYPER, init, f"{parts}/model.safetensors")) == whole
    assert list(storage.walk(parts)) == ["model.json", "model.safetensors"]
    assert storage.read_bytes(f"{parts}/model.safetensors") == (tmp_path / "whole.safetensors").read_bytes()
    assert whole["sha256"] == sha256_file(f"{parts}/model.safetensors")
    assert not same(tmp_path / "whole.safetensors", Path(init))


def test_a_state_without_a_version_is_resumed_and_a_newer_one_refused(zoo: Path, tmp_path: Path) -> None:
    recipe, init = recipe_of(zoo), str(zoo / "zoo" / "model_0.safetensors")
    whole = drain(train(recipe, HYPER, init, str(tmp_path / "whole.safetensors")))
    train_an_epoch(recipe, init, tmp_path / "parts.safetensors")
    file = tmp_path / "parts.state"
    state = torch.load(file, weights_only=True)
    assert state.pop("version") == 2
    torch.save({**state, "version": 3}, file)
    with pytest.raises(RecipeError, match=r"parts\.state has version 3; this ray_soup reads versions up to 2"):
        drain(train(recipe, HYPER, init, str(tmp_path / "parts.safetensors")))
    torch.save(state, file)  # as ray_soup 0.1 wrote it
    assert drain(train(recipe, HYPER, init, str(tmp_path / "parts.safetensors"))) == whole
    assert same(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors")


def test_a_finished_training_is_not_repeated(zoo: Path, tmp_path: Path) -> None:
    recipe, file, record = recipe_of(zoo), tmp_path / "m.safetensors", tmp_path / "m.json"
    metrics = {"train_loss": 0.25, "accuracy": 0.5}
    for version in ({}, {"version": 2}):
        record.write_text(json.dumps({**version, **metrics}))
        assert drain(train(recipe, HYPER, None, str(file))) == metrics
    record.write_text(json.dumps({"version": 3, **metrics}))
    with pytest.raises(RecipeError, match=r"m\.json has version 3"):
        drain(train(recipe, HYPER, None, str(file)))
    assert not file.exists()


def test_bfloat16_passes_leave_float32_parameters(zoo: Path, tmp_path: Path) -> None:
    hyper, init = changed(randaugment=0), str(zoo / "zoo" / "model_0.safetensors")
    found = {}
    for precision in ("float32", "bfloat16"):
        file = tmp_path / f"{precision}.safetensors"
        found[precision] = drain(train(recipe_of(zoo, precision=precision), hyper, init, str(file)))
    assert not same(tmp_path / "float32.safetensors", tmp_path / "bfloat16.safetensors")
    assert all(t.dtype in (torch.float32, torch.int64) for t in load_file(tmp_path / "bfloat16.safetensors").values())
    assert found["bfloat16"]["train_loss"] == pytest.approx(found["float32"]["train_loss"], rel=0.05)


def test_a_training_that_diverges_is_an_error(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(SoupError, match="Training diverged with"):
        drain(train(recipe_of(zoo), changed(lr=1e30), None, str(tmp_path / "m.safetensors")))
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_randaugment_keeps_dtype_and_range_and_follows_the_seed(shape: tuple[int, ...]) -> None:
    hyper = changed(shift=0)
    pixels = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)
    for images in (pixels, (pixels / 255 * 3 - 1.5).astype(np.float32)):
        torch.manual_seed(1)
        distorted = Augment(images, hyper)(np.arange(6), np.random.default_rng(0))
        assert distorted.shape == images.shape
        assert distorted.numpy().dtype == images.dtype
        assert not np.array_equal(distorted.numpy(), images)
        assert images.min() <= distorted.min()
        assert distorted.max() <= images.max() * (1 + 1e-6)
        torch.manual_seed(1)
        again = Augment(images, hyper)(np.arange(6), np.random.default_rng(0))
        assert torch.equal(distorted, again)
    plain = Augment(pixels, changed(shift=0, randaugment=0))(np.array([4, 2]), np.random.default_rng(0))
    np.testing.assert_array_equal(plain, pixels[[4, 2]])


def test_randaugment_refuses_what_is_not_an_image() -> None:
    with pytest.raises(RecipeError, match=r"found \[5, 8, 8\]"):
        Augment(np.zeros((2, 5, 8, 8), np.float32), HYPER)


def test_a_linear_probe_equals_scikit_learns_logistic_regression(zoo: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    pretrained = load_file(zoo / "zoo" / "model_0.safetensors")
    del pretrained["head.weight"]
    pretrained["head.bias"] = torch.zeros(1000)  # of another task
    save_file({**pretrained, "text.tower": torch.zeros(3)}, tmp_path / "pretrained.safetensors")
    wd = 1e-2
    recipe = recipe_of(zoo, finetune={"pretrained": str(tmp_path / "pretrained.safetensors"), "probe_wd": wd})
    drain(probe(recipe, str(tmp_path / "init.safetensors")))
    made = load_file(tmp_path / "init.safetensors")
    assert all(torch.equal(made[name], pretrained[name]) for name in made if not name.startswith("head."))
    model = tiny.Tiny()
    model.load_state_dict({**made, "head.weight": torch.zeros(10, 23), "head.bias": torch.zeros(10)})
    images, labels = (torch.from_numpy(a[:600]) for a in tiny.digits())
    features: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].detach()))
    model(images)
    theirs = LogisticRegression(C=1 / (wd * 600), max_iter=5000, tol=1e-8).fit(features[0].numpy(), labels.numpy())
    weight = torch.from_numpy(theirs.coef_)
    assert float((made["head.weight"] - weight).norm() / weight.norm()) < 5e-3


def test_a_checkpoint_that_lacks_more_or_less_than_a_head_is_refused(zoo: Path, tmp_path: Path) -> None:
    pretrained = load_file(zoo / "zoo" / "model_0.safetensors")
    save_file(pretrained, tmp_path / "all.safetensors")
    save_file({k: v for k, v in pretrained.items() if not k.startswith(("head", "norm"))}, tmp_path / "few.safetensors")
    for name, message in (
        ("all", r"lacks nothing\. Use it as finetune\.init instead"),
        ("few", r"lacks 4 tensors: .*norm\."),
    ):
        recipe = recipe_of(zoo, finetune={"pretrained": str(tmp_path / f"{name}.safetensors")})
        with pytest.raises(RecipeError, match=message):
            drain(probe(recipe, str(tmp_path / "init.safetensors")))

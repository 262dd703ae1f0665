"""Training of single ingredients, and the zoo that `finetune` makes of them."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ray_soup.cache import drained
from ray_soup.errors import RecipeError, SoupError
from ray_soup.finetune import finetune
from ray_soup.pipeline import run
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.train import Augment, probe, train
from tests import tiny
from tests.conftest import ROOT, kill_tree, ray_soup, values

HYPER = {
    "lr": 2e-3, "wd": 0.01, "epochs": 3, "label_smoothing": 0.1, "mixup": 0.2, "shift": 1, "randaugment": 9, "seed": 5,
}  # fmt: skip


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    data = {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")}
    return make_recipe(values(folder, data=data, **changes))


def same(one: Path, other: Path) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_stopped_training_goes_on_with_the_same_bits(zoo: Path, tmp_path: Path) -> None:
    recipe, init = recipe_of(zoo), str(zoo / "zoo" / "model_0.safetensors")
    whole = drained(train(recipe, HYPER, init, tmp_path / "whole.safetensors"))
    for _ in range(2):  # an epoch each
        started = train(recipe, HYPER, init, tmp_path / "parts.safetensors")
        assert next(started)[1] == 3
        started.close()
    assert drained(train(recipe, HYPER, init, tmp_path / "parts.safetensors")) == whole
    assert same(tmp_path / "whole.safetensors", tmp_path / "parts.safetensors")
    assert sorted(f.name for f in tmp_path.glob("parts*")) == ["parts.json", "parts.safetensors"]
    assert not same(tmp_path / "whole.safetensors", Path(init))


def test_bfloat16_passes_leave_float32_numbers(zoo: Path, tmp_path: Path) -> None:
    hyper, init = {**HYPER, "randaugment": 0}, str(zoo / "zoo" / "model_0.safetensors")
    found = {}
    for precision in ("float32", "bfloat16"):
        file = tmp_path / f"{precision}.safetensors"
        found[precision] = drained(train(recipe_of(zoo, precision=precision), hyper, init, file))
    assert not same(tmp_path / "float32.safetensors", tmp_path / "bfloat16.safetensors")
    assert all(t.dtype in (torch.float32, torch.int64) for t in load_file(tmp_path / "bfloat16.safetensors").values())
    assert found["bfloat16"]["train_loss"] == pytest.approx(found["float32"]["train_loss"], rel=0.05)


def test_a_training_that_diverges_says_so(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(SoupError, match="Training diverged with"):
        drained(train(recipe_of(zoo), {**HYPER, "lr": 1e30}, None, tmp_path / "m.safetensors"))
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (3, 8, 8)])
def test_randaugment_distorts_and_keeps_kind_and_range(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)
    for images in (pixels, (pixels / 255 * 3 - 1.5).astype(np.float32)):
        torch.manual_seed(1)
        distorted = Augment(images, {**HYPER, "shift": 0})(np.arange(6), np.random.default_rng(0))
        assert distorted.shape == images.shape
        assert distorted.numpy().dtype == images.dtype
        assert not np.array_equal(distorted.numpy(), images)
        assert images.min() <= distorted.min()
        assert distorted.max() <= images.max() * (1 + 1e-6)
        torch.manual_seed(1)
        again = Augment(images, {**HYPER, "shift": 0})(np.arange(6), np.random.default_rng(0))
        assert torch.equal(distorted, again)
    plain = Augment(pixels, {**HYPER, "shift": 0, "randaugment": 0})(np.array([4, 2]), np.random.default_rng(0))
    np.testing.assert_array_equal(plain, pixels[[4, 2]])


def test_randaugment_of_what_is_no_image_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"these are \[5, 8, 8\]"):
        Augment(np.zeros((2, 5, 8, 8), np.float32), HYPER)


def test_a_linear_probe_is_the_logistic_regression_on_the_features(zoo: Path, tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    pretrained = load_file(zoo / "zoo" / "model_0.safetensors")
    del pretrained["head.weight"]
    pretrained["head.bias"] = torch.zeros(1000)  # another task's
    save_file({**pretrained, "text.tower": torch.zeros(3)}, tmp_path / "pretrained.safetensors")
    wd = 1e-2
    recipe = recipe_of(zoo, finetune={"pretrained": str(tmp_path / "pretrained.safetensors"), "probe_wd": wd})
    drained(probe(recipe, tmp_path / "init.safetensors"))
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


def test_what_lacks_more_than_a_head_is_refused(zoo: Path, tmp_path: Path) -> None:
    pretrained = load_file(zoo / "zoo" / "model_0.safetensors")
    save_file(pretrained, tmp_path / "all.safetensors")
    save_file({k: v for k, v in pretrained.items() if not k.startswith(("head", "norm"))}, tmp_path / "few.safetensors")
    for name, message in (("all", "lacks none: name it as finetune.init"), ("few", r"lacks 4 tensors: .*norm\.")):
        recipe = recipe_of(zoo, finetune={"pretrained": str(tmp_path / f"{name}.safetensors")})
        with pytest.raises(RecipeError, match=message):
            drained(probe(recipe, tmp_path / "init.safetensors"))


def test_a_zoo_that_was_fine_tuned_is_souped(zoo: Path, tmp_path: Path, cluster: None) -> None:
    init = str(zoo / "zoo" / "model_0.safetensors")
    recipe = recipe_of(zoo, finetune={"trials": 3, "init": init, "epochs": 1, "randaugment": {"choice": [0, 5]}})
    entries = finetune(recipe, tmp_path / "made")
    assert [e["file"] for e in entries] == [f"model_{k:02d}.safetensors" for k in range(3)]
    assert len({e["sha256"] for e in entries}) == 3
    assert finetune(recipe, tmp_path / "made") == entries
    assert sorted(f.name for f in (tmp_path / "made").iterdir()) == ["manifest.json", *(e["file"] for e in entries), "state"]
    soup = run(make_recipe(values(zoo, ingredients=str(tmp_path / "made"))), tmp_path / "out")
    assert [i["sha256"] for i in soup.record["ingredients"]] == [e["sha256"] for e in entries]
    assert [i["hyperparameters"]["lr"] for i in soup.record["ingredients"]] == [e["lr"] for e in entries]
    assert [i["metrics"]["accuracy"] for i in soup.record["ingredients"]] == [e["accuracy"] for e in entries]


def test_more_workers_than_there_is_room_for_are_refused(zoo: Path, tmp_path: Path, cluster: None) -> None:
    with pytest.raises(RecipeError, match="99 workers a model take 99 CPUs; the cluster has"):
        finetune(recipe_of(zoo, finetune={"workers_per_model": 99}), tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.slow
def test_two_workers_train_what_one_does(zoo: Path, tmp_path: Path, cluster: None) -> None:
    init = str(zoo / "zoo" / "model_0.safetensors")
    plain = {
        "init": init,
        "trials": 2,
        "epochs": 1,
        "lr": 1e-3,
        "wd": 0.01,
        "label_smoothing": 0,
        "mixup": 0,
        "randaugment": 0,
    }
    one = finetune(recipe_of(zoo, finetune=plain), tmp_path / "one")
    two = finetune(recipe_of(zoo, finetune={**plain, "workers_per_model": 2}), tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        ours, theirs = load_file(tmp_path / "one" / a["file"]), load_file(tmp_path / "two" / b["file"])
        for name in set(ours) - {"key.bias"}:  # has no gradient: Adam makes steps of rounding
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-4)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.01)


@pytest.mark.slow
def test_a_killed_finetune_goes_on(zoo: Path, tmp_path: Path) -> None:
    recipe = {
        **values(zoo),
        "data": {"train": str(zoo / "train.npz")},
        "finetune": {"trials": 3, "init": str(zoo / "zoo" / "model_0.safetensors"), "epochs": 25},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("finetune", str(tmp_path / "r.yaml"), str(tmp_path / "killed"))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    trials = tmp_path / "killed" / "state" / "trials"
    while not list(trials.glob("*.state")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(3)
    kill_tree(process)
    before = {f.stem for f in trials.glob("*.safetensors")} | {f.stem for f in trials.glob("*.state")}
    assert any(torch.load(f, weights_only=True)["epoch"] > 0 for f in trials.glob("*.state"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert before
    made = json.loads((tmp_path / "killed" / "manifest.json").read_text())
    whole = subprocess.run(ray_soup("finetune", str(tmp_path / "r.yaml"), str(tmp_path / "whole")), cwd=ROOT)
    assert whole.returncode == 0
    assert len(made) == 3
    for entry in made:
        assert same(tmp_path / "killed" / entry["file"], tmp_path / "whole" / entry["file"])

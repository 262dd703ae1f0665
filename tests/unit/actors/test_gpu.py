"""Actors with a GPU, which a stand-in on the CPU gives them, compared with actors without one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ray_soup
from ray_soup.actors import timing
from ray_soup.actors.messages import TrainingJob
from ray_soup.io.progress import drain, no_progress
from ray_soup.mixing.hyperplane import Hyperplane
from ray_soup.recipe import make_recipe
from ray_soup.soups.doctor import diagnose
from ray_soup.task.data import Split
from ray_soup.tune.probe import fit_head
from ray_soup.tune.records import Hyperparameters
from ray_soup.tune.train import train
from tests import adapters
from tests.conftest import InProcess, values
from tests.gpu_on_cpu import OnGpu, gpu
from tests.tiny import Tiny
from tests.unit.actors.test_by_layer import deep

pytest.importorskip("triton")
__all__ = ["deep"]


def answers(recipe: Any, blocks: Any = "tensor", examples: int = 61) -> dict[str, Any]:
    """What an actor answers to most of the calls of a run."""
    pool = InProcess(recipe)
    shard, fit = pool.shards[0], Split("fit", np.arange(examples, dtype=np.int32))
    count, held_back = len(pool.inputs.ingredients), Split("fit", np.arange(examples, 2 * examples, dtype=np.int32))
    info = pool.open_all(blocks)
    chosen, parts = np.array([2, 0]), info.partition.count
    x = np.zeros((count, parts), np.float32)
    x[1] = 0.05  # does not move
    pool.begin(chosen, x, pool.choose_precision())
    moved = (0.02 * np.random.default_rng(0).standard_normal((2, parts))).astype(np.float32)
    found: dict[str, Any] = {"output": info.output}
    statistics = pool.recalibrate(moved, [fit]) if shard.replica.recalibrated else {}
    pool.use(statistics)
    for turn in ("first", "second"):
        (step,) = pool.step(moved, 1.1, fit)
        found |= {f"{turn}: {name}": getattr(step, name) for name in ("gradient", "by_factor", "loss", "weight")}
        assert 0 <= step.combine_s <= step.seconds
    found |= {f"statistics: {name}": array for name, array in statistics.items()}
    found |= vars(pool.evaluate(moved, 1.1, held_back)) | {"each": pool.evaluate_each(moved, held_back).loss}
    files = [i.path for i in pool.inputs.ingredients[:2]]
    if shard.replica.layers is None and shard.replica.recipe.model.startswith("tests"):
        found["mixture"] = pool.try_mixture(np.full(count, 1 / count), [fit]).loss
        found["candidate"] = pool.try_candidate((0, 2), 1, [fit], [fit] if statistics else ()).loss
        found["file"] = pool.evaluate_file(files[0], [fit])[0].loss
        pool.evaluate_member(tuple(files[:1]), [fit], no_progress)
        pool.evaluate_member(tuple(files), [fit], no_progress)
        found["ensemble"] = pool.evaluate_ensemble(tuple(files), [fit])[0].loss
    assert all(peak > 0 for peak in pool.peak_memory())
    pool.close()
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None or isinstance(value, tuple):
            assert found[name] == value, name
        else:
            scale = float(np.abs(np.asarray(value)).max())
            np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * scale, err_msg=name)


def recipe_of(zoo: Path, gpus: int, **changes: Any) -> Any:
    return make_recipe(values(zoo, learn__micro_batch=16, actors__gpus=gpus, **changes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_model_held_whole(zoo: Path, dtype: str) -> None:
    expected = answers(recipe_of(zoo, 0, directions__dtype=dtype), {"tensor": 3})
    with gpu():
        assert_close(answers(recipe_of(zoo, 1, directions__dtype=dtype), {"tensor": 3}), expected)


def test_running_statistics(conv_zoo: Path) -> None:
    changes = {"model": "tests.tiny:build_conv"}
    expected = answers(recipe_of(conv_zoo, 0, **changes))
    assert any(name.startswith("statistics") for name in expected)
    with gpu():
        assert_close(answers(recipe_of(conv_zoo, 1, **changes)), expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_without_triton(zoo: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    expected = answers(recipe_of(zoo, 0, directions__dtype=dtype))
    monkeypatch.setattr("ray_soup.mixing.hyperplane.find_spec", lambda name: None)
    with gpu():
        assert_close(answers(recipe_of(zoo, 1, directions__dtype=dtype)), expected)


def test_by_layer(deep: Path) -> None:
    changes = {"model": "tests.unit.actors.test_by_layer:build", "actors__by_layer": True, "learn__model_batch": 2}
    expected = answers(recipe_of(deep, 0, **changes), examples=17)
    with gpu():
        assert_close(answers(recipe_of(deep, 1, **changes), examples=17), expected)


def test_how_often_a_step_waits_for_the_gpu_does_not_depend_on_its_micro_batches(zoo: Path) -> None:
    waits = []
    for micro_batch in (61, 10):
        with gpu() as device:
            pool = InProcess(make_recipe(values(zoo, learn__micro_batch=micro_batch, actors__gpus=1)))
            x = np.full((8, pool.open_all("model").partition.count), 1e-3, np.float32)
            pool.begin(np.arange(8), x, "float32")
            before = device.waits
            pool.step(x, 1.0, Split("fit", np.arange(61, dtype=np.int32)))
            waits.append(device.waits - before)
    assert waits[0] == waits[1] == 4  # the projected gradient, and three sums


def test_directions_are_sent_to_the_gpu_one_at_a_time(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    rows = Hyperplane.rows

    def recorded(plane: Hyperplane) -> torch.Tensor:
        copied.append(len(found := rows(plane)))
        return found

    with gpu():
        pool = InProcess(recipe_of(zoo, 1))
        pool.open_all("model")
        monkeypatch.setattr(Hyperplane, "rows", recorded)
        plane = pool.shards[0].plane
        plane.choose(np.array([5, 2, 6]))
        assert copied == [0, 1, 1, 1]
        assert isinstance(plane._resident, OnGpu)
        assert torch.equal(plane._resident.cpu(), rows(plane))


def test_the_speeds_of_a_gpu_are_measured(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SYNTHETIC_BYTES", 1 << 10)
    monkeypatch.setattr(timing, "CHUNK", 1 << 11)
    with gpu():
        timings = InProcess(recipe_of(zoo, 1)).time_step(2, 16, no_progress)
    assert min(timings.step_s, timings.forward_s, timings.combine_s, timings.project_s, timings.peak_bytes) > 0


@pytest.mark.parametrize(("wanted", "chosen"), [("auto", "bfloat16"), ("float32", "float32")])
def test_a_gpu_computes_in_bfloat16_if_it_can(zoo: Path, wanted: str, chosen: str) -> None:
    with gpu():
        pool = InProcess(recipe_of(zoo, 1, precision=wanted))
        assert pool.choose_precision() == chosen
        assert all(isinstance(parameter, OnGpu) for parameter in pool.shards[0].replica.model.parameters())
        assert answers(recipe_of(zoo, 1, precision=wanted), "model")["loss"] > 0


def test_a_stand_in_refuses_what_a_gpu_refuses() -> None:
    with gpu():
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        for work in (lambda: here + there, lambda: torch.stack([here, there]), lambda: torch.dot(there, here)):
            with pytest.raises(RuntimeError, match="same device"):
                work()
        with pytest.raises(TypeError, match="cuda:0"):
            there.numpy()
        assert (here.to("cuda") + there).cpu().numpy().tolist() == [2, 2, 2]


def test_soups_in_memory_of_a_model_on_a_gpu(zoo: Path) -> None:
    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    arrays = np.load(zoo / "heldout.npz")
    with gpu():
        model = Tiny().to("cuda")
        on_gpu = [{name: tensor.to("cuda") for name, tensor in state.items()} for state in states]
        fit = [(torch.from_numpy(arrays["images"]).to("cuda"), torch.from_numpy(arrays["labels"]).to("cuda"))]
        soup = ray_soup.mix_state_dicts(model, on_gpu, fit, "uniform")
        assert model.load_state_dict(soup.state_dict()).missing_keys == []
    for name, _ in model.named_parameters():
        mean = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(soup.state_dict()[name], mean, rtol=1e-5, atol=1e-6)


def test_fine_tuning(zoo: Path, tmp_path: Path) -> None:
    data = {"train": str(zoo / "train.npz"), "fit": str(zoo / "heldout.npz")}
    hyper: Hyperparameters = {
        "lr": 2e-3, "wd": 0.01, "epochs": 1, "label_smoothing": 0.1, "mixup": 0.2, "shift": 1, "randaugment": 0, "seed": 5,
    }  # fmt: skip
    found = []
    for gpus in (0, 1):
        with gpu() if gpus else nullcontext():
            found.append(drain(train(recipe_of(zoo, gpus, data=data), hyper, None, str(tmp_path / f"{gpus}.safetensors"))))
    assert found[1]["train_loss"] == pytest.approx(found[0]["train_loss"], rel=1e-3)
    assert load_file(tmp_path / "0.safetensors").keys() == load_file(tmp_path / "1.safetensors").keys()


def test_a_linear_probe(zoo: Path) -> None:
    features, labels = torch.randn(40, 5), torch.arange(40) % 3
    heads = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    fit_head(heads[0], features, labels, 0.1)
    with gpu():
        fit_head(heads[1].to("cuda"), features.to("cuda"), labels.to("cuda"), 0.1)
        torch.testing.assert_close(heads[1].weight.cpu(), heads[0].weight, rtol=1e-4, atol=1e-5)


def test_doctor_names_the_gpu() -> None:
    with gpu():
        assert diagnose(None).rows["GPUs"] == "CPU that stands in for a GPU, 8.6 GB"


def test_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters.write_adapters(tmp_path)
    adapters.write_texts(tmp_path)
    recipe = adapters.values(tmp_path)
    expected = answers(make_recipe(recipe), examples=4)
    with gpu():
        recipe["actors"]["gpus"] = 1
        assert_close(answers(make_recipe(recipe), examples=4), expected)


def test_training_of_all_weights(zoo: Path, tmp_path: Path) -> None:
    fit, select = Split("fit", np.arange(0, 300, dtype=np.int32)), Split("fit", np.arange(300, 400, dtype=np.int32))
    curves = []
    for gpus in (0, 1):
        start = str(zoo / "zoo" / "model_0.safetensors")
        job = TrainingJob(
            "training", start, str(tmp_path / f"{gpus}"), "task", 4e-3, 0.01, 2, 128, 7, "float32", fit, select
        )
        with gpu() if gpus else nullcontext():
            curves.append(InProcess(recipe_of(zoo, gpus)).train(job, no_progress).curve)
    assert [row["epoch"] for row in curves[0]] == [-1, 0, 1]
    for plain, on_gpu in zip(*curves, strict=True):
        assert on_gpu == pytest.approx(plain, rel=1e-3)

"""Running statistics of BatchNorm layers, computed anew for soups."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn

from ray_soup.actors import Actors, quiet
from ray_soup.cache import drained
from ray_soup.coefficients import load_coefficients
from ray_soup.data import Split, calibration_batches, cut
from ray_soup.errors import RecipeError
from ray_soup.greedy import greedy, ranking
from ray_soup.learn import learn, load_state
from ray_soup.outcomes import Outcome
from ray_soup.pipeline import Bench, bake_again, prepare, run, verify
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.running_statistics import Statistics, averaged, buffers_of, summed, tracking_layers
from ray_soup.shard import Mesh
from tests import tiny
from tests.conftest import InProcess, values

pytestmark = pytest.mark.slow

learn_module = import_module("ray_soup.learn")  # ray_soup.learn is the function


@pytest.fixture(scope="module")
def conv_zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conv")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", 4, tiny.build_conv)
    return folder


def recipe_of(folder: Path, **changes: object) -> Recipe:
    return make_recipe(values(folder, model="tests.tiny:build_conv", **changes))


def statistics_by_torch(model: nn.Module, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn(batches, model)
    return {name: tensor for name, tensor in model.state_dict().items() if name in buffers_of(tracking_layers(model))}


def same(found: Statistics, expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, array in found.items():
        torch.testing.assert_close(torch.from_numpy(array), expected[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3, 2, 4, 4), (5, 3)])
def test_they_are_those_of_update_bn(shape: tuple[int, ...], parts: int) -> None:
    torch.manual_seed(0)
    norm: nn.Module = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d, 2: nn.BatchNorm1d}[len(shape)](3)
    twice = nn.SyncBatchNorm(3)  # used twice, under two names
    model = nn.ModuleDict({"norm": norm, "first": twice, "second": twice, "dropout": nn.Dropout(0.5)})
    model.forward = lambda x: model["dropout"](model["second"](model["first"](model["norm"](x)) ** 2))
    batches = [torch.randn(shape) * (i + 1) for i in range(7)]
    model.eval()
    before = {name: tensor.clone() for name, tensor in norm.named_parameters()}
    sums = [drained(summed(model, batches[part::parts], lambda batch: batch)) for part in range(parts)]
    found = averaged(sums)
    assert not any(module.training for module in model.modules())
    assert type(twice) is nn.SyncBatchNorm
    assert norm.momentum == 0.1
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.named_parameters())
    assert found["norm.num_batches_tracked"] == 7
    assert found["second.num_batches_tracked"] == 14
    for module in model.values():
        module.training = True
    same(found, statistics_by_torch(model, batches))


def test_instance_norm_takes_the_mean_over_instances() -> None:
    norm, images = nn.InstanceNorm2d(3, track_running_stats=True).eval(), torch.randn(4, 3, 5, 5)
    found = averaged([drained(summed(norm, images.split(2), lambda batch: batch))])
    same(
        found,
        {
            "running_mean": images.mean(dim=(0, 2, 3)),
            "running_var": images.var(dim=(2, 3)).mean(dim=0),
            "num_batches_tracked": torch.tensor(2),
        },
    )


def test_one_image_is_too_few_and_says_so() -> None:
    with pytest.raises(RecipeError, match=r"so few images .* Raise learn\.batch_size"):
        drained(summed(nn.BatchNorm1d(3), [torch.zeros(1, 3)], lambda batch: batch))


def test_batches_are_of_fit_alone() -> None:
    fit = Split("fit", np.arange(0, 200, 2, dtype=np.int32))
    for size, most, lengths in ((30, 1000, [30, 30, 30]), (30, 64, [30, 30]), (128, 1000, [100]), (128, 40, [40])):
        batches = calibration_batches(fit, size, 1, most)
        assert [len(b) for b in batches] == lengths
        rows = np.concatenate([b.rows for b in batches])
        assert len(set(rows.tolist())) == len(rows)
        assert set(rows.tolist()) <= set(fit.rows.tolist())


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)])
def test_a_soup_has_statistics_of_its_own(conv_zoo: Path, tmp_path: Path, mesh: tuple[int, int]) -> None:
    """Whatever the mesh; they can be baked again and verified."""
    actors = {"replicas": mesh[0], "shards": mesh[1], "cpus": 1}
    recipe = recipe_of(conv_zoo, actors=actors, learn__lr=0.1, learn__batch_size=64)
    soup = run(recipe, tmp_path / "out")
    coefficients, model = load_coefficients(soup.out / "coefficients.safetensors"), tiny.build_conv()
    state = load_file(soup.out / "model.safetensors")
    model.load_state_dict(state)
    splits = cut(recipe.data, {"fit": 597, "test": 600}, None, recipe.learn.seed)
    images = torch.from_numpy(np.load(conv_zoo / "heldout.npz")["images"])
    batches = calibration_batches(splits["fit"], 64, recipe.learn.seed, 10_000)
    assert len(batches) == 7
    expected = statistics_by_torch(model, [images[batch.rows] for batch in batches])
    same(coefficients.statistics, expected)
    for name, array in coefficients.statistics.items():
        assert torch.equal(state[name], torch.from_numpy(array))
    assert any("2 BatchNorm layers were computed anew on 448 images of fit" in note for note in soup.notes)
    assert any(line["steps"] for line in soup.record["curve"])
    assert len(verify(soup.out)) == 4
    bake_again(soup.out, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (soup.out / "model.safetensors").read_bytes()
    model.eval()
    test = np.load(conv_zoo / "test.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(test["images"]))
    nll = nn.functional.cross_entropy(logits, torch.from_numpy(test["labels"])).item()
    assert soup.rows[0]["test_nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.usefixtures("cluster")
def test_a_run_that_was_struck_ends_with_the_same_bits(
    conv_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch and gone on with, and then with an actor killed in the middle of another."""
    import ray

    monkeypatch.setattr(learn_module, "SAVE_EVERY_S", 0.0)
    recipe = recipe_of(conv_zoo, learn__epochs=3, learn__model_batch=2, learn__batch_size=64)
    ingredients, layout = prepare(recipe)
    actors = Actors(recipe, ingredients, Mesh(2, 1), 1)
    found = {}
    try:
        bench = Bench(recipe, ingredients, layout, Mesh(2, 1), 1, 2, actors, actors.setup(quiet), quiet)
        splits = bench.cut(1)
        calibration = bench.calibration(recipe, splits, 128)
        assert [len(batch) for batch in calibration] == [64, 64]

        def stop(step: int, *_: object) -> None:
            if step == 10:
                raise KeyboardInterrupt

        def kill(step: int, *_: object) -> None:
            if step == 32:
                ray.kill(actors._handles[1])

        for name, strikes in {"whole": [], "struck": [stop, kill]}.items():
            taken = bench.take((0, 1, 2, 3), "tensor")
            file = tmp_path / f"{name}.pt"
            for strike in strikes[:1]:
                with pytest.raises(KeyboardInterrupt):
                    learn(recipe, actors, taken.norms, splits, 2, file, strike, calibration=calibration)
                assert load_state(file).step == 2
                assert load_state(file).statistics
                taken = bench.take((0, 1, 2, 3), "tensor")
            watch = strikes[-1] if strikes else lambda *_: None
            found[name] = learn(recipe, actors, taken.norms, splits, 2, file, watch, calibration=calibration)
    finally:
        actors.close()
    assert torch.equal(found["whole"].y, found["struck"].y)
    assert found["whole"].curve == found["struck"].curve
    assert found["whole"].y.any()
    assert found["whole"].image_passes == 6 * 448 + 8 * 128


def test_greedy_is_the_plain_loop_with_statistics_of_each_candidate(conv_zoo: Path) -> None:
    recipe = recipe_of(conv_zoo)
    states = [load_file(f) for f in sorted((conv_zoo / "zoo").glob("*.safetensors"))]
    data = np.load(conv_zoo / "heldout.npz")
    images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    split = Split("fit", np.arange(len(labels), dtype=np.int32))
    calibration = calibration_batches(split, 61, 1, 244)

    def right(kept: list[int]) -> np.ndarray:
        model = tiny.build_conv()
        mean = {name: sum(states[k][name].double() for k in kept) / len(kept) for name in states[0]}
        model.load_state_dict({name: tensor.to(states[0][name].dtype) for name, tensor in mean.items()})
        if len(kept) > 1:
            statistics_by_torch(model, [images[batch.rows] for batch in calibration])
        with torch.inference_mode():
            return (model.eval()(images).argmax(dim=1) == labels).numpy()

    held_out = {}
    for k in range(4):
        correct = right([k])
        held_out[k] = Outcome(1.0 - correct, correct, np.ones(len(labels), np.float32))
    order = ranking(held_out)
    kept, best = order[:1], held_out[order[0]].correct.sum()
    for k in order[1:]:
        if right([*kept, k]).sum() >= best:
            kept, best = [*kept, k], right([*kept, k]).sum()
    for size in (1, 2):
        search = greedy(InProcess(recipe, size), held_out, [split], calibration=calibration)
        assert (search.kept, search.correct) == (kept, best)


@pytest.mark.usefixtures("cluster")
def test_who_keeps_what(conv_zoo: Path, tmp_path: Path) -> None:
    single = run(recipe_of(conv_zoo, method="best_single"), tmp_path / "single")
    ingredient = load_file(conv_zoo / "zoo" / f"{single.record['best_single']}.safetensors")
    assert all(torch.equal(t, ingredient[n]) for n, t in load_file(single.out / "model.safetensors").items())
    assert not any("BatchNorm" in note for note in single.notes)

    mixed = run(recipe_of(conv_zoo, method="uniform", buffers="average"), tmp_path / "mixed")
    states = [load_file(file) for file in (conv_zoo / "zoo").glob("*.safetensors")]
    means = sum(state["norm.running_var"].double() for state in states) / 4
    torch.testing.assert_close(load_file(mixed.out / "model.safetensors")["norm.running_var"], means.float())
    (note,) = [note for note in mixed.notes if "BatchNorm" in note]
    assert note.startswith("This model has 2 BatchNorm layers")
    assert note.endswith("set buffers: recalibrate.")
    assert json.loads((mixed.out / "run.json").read_text())["notes"] == mixed.notes

    without_data = run(recipe_of(conv_zoo, method="uniform", data={}), tmp_path / "without")
    assert any(note.endswith("name data.fit.") for note in without_data.notes)
    with pytest.raises(RecipeError, match=r"buffers: recalibrate needs data\.fit"):
        run(recipe_of(conv_zoo, method="uniform", data={}, buffers="recalibrate"), tmp_path / "none")


def test_frozen_layers_are_left_alone(conv_zoo: Path, tmp_path: Path) -> None:
    """auto: the ingredients' running statistics are the same."""
    (tmp_path / "zoo").mkdir()
    for k, file in enumerate(sorted((conv_zoo / "zoo").glob("*.safetensors"))):
        state = load_file(file)
        frozen = {name: torch.ones_like(tensor) for name, tensor in state.items() if "running" in name}
        save_file({**state, **frozen}, tmp_path / "zoo" / f"{k}.safetensors")
    for folder, buffers, recalibrates in (
        (tmp_path, "auto", False), (tmp_path, "recalibrate", True), (conv_zoo, "auto", True), (conv_zoo, "first", False),
    ):  # fmt: skip
        recipe = recipe_of(conv_zoo, ingredients=str(folder / "zoo"), buffers=buffers)
        ingredients, layout = prepare(recipe)
        assert layout.tracking == ("norm", "norm1d")
        bench = Bench(recipe, ingredients, layout, Mesh(1, 1), 1, 4, None, None, quiet)
        assert bench.recalibrates == recalibrates

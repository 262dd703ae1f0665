"""Running statistics of BatchNorm layers, re-estimated for soups in whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.errors import RecipeError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.learn import learn
from ray_soup.soups.run import run
from ray_soup.soups.session import Session
from ray_soup.soups.state import ignore_state, load_state
from ray_soup.task.data import calibration_batches, cut_splits
from tests import tiny
from tests.conftest import values
from tests.unit.mixing.test_running_statistics import assert_same, statistics_by_torch

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def recipe_of(folder: Path, **changes: object) -> Recipe:
    return make_recipe(values(folder, model="tests.tiny:build_conv", **changes))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1), (1, 2)])
def test_a_soup_has_its_own_statistics(conv_zoo: Path, tmp_path: Path, mesh: tuple[int, int]) -> None:
    """On any mesh; the soup can be baked again and verified."""
    actors = {"replicas": mesh[0], "shards": mesh[1], "cpus": 1}
    recipe = recipe_of(conv_zoo, actors=actors, learn__lr=0.1, learn__batch_size=64)
    soup = run(recipe, tmp_path / "out")
    coefficients, model = load_coefficients(soup.out / "coefficients.safetensors"), tiny.build_conv()
    state = load_file(soup.out / "model.safetensors")
    model.load_state_dict(state)
    splits = cut_splits(recipe.data, {"fit": 597, "test": 600}, None, recipe.learn.seed)
    images = torch.from_numpy(np.load(conv_zoo / "heldout.npz")["images"])
    batches = calibration_batches(splits["fit"], 64, recipe.learn.seed, 10_000)
    assert len(batches) == 7
    expected = statistics_by_torch(model, [images[batch.rows] for batch in batches])
    assert_same(coefficients.statistics, expected)
    for name, array in coefficients.statistics.items():
        assert torch.equal(state[name], torch.from_numpy(array))
    assert any("2 BatchNorm layers were re-estimated on 448 examples of fit" in note for note in soup.notes)
    assert any(line["steps"] for line in soup.record["curve"])
    assert len(verify(soup.out)) == 5
    bake_copy(soup.out, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (soup.out / "model.safetensors").read_bytes()
    model.eval()
    test = np.load(conv_zoo / "test.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(test["images"]))
    nll = nn.functional.cross_entropy(logits, torch.from_numpy(test["labels"])).item()
    assert soup.rows[0]["test_nll"] == pytest.approx(nll, rel=1e-5)


def test_a_run_that_was_stopped_and_lost_an_actor_ends_bit_identical(
    conv_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of an epoch and resumed; then an actor is killed in the middle of another epoch."""
    import ray

    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    recipe = recipe_of(conv_zoo, learn__epochs=3, learn__model_batch=2, learn__batch_size=64)
    inputs, mesh = open_inputs(recipe), Mesh(2, 1)
    pool = RayPool(recipe, inputs.ingredients, mesh, 1)
    found = {}
    try:
        session = Session(recipe, inputs, pool, pool.setup(no_progress), mesh, 1, 2)
        session = session.with_soup(splits=session.cut(1))
        calibration = session.calibration(128)
        assert [len(batch) for batch in calibration] == [64, 64]

        def stop(step: int, *_: object) -> None:
            if step == 10:
                raise KeyboardInterrupt

        def kill(step: int, *_: object) -> None:
            if step == 32:
                ray.kill(pool.handles[1])

        for name, disturbed in {"whole": False, "disturbed": True}.items():
            file = tmp_path / f"{name}.pt"
            store = session.open_store(inputs.everything, "tensor")
            if disturbed:
                with pytest.raises(KeyboardInterrupt):
                    learn(recipe, pool, store.norms, session.splits, 2, file, stop, calibration=calibration)
                assert load_state(file).step == 2
                assert load_state(file).statistics
                store = session.open_store(inputs.everything, "tensor")
            after_step = kill if disturbed else ignore_state
            found[name] = learn(recipe, pool, store.norms, session.splits, 2, file, after_step, calibration=calibration)
    finally:
        pool.close()
    assert torch.equal(found["whole"].y, found["disturbed"].y)
    assert found["whole"].curve == found["disturbed"].curve
    assert found["whole"].y.any()
    assert found["whole"].image_passes == 6 * 448 + 8 * 128


def test_which_soups_keep_or_average_the_ingredients_statistics(conv_zoo: Path, tmp_path: Path) -> None:
    single = run(recipe_of(conv_zoo, method="best_single"), tmp_path / "single")
    ingredient = load_file(conv_zoo / "zoo" / f"{single.record['best_single']}.safetensors")
    assert all(torch.equal(t, ingredient[n]) for n, t in load_file(single.out / "model.safetensors").items())
    assert not any("BatchNorm" in note for note in single.notes)

    mixed = run(recipe_of(conv_zoo, method="uniform", buffers="average"), tmp_path / "mixed")
    states = [load_file(file) for file in (conv_zoo / "zoo").glob("*.safetensors")]
    means = sum(state["norm.running_var"].double() for state in states) / 4
    torch.testing.assert_close(load_file(mixed.out / "model.safetensors")["norm.running_var"], means.float())
    (note,) = [note for note in mixed.notes if "BatchNorm" in note]
    assert note.startswith("2 BatchNorm layers of this model have running statistics that are averages")
    assert note.endswith("set buffers: recalibrate.")
    assert json.loads((mixed.out / "run.json").read_text())["notes"] == mixed.notes

    without_data = run(recipe_of(conv_zoo, method="uniform", data={}), tmp_path / "without")
    assert any(note.endswith("add data.fit.") for note in without_data.notes)
    with pytest.raises(RecipeError, match=r"buffers: recalibrate needs data\.fit"):
        run(recipe_of(conv_zoo, method="uniform", data={}, buffers="recalibrate"), tmp_path / "none")

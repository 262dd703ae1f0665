"""Learning on Ray: meshes agree, and a lost actor, a killed driver or other actors do not change the result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.io.disk import files_below
from ray_soup.io.progress import no_progress
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe, with_changes
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.learn import learn
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.run import run
from ray_soup.soups.state import LearnState
from ray_soup.task.data import cut_splits
from tests.conftest import ROOT, children_called, ray_soup, steps_saved, values
from tests.ray.events import wait_for
from tests.stopping import is_running


def learned(
    folder: Path, state_file: Path, mesh: Mesh, dtype: str = "float32", **changes: Any
) -> tuple[np.ndarray, LearnState]:
    """Coefficients float64 [K, B] that a run on this mesh finds, and its last state."""
    recipe = make_recipe(values(folder, directions={"dtype": dtype}, **changes))
    inputs = open_inputs(recipe)
    pool = RayPool(recipe, inputs.ingredients, mesh, 2 / mesh.size if mesh.size > 2 else 1)
    try:
        setup = pool.setup(no_progress)
        store = pool.open_store(inputs.everything, recipe.blocks, no_progress)
        splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
        size = recipe.learn.model_batch if recipe.learn.model_batch != "auto" else len(inputs.ingredients)
        state = learn(recipe, pool, store.norms, splits, size, state_file)
    finally:
        pool.close()
    softmax = recipe.info.kind == "softmax"
    return parametrization(softmax, store.norms).coefficients(state.y.numpy()), state


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_meshes_agree_and_the_same_mesh_is_bit_identical(zoo: Path, tmp_path: Path) -> None:
    """448 fit examples in batches of 61: the last one is shorter; the shards do not divide 4,530 parameters evenly.

    Directions are in int4, whose elements are packed: slices begin within a byte, and within elements that share a scale.
    """
    found = {}
    for number, mesh in enumerate((Mesh(1, 1), Mesh(1, 1), Mesh(2, 1), Mesh(1, 2), Mesh(2, 2))):
        file = tmp_path / f"{number}.pt"
        found[number], state = learned(zoo, file, mesh, "int4", learn__epochs=3, learn__model_batch=8)
        assert state.steps == 24
        assert state.best_cost < state.curve[0]["select_nll"]
    np.testing.assert_array_equal(found[0], found[1])
    for number in (2, 3, 4):
        assert np.linalg.norm(found[number] - found[0]) <= 1e-4 * np.linalg.norm(found[0])
    assert np.abs(found[0] - 1 / 8).max() > 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_micro_batches_change_rounding_only_and_model_batches_take_turns(zoo: Path, tmp_path: Path) -> None:
    whole, _ = learned(zoo, tmp_path / "a.pt", Mesh(1, 1), learn__model_batch=3, method="mehl", blocks="layer")
    micro, state = learned(
        zoo, tmp_path / "b.pt", Mesh(1, 1), learn__model_batch=3, learn__micro_batch=7, method="mehl", blocks="layer"
    )
    assert np.linalg.norm(whole - micro) <= 1e-5 * np.linalg.norm(whole)
    assert state.turn == 3
    assert [c["turn"] for c in state.curve] == [0, 0, 0, 1, 1, 2, 2]
    best = min(c["select_nll"] for c in state.curve)
    assert state.best_cost == best


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_the_best_point_on_select_is_kept_not_the_last(zoo: Path, tmp_path: Path) -> None:
    """With a learning rate that only does harm the soup is the uniform one."""
    changes = {"learn__lr": 1e4, "learn__cosine_lr": False, "learn__epochs": 1}
    found, state = learned(zoo, tmp_path / "a.pt", Mesh(1, 1), **changes)
    assert state.curve[-1]["select_nll"] > state.curve[0]["select_nll"]
    np.testing.assert_array_equal(found, 1 / 8)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("mesh", "fault"),
    [
        pytest.param(Mesh(1, 2), signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(Mesh(1, 2), signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_actor_is_replaced_and_the_soup_is_bit_identical(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Mesh, fault: signal.Signals
) -> None:
    """An actor's process is killed, or stopped so that it does not answer within the deadline."""
    undisturbed, _ = learned(zoo, tmp_path / "a.pt", mesh, learn__model_batch=5, actors__wait_s=240)
    if fault == signal.SIGSTOP:
        monkeypatch.setenv("RAY_SOUP_DEADLINE_S", "25")
    killed: list[int] = []
    step = RayPool.step

    def disturbed(self: RayPool, *arguments: Any) -> Any:
        disturbed.calls += 1
        if disturbed.calls == 13:  # in the second epoch of the first turn
            killed.append(max(process.pid for process in children_called("RemoteShard")))
            os.kill(killed[0], fault)
        return step(self, *arguments)

    disturbed.calls = 0
    monkeypatch.setattr(RayPool, "step", disturbed)
    found, _ = learned(zoo, tmp_path / "b.pt", mesh, learn__model_batch=5, actors__wait_s=240)
    assert killed
    np.testing.assert_array_equal(found, undisturbed)


@pytest.mark.slow
def test_a_killed_driver_is_resumed_and_ends_bit_identical(zoo: Path, tmp_path: Path, cluster: None) -> None:
    """SIGKILL in the middle of an epoch, after at least one was saved; then the same command is rerun."""
    recipe = values(zoo, learn__epochs=5, learn__batch_size=8, learn__model_batch=4, actors__replicas=2)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("learn", str(tmp_path / "r.yaml"))
    run(make_recipe(recipe), tmp_path / "whole")
    out = tmp_path / "cut"
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: steps_saved(out) and scalars_of(out), process)
    children = psutil.Process(process.pid).children(recursive=True)
    actors = children_called("RemoteShard", process.pid)
    before = scalars_of(out)
    wait_for(lambda: scalars_of(out) != before, process)  # an epoch is saved before its scalars, so the next one has begun
    process.kill()
    process.wait()
    assert 0 < steps_saved(out) < 10 * 56
    assert len(actors) == 2
    deadline = time.monotonic() + 180
    while any(map(is_running, actors)):
        assert time.monotonic() < deadline, "a killed driver left its actors behind"
        time.sleep(0.1)
    for child in filter(is_running, children):  # Ray's own agents take a minute to notice
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert not (out / "run.json").exists()

    subprocess.run([*command, str(out)], check=True, cwd=ROOT, capture_output=True)
    whole, cut = (load_coefficients(tmp_path / name / "coefficients.safetensors") for name in ("whole", "cut"))
    np.testing.assert_array_equal(whole.values, cut.values)
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("whole", "cut")]
    assert records[0]["steps"] == records[1]["steps"] == 10 * 56
    assert records[0]["curve"] == records[1]["curve"]


def scalars_of(out: Path) -> int:
    """Bytes that TensorBoard can read of a run so far."""
    return sum(file.stat().st_size for file in files_below(out / "tensorboard"))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(("before", "now"), [((2, 1), (1, 1)), ((1, 1), (1, 2))])
def test_a_stopped_run_can_be_resumed_with_other_actors(
    zoo: Path, tmp_path: Path, before: tuple[int, int], now: tuple[int, int]
) -> None:
    recipe = make_recipe(values(zoo, learn__epochs=4, actors={"replicas": before[0], "shards": before[1], "cpus": 1}))
    whole = run(recipe, tmp_path / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and steps_saved(tmp_path / "out") and done >= total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", stop)
    assert 0 < steps_saved(tmp_path / "out") < whole.record["steps"]
    other = with_changes(recipe, {"actors.replicas": now[0], "actors.shards": now[1]})
    soup = run(other, tmp_path / "out")
    assert soup.record["mesh"] == {"replicas": now[0], "shards": now[1], "cpus": 1}
    assert soup.record["steps"] == whole.record["steps"]
    ours, theirs = (load_coefficients(s.out / "coefficients.safetensors").values for s in (soup, whole))
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)

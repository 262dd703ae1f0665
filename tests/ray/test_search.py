"""The search on Ray Tune, and soups as trials of a user's own tuner."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.actors import placement
from ray_soup.actors.placement import NoRoom
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import no_progress
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe, with_changes
from ray_soup.soups.finished import verify
from ray_soup.soups.run import run
from ray_soup.soups.state import LearnState, load_state
from ray_soup.tune.search import search
from ray_soup.tune.trainable import bundles, soup_of, soup_resources, soup_trainable
from ray_soup.tune.trials import results_of, wait_for_room
from tests.conftest import ROOT, children_called, kill_tree, ray_soup, values
from tests.ray.events import appeared, wait_for
from tests.ray.others import all_cpus, held
from tests.stopping import running, stop


def test_a_larger_model_batch_requests_more_memory(zoo: Path, cluster: None) -> None:
    recipe = make_recipe(values(zoo))
    small, large = (bundles(with_changes(recipe, {"learn.model_batch": m}), 100_000_000, 72)[0]["memory"] for m in (6, 36))
    assert large - small == 30 * 100_000_000


@pytest.mark.slow
def test_a_trial_that_no_node_can_hold_is_refused_at_once(zoo: Path, tmp_path: Path, cluster: None) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match="50 CPUs and 0 GPUs; the cluster has"):
        search(make_recipe(values(zoo, actors={"cpus": 50})), tmp_path / "out")
    with pytest.raises(RecipeError, match=r"needs an actor with CPU 1, memory 1e\+15; the nodes .* have: CPU .* Reduce x"):
        wait_for_room([{"CPU": 1, "memory": 1e15}], 0, no_progress, "x")
    assert time.monotonic() - started < 60
    said: list[str] = []
    with pytest.raises(RecipeError, match="A trial needs 2 actors with CPU 99 each"):
        wait_for_room([{"CPU": 99}] * 2, 1, lambda what, done, total: said.append(what), "x")
    assert said == ["waiting for CPUs"]


@pytest.mark.slow
def test_the_search_waits_for_a_cluster_that_grows() -> None:
    code = """
import ray
from ray.cluster_utils import Cluster
from ray_soup.tune.trials import wait_for_room

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.connect()
said = []


def progress(what, done, total):
    said.append(what)
    if len(said) == 2:
        cluster.add_node(num_cpus=3)


wait_for_room([{"CPU": 2}], 240, progress, "actors")
assert set(said) == {"waiting for CPUs"}, said
ray.shutdown()
cluster.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_search_on_a_cluster_that_others_hold_is_refused(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "SETTLE_S", 1.0)
    total = f"{all_cpus():g}"
    with (
        held(all_cpus()),
        pytest.raises(RecipeError, match=rf"an actor with CPU 1, .* has only CPU 0 of {total}, .* free: other programs, or"),
    ):
        search(make_recipe(values(zoo)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_search_whose_trials_cannot_start_ends_and_can_be_resumed(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program takes all CPUs when the trials are about to start."""
    monkeypatch.setattr(placement, "SETTLE_S", 1.0)
    recipe = make_recipe(values(zoo, search={"learn.lr": {"grid": [0.03]}, "scheduler": "none"}))
    with ExitStack() as others:

        def take_all(what: str, done: int, total: int) -> None:
            if what == "searching":
                others.enter_context(held(all_cpus()))

        others.enter_context(pytest.MonkeyPatch.context()).setattr("ray_soup.tune.search.patience_s", lambda recipe: 2)
        with pytest.raises(
            NoRoom, match=r"A trial needs an actor with CPU 1, .* and could not start within 2 s: .* CPU 0 of"
        ):
            search(recipe, tmp_path / "out", take_all)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["exit"] == 1
    assert "could not start within 2 s" in record["error"]
    monkeypatch.setattr(placement, "SETTLE_S", 30.0)
    soup = search(recipe, tmp_path / "out")
    assert [t["error"] for t in soup.record["search"]["trials"]] == [None, None]
    assert verify(tmp_path / "out")


def searched(folder: Path) -> dict[str, Any]:
    """Return a recipe that searches three points of a grid; one of them takes a step that overflows."""
    return values(
        folder,
        learn={"batch_size": 61, "epochs": 2, "model_batch": 8},
        search={"learn.lr": {"grid": [0.03, 1e300, 0.003]}, "scheduler": "none"},
    )


@pytest.mark.slow
def test_the_soup_of_a_search_is_that_of_its_best_trial(zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe = make_recipe(searched(zoo))
    soup = search(recipe, tmp_path / "out")
    trials = soup.record["search"]["trials"]
    assert [t["learn.lr"] for t in trials] == [0.01, 0.03, 1e300, 0.003]
    assert "The loss is not finite at step" in trials[2]["error"]
    assert trials[2]["select_nll"] is None
    done = [t for t in trials if t["error"] is None]
    assert len(done) == 3
    assert all(t["percent"] == 100 and math.isfinite(t["select_nll"]) for t in done)
    best = min(done, key=lambda t: t["select_nll"])
    assert soup.record["search"]["best"] == best["trial"]
    assert best["select_nll"] <= trials[0]["select_nll"]
    alone = run(with_changes(recipe, {"learn.lr": best["learn.lr"]}), tmp_path / "alone")
    ours, theirs = (load_coefficients(Path(o, "coefficients.safetensors")).values for o in (soup.out, alone.out))
    np.testing.assert_array_equal(ours, theirs)
    assert len(list((tmp_path / "out" / "tensorboard").glob("*/events*"))) == 4
    assert "Trials of the search" in (tmp_path / "out" / "report.html").read_text()
    assert search(recipe, tmp_path / "out").was_complete


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_that_is_stopped_and_killed_resumes_to_the_same_bits(zoo: Path, tmp_path: Path, cluster: None) -> None:
    """It is stopped while trials run, with Ctrl-C after it was resumed, and killed when one trial has ended."""
    recipe = values(
        zoo,
        learn={"batch_size": 8, "epochs": 20},
        search={"learn.lr": {"grid": [0.03, 0.003]}, "scheduler": "none"},
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("search", str(tmp_path / "r.yaml"), str(tmp_path / "out"))
    state = tmp_path / "out" / "state"

    def states() -> dict[str, LearnState]:
        read = {}
        for file in appeared(state, "trials/*.pt"):
            with suppress(SoupError, FileNotFoundError):  # it has just been moved
                read[file.name] = load_state(file)
        return read

    def saved() -> dict[str, int]:
        return {name: found.steps for name, found in states().items()}

    def snapshot_ns() -> int:
        return max((f.stat().st_mtime_ns for f in appeared(state, "tune/experiment_state-*.json")), default=0)

    def wait_for_snapshot() -> None:
        known = snapshot_ns()
        wait_for(lambda: snapshot_ns() > known, process)

    def one_has_ended_and_one_is_halfway() -> bool:
        found = states().values()
        return any(s.turn == 1 for s in found) and any(s.turn == 0 and 0 < s.epoch < 14 for s in found)

    for number in (signal.SIGTERM, signal.SIGINT):
        before = saved()
        with running(command, cwd=ROOT) as process:
            wait_for(lambda before=before: any(n > before.get(name, 0) for name, n in saved().items()), process)
            stop(process, number)
        assert json.loads((tmp_path / "out" / "run.json").read_text())["exit"] == 128 + number
    with running(command, cwd=ROOT) as process:
        wait_for(lambda: len(states()) == 3, process)  # two run at a time: one has ended
        for _ in range(2):  # once Tune has written two snapshots, the first of them knows all three and is whole
            wait_for_snapshot()
        wait_for(one_has_ended_and_one_is_halfway, process)
        kill_tree(process)
    killed = states()
    ended = {name for name, found in killed.items() if found.turn == 1}
    assert ended
    assert any(found.epoch > 0 for name, found in killed.items() if name not in ended)
    record = search(make_recipe(recipe), tmp_path / "out").record
    found = record["search"]["trials"]
    assert [t["learn.lr"] for t in found] == [0.01, 0.03, 0.003]
    assert {f"{t['id']}.pt" for t in found} == set(killed)  # none was started again under another name
    assert all(t["error"] is None and t["percent"] == 100 for t in found)
    for trial in found:
        alone = run(with_changes(make_recipe(recipe), {"learn.lr": trial["learn.lr"]}), tmp_path / str(trial["trial"]))
        assert min(line["select_nll"] for line in alone.record["curve"]) == trial["select_nll"]
        if trial["trial"] == record["search"]["best"]:
            ours, theirs = (load_coefficients(f / "coefficients.safetensors").values for f in (tmp_path / "out", alone.out))
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_a_trial_of_a_users_own_tuner_learns_the_same_soup(zoo: Path, tmp_path: Path, cluster: None) -> None:
    from ray import tune

    recipe = make_recipe(values(zoo))
    results = tune.Tuner(
        tune.with_resources(soup_trainable(recipe), soup_resources(recipe)),
        param_space={"learn.lr": tune.grid_search([0.05])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="own", verbose=0),
    ).fit()
    assert not results.errors
    for result in results_of(results):
        lr = result.config["learn.lr"]
        alone = run(with_changes(recipe, {"learn.lr": lr}), tmp_path / str(lr))
        assert min(line["select_nll"] for line in alone.record["curve"]) == result.metrics["select_nll"]
        soup = soup_of(recipe, result, tmp_path / f"of-{lr}")
        assert all(soup.rows[0][key] == alone.rows[0][key] for key in ("select_nll", "test_nll", "steps"))
        ours, theirs = (load_coefficients(Path(o, "coefficients.safetensors")).values for o in (soup.out, alone.out))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_optuna_suggests_trials_and_loggers_receive_them(zoo: Path, tmp_path: Path) -> None:
    loggers = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }
    space = {"learn.lr": {"loguniform": [0.01, 0.1]}, "learn.model_batch": {"choice": [4, 8]}}
    options = {"trials": 3, "algorithm": "optuna", "loggers": ["wandb", "mlflow"], **space}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(zoo, search=options)))
    command = ray_soup("search", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--json", "--log-format=json")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **loggers}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\[\d{4}-\d\d-\d\d .* \w+\.cc:", line)]
    assert all("time" in json.loads(line) for line in lines), done.stderr
    trials = json.loads(done.stdout.splitlines()[-1])["run"]["search"]["trials"]
    assert (trials[0]["learn.lr"], trials[0]["learn.model_batch"]) == (0.01, 8)
    assert len({t["learn.lr"] for t in trials}) == 3
    assert all(0.01 <= t["learn.lr"] <= 0.1 and t["learn.model_batch"] in (4, 8) for t in trials)
    metrics = list((tmp_path / "mlruns").glob("*/*/metrics/select_nll"))
    assert len(list((tmp_path / "out" / "wandb").rglob("*.wandb"))) == 3
    assert sorted(float(f.read_text().splitlines()[-1].split()[1]) for f in metrics) == pytest.approx(
        sorted(t["select_nll"] for t in trials)
    )


@pytest.mark.slow
def test_a_trial_survives_the_loss_of_its_actor(zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe = searched(zoo)
    recipe["learn"] |= {"epochs": 8, "batch_size": 8}
    recipe["search"] = {"learn.lr": {"grid": [0.03]}, "scheduler": "none"}
    killed: list[psutil.Process] = []

    def kill_one(what: str, done: int, total: int) -> None:
        if what == "searching" and not killed and appeared(tmp_path / "out" / "state", "trials/*.pt"):
            killed.append(max(children_called("RemoteShard"), key=psutil.Process.create_time))
            killed[0].kill()

    record = search(make_recipe(recipe), tmp_path / "out", kill_one).record
    assert killed
    trials = record["search"]["trials"]
    assert [t["error"] for t in trials] == [None, None]
    assert [t["percent"] for t in trials] == [100, 100]
    best = trials[record["search"]["best"]]
    alone = run(with_changes(make_recipe(recipe), {"learn.lr": best["learn.lr"]}), tmp_path / "alone")
    ours, theirs = (load_coefficients(Path(o, "coefficients.safetensors")).values for o in (tmp_path / "out", alone.out))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_example_of_a_users_own_tuner_works(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(zoo)))
    monkeypatch.setattr(sys, "argv", ["own_tuner.py", *(str(tmp_path / name) for name in ("r.yaml", "experiment", "out"))])
    code = (ROOT / "jobs" / "own_tuner.py").read_text().replace("num_samples=8", "num_samples=2")
    exec(compile(code, "own_tuner.py", "exec"), {"__name__": "__main__"})
    assert verify(tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.coefficients import load_coefficients
from ray_soup.errors import RecipeError
from ray_soup.learn import load_state
from ray_soup.pipeline import run, verify
from ray_soup.recipe import changed, dump_recipe, load_recipe, make_recipe, parse_overrides
from ray_soup.search import bundles, make_configs, pareto, search, soup_of, soup_resources, soup_trainable, wait_for_room
from tests.conftest import ROOT, kill_tree, ray_soup, values


def test_the_first_is_the_recipe_as_it_is_and_the_rest_are_drawn_by_the_seed(zoo: Path) -> None:
    recipe = make_recipe(
        values(zoo, search={"trials": 9, "learn.lr": {"loguniform": [0.01, 0.1]}, "blocks": {"choice": ["layer"]}})
    )
    configs = make_configs(recipe, 8)
    assert configs[0] == {"learn.lr": 0.01, "blocks": "tensor"}
    assert len(configs) == 9
    assert all(0.01 <= c["learn.lr"] <= 0.1 and c["blocks"] == "layer" for c in configs[1:])
    assert configs == make_configs(recipe, 8)
    assert configs[1:] != make_configs(changed(recipe, {"learn.seed": 2}), 8)[1:]
    default = make_configs(make_recipe(values(zoo)), 12)
    assert default[0] == {"learn.lr": 0.01, "learn.model_batch": 12}
    assert {c["learn.model_batch"] for c in default} == {3, 6, 12}
    grid = {"learn.lr": {"grid": [0.1, 0.2]}, "learn.epochs": {"grid": [1, 2]}}
    points = make_configs(make_recipe(values(zoo, search=grid)), 8)[1:]
    assert [(p["learn.lr"], p["learn.epochs"]) for p in points] == [(0.1, 1), (0.1, 2), (0.2, 1), (0.2, 2)]


def test_keys_of_the_search_come_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({"model": "a:b", "search": {"learn.lr": {"uniform": [1, 2]}, "trials": 3}})
    )
    recipe = load_recipe(
        tmp_path / "r.yaml", ("search.learn.model_batch={choice: [2, 6]}", "search.learn.wd={uniform: [0, 1]}")
    )
    assert recipe.search.space == {
        "learn.lr": {"uniform": [1, 2]}, "learn.model_batch": {"choice": [2, 6]}, "learn.wd": {"uniform": [0, 1]},
    }  # fmt: skip
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert parse_overrides(["search.trials=2"]) == {"search": {"trials": 2}}
    with pytest.raises(RecipeError, match=r"did you mean 'search\.trials'"):
        make_recipe({"model": "a:b", "search": {"trial": 3}})
    with pytest.raises(RecipeError, match=r"the recipe has no key 'learn\.lrr'"):
        make_configs(make_recipe({"model": "a:b", "search": {"learn.lrr": {"uniform": [1, 2]}}}), 4)
    with pytest.raises(RecipeError, match=r"search\.learn\.lr: .* found; expected"):
        make_configs(make_recipe({"model": "a:b", "search": {"learn.lr": {"uniform": [1]}}}), 4)


def test_a_larger_model_batch_asks_for_more_memory(zoo: Path, cluster: None) -> None:
    recipe = make_recipe(values(zoo))
    small, large = (bundles(changed(recipe, {"learn.model_batch": m}), 100_000_000, 72)[0]["memory"] for m in (6, 36))
    assert large - small == 30 * 100_000_000


def test_what_no_node_can_hold_is_refused_at_once(zoo: Path, tmp_path: Path, cluster: None) -> None:
    started = time.monotonic()
    with pytest.raises(RecipeError, match="50 CPUs and 0 GPUs; the cluster has"):
        search(make_recipe(values(zoo, actors={"cpus": 50})), tmp_path / "out")
    with pytest.raises(
        RecipeError, match=r"A trial asks for 1 actors with CPU 1, memory 1e\+15 each; the nodes .* have: CPU"
    ):
        wait_for_room([{"CPU": 1, "memory": 1e15}], 0, lambda what, done, total: None)
    assert time.monotonic() - started < 10
    said: list[str] = []
    with pytest.raises(RecipeError, match="A trial asks for"):
        wait_for_room([{"CPU": 99}], 1, lambda what, done, total: said.append(what))
    assert said == ["waiting for nodes"]


@pytest.mark.slow
def test_room_is_waited_for_on_a_cluster_that_grows(tmp_path: Path) -> None:
    code = """
import ray
from ray.cluster_utils import Cluster
from ray_soup.search import wait_for_room

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.connect()
said = []


def watch(what, done, total):
    said.append(what)
    if len(said) == 2:
        cluster.add_node(num_cpus=3)


wait_for_room([{"CPU": 2}], 60, watch)
assert set(said) == {"waiting for nodes"}, said
ray.shutdown()
cluster.shutdown()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_front_holds_what_nothing_beats() -> None:
    def trial(nll: float | None, memory: int, seconds: float) -> dict[str, Any]:
        return {"select_nll": nll, "peak_memory_bytes": memory, "seconds": seconds, "percent": 100}

    best, light, quick = trial(0.1, 900, 9), trial(0.2, 100, 9), trial(0.2, 900, 1)
    stopped, jittered = {**trial(0.1, 900, 4), "percent": 50}, trial(0.11, 890, 8.9)
    others = [trial(0.2, 900, 9), trial(None, 0, 0), stopped, jittered]
    assert pareto([best, light, quick, *others]) == [best, light, quick]


def searched(folder: Path) -> dict[str, Any]:
    """Three points of a grid and the recipe; one of them takes a step that breaks the numbers."""
    return values(
        folder,
        learn={"batch_size": 61, "epochs": 2, "model_batch": 8},
        search={"learn.lr": {"grid": [0.03, 1e300, 0.003]}, "scheduler": "none"},
    )


@pytest.mark.slow
def test_the_best_trial_is_the_soup_of_its_settings(zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe = make_recipe(searched(zoo))
    soup = search(recipe, tmp_path / "out")
    trials = soup.record["search"]["trials"]
    assert [t["learn.lr"] for t in trials] == [0.01, 0.03, 1e300, 0.003]
    assert "no longer finite" in trials[2]["error"]
    assert trials[2]["select_nll"] is None
    done = [t for t in trials if t["error"] is None]
    assert len(done) == 3
    assert all(t["percent"] == 100 and math.isfinite(t["select_nll"]) for t in done)
    best = min(done, key=lambda t: t["select_nll"])
    assert soup.record["search"]["best"] == best["trial"]
    assert best["select_nll"] <= trials[0]["select_nll"]
    alone = run(changed(recipe, {"learn.lr": best["learn.lr"]}), tmp_path / "alone")
    ours, theirs = (load_coefficients(o / "coefficients.safetensors").values for o in (soup.out, alone.out))
    np.testing.assert_array_equal(ours, theirs)
    assert len(list((tmp_path / "out" / "tensorboard").glob("*/events*"))) == 4
    assert "Trials of the search" in (tmp_path / "out" / "report.html").read_text()
    assert search(recipe, tmp_path / "out").was_complete


@pytest.mark.slow
def test_a_killed_search_goes_on(zoo: Path, tmp_path: Path) -> None:
    recipe = searched(zoo)
    recipe["learn"] |= {"epochs": 20, "batch_size": 8}
    recipe["search"] = {"learn.lr": {"grid": [0.03, 0.02, 0.003]}, "scheduler": "none"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ray_soup("search", str(tmp_path / "r.yaml"), str(tmp_path / "out"))
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    folder = tmp_path / "out" / "state" / "trials"

    def states() -> dict[str, Any]:
        return {f.name: (load_state(f), f.stat().st_mtime_ns) for f in folder.glob("*.pt")}

    while len(list(folder.glob("*.pt"))) < 3:  # two at a time: one has ended
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(3)
    kill_tree(process)
    before = states()
    ended = {name for name, (state, _) in before.items() if state.turn == 1}
    assert ended
    assert any(state.epoch > 0 for name, (state, _) in before.items() if name not in ended)
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])["run"]
    trials = record["search"]["trials"]
    assert len(trials) == 4
    assert {f"{t['id']}.pt" for t in trials} >= set(before)  # none began anew under another name
    assert all(t["error"] is None and t["percent"] == 100 for t in trials)


@pytest.mark.slow
def test_in_a_tuner_of_ones_own(zoo: Path, tmp_path: Path, cluster: None) -> None:
    from ray import tune

    recipe = make_recipe(values(zoo))
    results = tune.Tuner(
        tune.with_resources(soup_trainable(recipe), soup_resources(recipe)),
        param_space={"learn.lr": tune.grid_search([0.05])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="own", verbose=0),
    ).fit()
    assert not results.errors
    for result in results:
        lr = result.config["learn.lr"]
        alone = run(changed(recipe, {"learn.lr": lr}), tmp_path / str(lr))
        assert min(line["select_nll"] for line in alone.record["curve"]) == result.metrics["select_nll"]
        soup = soup_of(recipe, result, tmp_path / f"of-{lr}")
        assert all(soup.rows[0][key] == alone.rows[0][key] for key in ("select_nll", "test_nll", "steps"))
        ours, theirs = (load_coefficients(o / "coefficients.safetensors").values for o in (soup.out, alone.out))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_optuna_and_the_loggers_of_others(zoo: Path, tmp_path: Path) -> None:
    loggers = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }
    space = {"learn.lr": {"loguniform": [0.01, 0.1]}, "learn.model_batch": {"choice": [4, 8]}}
    options = {"trials": 3, "algorithm": "optuna", "loggers": ["wandb", "mlflow"], **space}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(zoo, search=options)))
    command = ray_soup("search", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--json")
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **loggers}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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
def test_a_trial_whose_actor_is_killed_goes_on(zoo: Path, tmp_path: Path) -> None:
    recipe = searched(zoo)
    recipe["learn"] |= {"epochs": 20, "batch_size": 8}
    recipe["search"] = {"learn.lr": {"grid": [0.03]}, "scheduler": "none"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        ray_soup("search", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--json"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((tmp_path / "out" / "state").glob("trials/*.pt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    actors = [p for p in psutil.Process(process.pid).children(recursive=True) if "RemoteShard" in "".join(p.cmdline())]
    actors[0].kill()
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    record = json.loads(stdout.splitlines()[-1])["run"]
    trials = record["search"]["trials"]
    assert [t["error"] for t in trials] == [None, None]
    assert [t["percent"] for t in trials] == [100, 100]
    best = trials[record["search"]["best"]]
    alone = run(changed(make_recipe(recipe), {"learn.lr": best["learn.lr"]}), tmp_path / "alone")
    ours, theirs = (load_coefficients(o / "coefficients.safetensors").values for o in (tmp_path / "out", alone.out))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_the_example_of_a_tuner(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(zoo)))
    monkeypatch.setattr(sys, "argv", ["own_tuner.py", *(str(tmp_path / name) for name in ("r.yaml", "experiment", "out"))])
    code = (ROOT / "jobs" / "own_tuner.py").read_text().replace("num_samples=8", "num_samples=2")
    exec(compile(code, "own_tuner.py", "exec"), {"__name__": "__main__"})
    assert verify(tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")

"""Experiments in the formats of Ray Tune and Ray Train, written by hand; tests/ray has experiments that Ray wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import find_sweeps, open_ingredients
from ray_soup.io.sweeps import is_experiment, split_metric

ACCURACIES = {"t0": (0.5, 0.6, 0.7), "t1": (0.5, 0.6, 0.7), "t3": (0.5, 0.4, 0.3)}


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment as Tune 2.50 leaves it: three finished trials of three epochs each, and one that failed."""
    folder = tmp_path / "experiment"
    trials = []
    for name in ("t3", "t2", "t1", "t0"):
        reports = []
        for epoch, accuracy in enumerate(ACCURACIES.get(name, ())):
            checkpoint = folder / f"trial_{name}" / f"checkpoint_00000{epoch}"
            checkpoint.mkdir(parents=True)
            torch.save({"model": {"a": torch.ones(1)}, "epoch": epoch}, checkpoint / "model.pt")
            torch.save({"step": 1}, checkpoint / "optimizer.pt")
            reports.append({"accuracy": accuracy, "epoch": epoch, "pid": 7, "checkpoint_dir_name": checkpoint.name})
        if reports:
            (folder / f"trial_{name}" / "result.json").write_text("".join(json.dumps(r) + "\n" for r in reports))
        static = {
            "trial_id": name,
            "status": "TERMINATED" if reports else "ERROR",
            "relative_logdir": f"trial_{name}",
            "config": {"seed": int(name[1:])},
        }
        trials.append([json.dumps(static), json.dumps({"last_result": reports[-1] if reports else {}})])
    write_state(folder, trials)
    return folder


def write_state(folder: Path, trials: list[Any]) -> None:
    (folder / "experiment_state-2026-11-24_09-41-00.json").write_text(json.dumps({"trial_data": trials}))


def test_the_last_or_the_best_checkpoint_of_each_finished_trial_is_found(experiment: Path) -> None:
    last = open_ingredients(str(experiment))
    assert [(i.name, i.trial.config["seed"], i.trial.metrics) for i in last] == [
        ("t0", 0, {"accuracy": 0.7, "epoch": 2}),
        ("t1", 1, {"accuracy": 0.7, "epoch": 2}),
        ("t3", 3, {"accuracy": 0.3, "epoch": 2}),
    ]
    assert all(i.path.endswith("checkpoint_000002/model.pt") for i in last)
    best = open_ingredients(f"{experiment}?metric=accuracy")
    assert [i.trial.metrics["epoch"] for i in best] == [2, 2, 0]
    worst = open_ingredients(f"{experiment}?metric=accuracy&mode=min")
    assert [i.trial.metrics["accuracy"] for i in worst] == [0.5, 0.5, 0.3]
    assert [i.path for i in open_ingredients([f"{experiment}?metric=accuracy"])] == [i.path for i in best]
    assert [i.key for i in open_ingredients(f"{experiment}?metric=accuracy&key=model")] == ["model"] * 3
    (found,) = find_sweeps(str(experiment))
    assert found.note() == f"{experiment}: 3 trials used, left out: 1 failed."
    with pytest.raises(RecipeError, match=r"the trial t0 reported no 'loss'; it reported accuracy, epoch\."):
        open_ingredients(f"{experiment}?metric=loss")


def test_trials_without_a_checkpoint_are_counted(experiment: Path) -> None:
    for folder in experiment.glob("trial_t0/checkpoint_*"):
        folder.rename(folder.with_name(f"moved_{folder.name}"))
    (found,) = find_sweeps(str(experiment))
    assert found.left_out == {"failed": 1, "without a checkpoint": 1}
    write_state(experiment, [[{"trial_id": "t", "status": "RUNNING"}, {}]])
    with pytest.raises(RecipeError, match=r"no finished trial with a checkpoint .*0 trials used, left out: 1 unfinished"):
        open_ingredients(str(experiment))


def test_without_a_report_for_each_checkpoint_no_metric_is_accepted(experiment: Path) -> None:
    (experiment / "trial_t1" / "result.json").unlink()
    assert len(open_ingredients(str(experiment))) == 3  # the last checkpoint is in the state
    with pytest.raises(RecipeError, match=r"trial_t1: cannot tell which checkpoint is best by 'accuracy': found 3"):
        open_ingredients(f"{experiment}?metric=accuracy")


def test_a_damaged_experiment_is_named(experiment: Path, tmp_path: Path) -> None:
    model = experiment / "trial_t0" / "checkpoint_000002" / "model.pt"
    model.rename(model.with_name("weights.pt"))
    with pytest.raises(IngredientError, match=r"cannot tell which file is the model\. Found optimizer\.pt, weights\.pt"):
        open_ingredients(str(experiment))
    (state,) = experiment.glob("experiment_state-*.json")
    state.write_text('{"trial_data": [')
    with pytest.raises(IngredientError, match="looks like an experiment of Ray Tune or Train, but cannot be read"):
        open_ingredients(str(experiment))
    (tmp_path / "zoo").mkdir()
    torch.save({"a": torch.ones(1)}, tmp_path / "zoo" / "a.pt")
    assert not is_experiment(str(tmp_path / "zoo"))
    with pytest.raises(RecipeError, match="no experiment of Ray Tune or Train"):
        open_ingredients(f"{tmp_path / 'zoo'}?metric=accuracy")


def test_experiments_of_ray_train_are_found(tmp_path: Path) -> None:
    """As TorchTrainer 2.60 leaves them: a snapshot and folders of checkpoints; here two runs of a sweep in one folder."""
    for run_name, best in (("run_a", 0), ("run_b", 1)):
        results = []
        for number in range(2):
            name = f"checkpoint_2026-11-24_09-41-0{number}"
            (tmp_path / "runs" / run_name / name).mkdir(parents=True)
            torch.save({"a": torch.ones(1)}, tmp_path / "runs" / run_name / name / "weights.pt")
            accuracy = 0.9 if number == best else 0.8
            results.append({"version": 0, "checkpoint_dir_name": name, "metrics": {"accuracy": accuracy}})
        snapshot = {"ray_version": "2.60.0", "checkpoint_results": results}
        (tmp_path / "runs" / run_name / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    for spec in (f"{tmp_path}/runs", f"{tmp_path}/runs/run_*"):
        found = open_ingredients(f"{spec}?metric=accuracy")
        assert [i.name for i in found] == ["run_a", "run_b"]
        assert found[0].path.endswith("09-41-00/weights.pt")
        assert found[1].path.endswith("09-41-01/weights.pt")
    assert all(i.path.endswith("09-41-01/weights.pt") for i in open_ingredients(f"{tmp_path}/runs"))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("folder", ("folder", None, "max")),
        ("folder?metric=loss&mode=min", ("folder", "loss", "min")),
        ("s3://b/f?metric=eval/acc", ("s3://b/f", "eval/acc", "max")),
        ("folder?metric=loss&mode=best", ("folder?metric=loss&mode=best", None, "max")),
    ],
)
def test_a_metric_is_split_from_the_folder(spec: str, expected: tuple[str, str | None, str]) -> None:
    assert split_metric(spec) == expected

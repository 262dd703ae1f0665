"""Experiments in the formats of Ray Tune and Ray Train, written by hand; tests/ray has experiments that Ray wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
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
        ("folder", ("folder", None, "")),
        ("folder?metric=loss&mode=min", ("folder", "loss", "min")),
        ("s3://b/f?metric=eval/acc", ("s3://b/f", "eval/acc", "")),
    ],
)
def test_a_metric_is_split_from_the_folder(spec: str, expected: tuple[str, str | None, str]) -> None:
    assert split_metric(spec) == expected


@pytest.mark.parametrize(
    "options", ["metric=loss&mode=best", "metric=", "mode=min", "mode=min&metric=loss", "metric=a&mode"]
)
def test_odd_options_are_refused(experiment: Path, options: str) -> None:
    with pytest.raises(RecipeError, match=r"expected FOLDER\?metric=NAME&mode=min or &mode=max"):
        open_ingredients(f"{experiment}?{options}")


def rewrite(experiment: Path, name: str, change: Callable[[int, dict[str, Any]], Any]) -> None:
    """Change the reports of a trial, given their number and content; a string becomes the line itself."""
    file = experiment / f"trial_{name}" / "result.json"
    reports = [change(n, json.loads(line)) for n, line in enumerate(file.read_text().splitlines())]
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in reports))


def chosen(spec: str) -> list[str]:
    """Return trial and epoch of each ingredient, and check that run.json can contain its records."""
    found = open_ingredients(spec)
    for ingredient in found:
        assert ingredient.trial is not None
        json.dumps([ingredient.trial.config, ingredient.trial.metrics], allow_nan=False)
    return [f"{i.name} {Path(i.path).parent.name[-1]}" for i in found]


@pytest.mark.parametrize(
    ("losses", "mode", "best", "skipped"),
    [
        ((float("nan"), 0.9, 0.3), "min", 2, 1),
        ((float("nan"), 0.9, 0.3), "max", 1, 1),
        ((0.3, float("nan"), 0.9), "min", 0, 1),
        ((0.3, float("-inf"), 0.9), "min", 0, 1),
        ((0.3, float("inf"), 0.9), "max", 2, 1),
        (("nan", "0.9", "3e-1"), "min", 2, 1),
        ((None, "high", 0.5), "min", 2, 2),
        ((True, [1], {"a": 0.1}), "max", 0, 1),
        ((10**400, 0.9, 0.3), "max", 1, 1),
        (("9", "10", "8"), "max", 1, 0),
    ],
)
def test_only_finite_values_of_a_metric_decide(
    experiment: Path, losses: tuple[Any, ...], mode: str, best: int, skipped: int
) -> None:
    for name in ACCURACIES:
        rewrite(experiment, name, lambda n, report: {**report, "val_loss": losses[n]})
    spec = f"{experiment}?metric=val_loss&mode={mode}"
    assert chosen(spec) == [f"{name} {best}" for name in ACCURACIES]
    (found,) = find_sweeps(spec)
    assert found.skipped == ({"without a finite 'val_loss'": 3 * skipped} if skipped else {})
    if skipped:
        assert str(found.note()).endswith(f"left out: 1 failed; reports skipped: {3 * skipped} without a finite 'val_loss'.")


def test_a_trial_whose_metric_is_never_finite_or_never_reported_is_left_out(experiment: Path) -> None:
    rewrite(experiment, "t0", lambda n, report: {**report, "accuracy": float("nan")})
    rewrite(experiment, "t1", lambda n, report: {"epoch": n, "checkpoint_dir_name": report["checkpoint_dir_name"]})
    assert chosen(f"{experiment}?metric=accuracy") == ["t3 0"]
    (found,) = find_sweeps(f"{experiment}?metric=accuracy")
    assert found.left_out == {"failed": 1, "without a finite 'accuracy'": 1, "that did not report 'accuracy'": 1}
    rewrite(experiment, "t3", lambda n, report: {**report, "accuracy": "tensor(0.9312)"})
    with pytest.raises(RecipeError, match=r"0 trials used, left out: 1 failed, 2 without a finite 'accuracy', 1 that"):
        open_ingredients(f"{experiment}?metric=accuracy")
    assert chosen(str(experiment)) == ["t0 2", "t1 2", "t3 2"]  # a metric that was not asked for is null in run.json
    assert open_ingredients(str(experiment))[0].trial.metrics == {"accuracy": None, "epoch": 2}


def test_the_only_checkpoint_of_a_trial_needs_a_finite_metric_too(experiment: Path) -> None:
    for number in range(2):
        shutil.rmtree(experiment / "trial_t0" / f"checkpoint_00000{number}")
    assert chosen(f"{experiment}?metric=accuracy") == ["t0 2", "t1 2", "t3 0"]
    rewrite(experiment, "t0", lambda n, report: {**report, "accuracy": report["accuracy"] if n < 2 else float("nan")})
    assert chosen(f"{experiment}?metric=accuracy") == ["t1 2", "t3 0"]
    (found,) = find_sweeps(f"{experiment}?metric=accuracy")
    assert found.left_out == {"failed": 1, "without a finite 'accuracy' at a checkpoint": 1}


def test_nested_metrics_have_the_names_of_tune(experiment: Path) -> None:
    for name in ACCURACIES:
        rewrite(experiment, name, lambda n, report: {**report, "eval": {"acc": -n, "top": {"5": n}}, "config": {"lr": 1}})
    assert chosen(f"{experiment}?metric=eval/acc") == ["t0 0", "t1 0", "t3 0"]
    assert chosen(f"{experiment}?metric=eval/top/5") == ["t0 2", "t1 2", "t3 2"]
    metrics = open_ingredients(str(experiment))[0].trial.metrics
    assert metrics == {"accuracy": 0.7, "epoch": 2, "eval/acc": -2, "eval/top/5": 2}


def test_a_loss_needs_a_mode(experiment: Path) -> None:
    for name in ACCURACIES:
        rewrite(experiment, name, lambda n, report: {**report, "val_loss": 3 - n, "lossless": n, "top1_err": n})
    for metric in ("val_loss", "top1_err"):
        with pytest.raises(RecipeError, match=f"'{metric}' has the name of a loss.*Append &mode=min or &mode=max"):
            open_ingredients(f"{experiment}?metric={metric}")
    assert chosen(f"{experiment}?metric=val_loss&mode=min") == ["t0 2", "t1 2", "t3 2"]
    assert chosen(f"{experiment}?metric=lossless") == ["t0 2", "t1 2", "t3 2"]


@pytest.mark.parametrize(
    "line", ["", "{", "7", "[]", "null", "\x00", '{"a": 1} {}', "[" * 100_000, '{"a": {"b": 1}, "a/b": 2}']
)
def test_odd_lines_are_skipped_and_counted(experiment: Path, line: str) -> None:
    file = experiment / "trial_t0" / "result.json"
    file.write_bytes(b"\xff\xfe\n" + line.encode() + b"\n" + file.read_bytes() + line.encode())
    assert chosen(f"{experiment}?metric=accuracy") == ["t0 2", "t1 2", "t3 0"]
    (found,) = find_sweeps(str(experiment))
    assert found.skipped == {"lines of result.json that are not JSON objects": 3 if line else 1}


def test_if_a_report_was_lost_the_best_checkpoint_is_not_guessed(experiment: Path) -> None:
    rewrite(experiment, "t0", lambda n, report: "{" if n == 2 else report)
    with pytest.raises(RecipeError, match=r"trial_t0: cannot tell which checkpoint is best by 'accuracy'"):
        open_ingredients(f"{experiment}?metric=accuracy")
    assert chosen(str(experiment)) == ["t0 2", "t1 2", "t3 2"]


def test_after_a_restore_the_last_report_of_a_checkpoint_counts(experiment: Path) -> None:
    file = experiment / "trial_t0" / "result.json"
    again = {"accuracy": 0.1, "epoch": 2, "checkpoint_dir_name": "checkpoint_000002"}
    file.write_text(file.read_text() + json.dumps(again) + "\n")
    assert chosen(f"{experiment}?metric=accuracy") == ["t0 1", "t1 2", "t3 0"]


def test_the_class_api_does_not_name_its_checkpoints(experiment: Path) -> None:
    """Tune saves the checkpoint of a class after its report, which therefore does not name the folder."""
    for name in ACCURACIES:
        rewrite(experiment, name, lambda n, report: {k: v for k, v in report.items() if k != "checkpoint_dir_name"})
    assert chosen(str(experiment)) == ["t0 2", "t1 2", "t3 2"]
    assert open_ingredients(str(experiment))[0].trial.metrics == {}  # nothing shows which report is the checkpoint's
    with pytest.raises(RecipeError, match="the class API of Tune writes none"):
        open_ingredients(f"{experiment}?metric=accuracy")
    for name in ACCURACIES:
        for number in range(2):
            shutil.rmtree(experiment / f"trial_{name}" / f"checkpoint_00000{number}")
    assert chosen(f"{experiment}?metric=accuracy") == ["t0 2", "t1 2", "t3 2"]  # there is only one to choose


def test_checkpoint_folders_may_be_links_and_a_broken_one_is_left_out(experiment: Path) -> None:
    last = experiment / "trial_t0" / "checkpoint_000002"
    last.rename(experiment / "elsewhere")
    last.symlink_to("../elsewhere")
    assert chosen(str(experiment)) == ["t0 2", "t1 2", "t3 2"]
    (experiment / "elsewhere").rename(experiment / "lost")
    assert chosen(f"{experiment}?metric=accuracy") == ["t0 1", "t1 2", "t3 0"]


def trial(name: Any = "t0", **changes: Any) -> list[Any]:
    return [{"trial_id": name, "status": "TERMINATED", "relative_logdir": "trial_t0", "config": {}, **changes}, {}]


@pytest.mark.parametrize(
    "trials",
    [
        [[]],
        [[{}, {}]],
        [["", ""]],
        [[1, 2]],
        [{}],
        None,
        7,
        [trial(relative_logdir="..")],
        [trial(relative_logdir="/etc")],
        [trial(relative_logdir="../trial_t0")],
        [trial(relative_logdir=None)],
        [["[" * 100_000, "{}"]],
    ],
    ids=lambda trials: repr(trials)[:40],
)
def test_an_odd_state_of_an_experiment_is_named(experiment: Path, trials: Any) -> None:
    write_state(experiment, trials)
    with pytest.raises(IngredientError, match=rf"{experiment} looks like an experiment of Ray Tune or Train, but cannot"):
        open_ingredients(str(experiment))


def test_a_report_that_names_a_folder_elsewhere_is_refused(experiment: Path) -> None:
    rewrite(experiment, "t0", lambda n, report: {**report, "checkpoint_dir_name": "../trial_t1/checkpoint_000000"})
    with pytest.raises(IngredientError, match=r"'\.\./trial_t1/checkpoint_000000' is not the name of a folder"):
        open_ingredients(f"{experiment}?metric=accuracy")


def test_an_experiment_without_trials_is_refused(experiment: Path) -> None:
    write_state(experiment, [])
    with pytest.raises(RecipeError, match="no finished trial with a checkpoint"):
        open_ingredients(f"{experiment}?metric=accuracy")


@pytest.mark.parametrize("file", ["result.json", "experiment_state-2026-11-24_09-41-00.json"])
def test_a_fifo_in_an_experiment_is_not_opened(experiment: Path, file: str) -> None:
    (found,) = experiment.glob(f"**/trial_t0/{file}") if file == "result.json" else experiment.glob(file)
    found.unlink()
    os.mkfifo(found)
    with pytest.raises(IngredientError, match=rf"{file} is a FIFO; expected a file"):
        open_ingredients(str(experiment))


def test_hyperparameters_are_json_values(experiment: Path) -> None:
    config = {"clip": float("inf"), "lr": [float("nan"), 0.1], "fn": {"_type": "CLOUDPICKLE_FALLBACK", "value": "8005"}}
    write_state(experiment, [trial(config=config)])
    assert open_ingredients(str(experiment))[0].trial.config == {
        "clip": "inf", "lr": ["nan", 0.1], "fn": "(a pickled object)"
    }  # fmt: skip


@pytest.mark.parametrize("results", [None, 7, [7], [{}], [{"metrics": {}, "checkpoint_dir_name": ".."}], {"a": 1}])
def test_an_odd_snapshot_of_ray_train_is_named(tmp_path: Path, results: Any) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps({"checkpoint_results": results}))
    with pytest.raises(IngredientError, match="looks like an experiment of Ray Tune or Train, but cannot be read"):
        open_ingredients(str(tmp_path))

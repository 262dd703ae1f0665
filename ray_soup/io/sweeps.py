"""Experiments of Ray Tune, Ray Train and `ray-soup finetune`, read from their folders.

An experiment is a list of trials with hyperparameters, metrics and checkpoints. Only JSON is read: nothing is unpickled, and
Ray is not needed.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.json_files import finite, parse_json, read_json, read_text

OF_TUNE = {  # keys that Tune adds to every report
    "checkpoint_dir_name", "date", "done", "experiment_tag", "hostname", "iterations_since_restore", "node_ip", "pid",
    "should_checkpoint", "time_since_restore", "time_this_iter_s", "timestamp", "trial_id",
}  # fmt: skip
LOSSES = re.compile(
    r"(^|[\W_])(loss|losses|nll|error|err|mse|rmse|mae|perplexity|ppl|brier|ece|cross_?entropy)([\W\d_]|$)", re.IGNORECASE
)
LARGEST_FLOAT = sys.float_info.max
TUNE, TRAIN, OURS = "experiment_state-*.json", "checkpoint_manager_snapshot.json", "manifest.json"


@dataclass(frozen=True)
class Trial:
    """One finished trial of a sweep, and the checkpoint that represents it."""

    name: str
    """Id of the trial in its sweep."""
    path: str
    """The checkpoint, a folder or a file."""
    config: dict[str, Any]
    """Hyperparameters."""
    metrics: dict[str, Any]
    """Metrics that the trial reported with this checkpoint."""
    checkpoints: tuple[str, ...] = field(default=(), compare=False)
    """All checkpoints of the trial, folders, in the order in which they were written."""


@dataclass
class Sweep:
    """The trials of one experiment."""

    folder: str
    """Path or URI of the experiment."""
    trials: list[Trial] = field(default_factory=list)
    """Finished trials with a checkpoint, in the order of their ids."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many trials failed, did not finish, have no checkpoint, or never reported a finite metric."""
    skipped: Counter[str] = field(default_factory=Counter)
    """How many reports could not be used, by the reason."""

    def note(self) -> str | None:
        """Describe in one line which trials and reports were left out; None if there are none."""
        parts = [
            f"{what}: {', '.join(f'{count} {reason}' for reason, count in counts.items())}"
            for what, counts in (("left out", self.left_out), ("reports skipped", self.skipped))
            if counts
        ]
        return f"{self.folder}: {len(self.trials)} trials used, {'; '.join(parts)}." if parts else None


def split_metric(spec: str) -> tuple[str, str | None, str]:
    """Split `folder?metric=accuracy&mode=max` into folder, metric (None by default) and mode (empty by default).

    Raises RecipeError for another mode than min and max.
    """
    found = re.fullmatch(r"(.*)\?metric=([^&?]+)(?:&mode=(min|max))?", spec, re.DOTALL)
    if found is None and re.search(r"\?(metric|mode)=", spec):
        raise RecipeError(f"ingredients: found {spec}; expected FOLDER?metric=NAME&mode=min or &mode=max. Fix the options.")
    return (found[1], found[2], found[3] or "") if found else (spec, None, "")


def is_experiment(folder: str) -> bool:
    """Return whether a folder is an experiment of Ray Tune or Train."""
    names = storage.listdir(folder) if storage.isdir(folder) else []
    return TRAIN in names or any(fnmatch(name, TUNE) for name in names)


def read_sweep(folder: str, metric: str | None = None, mode: str = "") -> Sweep:
    """Read the trials of an experiment, each with its best checkpoint by `metric`, or its last one without a metric.

    Only finite values of the metric decide.

    Raises IngredientError if the experiment cannot be read, RecipeError if no trial reported the metric, or if it has the
    name of a loss and `mode` is empty; otherwise the largest value is the best by default.
    """
    sweep = Sweep(folder)
    with _naming(folder, folder):
        states = [name for name in storage.listdir(folder) if fnmatch(name, TUNE)]
    file = storage.join(folder, states[-1] if states else TRAIN)
    with _naming(folder, file):
        runs = _runs_of_tune(sweep, file) if states else [_run_of_train(sweep, file)]
    _choose(sweep, runs, metric, mode)
    return sweep


@contextmanager
def _naming(folder: str, file: str) -> Iterator[None]:
    """Turn what goes wrong with `file` of the experiment in `folder` into an IngredientError that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise IngredientError(
            f"{folder} looks like an experiment of Ray Tune or Train, but cannot be read: {file} is damaged "
            f"({type(error).__name__}: {error}). Use a glob for its checkpoints instead."
        ) from error


@dataclass(frozen=True)
class _Run:
    """What one finished trial left."""

    name: str
    folder: str
    config: dict[str, Any]
    reports: list[dict[str, Any]]
    """Its reports in order, by flat names such as eval/accuracy."""
    checkpoints: list[str]
    """Names of its checkpoint folders, in order."""

    def reported(self, metric: str | None) -> bool:
        """Return whether a report has the metric; True without a metric."""
        return metric is None or any(metric in report for report in self.reports)

    def by_checkpoint(self) -> dict[str, dict[str, Any]]:
        """Return the last report that names each checkpoint; an earlier one is from before the trial was restored."""
        there = set(self.checkpoints)
        return {name: report for report in self.reports if (name := _checkpoint_of(report)) in there}


def _runs_of_tune(sweep: Sweep, state: str) -> list[_Run]:
    """Read the finished trials of Tune, and count the others."""
    found = read_json(state)["trial_data"]
    trials = [[parse_json(part) if isinstance(part, str) else part for part in trial] for trial in found]
    runs = []
    for static, runtime in sorted(trials, key=lambda trial: str(trial[0]["trial_id"])):
        if static["status"] != "TERMINATED":
            sweep.left_out["failed" if static["status"] == "ERROR" else "unfinished"] += 1
            continue
        folder = storage.join(sweep.folder, _plain_name(static["relative_logdir"]))
        names = storage.listdir(folder)
        reports = _reports(sweep, storage.join(folder, "result.json")) if "result.json" in names else []
        reports = reports or [_flat(runtime.get("last_result") or {})]
        checkpoints = [n for n in names if n.startswith("checkpoint_") and storage.isdir(storage.join(folder, n))]
        runs.append(_Run(str(static["trial_id"]), folder, _config(static.get("config") or {}), reports, checkpoints))
    return runs


def _reports(sweep: Sweep, file: str) -> list[dict[str, Any]]:
    """Read the reports of a trial; a line that is no report, such as one cut short, is counted."""
    reports = []
    for line in filter(bytes.strip, read_text(file).split(b"\n")):
        try:
            reports.append(_flat(parse_json(line)))
        except (ValueError, AttributeError):
            sweep.skipped["lines of result.json that are not JSON objects"] += 1
    return reports


def _run_of_train(sweep: Sweep, snapshot: str) -> _Run:
    """Read a run of Ray Train, which counts as one trial."""
    results = read_json(snapshot)["checkpoint_results"]
    reports = [{**_flat(r["metrics"] or {}), "checkpoint_dir_name": _plain_name(r["checkpoint_dir_name"])} for r in results]
    names = dict.fromkeys(report["checkpoint_dir_name"] for report in reports)
    checkpoints = [name for name in names if storage.isdir(storage.join(sweep.folder, name))]
    return _Run(os.path.basename(os.path.normpath(sweep.folder)), sweep.folder, {}, reports, checkpoints)


def _choose(sweep: Sweep, runs: list[_Run], metric: str | None, mode: str) -> None:
    """Add each run to the sweep with the checkpoint that represents it, or count it as left out."""
    lacking = [run for run in runs if not run.reported(metric)]
    if lacking and len(lacking) == len(runs):
        known = sorted({key for report in lacking[0].reports for key in _plain(report)})
        raise RecipeError(
            f"{sweep.folder}: the trial {lacking[0].name} reported no '{metric}'; it reported "
            f"{', '.join(known) or 'no numbers'}. Use one of these after ?metric=."
        )
    if metric is not None and not mode and LOSSES.search(metric):
        raise RecipeError(
            f"{sweep.folder}?metric={metric}: '{metric}' has the name of a loss, but without &mode=min the largest value is "
            "the best. Append &mode=min or &mode=max."
        )
    for run in runs:
        if not run.reported(metric):
            sweep.left_out[f"that did not report '{metric}'"] += 1
        elif not run.checkpoints:
            sweep.left_out["without a checkpoint"] += 1
        else:
            with _naming(sweep.folder, storage.join(run.folder, "result.json")):
                name = run.checkpoints[-1] if metric is None else _best(sweep, run, metric, mode)
                metrics = _plain(run.by_checkpoint().get(name or "", {}), metric)
            if name is not None:
                paths = tuple(storage.join(run.folder, one) for one in run.checkpoints)
                sweep.trials.append(Trial(run.name, storage.join(run.folder, name), run.config, metrics, paths))


def _best(sweep: Sweep, run: _Run, metric: str, mode: str) -> str | None:
    """Return the name of the best checkpoint by finite values of the metric; None if there are none, which is counted."""
    values = [_number(report[metric]) for report in run.reports if metric in report]
    if all(value is None for value in values):
        sweep.left_out[f"without a finite '{metric}'"] += 1
        return None
    if None in values:
        sweep.skipped[f"without a finite '{metric}'"] += values.count(None)
    named = run.by_checkpoint()
    if len(run.checkpoints) == 1 and not named:
        return run.checkpoints[0]  # nothing to choose
    if len(run.reports) < len(run.checkpoints) or not named:
        raise RecipeError(
            f"{run.folder}: cannot tell which checkpoint is best by '{metric}': found {len(run.checkpoints)} checkpoints, "
            "but no result.json with a report that names each (the class API of Tune writes none). Remove ?metric= to use "
            "the last checkpoint of each trial."
        )
    known = {name: value for name, report in named.items() if (value := _number(report.get(metric))) is not None}
    if not known:
        sweep.left_out[f"without a finite '{metric}' at a checkpoint"] += 1
        return None
    return (min if mode == "min" else max)(known, key=lambda name: known[name])


def _checkpoint_of(report: dict[str, Any]) -> Any:
    name = report.get("checkpoint_dir_name")
    return None if name is None else _plain_name(name)


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten metrics as Tune does: {"eval": {"acc": 1}} becomes {"eval/acc": 1}. Raises ValueError on a collision."""
    flat: dict[str, Any] = {}
    for key, value in metrics.items():
        if not prefix and key == "config":
            continue
        inner = _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        if flat.keys() & inner.keys():
            raise ValueError(f"two metrics are called {min(flat.keys() & inner.keys())!r}")
        flat |= inner
    return flat


def _number(value: Any) -> float | None:
    """Return a metric as a number, also one written as text; None if it is not a finite number."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", value, re.ASCII):
        value = float(value)
    if not isinstance(value, (int, float)) or not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        return None
    return value


def _plain(metrics: dict[str, Any], metric: str | None = None) -> dict[str, float | None]:
    """Return the numeric metrics that the user reported, without Tune's own; None for a value that is not finite."""
    return {
        key: _number(value)
        for key, value in metrics.items()
        if (isinstance(value, (int, float)) or key == metric) and key not in OF_TUNE
    }


def _plain_name(name: Any) -> str:
    """Return the name of a folder inside another one. Raises ValueError if it leads elsewhere."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00]+", name) or name in (".", ".."):
        raise ValueError(f"{str(name)[:200]!r} is not the name of a folder")
    return name


def _config(config: Any) -> Any:
    """Return hyperparameters as JSON values: NaN and infinities by their names, and pickled objects as such."""
    if isinstance(config, dict) and config.keys() == {"_type", "value"}:
        return "(a pickled object)"
    if isinstance(config, dict):
        return {key: _config(value) for key, value in config.items()}
    return finite(config)


def fine_tuned(paths: Sequence[str]) -> list[Trial | None]:
    """Return the trial of each checkpoint from the manifest.json that `ray-soup finetune` wrote next to it, or None."""
    manifests: dict[str, dict[str, dict[str, Any]]] = {}
    return [_recorded(path, manifests) for path in paths]


def _recorded(path: str, manifests: dict[str, dict[str, dict[str, Any]]]) -> Trial | None:
    """Return the trial of one checkpoint; `manifests` caches the manifests read so far, by folder."""
    folder, name = os.path.split(path)
    if folder not in manifests:
        manifests[folder] = {}
        with suppress(OSError, SoupError, ValueError, KeyError, TypeError):  # missing, or another program's manifest
            entries = finite(read_json(storage.join(folder, OURS)))
            manifests[folder] = {entry["file"]: entry for entry in entries if "sha256" in entry}
    entry = manifests[folder].get(name)
    if entry is None:
        return None
    metrics: dict[str, Any] = {key: entry[key] for key in ("train_loss", "accuracy") if key in entry}
    config = {key: value for key, value in entry.items() if key not in {"file", "sha256", *metrics}}
    return Trial(os.path.splitext(name)[0], path, config, metrics)

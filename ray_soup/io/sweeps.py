"""Experiments of Ray Tune, Ray Train and `ray-soup finetune`, read from their folders.

An experiment is a list of trials with hyperparameters, metrics and checkpoints. Only JSON is read: nothing is unpickled, and
Ray is not needed.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage

OF_TUNE = {  # keys that Tune adds to every report
    "checkpoint_dir_name", "date", "done", "experiment_tag", "hostname", "iterations_since_restore", "node_ip", "pid",
    "should_checkpoint", "time_since_restore", "time_this_iter_s", "timestamp", "trial_id",
}  # fmt: skip
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


@dataclass
class Sweep:
    """The trials of one experiment."""

    folder: str
    """Path or URI of the experiment."""
    trials: list[Trial] = field(default_factory=list)
    """Finished trials with a checkpoint, in the order of their ids."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many trials failed, did not finish, or have no checkpoint."""

    def note(self) -> str | None:
        """Describe in one line which trials were left out; None if there are none."""
        if not self.left_out:
            return None
        what = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{self.folder}: {len(self.trials)} trials used, left out: {what}."


def split_metric(spec: str) -> tuple[str, str | None, str]:
    """Split `folder?metric=accuracy&mode=max` into folder, metric (None by default) and mode (`max` by default)."""
    found = re.fullmatch(r"(.*)\?metric=([^&?]+)(?:&mode=(min|max))?", spec)
    return (found[1], found[2], found[3] or "max") if found else (spec, None, "max")


def is_experiment(folder: str) -> bool:
    """Return whether a folder is an experiment of Ray Tune or Train."""
    names = storage.listdir(folder) if storage.isdir(folder) else []
    return TRAIN in names or any(fnmatch(name, TUNE) for name in names)


def read_sweep(folder: str, metric: str | None = None, mode: str = "max") -> Sweep:
    """Read the trials of an experiment, each with its best checkpoint by `metric`, or its last one without a metric.

    Raises IngredientError if the experiment cannot be read, RecipeError if a trial did not report the metric.
    """
    sweep = Sweep(folder)
    try:
        states = [name for name in storage.listdir(folder) if fnmatch(name, TUNE)]
        if states:
            _read_tune(sweep, storage.join(folder, states[-1]), metric, mode)
        else:
            _read_train(sweep, storage.join(folder, TRAIN), metric, mode)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IngredientError(
            f"{folder} looks like an experiment of Ray Tune or Train, but cannot be read ({type(error).__name__}: {error}). "
            "Use a glob for its checkpoints instead."
        ) from error
    return sweep


def _read_tune(sweep: Sweep, state: str, metric: str | None, mode: str) -> None:
    found = json.loads(storage.read_bytes(state))["trial_data"]
    trials = [[json.loads(part) if isinstance(part, str) else part for part in trial] for trial in found]
    for static, runtime in sorted(trials, key=lambda t: t[0]["trial_id"]):
        if static["status"] != "TERMINATED":
            sweep.left_out["failed" if static["status"] == "ERROR" else "unfinished"] += 1
            continue
        folder = storage.join(sweep.folder, static["relative_logdir"])
        names = storage.listdir(folder)
        reports = _reports(folder) if "result.json" in names else []
        reports = reports or [runtime.get("last_result") or {}]
        checkpoints = [name for name in names if name.startswith("checkpoint_")]
        if metric is not None and len(reports) < len(checkpoints):
            raise RecipeError(
                f"{folder}: cannot tell which checkpoint is best by '{metric}': found {len(checkpoints)} checkpoints, but "
                "no result.json with a report for each. Remove ?metric= to use the last checkpoint of each trial."
            )
        found = [(r, storage.join(folder, r.get("checkpoint_dir_name") or "-")) for r in reports]
        _add_trial(sweep, static["trial_id"], static.get("config", {}), found, metric=metric, mode=mode)


def _reports(folder: str) -> list[dict[str, Any]]:
    lines = storage.read_bytes(storage.join(folder, "result.json")).decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _read_train(sweep: Sweep, snapshot: str, metric: str | None, mode: str) -> None:
    results = json.loads(storage.read_bytes(snapshot))["checkpoint_results"]
    found = [(r["metrics"], storage.join(sweep.folder, r["checkpoint_dir_name"])) for r in results]
    _add_trial(sweep, os.path.basename(os.path.normpath(sweep.folder)), {}, found, metric=metric, mode=mode)


def _add_trial(
    sweep: Sweep,
    name: str,
    config: dict[str, Any],
    found: list[tuple[dict[str, Any], str]],
    *,
    metric: str | None,
    mode: str,
) -> None:
    """Add a trial to the sweep, or count it as left out; `found` lists its reports, each with its checkpoint folder."""
    kept = [(metrics, folder) for metrics, folder in found if storage.isdir(folder)]
    if metric is not None:
        known = sorted({key for metrics, _ in found for key in _plain(metrics)})
        if found and metric not in known:
            raise RecipeError(
                f"{sweep.folder}: the trial {name} reported no '{metric}'; it reported {', '.join(known)}. Use one of these "
                "after ?metric=."
            )
        kept = [(metrics, folder) for metrics, folder in kept if metric in metrics]
    if not kept:
        sweep.left_out["without a checkpoint"] += 1
        return
    best = kept[-1] if metric is None else (max if mode == "max" else min)(kept, key=lambda k: k[0][metric])
    sweep.trials.append(Trial(name, best[1], config, _plain(best[0])))


def _plain(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the numeric metrics that the user reported, without Tune's own."""
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float)) and key not in OF_TUNE}


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
            entries = json.loads(storage.read_bytes(storage.join(folder, OURS)))
            manifests[folder] = {entry["file"]: entry for entry in entries if "sha256" in entry}
    entry = manifests[folder].get(name)
    if entry is None:
        return None
    metrics: dict[str, Any] = {key: entry[key] for key in ("train_loss", "accuracy") if key in entry}
    config = {key: value for key, value in entry.items() if key not in {"file", "sha256", *metrics}}
    return Trial(os.path.splitext(name)[0], path, config, metrics)

"""Typed records of fine-tuning, with one writer and one reader for each file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.disk import write_json
from ray_soup.io.state_archive import check_archive
from ray_soup.soups.records import Digest, FileName, check_version, damaged, read_record

TRAINING_VERSION = 2
"""Version of a training run's state and of its record. Version 1, written by ray_soup 0.1, has no version key."""


class Hyperparameters(TypedDict):
    """Hyperparameters of one training run, as explained in the recipe section `finetune`."""

    lr: float
    wd: float
    epochs: int
    label_smoothing: float
    mixup: float
    shift: int
    randaugment: int
    seed: int


class TrainingMetrics(TypedDict):
    """Mean training loss of the last epoch, and the accuracy on data.fit if the recipe has fit data."""

    train_loss: float
    accuracy: NotRequired[float]


class ManifestEntry(Hyperparameters, TrainingMetrics):
    """A fine-tuned checkpoint in manifest.json: its hyperparameters and metrics, file name and SHA-256."""

    file: FileName
    sha256: Digest


class FailedTraining(Hyperparameters):
    """A failed training run in failures.json: its hyperparameters and the last line of its error."""

    error: str


_METRICS = TypeAdapter(TrainingMetrics)
_MANIFEST = TypeAdapter(list[ManifestEntry])
_FAILURES = TypeAdapter(list[FailedTraining])


def write_metrics(metrics: TrainingMetrics, file: Path) -> None:
    """Write the record of a finished training run atomically; its existence means that the run is finished."""
    write_json(file, {"version": TRAINING_VERSION, **metrics})


def read_metrics(file: Path) -> TrainingMetrics:
    """Read the record of a finished training run.

    Raises RecipeError if it is damaged, or a newer ray_soup wrote it.
    """
    remedy = f"Remove {file} to train this checkpoint again."
    record = read_record(file, _METRICS, TRAINING_VERSION, ("train_loss",), remedy)
    record.pop("version", None)
    return cast(TrainingMetrics, record)


def read_training(file: Path, device: torch.device) -> dict[str, Any]:
    """Read the state of an unfinished training run onto a device.

    Raises RecipeError if it is damaged, or a newer ray_soup wrote it.
    """
    remedy = f"Remove {file} to train this checkpoint from the start."
    try:
        check_archive(file)
        state = torch.load(file, map_location=device, weights_only=True)
        missing = {"model", "optimizer", "epoch", "step", "loss_sum"} - set(state)
    except SoupError:
        raise
    except Exception as error:  # torch raises errors of many kinds for damaged files
        raise damaged(file, f"{error}".partition("\n")[0], remedy) from error
    if missing:
        raise damaged(file, f"no {sorted(missing)[0]!r}", remedy)
    check_version(state, TRAINING_VERSION, file)
    return cast(dict[str, Any], state)


def write_manifest(entries: Sequence[ManifestEntry], file: Path) -> None:
    """Write manifest.json atomically; its existence means that the zoo is complete."""
    write_json(file, entries, indent=1)


def read_manifest(file: Path) -> list[ManifestEntry]:
    """Read manifest.json. Raises RecipeError if it is damaged, or a checkpoint that it lists is missing."""
    remedy = "Restore it from a copy, or empty the folder and run finetune again."
    entries = cast(list[ManifestEntry], read_record(file, _MANIFEST, 1, remedy=remedy))
    if len({entry["file"] for entry in entries}) < max(2, len(entries)):
        raise damaged(file, "it lists fewer than two checkpoints, or one twice", remedy)
    missing = next((entry["file"] for entry in entries if not file.with_name(entry["file"]).is_file()), None)
    if missing is not None:
        raise RecipeError(f"{file.with_name(missing)} is missing, but {file} lists it. {remedy}")
    return entries


def write_failures(failures: Sequence[FailedTraining], file: Path) -> None:
    """Write failures.json atomically."""
    write_json(file, failures, indent=1)


def read_failures(file: Path) -> list[FailedTraining]:
    """Read failures.json; an empty list if no training run failed and none was recorded. Raises RecipeError."""
    if not os.path.lexists(file):
        return []
    return cast(list[FailedTraining], read_record(file, _FAILURES, 1, remedy="Remove it."))

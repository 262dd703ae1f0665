"""Typed records of fine-tuning, with one writer and one reader for each file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from typing_extensions import NotRequired, TypedDict

from ray_soup.io.disk import write_text
from ray_soup.soups.records import check_version

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

    file: str
    sha256: str


class FailedTraining(Hyperparameters):
    """A failed training run in failures.json: its hyperparameters and the last line of its error."""

    error: str


def write_metrics(metrics: TrainingMetrics, file: Path) -> None:
    """Write the record of a finished training run atomically; its existence means that the run is finished."""
    write_text(file, json.dumps({"version": TRAINING_VERSION, **metrics}))


def read_metrics(file: Path) -> TrainingMetrics:
    """Read the record of a finished training run. Raises RecipeError if a newer ray_soup wrote it."""
    record = json.loads(file.read_text())
    check_version(record, TRAINING_VERSION, file)
    record.pop("version", None)
    return cast(TrainingMetrics, record)


def write_manifest(entries: Sequence[ManifestEntry], file: Path) -> None:
    """Write manifest.json atomically; its existence means that the zoo is complete."""
    write_text(file, json.dumps(entries, indent=1))


def read_manifest(file: Path) -> list[ManifestEntry]:
    """Read manifest.json."""
    return cast(list[ManifestEntry], json.loads(file.read_text()))


def write_failures(failures: Sequence[FailedTraining], file: Path) -> None:
    """Write failures.json atomically."""
    write_text(file, json.dumps(failures, indent=1))


def read_failures(file: Path) -> list[FailedTraining]:
    """Read failures.json; an empty list if no training run failed and none was recorded."""
    return cast(list[FailedTraining], json.loads(file.read_text())) if file.exists() else []

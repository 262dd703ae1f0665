"""Typed records of fine-tuning, with one writer and one reader for each file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import TypeAdapter
from typing_extensions import NotRequired, TypedDict

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import kept, storage
from ray_soup.io.disk import json_text, write_json
from ray_soup.io.state_archive import check_archive
from ray_soup.soups.records import Digest, FileName, check_version, damaged, read_record
from ray_soup.task.evidence_files import PREPROCESSING

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


class FinishedTraining(TrainingMetrics):
    """What a finished training run recorded: its metrics and the SHA-256 of its checkpoint, which older records lack."""

    sha256: NotRequired[Digest]


class ManifestEntry(Hyperparameters, TrainingMetrics):
    """A fine-tuned checkpoint in manifest.json: its hyperparameters and metrics, file name and SHA-256."""

    file: FileName
    sha256: Digest


class FailedTraining(Hyperparameters):
    """A failed training run in failures.json: its hyperparameters and the last line of its error."""

    error: str


_METRICS = TypeAdapter(FinishedTraining)
_MANIFEST = TypeAdapter(list[ManifestEntry])
_FAILURES = TypeAdapter(list[FailedTraining])


def write_metrics(metrics: FinishedTraining, file: str) -> None:
    """Write the record of a finished training run to a path or URI; its existence means that the run is finished."""
    storage.write_bytes(json_text({"version": TRAINING_VERSION, **metrics}).encode(), file)


def read_metrics(file: Path) -> FinishedTraining:
    """Read the record of a finished training run.

    Raises RecipeError if it is damaged, or a newer ray_soup wrote it.
    """
    remedy = f"Remove {file} to train this checkpoint again."
    record = read_record(file, _METRICS, TRAINING_VERSION, ("train_loss",), remedy)
    record.pop("version", None)
    return cast(FinishedTraining, record)


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


def read_manifest(file: str) -> list[ManifestEntry]:
    """Read manifest.json at a path or URI. Raises RecipeError if it is damaged, or a checkpoint that it lists is missing."""
    remedy = "Restore it from a copy, or empty the folder and run finetune again."
    folder = file.removesuffix("manifest.json").rstrip("/")
    with kept.local(file) as copy:
        entries = cast(list[ManifestEntry], read_record(copy, _MANIFEST, 1, remedy=remedy))
        if len({entry["file"] for entry in entries}) < max(2, len(entries)):
            raise damaged(copy, "it lists fewer than two checkpoints, or one twice", remedy)
    missing = next((entry["file"] for entry in entries if not storage.isfile(storage.join(folder, entry["file"]))), None)
    if missing is not None:
        raise RecipeError(f"{storage.join(folder, missing)} is missing, but {file} lists it. {remedy}")
    return entries


def write_failures(failures: Sequence[FailedTraining], file: Path) -> None:
    """Write failures.json atomically."""
    write_json(file, failures, indent=1)


def read_notes(out: str) -> list[str]:
    """Return the notes in a folder or URI about the weights that fine-tuning started from; none where none are recorded."""
    with suppress(OSError, ValueError, AttributeError):
        notes = json.loads(storage.read_bytes(storage.join(out, PREPROCESSING))).get("notes")
        return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
    return []


def read_failures(file: str) -> list[FailedTraining]:
    """Read failures.json at a path or URI; an empty list if there is none. Raises RecipeError."""
    if not storage.exists(file):
        return []
    with kept.local(file) as copy:
        return cast(list[FailedTraining], read_record(copy, _FAILURES, 1, remedy="Remove it."))

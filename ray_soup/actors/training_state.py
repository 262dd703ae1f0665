"""The state of a training of all weights: what is saved, and what is read when it resumes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_soup.actors.messages import TrainingJob
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import kept, storage
from ray_soup.io.hashing import sha256_file
from ray_soup.io.state_archive import check_archive

VERSION = 2  # 1: gradients of several actors summed in another order


@dataclass
class TrainingState:
    """Everything that changes while a model is trained."""

    task: str
    """The task of the job."""
    precision: str
    """Precision of forward and backward passes."""
    step: int = 0
    """Number of finished steps, over all epochs."""
    image_passes: int = 0
    """Number of examples in forward and backward passes and in re-estimations of running statistics."""
    loss: float = 0.0
    """Sum of the losses on fit in this epoch."""
    weight: float = 0.0
    """The sum of the weights of those examples."""
    best_epoch: int = -1
    """The best epoch on select so far; -1: the start."""
    best_cost: float = math.inf
    """NLL on select at the best epoch, or minus the figure that select_by names."""
    best_sha256: str = ""
    """SHA-256 of the file of differences of the best epoch."""
    stopped: str = ""
    """As in TrainingResult."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """As in TrainingResult."""
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    """The running statistics that were re-estimated last."""
    theta: torch.Tensor | None = None
    """The parameter vector, float32 [N]; None in the memory of an actor, and when the job is done."""
    optimizer: dict[str, Any] | None = None
    """The optimizer's state dict."""


def save_state(state: TrainingState, file: str, more: dict[str, Any]) -> None:
    """Write a state atomically to a path or URI, with `more` values than the memory of an actor holds. Raises SoupError."""
    values = {name: getattr(state, name) for name in TrainingState.__dataclass_fields__} | {"version": VERSION} | more
    with kept.replacing(file) as stream:
        torch.save(values, stream)


def load_state(file: str, job: TrainingJob, steps: int, parameters: int, hashed: bool) -> TrainingState:
    """Read the state of a job; if `hashed`, the file of differences is compared with the digest in it.

    A state without this file is none: it was copied, for a run that took over, while actors of the old one still trained.
    Raises RecipeError if it is damaged, or belongs to another task.
    """
    try:
        with kept.local(file) as here:
            check_archive(here)
            found = torch.load(here, map_location="cpu", weights_only=True)
        version = found.pop("version")
        state = TrainingState(**found)
        best = f"{job.stem}.best{state.best_epoch}.safetensors"
        fault = _fault(state, job, steps, parameters) if version == VERSION else f"it has version {version!r}"
        if fault is None and state.best_epoch >= 0:
            if not storage.isfile(best):
                return TrainingState(job.task, job.precision)
            fault = f"{best} is not as it was written" if hashed and sha256_file(best) != state.best_sha256 else None
    except SoupError:
        raise
    except Exception as error:  # torch raises errors of many kinds for damaged files
        fault = f"{error}".partition("\n")[0]
    if fault is not None:
        raise RecipeError(f"{file} is damaged ({fault}). Remove {file} to train this model from the start.")
    return state


def _fault(state: TrainingState, job: TrainingJob, steps: int, parameters: int) -> str | None:
    """Return what is wrong with a state of a job of `steps` steps; None if nothing is."""
    if state.task != job.task:
        return "it belongs to another recipe, or to ingredients or examples that have changed since"
    theta = state.theta
    whole = theta is not None and theta.dtype == torch.float32 and theta.numel() == parameters and state.optimizer
    if state.step < steps and not state.stopped and not whole:
        return f"it has no parameter vector of {parameters:,} elements, or no state of the optimizer"
    return None

"""The state of a soup that is being learned: everything a killed run needs to resume bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ray_soup.soups.records import check_version

VERSION = 2  # 1: the same keys without `version`, written by ray_soup 0.1


@dataclass
class LearnState:
    """Everything that changes while a soup is learned."""

    y: torch.Tensor
    """Coordinates float64 [K, B]; those of finished turns are at their best points."""
    precision: str = ""
    """Precision of forward and backward passes, with `auto` resolved at the start."""
    turn: int = 0
    """The number of the current model batch."""
    epoch: int = 0
    """Number of epochs finished in this turn."""
    step: int = 0
    """Number of steps finished in this epoch."""
    moving: torch.Tensor | None = None
    """Coordinates float64 [m, B] of the current model batch."""
    optimizer: dict[str, Any] | None = None
    """The optimizer's state dict."""
    factor: torch.Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    """Factor on the logits, float64 []: one over the temperature."""
    best: torch.Tensor | None = None
    """The best `moving` of this turn on select."""
    best_factor: float = 1.0
    """The factor at `best`."""
    best_nll: float = float("inf")
    """NLL on select at `best`."""
    statistics: dict[str, torch.Tensor] | None = None
    """Running statistics that the actors use: those at the coordinates that the turn or the epoch began with."""
    fit_loss: float = 0.0
    """Sum of the loss over the examples of this epoch so far."""
    fit_count: int = 0
    """The number of those examples."""
    steps: int = 0
    """Number of steps over all turns."""
    image_passes: int = 0
    """Number of examples in forward and backward passes and in re-estimations of running statistics."""
    step_ms: list[float] = field(default_factory=list)
    """Duration of each of the first 1,000 steps, in milliseconds."""
    overhead_ms: list[float] = field(default_factory=list)
    """The part of each duration in which no actor was computing, in milliseconds."""
    wire_bytes: int = 0
    """Bytes to and from one actor in a step."""
    seconds: float = 0.0
    """Time spent learning, over all starts."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """One entry per epoch: turn, epoch, fit_nll, select_nll, select_accuracy, steps, and lr, that of its last step."""


StateCallback = Callable[[int, int, LearnState], None]
"""Called with (step, total steps, state). With learn.patience the run may end earlier."""


def ignore_state(step: int, steps: int, state: LearnState) -> None:
    """Do nothing."""


def save_state(state: LearnState, path: Path) -> None:
    """Write the state atomically."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({"version": VERSION, **{f: getattr(state, f) for f in state.__dataclass_fields__}}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(file: Path | IO[bytes]) -> LearnState:
    """Read a state. Raises RecipeError if a newer version of ray_soup wrote it."""
    found = torch.load(file, weights_only=True)
    check_version(found, VERSION, getattr(file, "name", file))
    found.pop("version", None)
    return LearnState(**found)

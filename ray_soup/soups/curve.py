"""What is read from the learning curve, the figures on select at the end of every epoch, and from other counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ray_soup.soups.state import LearnState
from ray_soup.task.choices import cost_in


def stale_epochs(state: LearnState, select_by: str) -> int:
    """Return the epochs of this turn since the last improvement on select."""
    best = min(range(len(state.curve)), key=lambda n: cost_in(state.curve[n], select_by), default=0)
    return sum(line["turn"] == state.turn and line["epoch"] >= 0 for line in state.curve[best + 1 :])


def best_epochs(curve: Sequence[Mapping[str, float]], turn: int, select_by: str) -> int:
    """Return how many epochs of a turn led to its best point; 0 if the turn ended where it had begun."""
    so_far = [line for line in curve if line["turn"] <= turn]
    best = min(so_far, key=lambda line: cost_in(line, select_by))
    return int(best["epoch"]) + 1 if best["turn"] == turn else 0


def summary(state: LearnState) -> dict[str, Any]:
    """Return the figures of a run that go into run.json."""
    found = {
        "precision": state.precision,
        "steps": state.steps,
        "image_passes": state.image_passes,
        "step_ms": median(state.step_ms),
        "driver_overhead_ms": median(state.overhead_ms),
        "wire_bytes_per_step": state.wire_bytes,
        "curve": state.curve,
    }
    return found if state.before is None else {**found, "refit": {"steps": refit_steps(state)}}


def refit_steps(state: LearnState) -> int:
    """Return the steps of the refit so far."""
    return state.steps - int(state.curve[-1]["steps"])

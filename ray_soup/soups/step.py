"""The arithmetic of a step on the driver: from the actors' partial results to a gradient, and what the step has cost."""

from __future__ import annotations

import numpy as np

from ray_soup.actors import metrics
from ray_soup.actors.messages import Partial
from ray_soup.errors import SoupError
from ray_soup.mixing.coefficients import Parametrization
from ray_soup.soups.optimize import without_noise
from ray_soup.soups.state import LearnState

TIMED_STEPS = 1000  # steps whose duration is kept


def gradient_of(
    partials: list[Partial],
    weight: float,
    of: Parametrization,
    clip: float | None,
    state: LearnState,
    rough: np.ndarray | None = None,
) -> np.ndarray:
    """Compute dL/dy, float64 [m, B]: sum the partial gradients by rank, divide by the weight, apply the chain rule.

    `rough` is the gradient of a penalty with respect to x, float64 [m, B].
    """
    total = np.zeros(partials[0].gradient.shape)
    for partial in partials:
        total += partial.gradient
    assert state.moving is not None
    if not np.isfinite(total).all():
        if state.steps == 0:
            raise SoupError(
                "The loss is not finite at the first step. Look for NaN in the inputs of data.fit or in `loss:`."
            )
        raise SoupError(f"The loss is not finite at step {state.steps}. Lower learn.lr, or set precision: float32.")
    by_x = total / weight if rough is None else total / weight + rough
    gradient = without_noise(of.gradient(state.moving.numpy(), by_x))
    size = float(np.linalg.norm(gradient))
    return gradient * (clip / size) if clip is not None and size > clip else gradient


def count_step(state: LearnState, answers: list[list[Partial]], examples: int, x: np.ndarray, seconds: float) -> None:
    """Add a step on a batch to the counts and the durations in the state; `answers` are those to each part of the batch."""
    partials = [partial for answer in answers for partial in answer]
    state.fit_loss += sum(p.loss for p in partials)
    state.fit_count += sum(p.weight for p in partials)
    state.steps += 1
    state.image_passes += examples
    ranks = sum(p.ranks for p in answers[0])
    state.wire_bytes = len(answers) * (x.nbytes + partials[0].gradient.nbytes) + 4 * examples // ranks
    phase = "learning" if state.before is None else "refitting"
    metrics.count_step(answers, phase, examples, state.wire_bytes * ranks, seconds)
    if len(state.step_ms) < TIMED_STEPS:
        state.step_ms.append(1000 * seconds)
        state.overhead_ms.append(1000 * (seconds - sum(max(p.seconds for p in answer) for answer in answers)))

"""The loop: MEHL soups by block coordinate descent over model batches, around one center; learned soups likewise, with all
ingredients in one model batch.

In each turn one model batch of ingredients moves and the others keep their place. The turn ends at its best point on select,
the starting point included, and the next turn starts there.

Running statistics of BatchNorm layers go stale as coordinates move: they are computed anew when a turn begins and after each
epoch, before select is looked at, and stay as they are during an epoch's steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

import numpy as np
import torch

from ray_soup.coefficients import Affine, Softmax, learning_rate, make_optimizer, without_noise
from ray_soup.data import Split, batch_positions
from ray_soup.errors import SoupError
from ray_soup.outcomes import Score
from ray_soup.recipe import SOFTMAX, Recipe
from ray_soup.running_statistics import Statistics
from ray_soup.shard import Partial

SAVE_EVERY_S = 60.0


class Asked(Protocol):
    """What the loop asks of the actors."""

    def choose_precision(self) -> str: ...
    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None: ...
    def step(self, x: np.ndarray, factor: float, batch: Split) -> list[Partial]: ...
    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Score: ...
    def recalibrate(self, x: np.ndarray, batches: list[Split]) -> Statistics: ...
    def use(self, statistics: Statistics) -> None: ...


@dataclass
class State:
    """All that changes while a soup is learned: what a killed run needs to go on with the same bits."""

    y: torch.Tensor
    """Coordinates float64 [K, B], those of past turns at their best points."""
    precision: str = ""
    """Of forward and backward passes: what auto stood for at the beginning."""
    turn: int = 0
    epoch: int = 0
    step: int = 0
    """Of the epoch."""
    moving: torch.Tensor | None = None
    """Coordinates float64 [m, B] of the model batch at work."""
    optimizer: dict[str, Any] | None = None
    factor: torch.Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    """On the logits."""
    best: torch.Tensor | None = None
    """The best `moving` of this turn on select, which scored best_nll."""
    best_factor: float = 1.0
    best_nll: float = float("inf")
    statistics: dict[str, torch.Tensor] | None = None
    """Running statistics that the actors use, of the coordinates that the turn or the epoch began with."""
    fit_loss: float = 0.0
    fit_count: int = 0
    """Sum over this epoch's examples so far."""
    steps: int = 0
    image_passes: int = 0
    step_ms: list[float] = field(default_factory=list)
    overhead_ms: list[float] = field(default_factory=list)
    wire_bytes: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    """A line an epoch: turn, epoch, fit_nll, select_nll, select_accuracy, steps, and lr, that of its last step."""


def save_state(state: State, path: Path) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save({f: getattr(state, f) for f in state.__dataclass_fields__}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_state(file: Path | IO[bytes]) -> State:
    return State(**torch.load(file, weights_only=True))


def model_batches(ingredients: int, size: int, seed: int, models_epochs: int) -> list[np.ndarray]:
    """The ingredients of each turn, int64, sorted: shuffled anew in every models_epoch and cut into model batches."""
    turns = []
    for models_epoch in range(models_epochs):
        order = np.random.default_rng([seed, 1, models_epoch]).permutation(ingredients)
        turns += [np.sort(order[first : first + size]) for first in range(0, ingredients, size)]
    return turns


def parametrisation(method: str, norms: np.ndarray) -> Affine | Softmax:
    """How a method's coordinates make coefficients, for directions with norms float64 [m, B]."""
    return Softmax(norms) if method in SOFTMAX else Affine(norms)


def learn(
    recipe: Recipe,
    actors: Asked,
    norms: np.ndarray,
    splits: dict[str, Split],
    model_batch: int,
    state_file: Path,
    watch: Callable[[int, int, State], None] = lambda step, steps, state: None,
    after_epoch: Callable[[int, int, State], None] = lambda step, steps, state: None,
    calibration: list[Split] | None = None,
) -> State:
    """Learn coordinates for directions with norms float64 [K, B]; goes on from `state_file` where there is one. With
    `calibration`, batches of fit, running statistics are computed anew on them.

    `watch` is told (step, steps in all, state) after every step, `after_epoch` after every epoch; with learn.patience there
    may be fewer steps in all. Returns the last state; its `y` and `factor` are the soup.
    """
    options, fit, select = recipe.learn, splits["fit"], splits["select"]
    ingredients, blocks = norms.shape
    turns = model_batches(ingredients, model_batch, options.seed, options.models_epochs)
    steps_per_epoch = -(-len(fit) // options.batch_size)
    steps_per_turn = steps_per_epoch * options.epochs
    state = load_state(state_file) if state_file.exists() else State(torch.zeros(ingredients, blocks, dtype=torch.float64))
    started, saved = time.monotonic() - state.seconds, time.monotonic()

    def save(optimizer: torch.optim.Optimizer | None) -> None:
        nonlocal saved
        state.optimizer = None if optimizer is None else optimizer.state_dict()
        state.seconds, saved = time.monotonic() - started, time.monotonic()
        save_state(state, state_file)

    def x_of(of: Affine | Softmax, y: torch.Tensor) -> np.ndarray:
        """What travels to the actors."""
        return of.x(y.numpy()).astype(np.float32)

    def recalibrate(x: np.ndarray) -> None:
        if calibration:
            state.statistics = {name: torch.from_numpy(v) for name, v in actors.recalibrate(x, calibration).items()}
            state.image_passes += sum(map(len, calibration))

    if not state.precision:
        state.precision = actors.choose_precision()
        save_state(state, state_file)  # a measurement: it might fall out otherwise the next time
    for turn in range(state.turn, len(turns)):
        chosen = turns[turn]
        of = parametrisation(recipe.method, norms[chosen])
        actors.begin(chosen, x_of(parametrisation(recipe.method, norms), state.y), state.precision)
        if state.moving is None:
            state.moving, state.best = state.y[chosen].clone(), state.y[chosen].clone()
        if state.statistics is None:
            recalibrate(x_of(of, state.moving))
        else:
            actors.use({name: tensor.numpy() for name, tensor in state.statistics.items()})
        optimizer = make_optimizer(options, state.moving, *([state.factor] if of.learns_factor else []))
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        if turn == 0 and not state.curve:
            start = actors.evaluate(x_of(of, state.moving), 1.0, select)
            state.best_nll = start.nll
            state.curve.append(
                {"turn": 0, "epoch": -1, "select_nll": start.nll, "select_accuracy": start.accuracy, "steps": 0}
            )
        for epoch in range(state.epoch, options.epochs):
            if options.patience is not None and stale_epochs(state) >= options.patience:
                break
            batches = batch_positions(len(fit), options.batch_size, options.seed, 2, turn, epoch)
            for step in range(state.step, steps_per_epoch):
                begun = time.perf_counter()
                x, batch = x_of(of, state.moving), Split(fit.source, fit.rows[batches[step]])
                partials = actors.step(x, state.factor.item(), batch)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(options, epoch * steps_per_epoch + step, steps_per_turn)
                state.moving.grad = torch.from_numpy(_gradient(partials, len(batch), of, options.clip, state))
                state.factor.grad = torch.tensor(sum(p.by_factor for p in partials) / len(batch), dtype=torch.float64)
                optimizer.step()
                state.step = step + 1
                _count(state, partials, len(batch), x, time.perf_counter() - begun)
                watch(state.steps, len(turns) * steps_per_turn, state)
                if time.monotonic() - saved > SAVE_EVERY_S:
                    save(optimizer)
            recalibrate(x_of(of, state.moving))
            score = actors.evaluate(x_of(of, state.moving), state.factor.item(), select)
            if score.nll < state.best_nll:
                state.best_nll, state.best, state.best_factor = score.nll, state.moving.clone(), state.factor.item()
            state.curve.append(
                {
                    "turn": turn, "epoch": epoch, "fit_nll": state.fit_loss / state.fit_count,
                    "select_nll": score.nll, "select_accuracy": score.accuracy, "steps": state.steps,
                    "lr": optimizer.param_groups[0]["lr"],
                }
            )  # fmt: skip
            state.epoch, state.step, state.fit_loss, state.fit_count = epoch + 1, 0, 0.0, 0
            save(optimizer)
            after_epoch(state.steps, len(turns) * steps_per_turn, state)
        assert state.best is not None
        state.y[chosen] = state.best
        state.factor.fill_(state.best_factor)
        state.turn, state.epoch, state.moving, state.best, state.statistics = turn + 1, 0, None, None, None
        save(None)
    return state


def stale_epochs(state: State) -> int:
    """Epochs of this turn since the last better point on select."""
    best = min(range(len(state.curve)), key=lambda n: state.curve[n]["select_nll"], default=0)
    return sum(line["turn"] == state.turn and line["epoch"] >= 0 for line in state.curve[best + 1 :])


def _gradient(partials: list[Partial], count: int, of: Affine | Softmax, clip: float | None, state: State) -> np.ndarray:
    """dL/dy float64 [m, B]: the partial projected gradients summed in the order of ranks, divided by the examples of the
    batch once, then the chain rule."""
    total = np.zeros_like(of.norms)
    for partial in partials:
        total += partial.gradient
    assert state.moving is not None
    if not np.isfinite(total).all():
        if state.steps == 0:
            raise SoupError(
                "The loss is not finite at the first step: look for NaN in the images of data.fit, or in `loss:`."
            )
        raise SoupError(f"The loss is no longer finite at step {state.steps}. Lower learn.lr, or set precision: float32.")
    gradient = without_noise(of.gradient(state.moving.numpy(), total / count))
    size = float(np.linalg.norm(gradient))
    return gradient * (clip / size) if clip is not None and size > clip else gradient


def _count(state: State, partials: list[Partial], examples: int, x: np.ndarray, seconds: float) -> None:
    state.fit_loss += sum(p.loss for p in partials)
    state.fit_count += examples
    state.steps += 1
    state.image_passes += examples
    state.wire_bytes = x.nbytes + 4 * examples // len(partials) + partials[0].gradient.nbytes
    if len(state.step_ms) < 1000:
        state.step_ms.append(1000 * seconds)
        state.overhead_ms.append(1000 * (seconds - max(p.seconds for p in partials)))


def summary(state: State) -> dict[str, Any]:
    """The figures of a run that go into run.json."""
    return {
        "precision": state.precision,
        "steps": state.steps,
        "image_passes": state.image_passes,
        "step_ms": median(state.step_ms),
        "driver_overhead_ms": median(state.overhead_ms),
        "wire_bytes_per_step": state.wire_bytes,
        "curve": state.curve,
    }

"""The learning loop: MEHL-Soup by block coordinate descent over model batches around one center (Li et al. 2024).

In each turn one model batch of ingredients moves and the others stay in place. A turn ends at its best point on select, its
starting point included, and the next turn starts there. Learned-Soup (Wortsman et al. 2022) runs through the same loop with
all ingredients in one model batch.

The running statistics of BatchNorm layers go stale as coordinates move: they are re-estimated at the start of each turn and
after each epoch, before select is evaluated, and stay fixed during an epoch's steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ray_soup.actors.messages import Partial
from ray_soup.actors.pool import StepPool
from ray_soup.errors import SoupError, Stopped
from ray_soup.io.signals import uninterrupted
from ray_soup.mixing.coefficients import Affine, Softmax
from ray_soup.recipe import Recipe
from ray_soup.soups.optimize import learning_rate, make_optimizer, parametrization, without_noise
from ray_soup.soups.state import LearnState, StateCallback, ignore_state, load_state, save_state, task_of
from ray_soup.soups.trajectory import roughness
from ray_soup.task.choices import cost, cost_in, figures_on_select
from ray_soup.task.data import Split, batch_positions

SAVE_EVERY_S = 60.0
TIMED_STEPS = 1000  # steps whose duration is kept


def model_batches(ingredients: int, size: int, seed: int, models_epochs: int) -> list[np.ndarray]:
    """Return the ingredients of each turn, sorted int64 [m]: shuffled in every models_epoch and cut into model batches."""
    turns = []
    for models_epoch in range(models_epochs):
        order = np.random.default_rng([seed, 1, models_epoch]).permutation(ingredients)
        turns += [np.sort(order[first : first + size]) for first in range(0, ingredients, size)]
    return turns


def learn(
    recipe: Recipe,
    pool: StepPool,
    norms: np.ndarray,
    splits: dict[str, Split],
    model_batch: int,
    state_file: Path,
    after_step: StateCallback = ignore_state,
    after_epoch: StateCallback = ignore_state,
    calibration: list[Split] | None = None,
    contents: Sequence[str] = (),
    order: Sequence[int] = (),
) -> LearnState:
    """Learn the coordinates; resume from `state_file` if it exists.

    Args:
        recipe: the recipe; its `learn` section holds the settings.
        pool: actors that hold the directions.
        norms: float64 [K, B], norms of the directions.
        splits: at least fit and select.
        model_batch: number of ingredients that move at a time.
        state_file: where the state is saved after each epoch and at least every minute.
        after_step: called after every step.
        after_epoch: called after every epoch.
        calibration: batches of fit that running statistics are re-estimated on; empty: the statistics are averaged.
        contents: digests of the ingredients and of the examples, without which a state is not resumed from.
        order: the positions of the ingredients, ordered by step; needed with learn.smoothness.

    Returns:
        The last state; its `y` and `factor` are the soup.
    """
    task = task_of(recipe, contents)
    run = _Learning.start(recipe, pool, norms, splits, model_batch, state_file, calibration, task)
    run.order = order
    state, options = run.state, recipe.learn
    for turn in range(state.turn, len(run.turns)):
        chosen, optimizer = run.begin_turn(turn)
        for epoch in range(state.epoch, options.epochs):
            if options.patience is not None and stale_epochs(state, recipe.select_by) >= options.patience:
                break
            batches = batch_positions(len(run.fit), options.batch_size, options.seed, 2, turn, epoch)
            for step in range(state.step, run.steps_per_epoch):
                begun = time.perf_counter()
                x, batch = run.x(), Split(run.fit.source, run.fit.rows[batches[step]])
                with run.saving_after(KeyboardInterrupt, optimizer):
                    partials = pool.step(x, state.factor.item(), batch)
                with run.saving_after(Stopped, optimizer), uninterrupted():
                    run.move(optimizer, partials, epoch * run.steps_per_epoch + step)
                    state.step = step + 1
                    _count(state, partials, len(batch), x, time.perf_counter() - begun)
                after_step(state.steps, run.total_steps, state)
                run.save_if_due(optimizer)
            run.end_epoch(optimizer, epoch)
            after_epoch(state.steps, run.total_steps, state)
        run.end_turn(chosen)
    return state


@dataclass
class _Learning:
    """A run of `learn`: its fixed settings, its state, and the parts of the loop."""

    recipe: Recipe
    pool: StepPool
    norms: np.ndarray
    fit: Split
    select: Split
    turns: list[np.ndarray]
    steps_per_epoch: int
    state_file: Path
    calibration: list[Split]
    state: LearnState
    started: float
    saved: float
    of: Affine | Softmax
    """The parametrization of the model batch that moves now."""
    order: Sequence[int] = ()
    """The positions of the ingredients, ordered by step."""

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        pool: StepPool,
        norms: np.ndarray,
        splits: dict[str, Split],
        model_batch: int,
        state_file: Path,
        calibration: list[Split] | None,
        task: str,
    ) -> _Learning:
        options, (ingredients, blocks) = recipe.learn, norms.shape
        turns = model_batches(ingredients, model_batch, options.seed, options.models_epochs)
        if state_file.exists():
            state = load_state(state_file, task, norms.shape)
        else:
            state = LearnState(torch.zeros(ingredients, blocks, dtype=torch.float64), task=task)
        now = time.monotonic()
        per_epoch = -(-len(splits["fit"]) // options.batch_size)
        run = cls(
            recipe, pool, norms, splits["fit"], splits["select"], turns, per_epoch, state_file, calibration or [], state,
            now - state.seconds, now, parametrization(recipe.info.kind == "softmax", norms),
        )  # fmt: skip
        if not state.precision:
            state.precision = pool.choose_precision()
            save_state(state, state_file)  # a measurement, which could turn out differently the next time
        return run

    @property
    def steps_per_turn(self) -> int:
        return self.steps_per_epoch * self.recipe.learn.epochs

    @property
    def total_steps(self) -> int:
        return len(self.turns) * self.steps_per_turn

    def x(self) -> np.ndarray:
        """Return the coordinates that are sent to the actors, float32 [m, B]."""
        assert self.state.moving is not None
        return self.of.x(self.state.moving.numpy()).astype(np.float32)

    def begin_turn(self, turn: int) -> tuple[np.ndarray, torch.optim.Optimizer]:
        """Begin a turn from the point in the state; return its model batch and its optimizer."""
        state, chosen = self.state, self.turns[turn]
        softmax = self.recipe.info.kind == "softmax"
        self.of = parametrization(softmax, self.norms[chosen])
        everything = parametrization(softmax, self.norms)
        self.pool.begin(chosen, everything.x(state.y.numpy()).astype(np.float32), state.precision)
        if state.moving is None:
            state.moving, state.best = state.y[chosen].clone(), state.y[chosen].clone()
        if state.statistics is None:
            self.recalibrate()
        else:
            self.pool.use({name: tensor.numpy() for name, tensor in state.statistics.items()})
        learned = [state.factor] if self.of.learns_factor else []
        optimizer = make_optimizer(self.recipe.learn, state.moving, *learned)
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        if turn == 0 and not state.curve:
            start = self.pool.evaluate(self.x(), 1.0, self.select)
            state.best_cost = cost(start, self.recipe.select_by)
            state.curve.append({"turn": 0, "epoch": -1, **figures_on_select(start), "steps": 0})
        return chosen, optimizer

    def move(self, optimizer: torch.optim.Optimizer, partials: list[Partial], step: int) -> None:
        """Take one optimizer step of the moving coordinates on the partial gradients of a batch."""
        state, options = self.state, self.recipe.learn
        assert state.moving is not None
        weight = sum(p.weight for p in partials) or 1.0  # a batch may have nothing to score
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, self.steps_per_turn)
        rough = self.by_roughness() if options.smoothness else None
        state.moving.grad = torch.from_numpy(_gradient(partials, weight, self.of, options.clip, state, rough))
        state.factor.grad = torch.tensor(sum(p.by_factor for p in partials) / weight, dtype=torch.float64)
        optimizer.step()

    def by_roughness(self) -> np.ndarray:
        """Return the gradient of the penalty `learn.smoothness` with respect to x, float64 [m, B].

        Coefficients are linear in x, c = x + (1 - sum_j x_j) / K, so that dP/dx_k = dP/dc_k - mean_j dP/dc_j. With a
        softmax, x sums to 1, and what is the same for all k changes nothing.
        """
        state, chosen = self.state, self.turns[self.state.turn]
        assert state.moving is not None
        y = state.y.numpy().copy()
        y[chosen] = state.moving.numpy()
        everything = parametrization(self.recipe.info.kind == "softmax", self.norms)
        _, by_c = roughness(everything.coefficients(y), self.order)
        found: np.ndarray = self.recipe.learn.smoothness * (by_c - by_c.mean(axis=0))[chosen]
        return found

    def end_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Evaluate on select, remember the best point, and save."""
        state = self.state
        assert state.moving is not None
        self.recalibrate()
        score = self.pool.evaluate(self.x(), state.factor.item(), self.select)
        found = cost(score, self.recipe.select_by)
        if found < state.best_cost:
            state.best_cost, state.best, state.best_factor = found, state.moving.clone(), state.factor.item()
        state.curve.append(
            {
                "turn": state.turn, "epoch": epoch, "fit_nll": state.fit_loss / max(state.fit_count, 1e-300),
                **figures_on_select(score), "steps": state.steps,
                "lr": optimizer.param_groups[0]["lr"],
            }
        )  # fmt: skip
        state.epoch, state.step, state.fit_loss, state.fit_count = epoch + 1, 0, 0.0, 0.0
        self.save(optimizer)

    def end_turn(self, chosen: np.ndarray) -> None:
        """Put the model batch at its best point."""
        state = self.state
        assert state.best is not None
        state.y[chosen] = state.best
        state.factor.fill_(state.best_factor)
        state.turn, state.epoch, state.moving, state.best, state.statistics = state.turn + 1, 0, None, None, None
        self.save(None)

    def recalibrate(self) -> None:
        """Re-estimate running statistics at the moving coordinates, if this run does so at all."""
        if self.calibration:
            found = self.pool.recalibrate(self.x(), self.calibration)
            self.state.statistics = {name: torch.from_numpy(values) for name, values in found.items()}
            self.state.image_passes += sum(map(len, self.calibration))

    @contextmanager
    def saving_after(self, kind: type[BaseException], optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Save if an exception of this kind, between two steps, ends the context."""
        try:
            yield
        except kind:
            self.save(optimizer)
            raise

    def save_if_due(self, optimizer: torch.optim.Optimizer) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY_S:
            self.save(optimizer)

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.state.optimizer = None if optimizer is None else optimizer.state_dict()
        self.state.seconds, self.saved = time.monotonic() - self.started, time.monotonic()
        save_state(self.state, self.state_file)


def stale_epochs(state: LearnState, select_by: str) -> int:
    """Return the epochs of this turn since the last improvement on select."""
    best = min(range(len(state.curve)), key=lambda n: cost_in(state.curve[n], select_by), default=0)
    return sum(line["turn"] == state.turn and line["epoch"] >= 0 for line in state.curve[best + 1 :])


def _gradient(
    partials: list[Partial],
    weight: float,
    of: Affine | Softmax,
    clip: float | None,
    state: LearnState,
    rough: np.ndarray | None = None,
) -> np.ndarray:
    """Compute dL/dy, float64 [m, B]: sum the partial gradients by rank, divide by the weight, apply the chain rule.

    `rough` is the gradient of a penalty with respect to x, float64 [m, B].
    """
    total = np.zeros_like(of.norms)
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


def _count(state: LearnState, partials: list[Partial], examples: int, x: np.ndarray, seconds: float) -> None:
    state.fit_loss += sum(p.loss for p in partials)
    state.fit_count += sum(p.weight for p in partials)
    state.steps += 1
    state.image_passes += examples
    state.wire_bytes = x.nbytes + 4 * examples // len(partials) + partials[0].gradient.nbytes
    if len(state.step_ms) < TIMED_STEPS:
        state.step_ms.append(1000 * seconds)
        state.overhead_ms.append(1000 * (seconds - max(p.seconds for p in partials)))


def summary(state: LearnState) -> dict[str, Any]:
    """Return the figures of a run that go into run.json."""
    return {
        "precision": state.precision,
        "steps": state.steps,
        "image_passes": state.image_passes,
        "step_ms": median(state.step_ms),
        "driver_overhead_ms": median(state.overhead_ms),
        "wire_bytes_per_step": state.wire_bytes,
        "curve": state.curve,
    }

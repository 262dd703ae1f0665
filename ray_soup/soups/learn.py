"""The learning loop: MEHL-Soup by block coordinate descent over model batches around one center (Li et al. 2024).

In each turn one model batch of ingredients moves and the others stay in place. A turn ends at its best point on select, its
starting point included, and the next turn starts there. Learned-Soup (Wortsman et al. 2022) runs through the same loop with
all ingredients in one model batch.

The running statistics of BatchNorm layers go stale as coordinates move: they are re-estimated at the start of each turn and
after each epoch, before select is evaluated, and stay fixed during an epoch's steps.

With learn.refit the turns are taken once more, on fit and select together and without choices, each with the steps that
had led to its best point.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_soup.actors import metrics
from ray_soup.actors.messages import Partial
from ray_soup.actors.pool import StepPool
from ray_soup.errors import Stopped
from ray_soup.io.lazy import torch
from ray_soup.io.signals import uninterrupted
from ray_soup.recipe import Recipe
from ray_soup.soups.coordinates import Moving, largest_rate, moving_coordinates
from ray_soup.soups.curve import best_epochs, stale_epochs
from ray_soup.soups.optimize import learning_rate, make_optimizer, parametrization
from ray_soup.soups.start import Beginning, choose_start
from ray_soup.soups.state import LearnState, StateCallback, ignore_state, load_state, save_state, task_of
from ray_soup.soups.step import count_step, gradient_of
from ray_soup.soups.together import Together, moving_together
from ray_soup.soups.trajectory import roughness
from ray_soup.soups.turns import joint_batches, model_batches
from ray_soup.task.choices import cost, figures_on_select
from ray_soup.task.data import Split, batch_positions

SAVE_EVERY_S = 60.0


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
    refits: bool = True,
    starts: Sequence[Beginning] = (),
    tensor: np.ndarray | None = None,
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
        refits: False leaves out what learn.refit adds.
        starts: where it may begin if that is better on select than the uniform soup.
        tensor: int64 [B], the tensor of each block: all turns are taken with whole tensors first. None: with blocks only.

    Returns:
        The last state; its `y` and `factor` are the soup, and after a refit `before` and `before_factor` the one before it.
    """
    task = task_of(recipe, contents if tensor is None else [*contents, "whole tensors first"])
    run = _Learning.start(recipe, pool, norms, splits, model_batch, state_file, calibration, task)
    run.order, run.refits = order, refits and recipe.learn.refit
    if tensor is not None:
        run.tensor, run.turns = tensor, [*run.turns, *run.turns]
    state = run.state
    if starts and state.began is None and not state.curve:
        choose_start(state, pool, norms, run.turns[0], run.select, run.calibration, recipe.select_by, starts)
        run.save(None)
    if state.before is None:
        _learn(run, after_step, after_epoch)
    if run.refits:
        _refit(run, after_step)
    return state


def _learn(run: _Learning, after_step: StateCallback, after_epoch: StateCallback) -> None:
    """Take all turns on fit, and leave each at its best point on select."""
    state, options = run.state, run.recipe.learn
    for turn in range(state.turn, len(run.turns)):
        chosen, optimizer = run.begin_turn(turn)
        for epoch in range(state.epoch, options.epochs):
            if options.patience is not None and stale_epochs(state, run.recipe.select_by) >= options.patience:
                break
            positions = batch_positions(len(run.fit), options.batch_size, options.seed, 2, turn, epoch)
            batches = [[Split(run.fit.source, run.fit.rows[batch])] for batch in positions]
            run.take_steps(optimizer, epoch, batches, after_step)
            run.end_epoch(optimizer, epoch)
            after_epoch(state.steps, run.total_steps, state)
        run.end_turn(chosen)


def _refit(run: _Learning, after_step: StateCallback) -> None:
    """Take the turns again from the start on fit and select together, each with the steps that led to its best point."""
    if run.state.before is None:
        run.begin_refit()
    per_pass = -(-(len(run.fit) + len(run.select)) // run.recipe.learn.batch_size)
    for turn in range(run.state.turn, len(run.turns)):
        epochs = run.best_epochs(turn)
        if not epochs:
            continue
        chosen, optimizer = run.begin_turn(turn)
        for epoch in range(run.state.epoch, epochs):
            first = epoch * run.steps_per_epoch
            steps = range(first, first + run.steps_per_epoch)
            passes = {n: run.joint_batches(turn, n) for n in {step // per_pass for step in steps}}
            batches = [passes[step // per_pass][step % per_pass] for step in steps]
            run.take_steps(optimizer, epoch, batches, after_step)
            run.end_epoch_of_refit(optimizer, epoch, epochs)
        run.end_turn(chosen)


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
    of: Moving | Together
    """The parametrization of the model batch that moves now."""
    order: Sequence[int] = ()
    """The positions of the ingredients, ordered by step."""
    refits: bool = False
    """Whether a refit follows, or has begun."""
    tensor: np.ndarray | None = None
    """The tensor of each block, int64 [B], if whole tensors move in the first half of the turns."""

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
            state.gram = torch.from_numpy(pool.gram_of_blocks()) if options.whiten else None
            save_state(state, state_file)  # measurements, which could turn out differently the next time
        return run

    @property
    def steps_per_turn(self) -> int:
        return self.steps_per_epoch * self.recipe.learn.epochs

    @property
    def largest_rate(self) -> float:
        """The learning rate of this turn before its schedule."""
        return largest_rate(self.recipe.learn, self.of.norms.size)

    @property
    def total_steps(self) -> int:
        """Steps over all turns, at most; those of a refit are known once it has begun."""
        most = len(self.turns) * self.steps_per_turn
        if self.state.before is None:
            return (1 + self.refits) * most
        again = sum(map(self.best_epochs, range(len(self.turns)))) * self.steps_per_epoch
        return int(self.state.curve[-1]["steps"]) + again

    def best_epochs(self, turn: int) -> int:
        """Return the epochs of a turn that led to its best point on select."""
        return best_epochs(self.state.curve, turn, self.recipe.select_by)

    def joint_batches(self, turn: int, number: int) -> list[list[Split]]:
        """Return the batches of pass `number` over fit and select in the refit of a turn."""
        return joint_batches(self.fit, self.select, self.recipe.learn.batch_size, self.recipe.learn.seed, 5, turn, number)

    def x(self) -> np.ndarray:
        """Return the coordinates that are sent to the actors, float32 [m, B]."""
        assert self.state.moving is not None
        return self._sent(self.state.moving)

    def _sent(self, moving: torch.Tensor) -> np.ndarray:
        return self.of.x(moving.numpy()).astype(np.float32)

    def _in_y(self, moving: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.of.to_y(moving.numpy()))

    def begin_turn(self, turn: int) -> tuple[np.ndarray, torch.optim.Optimizer]:
        """Begin a turn from the point in the state; return its model batch and its optimizer."""
        state, chosen = self.state, self.turns[turn]
        state.turn = turn  # a refit skips turns
        softmax = self.recipe.info.kind == "softmax"
        gram, y = None if state.gram is None else state.gram.numpy(), state.y.numpy()
        if self.tensor is not None and turn < len(self.turns) // 2:
            self.of = moving_together(self.recipe.learn, self.norms, gram, chosen, y, self.tensor)
        else:
            self.of = moving_coordinates(self.recipe.learn, softmax, self.norms, gram, chosen, y)
        everything = parametrization(softmax, self.norms)
        self.pool.begin(chosen, everything.x(y).astype(np.float32), state.precision)
        if state.moving is None:
            state.moving = torch.from_numpy(self.of.from_y(y[chosen])).clone()
            state.best = state.y[chosen].clone()
        if state.statistics is None:
            self.recalibrate()
        else:
            self.pool.use({name: tensor.numpy() for name, tensor in state.statistics.items()})
        learned = [state.factor] if self.of.learns_factor else []
        optimizer = make_optimizer(self.recipe.learn, self.largest_rate, state.moving, *learned)
        if state.optimizer is not None:
            optimizer.load_state_dict(state.optimizer)
        if turn == 0 and not state.curve:
            start = self.pool.evaluate(self.x(), 1.0, self.select)
            state.best_cost = cost(start, self.recipe.select_by)
            state.curve.append({"turn": 0, "epoch": -1, **figures_on_select(start), "steps": 0})
        return chosen, optimizer

    def take_steps(
        self, optimizer: torch.optim.Optimizer, epoch: int, batches: Sequence[Sequence[Split]], after_step: StateCallback
    ) -> None:
        """Take the steps of an epoch that are left; each batch consists of one part per source of data."""
        state = self.state
        for step in range(state.step, self.steps_per_epoch):
            begun = time.perf_counter()
            x, batch = self.x(), batches[step]
            with self.saving_after(KeyboardInterrupt, optimizer):
                answers = [self.pool.step(x, state.factor.item(), part) for part in batch]
            with self.saving_after(Stopped, optimizer), uninterrupted():
                partials = [partial for answer in answers for partial in answer]
                self.move(optimizer, partials, epoch * self.steps_per_epoch + step)
                state.step = step + 1
                count_step(state, answers, sum(map(len, batch)), x, time.perf_counter() - begun)
            after_step(state.steps, self.total_steps, state)
            self.save_if_due(optimizer)

    def move(self, optimizer: torch.optim.Optimizer, partials: list[Partial], step: int) -> None:
        """Take one optimizer step of the moving coordinates on the partial gradients of a batch."""
        state, options = self.state, self.recipe.learn
        assert state.moving is not None
        weight = sum(p.weight for p in partials) or 1.0  # a batch may have nothing to score
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, self.largest_rate, step, self.steps_per_turn)
        rough = self.by_roughness() if options.smoothness else None
        state.moving.grad = torch.from_numpy(gradient_of(partials, weight, self.of, options.clip, state, rough))
        state.factor.grad = torch.tensor(sum(p.by_factor for p in partials) / weight, dtype=torch.float64)
        optimizer.step()
        if options.average:
            state.total = state.moving.clone() if state.total is None else state.total + state.moving
            state.total_factor += state.factor.item()

    def point(self) -> tuple[torch.Tensor, float]:
        """Return the coordinates float64 [m, B], and the factor, that this epoch has led to: its last, or their mean."""
        state = self.state
        assert state.moving is not None
        if state.total is None:
            return state.moving.clone(), state.factor.item()
        return state.total / state.step, state.total_factor / state.step

    def by_roughness(self) -> np.ndarray:
        """Return the gradient of the penalty `learn.smoothness` with respect to x, float64 [m, B].

        Coefficients are linear in x, c = x + (1 - sum_j x_j) / K, so that dP/dx_k = dP/dc_k - mean_j dP/dc_j. With a
        softmax, x sums to 1, and what is the same for all k changes nothing.
        """
        state, chosen = self.state, self.turns[self.state.turn]
        assert state.moving is not None
        y = state.y.numpy().copy()
        y[chosen] = self.of.to_y(state.moving.numpy())
        everything = parametrization(self.recipe.info.kind == "softmax", self.norms)
        _, by_c = roughness(everything.coefficients(y), self.order)
        found: np.ndarray = self.recipe.learn.smoothness * (by_c - by_c.mean(axis=0))[chosen]
        return found

    def end_epoch(self, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Evaluate on select, remember the best point, and save."""
        state = self.state
        (point, factor), averaged = self.point(), state.total is not None
        self.recalibrate(point)
        score = self.pool.evaluate(self._sent(point), factor, self.select)
        found = cost(score, self.recipe.select_by)
        if found < state.best_cost:
            state.best_cost, state.best, state.best_factor = found, self._in_y(point), factor
        state.curve.append(
            {
                "turn": state.turn, "epoch": epoch, "fit_nll": state.fit_loss / max(state.fit_count, 1e-300),
                **figures_on_select(score), "steps": state.steps,
                "lr": optimizer.param_groups[0]["lr"],
            }
        )  # fmt: skip
        metrics.count_epoch(state.curve[-1]["select_nll"])
        self._begin_epoch(optimizer, epoch + 1, averaged and epoch + 1 < self.recipe.learn.epochs)

    def _begin_epoch(self, optimizer: torch.optim.Optimizer, epoch: int, recalibrates: bool) -> None:
        state = self.state
        state.epoch, state.step, state.fit_loss, state.fit_count = epoch, 0, 0.0, 0.0
        state.total, state.total_factor = None, 0.0
        if recalibrates:  # the statistics in use are those of another point
            self.recalibrate()
        self.save(optimizer)

    def begin_refit(self) -> None:
        """Go back to the start, and keep the soup that was learned."""
        state = self.state
        state.before, state.before_factor = state.y.clone(), state.factor.item()
        state.y = torch.zeros_like(state.y) if state.start is None else state.start.clone()
        state.turn, state.best_factor = 0, 1.0
        state.factor.fill_(state.best_factor)
        self.save(None)

    def end_epoch_of_refit(self, optimizer: torch.optim.Optimizer, epoch: int, epochs: int) -> None:
        """Keep the point that one of the `epochs` of a turn has led to, and save: nothing is chosen."""
        point, self.state.best_factor = self.point()
        self.state.best = self._in_y(point)
        self._begin_epoch(optimizer, epoch + 1, epoch + 1 < epochs)

    def end_turn(self, chosen: np.ndarray) -> None:
        """Put the model batch at its best point."""
        state = self.state
        assert state.best is not None
        state.y[chosen] = state.best
        state.factor.fill_(state.best_factor)
        state.turn, state.epoch, state.moving, state.best, state.statistics = state.turn + 1, 0, None, None, None
        self.save(None)

    def recalibrate(self, point: torch.Tensor | None = None) -> None:
        """Re-estimate running statistics at the moving coordinates, or at `point`, if this run does so at all."""
        if self.calibration:
            found = self.pool.recalibrate(self.x() if point is None else self._sent(point), self.calibration)
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

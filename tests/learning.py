"""Learn with actors in this process: what the tests of the learning loop share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ray_soup.actors.messages import StoreInfo
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.learn import learn
from ray_soup.soups.optimize import learning_rate, without_noise
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run
from ray_soup.soups.state import LearnState, StateCallback, ignore_state
from ray_soup.task.data import Split, batch_positions, calibration_batches, cut_splits
from ray_soup.tune.resume import resume
from tests import tiny
from tests.conftest import InProcess, values


class Learner:
    """A pool in this process with the directions of a zoo, and the recipe to learn with."""

    def __init__(self, folder: Path, size: int = 1, calibrated: int = 0, **changes: Any) -> None:
        """Set up the pool.

        Args:
            folder: the zoo.
            size: number of replicas.
            calibrated: number of examples of fit that running statistics are re-estimated on.
            **changes: keys of the recipe, as for `values`.
        """
        self.recipe: Recipe = make_recipe(values(folder, directions={"dtype": "float32"}, **changes))
        self.pool = InProcess(self.recipe, size)
        self.calibrated = calibrated
        self.store: StoreInfo = self.pool.open_all(self.recipe.blocks)
        info, options = self.pool.setup_info, self.recipe.learn
        self.splits: dict[str, Split] = cut_splits(self.recipe.data, info.sizes, info.fit_digests, options.seed)
        self.count = len(self.pool.inputs.ingredients)
        self.beginning: Any = None

    def learn(self, file: Path, after_step: StateCallback = ignore_state, **options: Any) -> LearnState:
        """Learn from the state in `file`, if there is one."""
        self.store = self.pool.open_all(self.recipe.blocks)
        settings, size = self.recipe.learn, self.recipe.learn.model_batch
        batches = calibration_batches(self.splits["fit"], settings.batch_size, settings.seed, self.calibrated)
        return learn(
            self.recipe, self.pool, self.store.norms, self.splits, self.count if size == "auto" else size, file, after_step,
            calibration=batches if self.calibrated else [], **options,
        )  # fmt: skip


def stopping(at: int) -> Callable[[int, int, LearnState], None]:
    """Return a callback that interrupts a run after this many steps."""

    def after_step(step: int, steps: int, state: LearnState) -> None:
        if step == at:
            raise KeyboardInterrupt

    return after_step


def whole_and_stopped(recipe: Recipe, folder: Path) -> tuple[Soup, Soup]:
    """Make a soup twice below a folder: at once, and interrupted near the end of learning and resumed."""
    whole = run(recipe, folder / "whole")

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and done == total - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder / "stopped", progress=stop)
    found = resume(folder / "stopped").soup
    assert found is not None
    return whole, found


def same(found: LearnState, expected: LearnState) -> None:
    """Check that two runs have led to the same bits."""
    for name in ("y", "factor"):
        np.testing.assert_array_equal(getattr(found, name).numpy(), getattr(expected, name).numpy())
    for name in ("curve", "steps", "image_passes", "best_cost", "best_factor"):
        assert getattr(found, name) == getattr(expected, name), name


def by_autograd(
    learner: Learner,
    y: torch.Tensor,
    chosen: np.ndarray,
    batches: Sequence[np.ndarray],
    rates: Sequence[float],
    whiten: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Take steps of AdamW on the hyperplane by autograd over a graph of all ingredients.

    Args:
        learner: the zoo, as float32 safetensors of `tiny.Tiny`.
        y: float64 [K, B], where the turn begins.
        chosen: the ingredients that move.
        batches: positions of the held-out examples of each step.
        rates: learning rate of each step.
        whiten: float64 [B, m, m]: the optimizer moves z, with y = whiten z in each block, and the turn begins at z = 0.

    Returns:
        y of the moving ingredients after each step, float64 [m, B] each.
    """
    states = [load_file(ingredient.path) for ingredient in learner.pool.inputs.ingredients]
    names, blocks = learner.pool.layout.names, learner.store.partition.block.tolist()
    stacked = {name: torch.stack([state[name] for state in states]) for name in names}
    images, labels = (torch.from_numpy(array[600:1197]) for array in tiny.digits())
    norms, count = torch.from_numpy(learner.store.norms), len(states)
    moving = (y[chosen] if whiten is None else torch.zeros_like(y[chosen])).clone().requires_grad_()
    optimizer = torch.optim.AdamW([moving], weight_decay=learner.recipe.learn.wd)
    found = []
    for batch, rate in zip(batches, rates, strict=True):
        own = moving if whiten is None else torch.einsum("bij,jb->ib", whiten, moving)
        everything = y.clone().index_copy(0, torch.from_numpy(chosen), own)
        x = everything / norms
        c = torch.cat([x + (1 - x.sum(0)) / count, torch.full((count, 1), 1 / count)], dim=1).float()  # the last: MEAN
        soup = {name: torch.einsum("k,k...->...", c[:, b], stacked[name]) for name, b in zip(names, blocks, strict=True)}
        loss = F.cross_entropy(torch.func.functional_call(tiny.Tiny().eval(), soup, (images[batch],)), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        assert moving.grad is not None
        moving.grad = torch.from_numpy(without_noise(moving.grad.numpy()))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            found.append((moving if whiten is None else torch.einsum("bij,jb->ib", whiten, moving)).clone())
    return found


def assert_learns_as_autograd(learner: Learner, file: Path, matrices: np.ndarray, rate: float) -> None:
    """Check 16 steps of two epochs against autograd, with y = matrices z in each block, matrices float64 [B, m, m]."""
    seen: list[np.ndarray] = []
    learner.learn(file, lambda step, steps, state: seen.append(state.moving.numpy().copy()))
    rows = learner.splits["fit"].rows
    batches = [rows[positions] for epoch in range(2) for positions in batch_positions(448, 61, 1, 2, 0, epoch)]
    rates = [learning_rate(learner.recipe.learn, rate, step, 16) for step in range(16)]
    zero = torch.zeros(learner.store.norms.shape, dtype=torch.float64)
    found = by_autograd(learner, zero, np.arange(8), batches, rates, torch.from_numpy(matrices))
    ours = np.einsum("bij,jb->ib", matrices, seen[-1])
    np.testing.assert_allclose(ours, found[-1].numpy(), rtol=1e-3, atol=1e-4)
    assert np.abs(ours).max() > 0.1

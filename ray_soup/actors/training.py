"""Train all weights of a model on fit, from a written soup, stopped on select.

The optimizer is AdamW, with linear warm-up over a tenth of the steps and cosine decay to zero; the model stays in eval mode,
as in learning. What is evaluated after an epoch is the model as a file would hold it: the soup plus a float32 difference,
rounded to the dtypes of the soup.

The state is saved after each epoch and at least every minute. An actor that replaces a lost one, and a run that is resumed,
continue from it; the result is bit-identical.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import ExitStack
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

from ray_soup.actors import precision as precisions
from ray_soup.actors.evaluation import score
from ray_soup.actors.group import ShardGroup
from ray_soup.actors.messages import Heartbeat, TrainingJob, TrainingResult
from ray_soup.actors.replica import Replica, tensor_of
from ray_soup.actors.training_state import TrainingState, load_state, save_state
from ray_soup.errors import SoupError
from ray_soup.io import kept, storage
from ray_soup.io.hashing import sha256_file
from ray_soup.io.progress import labelled
from ray_soup.mixing.difference import trained, write_difference
from ray_soup.mixing.running_statistics import averaged
from ray_soup.task import models
from ray_soup.task.attention import FastAttention
from ray_soup.task.choices import cost, figures_on_select
from ray_soup.task.data import Split, batch_positions
from ray_soup.task.outcomes import Score

T = TypeVar("T")

SAVE_EVERY_S = 60.0
SAVING = 0.1
"""Share of the time that saving the state within an epoch may take."""
ORDER = 5
"""Tells the order of the examples from other random draws of the same seed."""


def cosine_with_warmup(step: int, steps: int) -> float:
    """Return the share of the largest learning rate at 0 <= step < steps: a linear warm-up over a tenth, then a cosine."""
    return min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(replica: Replica, job: TrainingJob, group: ShardGroup, parts: int) -> Generator[Heartbeat, None, TrainingResult]:
    """Train the replica's model, which is in an arbitrary state afterwards; resume from the job's state if there is one.

    Every batch has as many `parts`, which the members of the group share. Gradients are summed part by part, so the result
    does not depend on the number of members. The first member writes the files.

    Raises RecipeError if that state is damaged, SoupError if the loss is not finite at the first step.
    """
    run = _Training(replica, job, group, parts)
    if run.is_finished():
        return run.result()
    replica.hold_gradients(np.ones(len(replica.layout.names), dtype=bool))
    try:
        yield from run.open_soup()
        yield from run.start()
        while not run.is_finished():
            run.take_step()
            yield job.what, run.state.step, run.steps
            if run.state.step % run.steps_per_epoch == 0 and not run.state.stopped:
                yield from run.end_epoch()
            elif run.state.stopped or time.monotonic() - run.saved > max(SAVE_EVERY_S, run.saving_s / SAVING):
                run.save()
    except torch.OutOfMemoryError:  # of a GPU
        run.state.stopped = "memory"
    finally:
        run.opened.close()
    return run.result()


class _Training:
    """A run of `train`: its job, its state, and the parts of the loop."""

    def __init__(self, replica: Replica, job: TrainingJob, group: ShardGroup, parts: int) -> None:
        self.replica, self.job, self.group, self.parts = replica, job, group, parts
        self.mine = range(group.shard, parts, group.shards)
        self.steps_per_epoch = -(-len(job.fit) // job.batch_size)
        self.steps = job.epochs * self.steps_per_epoch
        self.file = f"{job.stem}.pt"
        self.saved, self.saving_s = time.monotonic(), 0.0
        self.shapes = dict(zip(replica.layout.names, replica.layout.shapes, strict=True))
        self.state = TrainingState(job.task, job.precision)
        if storage.isfile(self.file):
            self.state = load_state(self.file, job, self.steps, replica.layout.numel, hashed=group.shard == 0)
        self.autocast = precisions.autocast(self.state.precision, replica.device)
        self.opened = ExitStack()
        """Closes the soup."""

    def is_finished(self) -> bool:
        """Return whether there is nothing left to do."""
        return self.state.step == self.steps or bool(self.state.stopped)

    @cached_property
    def theta(self) -> torch.Tensor:
        """The parameter vector, float32 [N], without the padding of shards."""
        return self.replica.theta[: self.replica.layout.numel]

    @cached_property
    def gradient(self) -> torch.Tensor:
        """Its gradient, float32 [N]."""
        return self.replica.gradient[: self.replica.layout.numel]

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the whole parameter vector; weight decay is up to `take_step`."""
        self.theta.grad = self.gradient
        made = torch.optim.AdamW([self.theta], lr=self.job.lr, weight_decay=0.0, fused=True)
        if self.state.optimizer is not None:
            made.load_state_dict(self.state.optimizer)
            self.state.optimizer = None
        return made

    def best_file(self) -> str:
        """Return the file of differences of the best epoch."""
        return f"{self.job.stem}.best{self.state.best_epoch}.safetensors"

    def open_soup(self) -> Generator[Heartbeat, None, None]:
        """Open the soup; every epoch reads it twice, so one in remote storage is copied to this node."""
        path = self.job.start
        if storage.is_remote(path):
            folder, _, name = path.rpartition("/")
            has_parts = name.endswith(".json")
            hold, copy = yield from labelled("fetching the soup", storage.cached_copy(folder if has_parts else path))
            self.opened.callback(hold.discard)
            path = str(copy / name if has_parts else copy)
        self.soup = models.fitting(self.replica.layout, path, self.replica.recipe.ignore)
        self.opened.callback(self.soup.close)

    def start(self) -> Generator[Heartbeat, None, None]:
        """Go to the point in the state, or evaluate the soup."""
        replica, state = self.replica, self.state
        models.copy_tensors(self.soup, replica.model, replica.layout.buffers)
        for name, low, high in replica.layout.spans():
            self.theta[low:high].copy_(self.soup.read(name))
        replica.round_weights()
        if state.theta is not None:
            self.theta.copy_(state.theta)
            replica.copy_buffers(state.statistics)
            replica.theta_changed()
            state.theta = None
        elif not state.curve:
            found = yield from self._evaluate()
            state.best_cost = cost(found, replica.recipe.select_by)
            state.curve.append({"turn": 0, "epoch": -1, **figures_on_select(found), "steps": 0})

    def take_step(self) -> None:
        """Take one step on a batch; if the loss is not finite, stop instead."""
        replica, state, job = self.replica, self.state, self.job
        epoch, number = divmod(state.step, self.steps_per_epoch)
        if number == 0:
            state.loss = state.weight = 0.0
        rows = batch_positions(len(job.fit), job.batch_size, job.seed, ORDER, epoch)[number]
        loss, weight, failed = self._gradient(Split(job.fit.source, job.fit.rows[rows]))
        if failed:
            state.stopped = "memory"
            return
        size = torch.linalg.vector_norm(self.gradient).item()
        if not math.isfinite(loss + size):
            if state.step == 0:
                raise SoupError(
                    "The loss is not finite at the first step. Look for NaN in the inputs of data.fit or in `loss:`."
                )
            state.stopped = "diverged"
            return
        lr = job.lr * cosine_with_warmup(state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for _, low, high in replica.layout.spans() if job.wd else ():
            if self.gradient[low:high].any():  # torch, too, leaves out tensors without a gradient
                self.theta[low:high].mul_(1 - lr * job.wd)
        self.optimizer.step()
        replica.theta_changed()
        state.step += 1
        state.image_passes += len(rows)
        state.loss += loss
        state.weight += weight

    def _gradient(self, batch: Split) -> tuple[float, float, float]:
        """Compute the gradient of the mean loss on a batch.

        Returns the sums of losses and weights, and how many parts lacked memory.
        """
        parts, members = batch.parts(self.parts), self.group.shards
        sums = torch.zeros(self.parts, 3, dtype=torch.float64)
        total: torch.Tensor | None = None
        for first in range(0, self.parts, members):  # each member takes one of these parts
            self.gradient.zero_()
            part = first + self.group.shard
            if part < self.parts:
                sums[part] = torch.tensor(self._accumulate(parts[part]), dtype=torch.float64)
            if self.parts > 1:
                total = self.group.add_in_order(total, self.gradient, min(members, self.parts - first))
        if total is not None:
            self.group.gather_slices(total, self.gradient)
        self.group.sum(sums)  # each row comes from one member
        losses, weights, lacking = (sum(column) for column in zip(*sums.tolist(), strict=True))
        self.gradient.div_(weights or 1.0)  # a batch may have nothing to score
        return losses, weights, lacking

    def _accumulate(self, part: Split) -> tuple[float, float, float]:
        """Add the gradient of the losses on a part; return the sums of losses and weights, and 1 if memory was lacking."""
        replica, objective = self.replica, self.replica.objective
        loss_sum, weight = torch.zeros(2, dtype=torch.float64, device=replica.device)
        try:
            with FastAttention():
                for inputs, targets in replica.micro_batches(part):
                    with self.autocast:
                        outputs = replica.outputs(inputs)
                    scaled = objective.scaled(outputs.float(), 1.0)
                    loss = replica.loss(scaled, targets, replica.recipe.learn.label_smoothing)
                    torch.autograd.backward(loss)
                    loss_sum += loss.detach()
                    weight += objective.weights(targets).sum()
        except torch.OutOfMemoryError:  # of a GPU; the other members wait for this one
            return loss_sum.item(), weight.item(), 1.0
        return loss_sum.item(), weight.item(), 0.0

    def end_epoch(self) -> Generator[Heartbeat, None, None]:
        """Evaluate on select what a file would hold, remember the best epoch, and save."""
        replica, state = self.replica, self.state
        epoch = state.step // self.steps_per_epoch - 1
        self.group.share(self.theta)  # other hardware may round in another way
        self.gradient.copy_(self.theta)  # the gradient is not needed between two steps
        finite = self._round()
        yield from self._recalibrate()
        found = yield from self._evaluate()
        value = cost(found, replica.recipe.select_by) if finite else math.inf
        state.curve.append(
            {
                "turn": 0, "epoch": epoch, "fit_nll": state.loss / max(state.weight, 1e-300), **figures_on_select(found),
                "steps": state.step, "lr": self.optimizer.param_groups[0]["lr"],
            }
        )  # fmt: skip
        self.theta.copy_(self.gradient)
        replica.theta_changed()
        if value < state.best_cost:
            state.best_cost, state.best_epoch = value, epoch
            if self.group.shard == 0:
                with kept.written(self.best_file()) as here:
                    write_difference(here, self.shapes, self._difference)
                    state.best_sha256 = sha256_file(str(here))
        self.save()
        if self.group.shard == 0:
            for file in kept.found(f"{self.job.stem}.best"):
                if file != self.best_file():
                    storage.remove(file)

    def _difference(self, name: str) -> torch.Tensor:
        """Return the difference of a tensor from the soup, float32 [n], on the CPU."""
        low, high = self._span[name]
        return self.theta[low:high].cpu() - self.soup.read(name).float()

    @cached_property
    def _span(self) -> dict[str, tuple[int, int]]:
        return {name: (low, high) for name, low, high in self.replica.layout.spans()}

    def _round(self) -> bool:
        """Replace the parameters by those that a file would hold; return whether all of them are finite."""
        finite = True
        for name, low, high in self.replica.layout.spans():
            soup = self.soup.read(name)
            values = trained(soup, self._difference(name), soup.dtype).float()
            self.theta[low:high].copy_(values)
            finite = finite and bool(torch.isfinite(values).all())
        self.soup.drop_pages()
        self.replica.theta_changed()
        return finite

    def _recalibrate(self) -> Generator[Heartbeat, None, None]:
        """Re-estimate the running statistics, if this job does so at all."""
        if self.job.calibration:
            sums = {}
            for part in self.mine:
                sums[part] = yield from self.replica.sum_statistics(self.job.calibration[part :: self.parts])
            found = {name: tensor_of(values) for name, values in averaged(self._of_all_parts(sums)).items()}
            self.state.statistics = {name: v for name, v in found.items() if name in self.replica.layout.buffers}
            self.replica.copy_buffers(self.state.statistics)
            self.state.image_passes += sum(map(len, self.job.calibration))

    def _evaluate(self) -> Generator[Heartbeat, None, Score]:
        """Score the model on select, in float32."""
        parts, scores = self.job.select.parts(self.parts), {}
        for part in self.mine:
            total = Score()
            for piece in self.replica.pieces(parts[part]):
                total += score(self.replica, piece)
                yield "evaluating", total.count, len(parts[part])
            scores[part] = total
        return sum(self._of_all_parts(scores), Score())

    def _of_all_parts(self, mine: dict[int, T]) -> list[T]:
        """Return what all members have found for their parts, in the order of parts."""
        found = {part: value for values in self.group.collect(mine) for part, value in values.items()}
        return [found[part] for part in range(self.parts)]

    def save(self) -> None:
        """Write the state atomically; at the end without what only further steps would need."""
        begun = time.monotonic()
        if self.group.shard == 0:
            more = {} if self.is_finished() else {"theta": self.theta, "optimizer": self.optimizer.state_dict()}
            save_state(self.state, self.file, more)
        self.saved = time.monotonic()
        self.saving_s = self.saved - begun

    def result(self) -> TrainingResult:
        """Return the result of the job."""
        state = self.state
        best = self.best_file() if state.best_epoch >= 0 else ""
        return TrainingResult(
            state.curve, state.best_epoch, state.best_cost, best, state.precision, state.step, state.image_passes,
            state.stopped,
        )  # fmt: skip

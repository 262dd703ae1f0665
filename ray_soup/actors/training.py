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
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup.actors import precision as precisions
from ray_soup.actors.evaluation import score
from ray_soup.actors.group import ShardGroup
from ray_soup.actors.messages import Heartbeat, TrainingJob, TrainingResult
from ray_soup.actors.replica import Replica, tensor_of
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.disk import replacing
from ray_soup.io.hashing import sha256_file
from ray_soup.io.state_archive import check_archive
from ray_soup.mixing.difference import trained, write_difference
from ray_soup.mixing.running_statistics import averaged
from ray_soup.task import models
from ray_soup.task.choices import cost, figures_on_select
from ray_soup.task.data import Split, batch_positions
from ray_soup.task.outcomes import Score

VERSION = 1
SAVE_EVERY_S = 60.0
ORDER = 5
"""Tells the order of the examples from other random draws of the same seed."""


def cosine_with_warmup(step: int, steps: int) -> float:
    """Return the share of the largest learning rate at 0 <= step < steps: a linear warm-up over a tenth, then a cosine."""
    return min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))


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


def train(replica: Replica, job: TrainingJob, group: ShardGroup) -> Generator[Heartbeat, None, TrainingResult]:
    """Train the replica's model, which is in an arbitrary state afterwards; resume from the job's state if there is one.

    Each member of the group takes its part of every batch; gradients are summed, and the first member writes the files.

    Raises RecipeError if that state is damaged, SoupError if the loss is not finite at the first step.
    """
    run = _Training(replica, job, group)
    if run.is_finished():
        return run.result()
    replica.hold_gradients(np.ones(len(replica.layout.names), dtype=bool))
    try:
        yield from run.start()
        while not run.is_finished():
            run.take_step()
            yield job.what, run.state.step, run.steps
            if run.state.step % run.steps_per_epoch == 0 and not run.state.stopped:
                yield from run.end_epoch()
            elif run.state.stopped or time.monotonic() - run.saved > SAVE_EVERY_S:
                run.save()
    except torch.OutOfMemoryError:  # of a GPU
        run.state.stopped = "memory"
    finally:
        run.soup.close()
    return run.result()


class _Training:
    """A run of `train`: its job, its state, and the parts of the loop."""

    def __init__(self, replica: Replica, job: TrainingJob, group: ShardGroup) -> None:
        self.replica, self.job, self.group = replica, job, group
        self.steps_per_epoch = -(-len(job.fit) // job.batch_size)
        self.steps = job.epochs * self.steps_per_epoch
        self.file = Path(f"{job.stem}.pt")
        self.saved = time.monotonic()
        self.shapes = dict(zip(replica.layout.names, replica.layout.shapes, strict=True))
        self.state = TrainingState(job.task, job.precision)
        if self.file.exists():
            self.state = _load(self.file, job, self.steps, replica.layout.numel)
        self.autocast = precisions.autocast(self.state.precision, replica.device)
        self.soup = models.fitting(replica.layout, job.start, replica.recipe.ignore)

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

    def best_file(self) -> Path:
        """Return the file of differences of the best epoch."""
        return Path(f"{self.job.stem}.best{self.state.best_epoch}.safetensors")

    def start(self) -> Generator[Heartbeat, None, None]:
        """Go to the point in the state, or evaluate the soup."""
        replica, state = self.replica, self.state
        models.copy_tensors(self.soup, replica.model, replica.layout.state_shapes)
        if state.theta is not None:
            self.theta.copy_(state.theta)
            replica.copy_buffers(state.statistics)
            replica.update_computed_buffers()
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
        loss, weight, failed = self._gradient(self._part(Split(job.fit.source, job.fit.rows[rows])))
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
        replica.update_computed_buffers()
        state.step += 1
        state.image_passes += len(rows)
        state.loss += loss
        state.weight += weight

    def _part(self, split: Split) -> Split:
        """Return this member's part of a split."""
        return split.parts(self.group.shards)[self.group.shard]

    def _gradient(self, part: Split) -> tuple[float, float, float]:
        """Compute the gradient of the mean loss on a batch, of which this member has a part.

        Returns the sums of losses and weights, and how many members lacked memory.
        """
        replica, objective = self.replica, self.replica.objective
        self.gradient.zero_()
        loss_sum, weight = torch.zeros(2, dtype=torch.float64, device=replica.device)
        failed = 0.0
        try:
            for inputs, targets in replica.micro_batches(part):
                with self.autocast:
                    outputs = replica.model(inputs)
                scaled = objective.scaled(outputs.float(), 1.0)
                loss = replica.loss(scaled, targets, replica.recipe.learn.label_smoothing)
                torch.autograd.backward(loss)
                loss_sum += loss.detach()
                weight += objective.weights(targets).sum()
        except torch.OutOfMemoryError:  # of a GPU; the other members wait for this one
            failed = 1.0
        sums = torch.tensor([loss_sum.item(), weight.item(), failed], dtype=torch.float64)
        self.group.sum(sums)
        self.group.sum(self.gradient)
        total, count, lacking = sums.tolist()
        self.gradient.div_(count or 1.0)  # a batch may have nothing to score
        return total, count, lacking

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
        replica.update_computed_buffers()
        if value < state.best_cost:
            state.best_cost, state.best_epoch = value, epoch
            if self.group.shard == 0:
                write_difference(self.best_file(), self.shapes, self._difference)
                state.best_sha256 = sha256_file(str(self.best_file()))
        self.save()
        for file in self.file.parent.glob(f"{self.file.stem}.best*.safetensors"):
            if file != self.best_file() and self.group.shard == 0:
                file.unlink(missing_ok=True)

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
        self.replica.update_computed_buffers()
        return finite

    def _recalibrate(self) -> Generator[Heartbeat, None, None]:
        """Re-estimate the running statistics, if this job does so at all."""
        if self.job.calibration:
            mine = self.job.calibration[self.group.shard :: self.group.shards]
            sums = yield from self.replica.sum_statistics(mine)
            found = {name: tensor_of(values) for name, values in averaged(self.group.collect(sums)).items()}
            self.state.statistics = {name: v for name, v in found.items() if name in self.replica.layout.buffers}
            self.replica.copy_buffers(self.state.statistics)
            self.state.image_passes += sum(map(len, self.job.calibration))

    def _evaluate(self) -> Generator[Heartbeat, None, Score]:
        """Score the model on select, in float32."""
        total, part = Score(), self._part(self.job.select)
        for piece in self.replica.pieces(part):
            total += score(self.replica, piece)
            yield "evaluating", total.count, len(part)
        return sum(self.group.collect(total), Score())

    def save(self) -> None:
        """Write the state atomically; at the end without what only further steps would need."""
        self.saved = time.monotonic()
        if self.group.shard > 0:
            return
        values = {name: getattr(self.state, name) for name in TrainingState.__dataclass_fields__} | {"version": VERSION}
        if not self.is_finished():
            values |= {"theta": self.theta, "optimizer": self.optimizer.state_dict()}
        with replacing(self.file) as stream:
            torch.save(values, stream)

    def result(self) -> TrainingResult:
        """Return the result of the job."""
        state = self.state
        best = str(self.best_file()) if state.best_epoch >= 0 else ""
        return TrainingResult(
            state.curve, state.best_epoch, state.best_cost, best, state.precision, state.step, state.image_passes,
            state.stopped,
        )  # fmt: skip


def _load(file: Path, job: TrainingJob, steps: int, parameters: int) -> TrainingState:
    """Read the state of a job. Raises RecipeError if it is damaged, or belongs to another task."""
    try:
        check_archive(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        version = found.pop("version")
        state = TrainingState(**found)
        fault = _fault(state, job, steps, parameters) if version == VERSION else f"it has version {version!r}"
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
    theta, best = state.theta, Path(f"{job.stem}.best{state.best_epoch}.safetensors")
    whole = theta is not None and theta.dtype == torch.float32 and theta.numel() == parameters and state.optimizer
    if state.step < steps and not state.stopped and not whole:
        return f"it has no parameter vector of {parameters:,} elements, or no state of the optimizer"
    if state.best_epoch >= 0 and not (best.is_file() and sha256_file(str(best)) == state.best_sha256):
        return f"{best} is missing, or not as it was written"
    return None

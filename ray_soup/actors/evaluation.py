"""Evaluate models on splits: the current soup as sums, checkpoints and their ensemble example by example."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ray_soup.actors.messages import Heartbeat
from ray_soup.actors.replica import Replica
from ray_soup.task.data import Split
from ray_soup.task.objective import Classification, Objective
from ray_soup.task.outcomes import LOG_FACTORS, Outcome, Score, join_outcomes
from ray_soup.task.own_functions import Function

FLOAT32 = nullcontext()
"""Forward passes in the dtype of the model."""
UNFINISHED = ("",)  # never equal to a list of paths


def score(replica: Replica, split: Split, factor: float = 1.0) -> Score:
    """Score the replica's model on a split, with `factor` on the logits."""
    objective, metric = replica.objective, replica.metric if replica.recipe.select_by == "metric" else None
    loss, weight, right, scores = torch.zeros(4, dtype=torch.float64, device=replica.device)
    has_accuracy = True
    with torch.inference_mode():
        for inputs, targets in replica.micro_batches(split):
            outputs = replica.model(inputs).float()
            loss += replica.loss(objective.scaled(outputs, factor), targets, 0.0)
            weight += objective.weights(targets).sum()
            correct = objective.correct(outputs, targets)
            has_accuracy = correct is not None
            right += 0 if correct is None else correct.sum()
            scores += 0 if metric is None else metric(outputs, targets).sum()
    return Score(
        loss.item(), right.item() if has_accuracy else None, weight.item(),
        None if metric is None else scores.item(), len(split),
    )  # fmt: skip


def outcome_of(
    objective: Objective,
    outputs: torch.Tensor,
    targets: torch.Tensor,
    factored: bool = False,
    metric: Function | None = None,
) -> Outcome:
    """Compute a model's outcome, example by example.

    Args:
        objective: what the outputs are for.
        outputs: float [n, ...].
        targets: [n, ...].
        factored: True to add, for classification, the losses for each factor exp(LOG_FACTORS) on the logits, to find a
            temperature.
        metric: the recipe's metric, if it has one.
    """
    outputs = outputs.float()
    scores = None if metric is None else metric(outputs, targets)
    if type(objective) is not Classification:  # a class derived from it may have other losses
        correct, confidence = objective.correct(outputs, targets), objective.confidence(outputs)
        losses, weights = objective.losses(outputs, targets).double(), objective.weights(targets).double()
        return _outcome(losses, correct, confidence, None, scores, weights)
    log_p = F.log_softmax(outputs, dim=1)
    loss = F.nll_loss(log_p, targets, reduction="none")
    best = log_p.max(dim=1)
    factored_losses = None
    if factored:
        factors = torch.from_numpy(np.exp(LOG_FACTORS)).float().to(outputs.device)
        own = outputs.gather(1, targets[:, None])
        factored_losses = torch.stack([torch.logsumexp(f * outputs, dim=1) - f * own[:, 0] for f in factors], dim=1)
    return _outcome(loss, best.indices == targets, best.values.exp(), factored_losses, scores)


def _outcome(loss: torch.Tensor, *columns: torch.Tensor | None, **named: torch.Tensor) -> Outcome:
    """Make an outcome of tensors on any device."""
    arrays = [None if column is None else column.cpu().numpy() for column in columns]
    return Outcome(loss.cpu().numpy(), *arrays, **{name: column.cpu().numpy() for name, column in named.items()})


def _about(replica: Replica, split: Split, outcome: Outcome) -> Outcome:
    """Add what the data says about the examples of a split: their documents, and their bytes."""
    examples = replica.examples[split.source]
    group, size = (None if column is None else column[split.rows] for column in (examples.groups, examples.bytes))
    return outcome if group is None and size is None else replace(outcome, group=group, size=size)


def evaluate_checkpoint(
    replica: Replica, path: str, splits: list[Split], factored: bool, totals: list[list[torch.Tensor]] | None = None
) -> Generator[Heartbeat, None, list[Outcome]]:
    """Load the checkpoint at `path` into the model and evaluate it on each split, in float32.

    The value of the generator is one outcome per split. Raises IngredientError if the checkpoint does not fit the model.

    Args:
        replica: the replica whose model and data are used.
        path: the checkpoint.
        splits: the splits to evaluate on.
        factored: as in `outcome_of`.
        totals: if given, what an ensemble averages is added to these tensors, a list for each split with one for each
            micro-batch; empty lists are filled.
    """
    replica.load_file(path)
    outcomes = yield from evaluate_model(replica, splits, factored, totals)
    replica.restore_buffers()
    return outcomes


def evaluate_model(
    replica: Replica,
    splits: list[Split],
    factored: bool = False,
    totals: list[list[torch.Tensor]] | None = None,
    precision: AbstractContextManager[object] = FLOAT32,
) -> Generator[Heartbeat, None, list[Outcome]]:
    """Evaluate the replica's model on each split, as `evaluate_checkpoint` does, with forward passes in `precision`."""
    outcomes, done, count = [], 0, sum(map(len, splits))
    for number, split in enumerate(splits):
        parts: list[Outcome] = []
        for piece in replica.pieces(split):
            with precision, torch.inference_mode():
                for inputs, targets in replica.micro_batches(piece):
                    outputs = replica.model(inputs).float()
                    parts.append(outcome_of(replica.objective, outputs, targets, factored, replica.metric))
                    if totals is not None:
                        _add(totals[number], len(parts) - 1, replica.objective.member(outputs, targets))
            done += len(piece)
            yield "evaluating", done, count
        outcomes.append(_about(replica, split, join_outcomes(parts)))
    return outcomes


def _add(totals: list[torch.Tensor], place: int, member: torch.Tensor) -> None:
    """Add a tensor to the one at `place`, or append it there."""
    if place == len(totals):
        totals.append(torch.zeros_like(member))
    totals[place] += member


class Ensemble:
    """The sum of the outputs of several checkpoints, kept between calls, so that each checkpoint is evaluated once.

    Every call names all members so far: an actor that replaces a lost one evaluates the earlier members first.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._members: tuple[str, ...] = ()
        self._totals: list[list[torch.Tensor]] = []

    def add(self, paths: tuple[str, ...], splits: list[Split]) -> Generator[Heartbeat, None, list[Outcome]]:
        """Evaluate the last of the checkpoints `paths` on each split, and add its outputs to those of the earlier ones."""
        if self._members != paths[:-1]:
            self._members = ()
            for end in range(1, len(paths)):
                yield from self.add(paths[:end], splits)
        if not self._members:
            self._totals = [[] for _ in splits]
        before, self._members = self._members, UNFINISHED
        outcomes = yield from evaluate_checkpoint(self._replica, paths[-1], splits, False, self._totals)
        self._members = (*before, paths[-1])
        return outcomes

    def evaluate(self, paths: tuple[str, ...], splits: list[Split]) -> Generator[Heartbeat, None, list[Outcome]]:
        """Evaluate the mean of what the checkpoints `paths` predict for each split."""
        if self._members != paths:
            yield from self.add(paths, splits)
        replica, outcomes = self._replica, []
        for split, totals in zip(splits, self._totals, strict=True):
            parts, batches = [], (b for piece in replica.pieces(split) for b in replica.micro_batches(piece))
            for total, (_, targets) in zip(totals, batches, strict=True):
                parts.append(self._outcome(total / len(paths), targets))
            outcomes.append(_about(replica, split, join_outcomes(parts)))
        return outcomes

    def _outcome(self, mean: torch.Tensor, targets: torch.Tensor) -> Outcome:
        objective = self._replica.objective
        if objective.members_are_outputs:
            return outcome_of(objective, mean, targets, True, self._replica.metric)
        losses, correct = objective.of_members(mean, targets)
        return _outcome(losses.double(), correct, weight=objective.weights(targets).double())

    def forget(self) -> None:
        """Free the sums and start over."""
        self._members, self._totals = (), []

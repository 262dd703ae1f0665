"""Evaluate models on splits: the current soup as sums, checkpoints and their ensemble example by example."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from ray_soup.actors.messages import Heartbeat
from ray_soup.actors.replica import Replica
from ray_soup.io import kept, storage
from ray_soup.io.state_archive import check_archive
from ray_soup.task.data import Split
from ray_soup.task.objective import Classification, Objective
from ray_soup.task.outcomes import LOG_FACTORS, Outcome, Score, join_outcomes, joined_names
from ray_soup.task.own_functions import Function

FLOAT32 = nullcontext()
"""Forward passes in the dtype of the model."""
UNFINISHED = ("",)  # never equal to a list of paths
SAVING = 0.1
"""Share of the time that saving the sum of an ensemble may take."""


def score(replica: Replica, split: Split, factor: float = 1.0) -> Score:
    """Score the replica's model on a split, with `factor` on the logits."""
    objective, metric = replica.objective, replica.metric if replica.recipe.select_by == "metric" else None
    loss, weight, right, scores = torch.zeros(4, dtype=torch.float64, device=replica.device)
    has_accuracy = True
    with torch.inference_mode():
        for inputs, targets in replica.micro_batches(split):
            outputs = replica.outputs(inputs).float()
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
        found = _outcome(losses, correct, confidence, None, scores, weights)
        return _with_scores(found, objective.scores(outputs, targets))
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


def _with_scores(outcome: Outcome, scores: Mapping[str, torch.Tensor]) -> Outcome:
    """Add what the objective's `scores` returned."""
    named = joined_names({name: found.detach().cpu().numpy() for name, found in scores.items()})
    return outcome if named is None else replace(outcome, named=named)


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
                    outputs = replica.outputs(inputs).float()
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
    """The sum of the outputs of several checkpoints on the examples of one rank, kept between calls.

    So each checkpoint is evaluated once. Every call names all members so far: an actor that begins to serve the rank, or a
    run that is resumed, continues with what was saved, and evaluates members that are not in there.

    Args:
        replica: the replica whose model and data are used.
        file: where the sum is saved; empty: nowhere.
        task: digest of everything that outputs depend on, without which a saved sum is not used.
    """

    def __init__(self, replica: Replica, file: str = "", task: str = "") -> None:
        self._replica, self._file, self._task = replica, file, f"{task} {replica.micro_batch}"
        self._members: tuple[str, ...] = ()
        self._totals: list[list[torch.Tensor]] = []
        self._last: list[Outcome] = []
        """Outcomes of the last member."""
        self._saved, self._saving_s = time.monotonic(), 0.0

    def add(self, paths: tuple[str, ...], splits: list[Split]) -> Generator[Heartbeat, None, list[Outcome]]:
        """Evaluate the last of the checkpoints `paths` on each split, and add its outputs to those of the earlier ones."""
        if not self._members or self._members != paths[: len(self._members)]:
            self._load(paths)
        for end in range(len(self._members) + 1, len(paths) + 1):
            if not self._members:
                self._totals = [[] for _ in splits]
            before, self._members = self._members, UNFINISHED
            self._last = yield from evaluate_checkpoint(self._replica, paths[end - 1], splits, False, self._totals)
            self._members = (*before, paths[end - 1])
            self._save()
        return self._last

    def _save(self) -> None:
        """Save the sum, unless this is too soon after the last time. Raises SoupError."""
        begun = time.monotonic()
        if not self._file or self._saving_s > SAVING * (begun - self._saved):
            return
        last = [{name: torch.from_numpy(array) for name, array in one.columns().items()} for one in self._last]
        with kept.replacing(self._file) as stream:
            torch.save({"task": self._task, "members": list(self._members), "totals": self._totals, "last": last}, stream)
        self._saved = time.monotonic()
        self._saving_s = self._saved - begun

    def _load(self, paths: tuple[str, ...]) -> None:
        """Continue with the sum that was saved, if its members are the first of these; otherwise with none."""
        self._members = ()
        if not self._file or not storage.isfile(self._file):
            return
        with suppress(Exception):  # torch raises errors of many kinds for a damaged file, which counts as missing
            with kept.local(self._file) as file:
                check_archive(file)
                found = torch.load(file, map_location=self._replica.device, weights_only=True)
            members = tuple(found["members"])
            if found["task"] == self._task and members == paths[: len(members)]:
                last = [{name: column.cpu().numpy() for name, column in one.items()} for one in found["last"]]
                self._last = [Outcome.of_columns(columns) for columns in last]
                self._totals, self._members = found["totals"], members

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

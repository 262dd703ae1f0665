"""Evaluate models on splits: the current soup as sums, checkpoints and their ensemble example by example."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch
import torch.nn.functional as F

from ray_soup.actors.messages import Heartbeat
from ray_soup.actors.replica import Replica
from ray_soup.task import models
from ray_soup.task.data import Split
from ray_soup.task.objective import Function
from ray_soup.task.outcomes import LOG_FACTORS, Outcome, Score, join_outcomes

UNFINISHED = ("",)  # never equal to a list of paths


def score(replica: Replica, split: Split, factor: float = 1.0) -> Score:
    """Score the replica's model on a split, with `factor` on the logits."""
    loss = torch.zeros((), dtype=torch.float64, device=replica.device)
    correct = torch.zeros((), dtype=torch.int64, device=replica.device)
    with torch.inference_mode():
        for images, labels in replica.micro_batches(split):
            logits = replica.model(images).float()
            loss += replica.loss(logits * factor, labels, 0.0)
            correct += (logits.argmax(dim=1) == labels).sum()
    return Score(loss.item(), int(correct.item()), len(split))


def outcome_of(
    logits: torch.Tensor, labels: torch.Tensor, factored: bool = False, metric: Function | None = None
) -> Outcome:
    """Compute a model's outcome, example by example, from its logits.

    Args:
        logits: float [n, classes].
        labels: int64 [n].
        factored: True to add the losses for each factor exp(LOG_FACTORS) on the logits, to find a temperature.
        metric: the recipe's metric, if it has one.
    """
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_p, labels, reduction="none")
    best = log_p.max(dim=1)
    losses = None
    if factored:
        factors = torch.from_numpy(np.exp(LOG_FACTORS)).float().to(logits.device)
        own = logits.gather(1, labels[:, None])
        losses = torch.stack([torch.logsumexp(f * logits, dim=1) - f * own[:, 0] for f in factors], dim=1).cpu().numpy()
    scores = None if metric is None else metric(logits, labels).cpu().numpy()
    right = (best.indices == labels).cpu().numpy()
    return Outcome(loss.cpu().numpy(), right, best.values.exp().cpu().numpy(), losses, scores)


def evaluate_checkpoint(
    replica: Replica, path: str, splits: list[Split], factored: bool, totals: list[torch.Tensor] | None = None
) -> Generator[Heartbeat, None, list[Outcome]]:
    """Load the checkpoint at `path` into the model and evaluate it on each split, in float32.

    The value of the generator is one outcome per split. Raises IngredientError if the checkpoint does not fit the model.

    Args:
        replica: the replica whose model and data are used.
        path: the checkpoint.
        splits: the splits to evaluate on.
        factored: as in `outcome_of`.
        totals: if given, the logits are added to these tensors, one float32 [n, classes] per split.
    """
    models.load_checkpoint(replica.model, path, replica.recipe.ignore)
    outcomes, done, count = [], 0, sum(map(len, splits))
    for number, split in enumerate(splits):
        parts: list[Outcome] = []
        first = 0
        for piece in replica.pieces(split):
            with torch.inference_mode():
                for images, labels in replica.micro_batches(piece):
                    logits = replica.model(images).float()
                    parts.append(outcome_of(logits, labels, factored, replica.metric))
                    if totals is not None:
                        totals[number][first : first + len(labels)] += logits
                    first += len(labels)
            done += len(piece)
            yield "evaluating", done, count
        outcomes.append(join_outcomes(parts))
    replica.restore_buffers()
    return outcomes


class Ensemble:
    """The sum of the logits of several checkpoints, kept between calls, so that each checkpoint is evaluated once.

    Every call names all members so far: an actor that replaces a lost one evaluates the earlier members first.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._members: tuple[str, ...] = ()
        self._logits: list[torch.Tensor] = []

    def add(self, paths: tuple[str, ...], splits: list[Split]) -> Generator[Heartbeat, None, list[Outcome]]:
        """Evaluate the last of the checkpoints `paths` on each split, and add its logits to those of the earlier ones."""
        if self._members != paths[:-1]:
            self._members = ()
            for end in range(1, len(paths)):
                yield from self.add(paths[:end], splits)
        if not self._members:
            classes, device = self._replica.classes, self._replica.device
            self._logits = [torch.zeros(len(split), classes, device=device) for split in splits]
        before, self._members = self._members, UNFINISHED
        outcomes = yield from evaluate_checkpoint(self._replica, paths[-1], splits, False, self._logits)
        self._members = (*before, paths[-1])
        return outcomes

    def evaluate(self, paths: tuple[str, ...], splits: list[Split]) -> Generator[Heartbeat, None, list[Outcome]]:
        """Evaluate the mean of the logits of the checkpoints `paths` on each split."""
        if self._members != paths:
            yield from self.add(paths, splits)
        outcomes = []
        for split, total in zip(splits, self._logits, strict=True):
            labels = torch.from_numpy(self._replica.examples[split.source].labels[split.rows]).to(self._replica.device)
            outcomes.append(outcome_of(total / len(paths), labels, True, self._replica.metric))
        return outcomes

    def forget(self) -> None:
        """Free the logits and start over."""
        self._members, self._logits = (), []

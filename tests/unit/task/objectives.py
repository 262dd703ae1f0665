"""Losses and metrics that recipes of the tests name, sound and unsound ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def each(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def of_probabilities(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.nll_loss(probabilities.log(), labels, reduction="none") - (1 - probabilities).log().sum(1)


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels)


def without_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(1) != labels).float()


def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits @ labels


def in_top_2(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.topk(2).indices == labels[:, None]).any(1)

"""The published MEHL-Soup procedure (Li, Jiang et al., ECCV 2024), implemented from its description: the baseline of ours.

It works in float32 with one block per parameter tensor. Directions start from a center that moves to the current soup at
every model batch. The gradient is clipped to norm 1. Every model batch has a new optimizer and schedule and, by default,
five epochs. Every step makes new copies of all vectors. The code is plain on purpose: nothing is tuned or slowed down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


class Reference:
    """A model, and its ingredients as parameter vectors float32 [K, N] in the order of the model's parameters."""

    def __init__(self, model: torch.nn.Module, ingredients: torch.Tensor):
        self.model, self.ingredients = model, ingredients
        self.parameters = list(model.parameters())
        sizes = [p.numel() for p in self.parameters]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.blocks = list(itertools.pairwise(ends))
        self.soup = ingredients[:0]

    def begin(self, chosen: list[int], center: torch.Tensor, lr: float, steps: int) -> None:
        """Begin a model batch: directions from `center` float32 [N], scaled to unit norm in every block."""
        directions = self.ingredients[chosen] - center
        for start, stop in self.blocks:
            norm = directions[:, start:stop].norm(dim=1, keepdim=True)
            directions[:, start:stop] /= norm.clamp_min(1e-30)  # published: 0/0 for blocks that are equal in all ingredients
        self.directions, self.center = directions, center
        self.x = torch.zeros(len(self.blocks), len(chosen), device=center.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.x], lr=lr, weight_decay=0.0)
        warm = max(1, steps // 5)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
        )
        self.fill(center)

    def fill(self, theta: torch.Tensor) -> None:
        """Copy the parameter vector `theta` float32 [N] into the model."""
        self.soup = theta
        with torch.no_grad():
            for parameter, (start, stop) in zip(self.parameters, self.blocks, strict=True):
                parameter.copy_(theta[start:stop].view(parameter.shape))

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Take one optimizer step on a batch; return the loss."""
        self.optimizer.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        gradient = torch.cat([p.grad.flatten() for p in self.parameters])
        self.x.grad = torch.stack([self.directions[:, a:b] @ gradient[a:b] for a, b in self.blocks])
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            moved = torch.cat([x @ self.directions[:, a:b] for x, (a, b) in zip(self.x, self.blocks, strict=True)])
            self.fill(self.center + moved)
        return loss.item()


def learn(
    model: torch.nn.Module,
    ingredients: torch.Tensor,
    batches: Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]],
    steps_per_epoch: int,
    model_batch: int,
    seed: int,
    lr: float = 0.01,
    epochs: int = 5,
) -> tuple[Reference, int]:
    """Run the whole procedure.

    Args:
        model: the model, which holds the soup afterwards.
        ingredients: float32 [K, N], parameter vectors.
        batches: batches(epoch) yields the (images, labels) of one pass over the held-out data.
        steps_per_epoch: the number of these batches.
        model_batch: how many ingredients move at a time.
        seed: of the order of ingredients.
        lr: the learning rate.
        epochs: passes over the data for each model batch.

    Returns:
        The reference and the number of its steps.
    """
    reference = Reference(model.eval(), ingredients)
    order = torch.randperm(len(ingredients), generator=torch.Generator().manual_seed(seed)).tolist()
    center, steps = torch.empty(0), 0
    for first in range(0, len(order), model_batch):
        chosen = order[first : first + model_batch]
        center = ingredients[chosen].mean(dim=0) if first == 0 else reference.soup
        reference.begin(chosen, center, lr, epochs * steps_per_epoch)
        for epoch in range(epochs):
            for images, labels in batches(first * epochs + epoch):
                reference.step(images, labels)
                steps += 1
    return reference, steps

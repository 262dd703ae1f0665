"""The published MEHL-Soup procedure (Li, Jiang et al., ECCV 2024), written from its description: what ours is held against.

float32; a block a parameter tensor; directions seen from a center that moves to the current soup at every model batch; the
gradient clipped to norm 1; a new optimizer and schedule, five epochs by default, for every model batch; every time through
fresh copies of all vectors. Plain on purpose: nothing here is tuned, and nothing is slowed down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F


class Reference:
    """The ingredients' parameter vectors [K, N] float32, in the order of the model's parameters, and the model itself."""

    def __init__(self, model: torch.nn.Module, ingredients: torch.Tensor):
        self.model, self.ingredients = model, ingredients
        self.parameters = list(model.parameters())
        sizes = [p.numel() for p in self.parameters]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.blocks = list(itertools.pairwise(ends))
        self.soup = ingredients[:0]

    def begin(self, chosen: list[int], center: torch.Tensor, lr: float, steps: int) -> None:
        """A model batch: its directions from `center` [N], each of unit norm in every block."""
        directions = self.ingredients[chosen] - center
        for start, stop in self.blocks:
            norm = directions[:, start:stop].norm(dim=1, keepdim=True)
            directions[:, start:stop] /= norm.clamp_min(1e-30)  # published: 0/0 for blocks that are equal in all
        self.directions, self.center = directions, center
        self.x = torch.zeros(len(self.blocks), len(chosen), requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.x], lr=lr, weight_decay=0.0)
        warm = max(1, steps // 5)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: (s + 1) / warm if s < warm else 0.5 * (1 + math.cos(math.pi * (s - warm) / max(1, steps - warm))),
        )
        self.fill(center)

    def fill(self, theta: torch.Tensor) -> None:
        self.soup = theta
        with torch.no_grad():
            for parameter, (start, stop) in zip(self.parameters, self.blocks, strict=True):
                parameter.copy_(theta[start:stop].view(parameter.shape))

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
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
    """The whole procedure; returns the reference, whose model is the soup, and the number of its steps.

    batches(epoch) yields (images, labels) of one pass over the held-out data.
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

"""Optimizer, learning rate schedule and parametrization of the learned methods."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ray_soup.io.lazy import torch
from ray_soup.mixing.coefficients import Affine, Softmax
from ray_soup.recipe import Learn


def learning_rate(learn: Learn, largest: float, step: int, steps: int) -> float:
    """Return the learning rate of step 0 <= step < steps: a linear warm-up to the largest, then a cosine to zero; or it."""
    if not learn.cosine_lr:
        return largest
    warmup = round(learn.warmup * steps)
    if step < warmup:
        return largest * (step + 1) / warmup
    return largest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(learn: Learn, largest: float, *parameters: torch.Tensor) -> torch.optim.Optimizer:
    """Make the optimizer of the coordinates, float64 [m, B], and of the factor on the logits if it is learned.

    `largest` is the largest learning rate of its steps.
    """
    if learn.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=largest, weight_decay=learn.wd, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=largest, weight_decay=learn.wd)


def without_noise(gradient: NDArray[np.float64], precision: float = 1e-6) -> NDArray[np.float64]:
    """Set the gradient of blocks to zero where it is only rounding noise, such as that of an attention's key bias.

    An optimizer that normalizes its steps would follow the noise.

    Args:
        gradient: float64 [m, B].
        precision: A block's gradient counts as noise if its norm is at most this share of the largest block's norm.

    Returns:
        float64 [m, B].
    """
    size = np.linalg.norm(gradient, axis=0)
    return np.where(size > precision * size.max(initial=0.0), gradient, 0.0)


def parametrization(softmax: bool, norms: NDArray[np.float64]) -> Affine | Softmax:
    """Return how coordinates become coefficients, for directions with norms float64 [m, B]."""
    return Softmax(norms) if softmax else Affine(norms)

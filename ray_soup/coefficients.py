"""Parametrisation, optimizer, schedule, save and load.

x[k, b] = y[k, b] / n[k, b]                          coordinates y are unit-scaled: one learning rate fits every block
c[k, b] = x[k, b] + (1 - sum_j x[j, b]) / K          each column sums to 1, any sign
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.recipe import Learn

MEAN = -1  # the block of a tensor that is the plain mean of all ingredients
FORMAT = "ray_soup.coefficients/1"


def to_x(y: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """x = y / n, and 0 where a direction is zero. float64 [K, B]."""
    return np.divide(y, norms, out=np.zeros_like(y), where=norms > 0)


def to_coefficients(x: np.ndarray) -> np.ndarray:
    """Coefficients of the ingredients themselves, from those of the directions. float64 [K, B]."""
    return x + (1 - x.sum(axis=0, keepdims=True)) / len(x)


def learning_rate(learn: Learn, step: int, steps: int) -> float:
    """Of step 0 <= step < steps: a linear warm-up, then a cosine to zero; or constant."""
    if not learn.cosine_lr:
        return learn.lr
    warmup = round(learn.warmup * steps)
    if step < warmup:
        return learn.lr * (step + 1) / warmup
    return learn.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(learn: Learn, y: torch.Tensor) -> torch.optim.Optimizer:
    """For the coordinates y float64 [m, B]."""
    if learn.optimizer == "sgd":
        return torch.optim.SGD([y], lr=learn.lr, weight_decay=learn.wd, momentum=0.9)
    return torch.optim.AdamW([y], lr=learn.lr, weight_decay=learn.wd)


def without_noise(gradient: np.ndarray, precision: float = 1e-6) -> np.ndarray:
    """The gradient [m, B] with zeros for blocks whose gradient is rounding noise beside the largest: an optimizer that
    normalises its steps would walk off on it. An attention's key bias is such a block."""
    size = np.linalg.norm(gradient, axis=0)
    return np.where(size > precision * size.max(initial=0.0), gradient, 0.0)


@dataclass(frozen=True)
class Coefficients:
    """How much of each ingredient goes into each tensor of a soup: enough, with the ingredients, to make it again."""

    values: np.ndarray
    """float64 [K, B]; each column sums to 1."""
    ingredients: tuple[str, ...]
    blocks: tuple[str, ...]
    block_of: dict[str, int]
    """Block of each parameter tensor, or MEAN."""
    buffers: str = "average"
    tied: dict[str, str] | None = None

    def of(self, tensor: str) -> np.ndarray:
        """The K coefficients of a parameter tensor."""
        block = self.block_of[tensor]
        return np.full(len(self.values), 1 / len(self.values)) if block == MEAN else self.values[:, block]

    def shares(self) -> np.ndarray:
        """Each ingredient's mean coefficient over the blocks, float64 [K]."""
        return self.values.mean(axis=1)


def save_coefficients(coefficients: Coefficients, path: Path) -> None:
    """One float64 tensor `coefficients` [K, B]; the names are in the metadata, as JSON."""
    c = coefficients
    metadata = {
        "format": FORMAT,
        "ingredients": json.dumps(c.ingredients),
        "blocks": json.dumps(c.blocks),
        "block_of": json.dumps(c.block_of),
        "buffers": c.buffers,
        "tied": json.dumps(c.tied or {}),
    }
    save_file({"coefficients": torch.from_numpy(np.ascontiguousarray(c.values))}, path, metadata)


def load_coefficients(path: Path) -> Coefficients:
    """Raises RecipeError if the file is missing or not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RecipeError(f"{path} has the format {metadata.get('format')!r}; expected {FORMAT!r}.")
            values = file.get_tensor("coefficients").numpy()
        return Coefficients(
            values,
            tuple(json.loads(metadata["ingredients"])),
            tuple(json.loads(metadata["blocks"])),
            json.loads(metadata["block_of"]),
            metadata["buffers"],
            json.loads(metadata["tied"]),
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as coefficients ({error}).") from error

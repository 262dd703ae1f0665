"""Parametrisation, optimizer, schedule, save and load.

x[k, b] = y[k, b] / n[k, b]                          coordinates y are unit-scaled: one learning rate fits every block
c[k, b] = x[k, b] + (1 - sum_j x[j, b]) / K          each column sums to 1, any sign

Learned soups (Wortsman et al. 2022): c = softmax(y) over the ingredients, and a factor t on the logits. Since c sums to 1,
sum_k c_k theta_k = center + sum_k c_k d_k: the same combine and project with x = c, and the chain rule.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.recipe import Learn
from ray_soup.running_statistics import Statistics

MEAN = -1  # the block of a tensor that is the plain mean of all ingredients
FORMAT = "ray_soup.coefficients/1"
STATISTICS = "statistics/"


def to_x(y: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """x = y / n, and 0 where a direction is zero. float64 [K, B]."""
    return np.divide(y, norms, out=np.zeros_like(y), where=norms > 0)


def to_coefficients(x: np.ndarray) -> np.ndarray:
    """Coefficients of the ingredients themselves, from those of the directions. float64 [K, B]."""
    return x + (1 - x.sum(axis=0, keepdims=True)) / len(x)


@dataclass(frozen=True)
class Affine:
    """MEHL: coordinates y float64 [m, B] for directions with norms [m, B]; y = 0 is the uniform soup."""

    norms: np.ndarray
    learns_factor = False

    def x(self, y: np.ndarray) -> np.ndarray:
        return to_x(y, self.norms)

    def gradient(self, y: np.ndarray, by_x: np.ndarray) -> np.ndarray:
        """dL/dy from dL/dx, both [m, B]."""
        return to_x(by_x, self.norms)

    def coefficients(self, y: np.ndarray) -> np.ndarray:
        return to_coefficients(to_x(y, self.norms))


@dataclass(frozen=True)
class Softmax:
    """Learned soups: y float64 [K, B], x = c = softmax(y) over all ingredients; y = 0 is the uniform soup."""

    norms: np.ndarray
    learns_factor = True

    def x(self, y: np.ndarray) -> np.ndarray:
        powers = np.exp(y - y.max(axis=0))
        return powers / powers.sum(axis=0)

    def gradient(self, y: np.ndarray, by_x: np.ndarray) -> np.ndarray:
        """dL/dy = c (dL/dc - sum_j c_j dL/dc_j), [K, B]."""
        c = self.x(y)
        return c * (by_x - (c * by_x).sum(axis=0))

    coefficients = x


def learning_rate(learn: Learn, step: int, steps: int) -> float:
    """Of step 0 <= step < steps: a linear warm-up, then a cosine to zero; or constant."""
    if not learn.cosine_lr:
        return learn.lr
    warmup = round(learn.warmup * steps)
    if step < warmup:
        return learn.lr * (step + 1) / warmup
    return learn.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def make_optimizer(learn: Learn, *parameters: torch.Tensor) -> torch.optim.Optimizer:
    """For the coordinates y float64 [m, B], and the factor on the logits where it is learned."""
    if learn.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learn.lr, weight_decay=learn.wd, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=learn.lr, weight_decay=learn.wd)


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
    factor: float = 1.0
    """On the logits, learned beside the coefficients: one over the temperature."""
    factored: tuple[str, ...] = ()
    """The last layer's tensors, which carry `factor` in the model; empty where the model has no such layer."""
    statistics: Statistics = field(default_factory=dict)
    """Running statistics that were computed anew, by buffer: they cannot be made from the ingredients without the data."""

    def of(self, tensor: str) -> np.ndarray:
        """The K coefficients of a parameter tensor, times the factor where it carries it."""
        block, count = self.block_of[tensor], len(self.values)
        values = np.full(count, 1 / count) if block == MEAN else self.values[:, block]
        return values * self.factor if tensor in self.factored else values

    def used(self) -> list[int]:
        """The ingredients with a coefficient that is not zero."""
        return [int(k) for k in np.flatnonzero(self.values.any(axis=1))]

    def shares(self) -> np.ndarray:
        """Each ingredient's mean coefficient over the blocks, float64 [K]."""
        return self.values.mean(axis=1)


def save_coefficients(coefficients: Coefficients, path: Path) -> None:
    """A float64 tensor `coefficients` [K, B], and `statistics/BUFFER` for running statistics that were computed anew; the
    names are in the metadata, as JSON."""
    c = coefficients
    metadata = {
        "format": FORMAT,
        "ingredients": json.dumps(c.ingredients),
        "blocks": json.dumps(c.blocks),
        "block_of": json.dumps(c.block_of),
        "buffers": c.buffers,
        "tied": json.dumps(c.tied or {}),
        "factor": json.dumps({"value": c.factor, "tensors": c.factored}),
    }
    arrays = {"coefficients": c.values, **{f"{STATISTICS}{name}": values for name, values in c.statistics.items()}}
    save_file({name: torch.from_numpy(np.asarray(values, order="C")) for name, values in arrays.items()}, path, metadata)


def save_table(coefficients: Coefficients, path: Path) -> None:
    """The same as Parquet, for people and their tables: a row for each ingredient and block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, blocks = coefficients.values.shape
    names = pa.DictionaryArray.from_arrays(np.repeat(np.arange(count, dtype=np.int32), blocks), coefficients.ingredients)
    labels = pa.DictionaryArray.from_arrays(np.tile(np.arange(blocks, dtype=np.int32), count), coefficients.blocks)
    columns = {"ingredient": names, "block": labels, "coefficient": coefficients.values.ravel()}
    pq.write_table(pa.table(columns), path)


def load_coefficients(path: Path) -> Coefficients:
    """Raises RecipeError if the file is missing or not one of ours."""
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise RecipeError(f"{path} has the format {metadata.get('format')!r}; expected {FORMAT!r}.")
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118 - not a dict
        factor = json.loads(metadata.get("factor", '{"value": 1.0, "tensors": []}'))
        return Coefficients(
            arrays["coefficients"],
            tuple(json.loads(metadata["ingredients"])),
            tuple(json.loads(metadata["blocks"])),
            json.loads(metadata["block_of"]),
            metadata["buffers"],
            json.loads(metadata["tied"]),
            factor["value"],
            tuple(factor["tensors"]),
            {name.removeprefix(STATISTICS): v for name, v in arrays.items() if name.startswith(STATISTICS)},
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as coefficients ({error}).") from error

"""Small models and zoos for tasks that are no classification: regression, labels, pixels; trained in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from tests.tiny import digits

HERE = "tests.ray.small_tasks"


class Dense(nn.Module):
    """Digits to `outputs` numbers."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, outputs))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float() / 16)


class Pixels(nn.Module):
    """Digits to the logits of three classes for each pixel, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 3, 3, padding=1))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.layers(images.float()[:, None] / 16)}


def numbers() -> nn.Module:
    return Dense(2)


def labels() -> nn.Module:
    return Dense(4)


def pixels() -> nn.Module:
    return Pixels()


def closeness(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A metric of regression: 1 where the outputs are exact."""
    return 1 / (1 + (outputs - targets).abs().mean(1))


def overlap(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A metric of segmentation: the share of pixels right in each image."""
    return (outputs.argmax(1) == targets).flatten(1).float().mean(1)


def targets_of(kind: str, images: np.ndarray, digit: np.ndarray) -> np.ndarray:
    if kind == "regression":
        mean = images.reshape(len(images), -1).mean(1) / 8
        return np.stack([mean, digit / 9], axis=1).astype(np.float32)
    if kind == "multi_label":
        return (digit[:, None] >> np.arange(4)) & 1
    shifted = np.roll(images.astype(np.int64), 1, axis=2)  # not a function of the pixel alone
    classes = np.digitize(images.astype(np.int64) + shifted, (8, 20))
    classes[:, 0, 0] = 255  # not scored
    return classes


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    loss: Callable[[Any, torch.Tensor], torch.Tensor]


TASKS = {
    "regression": Task(numbers, F.mse_loss),
    "multi_label": Task(labels, lambda out, y: F.binary_cross_entropy_with_logits(out, y.float())),
    "segmentation": Task(pixels, lambda out, y: F.cross_entropy(out["out"], y, ignore_index=255)),
}


def write_task(kind: str, folder: Path, count: int = 4) -> dict[str, Any]:
    """Write data and `count` ingredients for a task; return a recipe."""
    task, (images, digit) = TASKS[kind], digits()
    (folder / "zoo").mkdir(parents=True)
    targets = targets_of(kind, images, digit)
    for name, rows in {"train": slice(0, 600), "heldout": slice(600, 1197), "test": slice(1197, 1797)}.items():
        np.savez(folder / f"{name}.npz", images=images[rows], targets=targets[rows])
    x, y = torch.from_numpy(images[:600]), torch.from_numpy(targets[:600])

    def train(model: nn.Module, seed: int, lr: float, epochs: int) -> None:
        generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in torch.randperm(len(y), generator=generator).split(64):
                optimizer.zero_grad()
                task.loss(model(x[batch]), y[batch]).backward()
                optimizer.step()

    torch.manual_seed(0)
    trunk = task.build()
    train(trunk, 0, 5e-3, 6)
    for k in range(count):
        model = task.build()
        model.load_state_dict(trunk.state_dict())
        train(model, k + 1, 2e-3 * (1 + k % 3), 2 + k % 3)
        save_file(model.state_dict(), folder / "zoo" / f"model_{k}.safetensors")
    return {
        "ingredients": str(folder / "zoo" / "*.safetensors"),
        "model": f"{HERE}:{task.build.__name__}",
        "objective": kind,
        "data": {"fit": str(folder / "heldout.npz"), "select": 0.25, "test": str(folder / "test.npz")},
        "learn": {"batch_size": 150, "epochs": 2, "model_batch": 2},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
    }

"""A tiny transformer for the 8 x 8 digits of scikit-learn, and zoos of it: real files, made in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

SPEC = "tests.tiny:build"


class Tiny(nn.Module):
    """Digits as 4 tokens of 16 pixels. `key.bias` has no gradient; `unused` is the same in all ingredients."""

    def __init__(self, width: int = 23) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))])
        self.head = nn.Linear(width, 10)
        self.unused = nn.Parameter(torch.linspace(-1, 1, 7), requires_grad=True)
        self.register_buffer("mean", torch.tensor(8.0))
        self.register_buffer("seen", torch.tensor(1797))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = images.float().reshape(-1, 2, 4, 2, 4).transpose(2, 3).reshape(-1, 4, 16)
        x = self.embed((tokens - self.mean) / 8)
        y = self.norm(x)
        attention = torch.softmax(self.query(y) @ self.key(y).transpose(1, 2) / y.shape[-1] ** 0.5, dim=-1)
        x = x + attention @ self.value(y)
        x = x + self.blocks[0](x)
        return self.head(x.mean(dim=1))


def build() -> nn.Module:
    return Tiny()


class TinyConv(nn.Module):
    """The same digits through BatchNorm layers of two kinds, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.hidden, self.norm1d = nn.Linear(6 * 16, 12), nn.BatchNorm1d(12)
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(12, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(images.float()[:, None] / 8 - 1))), 2)
        return self.head(self.dropout(F.relu(self.norm1d(self.hidden(x.flatten(1))))))


def build_conv() -> nn.Module:
    return TinyConv()


def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.images[order].astype(np.uint8), data.target[order].astype(np.int64)


def write_data(folder: Path) -> None:
    """train 600, heldout 597, test 600."""
    images, labels = digits()
    for name, rows in {"train": slice(0, 600), "heldout": slice(600, 1197), "test": slice(1197, 1797)}.items():
        np.savez(folder / f"{name}.npz", images=images[rows], labels=labels[rows])


def train(model: nn.Module, seed: int, lr: float, epochs: int, images: torch.Tensor, labels: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for name, p in model.named_parameters() if name != "unused"]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def write_zoo(folder: Path, count: int, build: Callable[[], nn.Module] = build) -> None:
    """`count` ingredients from one initialisation, as model_0.safetensors, ..."""
    images, labels = (torch.from_numpy(a[:600]) for a in digits())
    torch.manual_seed(0)
    trunk = build()
    train(trunk, 0, 5e-3, 8, images, labels)
    for k in range(count):
        model = build()
        model.load_state_dict(trunk.state_dict())
        train(model, k + 1, 1e-3 * (1 + k % 4), 2 + k % 3, images, labels)
        save_file(model.state_dict(), folder / f"model_{k}.safetensors")

"""Checkpoints for other tasks than classes: compared, each model has the figures of its own library's evaluation loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ray.own_loops import (
    Batches,
    Figures,
    Loop,
    assert_figures,
    compared,
    fine_tuned,
    loaded_soup,
    rows_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
HERE = "tests.ray.test_any_task"


# Segmentation with torchvision

CLASSES, VOID = 4, 255


def segmenter() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)


def masks(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 64 pixels with one bright rectangle, its class in the mask, and borders that are not scored."""
    random = np.random.default_rng(seed)
    images = random.standard_normal((count, 3, 64, 64)).astype(np.float32)
    targets = np.zeros((count, 64, 64), np.uint8)
    for n in range(count):
        (top, left), kind = random.integers(4, 30, 2), int(random.integers(1, CLASSES))
        images[n, kind - 1, top : top + 30, left : left + 30] += 2
        targets[n, top : top + 30, left : left + 30] = kind
    targets[:, :3] = targets[:, :, :3] = VOID
    return torch.from_numpy(images), torch.from_numpy(targets)


@torch.inference_mode()
def pixel_figures(model: nn.Module, batches: Batches) -> Figures:
    """Cross-entropy and accuracy over all pixels, from a confusion matrix as in torchvision's references."""
    matrix, loss, right = torch.zeros(CLASSES, CLASSES, dtype=torch.int64), 0.0, []
    for images, target in batches:
        out = model(images)["out"]
        loss += F.cross_entropy(out, target.long(), ignore_index=VOID, reduction="sum").item()
        for a, b in zip(target.long(), out.argmax(1), strict=True):
            known = a < CLASSES
            of_image = torch.bincount(CLASSES * a[known] + b[known], minlength=CLASSES**2).view(CLASSES, CLASSES)
            matrix += of_image
            right.append(int(of_image.diag().sum()))
    return Figures(loss, int(matrix.sum()), np.array(right))


def test_segmentation_models_of_torchvision(tmp_path: Path) -> None:
    fit, test, train = masks(20, 0), masks(12, 1), masks(20, 2)

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, 20, 8)
        return F.cross_entropy(model(train[0][rows])["out"], train[1][rows].long(), ignore_index=VOID)

    zoo = fine_tuned(segmenter, step)
    for k, model in enumerate(zoo):  # as torchvision's references write them
        checkpoint = {"model": model.state_dict(), "epoch": 5, "args": argparse.Namespace(model="lraspp", lr=0.1)}
        torch.save(checkpoint, tmp_path / f"model_{k}.pth")
    for name, (images, targets) in (("fit", fit), ("test", test)):
        np.savez(tmp_path / f"{name}.npz", images=images, labels=targets)
    data = {"fit": str(tmp_path / "fit.npz"), "test": str(tmp_path / "test.npz")}
    made = compared(tmp_path, f"{HERE}:segmenter", f"{tmp_path}/*.pth", data, objective="segmentation")
    batches = list(DataLoader(TensorDataset(*test), batch_size=5))
    assert_figures(made, zoo, loaded_soup(segmenter, made[1].out), lambda model: pixel_figures(model, batches))


# Own models: several labels and regression


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))


def tables(folder: Path, targets: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, str], dict[str, Any]]:
    """Write fit and test, and return them with data to train on."""
    made = {}
    for seed, (name, count) in enumerate((("fit", 70), ("test", 33), ("train", 80))):
        x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
        made[name] = x, targets(x)
        np.savez(folder / f"{name}.npz", features=x.numpy(), targets=made[name][1].numpy())
    return {"fit": str(folder / "fit.npz"), "test": str(folder / "test.npz")}, made


def several_labels(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :4] + 0.3 * x[:, 1:5] > 0.2).float()


def numbers(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x[:, 0] * x[:, 1], x.sum(1), x[:, 2].sin(), x[:, 3]], 1)


def loop(criterion: nn.Module, correct: Callable[..., torch.Tensor] | None, batches: Batches) -> Loop:
    """An evaluation loop: the mean of a criterion over all numbers, however batches are cut."""

    @torch.inference_mode()
    def figures(model: nn.Module) -> Figures:
        loss, units, right = 0.0, 0, []
        for x, y in batches:
            output = model(x)
            loss, units = loss + criterion(output, y).item() * y.numel(), units + y.numel()
            if correct is not None:
                right.append(correct(output, y).sum(1).numpy())
        return Figures(loss, units, np.concatenate(right) if right else None)

    return figures


@pytest.mark.parametrize(
    ("objective", "targets", "criterion", "correct"),
    [
        ("multi_label", several_labels, nn.BCEWithLogitsLoss(), lambda o, y: (o.sigmoid() > 0.5) == (y > 0.5)),
        ("regression", numbers, nn.MSELoss(), None),
    ],
)
def test_several_labels_and_numbers(
    tmp_path: Path, objective: str, targets: Any, criterion: nn.Module, correct: Any
) -> None:
    data, made = tables(tmp_path, targets)
    x, y = made["train"]

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, len(x))
        return criterion(model(x[rows]), y[rows])

    zoo = fine_tuned(network, step)
    for k, model in enumerate(zoo):
        torch.save(model.state_dict(), tmp_path / f"model_{k}.pt")
    found = compared(tmp_path, f"{HERE}:network", f"{tmp_path}/*.pt", data, objective=objective)
    figures = loop(criterion, correct, list(DataLoader(TensorDataset(*made["test"]), batch_size=8)))
    assert_figures(found, zoo, loaded_soup(network, found[1].out), figures)

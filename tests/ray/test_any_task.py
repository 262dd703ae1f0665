"""Segmentation models of torchvision: compared, each model has the figures of the library's own evaluation loop."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from tests.ray.own_loops import Batches, Figures, assert_figures, compared, fine_tuned, loaded_soup, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
CLASSES, VOID = 4, 255
TRANSFORM = v2.Compose([
    v2.Resize([32], antialias=True), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
])  # fmt: skip
"""As torchvision's references/segmentation has it for evaluation."""


def segmenter() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.5  # a few steps of training are enough for its running statistics
    return model


def write_images(folder: Path, count: int, seed: int) -> None:
    """Images of 80 pixels with one bright rectangle, its class in the mask, and borders that are not scored."""
    random = np.random.default_rng(seed)
    for top in ("images", "masks"):
        (folder / top).mkdir(parents=True)
    for n in range(count):
        pixels, mask = random.integers(0, 100, (80, 80, 3), dtype=np.uint8), np.zeros((80, 80), np.uint8)
        (top, left), kind = random.integers(4, 40, 2), int(random.integers(1, CLASSES))
        pixels[top : top + 36, left : left + 36, kind - 1] += 150
        mask[top : top + 36, left : left + 36] = kind
        mask[:3] = mask[:, :3] = VOID
        Image.fromarray(pixels).save(folder / "images" / f"{n:02}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{n:02}.png")


def transformed(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and masks, transformed together by the library."""
    pairs = []
    for file in sorted((folder / "images").iterdir()):
        mask = torch.from_numpy(np.array(Image.open(folder / "masks" / file.name)))
        pairs.append(TRANSFORM(Image.open(file).convert("RGB"), tv_tensors.Mask(mask)))
    images, targets = zip(*pairs, strict=True)
    return torch.stack(images), torch.stack(targets)


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
    """By name, with folders of images and masks of the same names."""
    for seed, (name, count) in enumerate({"fit": 10, "test": 8, "train": 10}.items()):
        write_images(tmp_path / name, count, seed)
    train, test = transformed(tmp_path / "train"), transformed(tmp_path / "test")

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, 10, 5)
        return F.cross_entropy(model(train[0][rows])["out"], train[1][rows].long(), ignore_index=VOID)

    zoo = fine_tuned(segmenter, step, 5e-3)
    for k, model in enumerate(zoo):  # as torchvision's references write them
        checkpoint = {"model": model.state_dict(), "epoch": 5, "args": argparse.Namespace(model="lraspp", lr=0.1)}
        torch.save(checkpoint, tmp_path / f"model_{k}.pth")
    data = {name: str(tmp_path / name) for name in ("fit", "test")}
    spec = f"torchvision:lraspp_mobilenet_v3_large?classes={CLASSES}&resize_size=32"
    made = compared(tmp_path, spec, f"{tmp_path}/*.pth", data)
    assert made[1].record["objective"] == "segmentation"
    batches = list(zip(test[0].split(5), test[1].split(5), strict=True))
    assert_figures(made, zoo, loaded_soup(segmenter, made[1].out), lambda model: pixel_figures(model, batches))

"""Checkpoints of ordinary training loops: compared, each model has the figures of its own library's evaluation loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ray.own_loops import (
    COUNT,
    Batches,
    Figures,
    Loop,
    assert_figures,
    compared,
    fine_tuned,
    loaded_soup,
    rows_of,
)
from tests.unit.task.library_models import lightning

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


# Images with torchvision and timm

NAMES = ("blue", "green", "red")


def image_folders(folder: Path) -> dict[str, str]:
    """Folders of noisy images of three colors, of several sizes."""
    random = np.random.default_rng(0)
    for split, count in (("fit", 14), ("test", 8), ("train", 12)):
        for label, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for n in range(count):
                height, width = random.integers(50, 110, 2)
                pixels = random.integers(0, 200, (height, width, 3))
                pixels[..., 2 - label] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{n}.png")
    return {"fit": str(folder / "fit"), "test": str(folder / "test")}


def training_step(train: list[tuple[torch.Tensor, int]]) -> Callable[[nn.Module, int, int], torch.Tensor]:
    images, labels = torch.stack([image for image, _ in train]), torch.tensor([label for _, label in train])

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, len(labels), 8)
        return F.cross_entropy(model(images[rows]), labels[rows])

    return step


@torch.inference_mode()
def class_figures(model: nn.Module, batches: Batches) -> Figures:
    loss, right = 0.0, []
    for images, target in batches:
        output = model(images)
        loss += F.cross_entropy(output, target, reduction="sum").item()
        right.append((output.argmax(1) == target).numpy())
    correct = np.concatenate(right)
    return Figures(loss, len(correct), correct)


def resnet() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(weights=None, num_classes=len(NAMES))


def test_a_resnet_of_torchvision_at_64_pixels(tmp_path: Path) -> None:
    from torchvision import datasets, transforms

    data = image_folders(tmp_path)
    preprocess = transforms.Compose([
        transforms.Resize(72), transforms.CenterCrop(64), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    zoo = fine_tuned(resnet, training_step(list(datasets.ImageFolder(str(tmp_path / "train"), preprocess))), 1e-4)
    for k, model in enumerate(zoo):
        torch.save({"model": model.state_dict(), "epoch": 5}, tmp_path / f"model_{k}.pth")
    spec = f"torchvision:resnet18?classes={len(NAMES)}&resize_size=72&crop_size=64"
    made = compared(tmp_path, spec, f"{tmp_path}/*.pth", data)
    batches = list(DataLoader(datasets.ImageFolder(str(tmp_path / "test"), preprocess), batch_size=5))
    assert_figures(made, zoo, loaded_soup(resnet, made[1].out), lambda model: class_figures(model, batches))


def test_an_ema_of_timm_at_48_pixels_with_its_own_mean_and_std(tmp_path: Path) -> None:
    import timm
    from timm.data import create_dataset, create_loader
    from timm.utils import CheckpointSaver, ModelEmaV3

    data = image_folders(tmp_path)
    chosen = {"input_size": (3, 48, 48), "mean": (0.3, 0.4, 0.5), "std": (0.2, 0.3, 0.25), "crop_pct": 0.9}
    config = {"interpolation": "bilinear", **chosen}

    def make() -> nn.Module:
        return timm.create_model("test_resnet", num_classes=len(NAMES))

    def batches(split: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        dataset = create_dataset("", root=str(tmp_path / split))
        return list(create_loader(dataset, batch_size=5, use_prefetcher=False, num_workers=0, **config))

    train = [(x, int(y)) for images, labels in batches("train") for x, y in zip(images, labels, strict=True)]
    zoo = fine_tuned(make, training_step(train))
    used = []
    for k, model in enumerate(zoo):
        (tmp_path / "runs" / str(k)).mkdir(parents=True)
        ema = ModelEmaV3(zoo[0], decay=0.5)
        ema.update(model)
        arguments = argparse.Namespace(
            model="test_resnet", img_size=48, mean=[0.3, 0.4, 0.5], std=[0.2, 0.3, 0.25], crop_pct=0.9, input_size=None,
            interpolation="bilinear", num_classes=len(NAMES),
        )  # fmt: skip
        saver = CheckpointSaver(
            model, torch.optim.SGD(model.parameters(), lr=0.1), args=arguments, model_ema=ema,
            checkpoint_dir=str(tmp_path / "runs" / str(k)), recovery_dir=str(tmp_path),
        )  # fmt: skip
        saver.save_checkpoint(0, metric=1.0)
        used.append(ema.module.eval())
    spec = "timm:test_resnet?classes=3&img_size=48&mean=0.3,0.4,0.5&std=0.2,0.3,0.25&crop_pct=0.9&interpolation=bilinear"
    made = compared(tmp_path, spec, f"{tmp_path}/runs/*/model_best.pth.tar?key=state_dict_ema", data)
    test = batches("test")
    again = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(made[1].out / "model.safetensors"))
    assert_figures(made, used, again, lambda model: class_figures(model, test))


# Own models: several labels, regression, and a module of Lightning


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


def classes(x: torch.Tensor) -> torch.Tensor:
    return x[:, :4].argmax(1)


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


class Module(nn.Module):
    """What a LightningModule holds: a network, a criterion with weights of classes, and the states of metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(network(), backend="eager")
        self.criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0, 1.0]))
        self.train_acc = nn.Module()
        for name in ("tp", "fp", "tn", "fn"):
            self.train_acc.register_buffer(name, torch.zeros(4, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def by_hand(folder: Path, x: torch.Tensor, y: torch.Tensor) -> list[nn.Module]:
    """Train without Lightning, and write what it writes."""

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, len(x))
        model.train_acc.tp += 1 + seed
        return model.criterion(model(x[rows]), y[rows])

    zoo = fine_tuned(Module, step)
    for k, model in enumerate(zoo):
        file = folder / f"lightning_logs/version_{k}/checkpoints/epoch=0-step=5.ckpt"
        file.parent.mkdir(parents=True)
        torch.save({**lightning({}), "state_dict": model.state_dict()}, file)
    return zoo


def by_lightning(folder: Path, x: torch.Tensor, y: torch.Tensor) -> list[nn.Module]:
    """Train with Lightning's own Trainer, which writes the checkpoints."""
    import pytorch_lightning as trainers
    import torchmetrics.classification as metrics

    class Lit(trainers.LightningModule):
        def __init__(self, lr: float) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.compile(network(), backend="eager")
            self.criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0, 1.0]))
            self.train_acc = metrics.MulticlassAccuracy(4)
            self.train_acc.persistent(True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            output = self(batch[0])
            self.train_acc(output, batch[1])
            return self.criterion(output, batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)

    torch.manual_seed(0)
    init, zoo = Lit(0.1).state_dict(), []
    for seed in range(COUNT):
        model = Lit(1e-3 * (1 + seed))
        model.load_state_dict(init)
        loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
        trainers.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **quiet).fit(model, loader)
        zoo.append(model.eval())
    return zoo


@pytest.mark.parametrize("train", [by_hand, by_lightning])
def test_a_module_of_lightning_with_a_compiled_network_a_criterion_and_metrics(
    tmp_path: Path, train: Callable[..., list[nn.Module]]
) -> None:
    data, made = tables(tmp_path, classes)
    zoo = train(tmp_path, *made["train"])
    states = [zoo[0].state_dict(), *(torch.load(f)["state_dict"] for f in tmp_path.rglob("*.ckpt"))]
    assert len(states) == 1 + COUNT
    for state in states:
        assert {"net._orig_mod.0.weight", "criterion.weight", "train_acc.tp"} <= set(state)
    found = compared(tmp_path, f"{HERE}:network", f"{tmp_path}/lightning_logs/*/checkpoints/*.ckpt", data)
    assert any("criterion.*, train_acc.*" in note for note in found[1].notes)
    again = type(zoo[0])(*([0.1] if train is by_lightning else []))
    ours = {f"net._orig_mod.{name}": tensor for name, tensor in load_file(found[1].out / "model.safetensors").items()}
    again.load_state_dict({**zoo[0].state_dict(), **ours})
    batches = list(DataLoader(TensorDataset(*made["test"]), batch_size=8))
    assert_figures(found, zoo, again, lambda model: class_figures(model, batches))

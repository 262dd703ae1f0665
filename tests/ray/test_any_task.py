"""Checkpoints of ordinary training loops: compared, each model has the figures of its own library's evaluation loop."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
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

from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import verify
from ray_soup.soups.output import Soup
from tests.unit.task.library_models import lightning

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
COUNT = 3
HERE = "tests.ray.test_any_task"
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Figures = tuple[float, float | None]
"""NLL and accuracy, or the mean squared error alone."""


def compared(folder: Path, model: str, ingredients: str, data: dict[str, Any], **more: Any) -> Soup:
    """Make every soup, quickly."""
    recipe = make_recipe({
        "model": model, "ingredients": ingredients, "data": {"select": 0.4, **data}, "precision": "float32",
        "learn": {"batch_size": 16, "epochs": 1, "model_batch": COUNT}, "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        **more,
    })  # fmt: skip
    soup = compare(recipe, folder / "out")
    verify(folder / "out")
    return soup


def assert_figures(soup: Soup, singles: list[Figures], written: Figures) -> None:
    """Each ingredient, the best single one and the soup that was written have the figures of the library's own loop."""
    rows = {row["model_name"]: row for row in soup.rows[:COUNT]}
    assert len(rows) == COUNT
    table = {row["model_name"]: row for row in soup.record["table"]}
    best = next(row for row in soup.rows if row["model_name"] == "best_single")
    found = [*rows.values(), table["best_single"], table[soup.record["chosen"]]]
    nearest = min(range(COUNT), key=lambda k: abs(singles[k][0] - best["test_nll"]))
    for row, (nll, accuracy) in zip(found, [*singles, singles[nearest], written], strict=True):
        print(f"{row['model_name']}: NLL {row['test_nll']:.6f}, own loop {nll:.6f}; {row.get('test_accuracy')}, {accuracy}")
        assert row["test_nll"] == pytest.approx(nll, rel=1e-5)
        assert ("test_accuracy" in row) == (accuracy is not None)
        if accuracy is not None:
            assert row["test_accuracy"] == pytest.approx(accuracy, abs=1e-12)


def fine_tuned(
    make: Callable[[], nn.Module], step: Callable[[nn.Module, int, int], torch.Tensor], lr: float = 1e-3
) -> list[nn.Module]:
    """Train models from one initialization: `step(model, seed, number)` returns the loss of a batch."""
    torch.manual_seed(0)
    init = make().state_dict()
    zoo = []
    for seed in range(COUNT):
        model = make().train()
        model.load_state_dict(init)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr * (1 + seed))
        for number in range(5):
            optimizer.zero_grad()
            step(model, seed, number).backward()
            optimizer.step()
        zoo.append(model.eval())
    return zoo


def rows_of(seed: int, number: int, size: int, batch: int = 16) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(100 * seed + number))[:batch]


def loaded_soup(make: Callable[[], nn.Module], out: Path) -> nn.Module:
    model = make()
    model.load_state_dict(load_file(out / "model.safetensors"))
    return model.eval()


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
    matrix, loss, count = torch.zeros(CLASSES, CLASSES, dtype=torch.int64), 0.0, 0
    for images, target in batches:
        out = model(images)["out"]
        loss += F.cross_entropy(out, target.long(), ignore_index=VOID, reduction="sum").item()
        a, b = target.flatten().long(), out.argmax(1).flatten()
        known = a < CLASSES
        matrix += torch.bincount(CLASSES * a[known] + b[known], minlength=CLASSES**2).view(CLASSES, CLASSES)
        count += int(known.sum())
    return loss / count, (matrix.diag().sum() / matrix.sum().double()).item()


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
    soup = compared(tmp_path, f"{HERE}:segmenter", f"{tmp_path}/*.pth", data, objective="segmentation")
    batches = list(DataLoader(TensorDataset(*test), batch_size=5))
    singles = [pixel_figures(model, batches) for model in zoo]
    assert_figures(soup, singles, pixel_figures(loaded_soup(segmenter, soup.out), batches))


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
def image_figures(model: nn.Module, batches: Batches) -> Figures:
    loss, correct, count = 0.0, 0, 0
    for images, target in batches:
        output = model(images)
        loss += F.cross_entropy(output, target, reduction="sum").item()
        correct, count = correct + int((output.argmax(1) == target).sum()), count + len(target)
    return loss / count, correct / count


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
    soup = compared(tmp_path, spec, f"{tmp_path}/*.pth", data)
    batches = list(DataLoader(datasets.ImageFolder(str(tmp_path / "test"), preprocess), batch_size=5))
    singles = [image_figures(model, batches) for model in zoo]
    assert_figures(soup, singles, image_figures(loaded_soup(resnet, soup.out), batches))


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
    soup = compared(tmp_path, spec, f"{tmp_path}/runs/*/model_best.pth.tar?key=state_dict_ema", data)
    test = batches("test")
    again = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(soup.out / "model.safetensors")).eval()
    assert_figures(soup, [image_figures(model, test) for model in used], image_figures(again, test))


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


def loop(criterion: nn.Module, correct: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None) -> Any:
    """An evaluation loop: the mean of a criterion over all numbers, however batches are cut."""

    @torch.inference_mode()
    def figures(model: nn.Module, batches: Batches) -> Figures:
        loss, right, count, seen = 0.0, 0, 0, 0
        for x, y in batches:
            output = model(x)
            loss, count = loss + criterion(output, y).item() * len(x), count + len(x)
            if correct is not None:
                found = correct(output, y)
                right, seen = right + int(found.sum()), seen + found.numel()
        return loss / count, right / seen if correct is not None else None

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
    soup = compared(tmp_path, f"{HERE}:network", f"{tmp_path}/*.pt", data, objective=objective)
    figures, batches = loop(criterion, correct), list(DataLoader(TensorDataset(*made["test"]), batch_size=8))
    assert_figures(soup, [figures(m, batches) for m in zoo], figures(loaded_soup(network, soup.out), batches))


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


def test_a_module_of_lightning_with_a_compiled_network_a_criterion_and_metrics(tmp_path: Path) -> None:
    data, made = tables(tmp_path, classes)
    x, y = made["train"]

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        rows = rows_of(seed, number, len(x))
        output = model(x[rows])
        model.train_acc.tp += 1 + seed
        return model.criterion(output, y[rows])

    zoo = fine_tuned(Module, step)
    for k, model in enumerate(zoo):
        state = model.state_dict()
        assert "net._orig_mod.0.weight" in state
        torch.save({**lightning({}), "state_dict": state}, tmp_path / f"epoch=3-step={k}.ckpt")
    left_out = {"ignore": ["criterion.*", "train_acc.*"]}
    soup = compared(tmp_path, f"{HERE}:network", f"{tmp_path}/*.ckpt", data, **left_out)
    assert any("criterion" in note for note in soup.notes)
    batches = list(DataLoader(TensorDataset(*made["test"]), batch_size=8))
    again = Module()
    ours = {f"net._orig_mod.{name}": tensor for name, tensor in load_file(soup.out / "model.safetensors").items()}
    again.load_state_dict({**zoo[0].state_dict(), **ours})
    assert_figures(soup, [image_figures(m, batches) for m in zoo], image_figures(again.eval(), batches))

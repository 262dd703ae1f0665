"""Fine-tuned models and a comparison of them, whose figures must be those of the library's own evaluation loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import verify
from ray_soup.soups.output import Soup
from ray_soup.task.data import Split
from tests.conftest import InProcess

COUNT = 3
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Figures:
    """What an evaluation loop found."""

    loss: float
    """Sum over all units, such as images, tokens, pixels or labels."""
    units: int
    correct: np.ndarray | None
    """How many units of each example, or document, are right, [n]; None if that means nothing."""

    @property
    def nll(self) -> float:
        return self.loss / self.units

    @property
    def accuracy(self) -> float | None:
        return None if self.correct is None else float(self.correct.sum() / self.units)


Loop = Callable[[nn.Module], Figures]


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


def compared(folder: Path, model: str, ingredients: str, data: dict[str, Any], **more: Any) -> tuple[Recipe, Soup]:
    """Make every soup, quickly."""
    recipe = make_recipe({
        "model": model, "ingredients": ingredients, "data": {"select": 0.4, **data}, "precision": "float32",
        "learn": {"batch_size": 16, "epochs": 1, "model_batch": COUNT}, "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        **more,
    })  # fmt: skip
    soup = compare(recipe, folder / "out", CompareOptions(trained=False))
    verify(folder / "out")
    return recipe, soup


def assert_figures(made: tuple[Recipe, Soup], zoo: list[nn.Module], written: nn.Module, loop: Loop) -> None:
    """Each ingredient, the best single one and the soup have the predictions and figures of the library's own loop.

    Args:
        made: what `compared` returned.
        zoo: the ingredients, in order.
        written: the soup, as the library itself loads it.
        loop: evaluates a model on test.
    """
    recipe, soup = made
    singles = [loop(model.eval()) for model in zoo]
    rows = {row["model_name"]: row for row in soup.rows[:COUNT]}
    assert len(rows) == COUNT
    table = {row["model_name"]: row for row in soup.record["table"]}
    best = next(row for row in soup.rows if row["model_name"] == "best_single")
    nearest = min(singles, key=lambda own: abs(own.nll - best["test_nll"]))
    found = [*rows.values(), table["best_single"], table[soup.record["chosen"]]]
    expected = [*singles, nearest, loop(written.eval())]
    for row, own in zip(found, expected, strict=True):
        print(f"{row['model_name']}: NLL {row['test_nll']:.6f}, {own.nll:.6f}; {row.get('test_accuracy')}, {own.accuracy}")
        assert row["test_nll"] == pytest.approx(own.nll, rel=1e-5)
        assert ("test_accuracy" in row) == (own.accuracy is not None)
        if own.accuracy is not None:
            assert row["test_accuracy"] == pytest.approx(own.accuracy, abs=1e-12)
    pool = InProcess(recipe)
    split = Split("test", np.arange(pool.setup_info.sizes["test"], dtype=np.int32))
    paths = [ingredient.path for ingredient in pool.inputs.ingredients] + [str(soup.out / "model.safetensors")]
    for path, own in zip(paths, [*singles, expected[-1]], strict=True):
        (outcome,) = pool.evaluate_file(path, [split])
        if own.correct is None or outcome.correct is None:
            assert own.correct is outcome.correct is None
            continue
        group = np.arange(len(outcome)) if outcome.group is None else np.unique(outcome.group, return_inverse=True)[1]
        np.testing.assert_array_equal(np.bincount(group, outcome.correct), own.correct)


# Images of three colors

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


@torch.inference_mode()
def class_figures(model: nn.Module, batches: Batches) -> Figures:
    loss, right = 0.0, []
    for images, target in batches:
        output = model(images)
        loss += F.cross_entropy(output, target, reduction="sum").item()
        right.append((output.argmax(1) == target).numpy())
    correct = np.concatenate(right)
    return Figures(loss, len(correct), correct)

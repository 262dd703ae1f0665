"""Users who stay in Python: a script of Ray Tune that knows nothing of ray_soup, and a notebook without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ray_soup.io.find import open_ingredients
from tests import tiny
from tests.users.steps import learned, script

pytestmark = pytest.mark.slow
SWEEP = """
import tempfile
from pathlib import Path

import numpy as np
import torch
from ray import tune
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.layers(images.float() / 16)


def data(name):
    arrays = np.load(f"{name}.npz")
    return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


@torch.inference_mode()
def figures_of(model, name):
    images, labels = data(name)
    logits = model.eval()(images)
    return nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def train(config):
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    images, labels = data(f"{config['folder']}/train")
    generator = torch.Generator().manual_seed(config["seed"])
    for epoch in range(4):
        if config["seed"] == 2 and epoch == 1:
            raise RuntimeError("bad luck")
        for batch in torch.randperm(len(labels), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            torch.save(model.state_dict(), f"{folder}/model.pt")
            accuracy = figures_of(model, f"{config['folder']}/heldout")[1]
            tune.report({"accuracy": accuracy, "epoch": epoch}, checkpoint=tune.Checkpoint.from_directory(folder))


if __name__ == "__main__":
    results = tune.Tuner(
        train,
        param_space={"lr": 3e-3, "seed": tune.grid_search([0, 1, 2, 3]), "folder": str(Path.cwd())},
        run_config=tune.RunConfig(storage_path=str(Path.cwd() / "results"), name="sweep", verbose=0),
    ).fit()
"""
USE_SWEEP = """
import torch
from safetensors.torch import load_file
from sweep import Network, figures_of


def load(state):
    model = Network()
    model.load_state_dict(state)
    return figures_of(model, "test")


soup = load(load_file("soup/model.safetensors"))
singles = [load(torch.load(path)) for path in open("paths").read().splitlines()]
"""


@pytest.mark.usefixtures("cluster")
def test_a_user_of_ray_tune(tmp_path: Path) -> None:
    tiny.write_data(tmp_path)
    (tmp_path / "sweep.py").write_text(SWEEP)
    script(tmp_path, SWEEP)
    ingredients = f"{tmp_path}/results/sweep?metric=accuracy"
    recipe = {
        "model": "sweep:Network", "method": "mehl+", "ingredients": ingredients,
        "data": {"fit": "heldout.npz", "select": 0.25, "test": "test.npz"}, "learn": {"epochs": 1, "batch_size": 150},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1}, "precision": "float32",
    }  # fmt: skip
    row = learned(tmp_path, recipe)
    record = json.loads((tmp_path / "soup" / "run.json").read_text())
    assert [one["hyperparameters"]["seed"] for one in record["ingredients"]] == [0, 1, 3]
    assert any("left out: 1 failed" in note for note in record["notes"])

    found = open_ingredients(ingredients)
    (tmp_path / "paths").write_text("\n".join(one.path for one in found))
    names = script(tmp_path, USE_SWEEP)
    assert (row["test_nll"], row["test_accuracy"]) == pytest.approx(names["soup"], rel=1e-5)
    lines = (tmp_path / "soup" / "results.jsonl").read_text().splitlines()
    (single,) = (one for one in map(json.loads, lines) if one["model_name"] == "best_single")
    assert [one["metrics"]["accuracy"] for one in record["ingredients"]] == [one.trial.metrics["accuracy"] for one in found]
    best = single["test_nll"], single["test_accuracy"]
    assert any(best == pytest.approx(own, rel=1e-5) for own in names["singles"])
    same = learned(tmp_path, {**recipe, "ingredients": [one.path for one in found]}, "same")
    assert same["test_nll"] == row["test_nll"]


NOTEBOOK = (
    """
import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

import ray_soup
""",
    """
class Digits(Dataset):
    def __init__(self, rows):
        digits = load_digits()
        self.images, self.labels = digits.images[rows], digits.target[rows]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return torch.tensor(self.images[row], dtype=torch.float32) / 16, int(self.labels[row])


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 10))

    def forward(self, images):
        return self.layers(images)


train, fit, test = (DataLoader(Digits(slice(*rows)), 50) for rows in ((0, 600), (600, 1200), (1200, 1797)))
""",
    """
torch.manual_seed(0)
model, state_dicts = Network(), []
for lr in (1e-3, 3e-3, 1e-2, 3e-2):
    tuned = copy.deepcopy(model)
    optimizer = torch.optim.Adam(tuned.parameters(), lr)
    for epoch in range(3):
        for images, labels in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(tuned(images), labels).backward()
            optimizer.step()
    state_dicts.append(tuned.state_dict())
""",
    """
soup = ray_soup.mix_state_dicts(model, state_dicts, fit, method="mehl+", test=test, learn={"epochs": 2})
soup
""",
    """
@torch.inference_mode()
def figures_of(state):
    model.load_state_dict(state)
    model.eval()
    loss, right = 0.0, 0
    for images, labels in test:
        logits = model(images)
        loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
    return loss / len(test.dataset), right / len(test.dataset)


torch.save(soup.state_dict(), "soup.pt")
of_soup = figures_of(torch.load("soup.pt"))
of_singles = [figures_of(state) for state in state_dicts]
""",
)
"""The cells of a notebook: data and model are defined in it."""


def test_a_user_of_a_notebook(tmp_path: Path) -> None:
    names = script(tmp_path, "".join(NOTEBOOK))
    soup = names["soup"]
    assert names["of_soup"] == pytest.approx((soup.figures["test_nll"], soup.figures["test_accuracy"]), rel=1e-5)
    best = soup.best_single["test_nll"], soup.best_single["test_accuracy"]
    assert any(best == pytest.approx(own, rel=1e-5) for own in names["of_singles"])
    assert soup.figures["select_nll"] < soup.best_single["select_nll"]
    np.testing.assert_allclose(soup.coefficients.values.sum(axis=0), 1)

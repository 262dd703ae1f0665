"""An actor's memory grows with the model batch, not with the number of ingredients."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.io.progress import drain, no_progress
from ray_soup.mixing.directions import open_store
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.learn import learn
from ray_soup.task.data import cut_splits
from tests.conftest import children_called

WIDTH = 2000


def wide() -> nn.Module:
    """A model of 4 M parameters: a direction takes 16 MB in float32."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
    )


class Floats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = wide()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images.float())


class Sampler(threading.Thread):
    """Peaks of the one actor: resident bytes of the direction store, and the sum of these and its private memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store, self.total, self.samples, self.done = 0, 0, 0, threading.Event()
        self.process = max(children_called("RemoteShard"), key=psutil.Process.create_time)

    def sample(self) -> None:
        regions = self.process.memory_maps(grouped=False)
        store = sum(region.rss for region in regions if "/directions/" in region.path)
        with open(f"/proc/{self.process.pid}/status") as status:
            private = next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        self.store, self.total = max(self.store, store), max(self.total, store + private)
        self.samples += 1

    def run(self) -> None:
        while not self.done.wait(0.01):
            self.sample()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_memory_grows_with_the_model_batch_only(zoo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Floats().state_dict()
    vector = 4 * sum(t.numel() for t in base.values())  # bytes
    peaks, rises, stores = {}, {}, {}
    for number, count in enumerate((12, 12, 24)):  # the first also compiles
        folder = tmp_path / str(number)
        folder.mkdir()
        for k in range(count):
            torch.manual_seed(k)
            save_file({n: t + 0.01 * torch.randn_like(t) for n, t in base.items()}, folder / f"m{k}.safetensors")
        recipe = make_recipe(
            {
                "ingredients": str(folder), "model": "tests.ray.test_memory:Floats", "directions": {"dtype": "float32"},
                "data": {"fit": str(zoo / "heldout.npz")}, "precision": "float32", "blocks": "tensor",
                "learn": {"model_batch": 4, "epochs": 3, "batch_size": 64, "micro_batch": 64},
            }
        )  # fmt: skip
        inputs = open_inputs(recipe)
        drain(open_store(list(inputs.ingredients), inputs.layout, "float32"))  # built first: only learning is measured
        pool = RayPool(recipe, inputs.ingredients, Mesh(1, 1), 1)
        try:
            info = pool.setup(no_progress)
            store = pool.open_store(inputs.everything, recipe.blocks, no_progress)
            splits = cut_splits(recipe.data, info.sizes, info.fit_digests, recipe.learn.seed)
            sampler = Sampler()
            sampler.sample()
            before = sampler.total
            sampler.start()
            state = learn(recipe, pool, store.norms, splits, 4, tmp_path / f"{number}.pt")
            sampler.done.set()
            sampler.join()
        finally:
            pool.close()
        assert state.turn == count // 4
        assert sampler.samples > 20
        assert np.any(state.y.numpy() != 0)
        peaks[count], rises[count], stores[count] = sampler.total, sampler.total - before, sampler.store
    assert max(stores.values()) <= (4 + 1) * 1.02 * vector  # four directions and the center
    assert max(rises.values()) <= 16 * vector  # and a constant: base, temporaries, the compiled loops
    assert abs(peaks[24] - peaks[12]) <= 3 * vector  # twelve more directions would be 12

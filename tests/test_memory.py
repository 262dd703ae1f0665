"""An actor's memory follows the model batch, not the number of ingredients."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_soup.actors import Actors, quiet
from ray_soup.cache import drained
from ray_soup.data import cut
from ray_soup.directions import open_store
from ray_soup.learn import learn
from ray_soup.pipeline import prepare
from ray_soup.recipe import make_recipe
from ray_soup.shard import Mesh

WIDTH = 2000


def wide() -> nn.Module:
    """4 M parameters: a direction takes 16 MB in float32."""
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
    """Largest resident pages of the direction store, and largest sum of these and private memory, of the one actor."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.store, self.total, self.samples, self.done = 0, 0, 0, threading.Event()
        mine = psutil.Process().children(recursive=True)
        shards = [p for p in mine if "Shard" in p.name() and p.status() != psutil.STATUS_ZOMBIE]
        self.process = max(shards, key=psutil.Process.create_time)

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
def test_memory_follows_the_model_batch(zoo: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Floats().state_dict()
    numbers = sum(t.numel() for t in base.values())
    vector = 4 * numbers
    peaks, rises, stores = {}, {}, {}
    for number, count in enumerate((12, 12, 24)):  # the first also compiles
        folder = tmp_path / str(number)
        folder.mkdir()
        for k in range(count):
            torch.manual_seed(k)
            save_file({n: t + 0.01 * torch.randn_like(t) for n, t in base.items()}, folder / f"m{k}.safetensors")
        recipe = make_recipe(
            {
                "ingredients": str(folder), "model": "tests.test_memory:Floats", "directions": {"dtype": "float32"},
                "data": {"fit": str(zoo / "heldout.npz")}, "precision": "float32", "blocks": "tensor",
                "learn": {"model_batch": 4, "epochs": 2, "batch_size": 64, "micro_batch": 64},
            }
        )  # fmt: skip
        ingredients, layout = prepare(recipe)
        drained(open_store(ingredients, layout, "float32"))  # made before: only learning is measured
        actors = Actors(recipe, ingredients, Mesh(1, 1), 1)
        try:
            ready = actors.setup(quiet)
            taken = actors.take(tuple(range(count)), recipe.blocks, quiet)
            splits = cut(recipe.data, ready.sizes, ready.fit_digests, recipe.learn.seed)
            sampler = Sampler()
            sampler.sample()
            before = sampler.total
            sampler.start()
            state = learn(recipe, actors, taken.norms, splits, 4, tmp_path / f"{number}.pt")
            sampler.done.set()
            sampler.join()
        finally:
            actors.close()
        assert state.turn == count // 4
        assert sampler.samples > 50
        assert np.any(state.y.numpy() != 0)
        peaks[count], rises[count], stores[count] = sampler.total, sampler.total - before, sampler.store
    assert max(stores.values()) <= (4 + 1) * 1.02 * vector  # four directions and the center
    assert max(rises.values()) <= 16 * vector  # and a constant: base, temporaries, the compiled loops
    assert abs(peaks[24] - peaks[12]) <= 3 * vector  # twelve directions more would be 12

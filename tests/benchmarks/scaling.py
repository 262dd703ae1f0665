"""The driver's overhead per step, and two actors of one thread compared with one.

*driver*: the time of a step minus that of its slowest actor, compared with a bare Ray call of the same payload, for 1, 2 and
4 actors and a model with as many blocks as ViT-B/32. *scaling*: the time of a step of ViT-B/32 with a model batch of 18.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from tests.benchmarks.step import COUNT, MODEL, write_data
from tests.benchmarks.timing import typical

BLOCKS = 152  # tensors of ViT-B/32 and its head
BATCH, ROUNDS = 128, 300


def many_blocks() -> torch.nn.Module:
    """Build a model of BLOCKS tensors whose passes take almost no time."""
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(BLOCKS // 2)))
    for layer in model:
        torch.nn.init.eye_(layer.weight)
    return model


def opened(recipe: Any, size: int) -> tuple[Any, int]:
    """Start `size` actors of one thread and a model batch of all ingredients; return the pool and the number of blocks."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.on_ray import RayPool
    from ray_soup.io.progress import no_progress
    from ray_soup.soups.inputs import open_inputs

    inputs = open_inputs(recipe)
    pool = RayPool(recipe, inputs.ingredients, Mesh(size, 1), 1)
    pool.setup(no_progress)
    blocks = pool.open_store(tuple(range(COUNT)), "tensor", no_progress).partition.count
    pool.begin(np.arange(COUNT), np.zeros((COUNT, blocks), np.float32), pool.choose_precision())
    return pool, blocks


def write_tiny_inputs(folder: Path) -> Any:
    """Write ingredients and data for `many_blocks`; return the recipe."""
    from ray_soup.recipe import make_recipe
    from tests.benchmarks.ingredients import write_zoo

    model = "tests.benchmarks.scaling:many_blocks"
    write_zoo(folder, model, COUNT)
    random = np.random.default_rng(0)
    images = random.standard_normal((BATCH, 10)).astype(np.float32)
    np.savez(folder / "data.npz", images=images, labels=random.integers(0, 10, BATCH))
    return make_recipe({"model": model, "ingredients": f"{folder}/*.safetensors", "data": {"fit": str(folder / "data.npz")}})


def start_echoes(size: int) -> list[Any]:
    """Start `size` actors that stay busy for a given time and then return as many bytes as a shard does."""
    import ray

    class Echo:
        def step(self, x: np.ndarray, factor: float, batch: Any, busy_s: float) -> tuple[np.ndarray, float, float]:
            start = time.perf_counter()
            while time.perf_counter() - start < busy_s:
                pass
            return x.astype(np.float64), factor, time.perf_counter() - start

    return [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(size)]


def overhead(recipe: Any, size: int) -> dict[str, float]:
    """Alternate steps of `size` actors with bare calls that are busy for the same time."""
    import ray

    from ray_soup.task.data import Split

    batch = Split("fit", np.arange(BATCH, dtype=np.int32))
    pool, blocks = opened(recipe, size)
    x = np.full((COUNT, blocks), 1e-4, np.float32)
    own: list[float] = []
    bare: list[float] = []
    busy: list[float] = []
    echoes = start_echoes(size)
    parts = batch.parts(size)
    for _ in range(ROUNDS):
        start = time.perf_counter()
        partials = pool.step(x, 1.0, batch)
        busy.append(max(p.seconds for p in partials))
        own.append(time.perf_counter() - start - busy[-1])
        start = time.perf_counter()
        calls = [e.step.remote(x, 1.0, part, busy[-1]) for e, part in zip(echoes, parts, strict=True)]
        spent = max(answer[2] for answer in ray.get(calls))
        bare.append(time.perf_counter() - start - spent)
    for echo in echoes:
        ray.kill(echo)
    pool.close()
    return {
        f"{size} actors: slowest actor of a step (ms)": 1000 * float(np.median(busy)),
        f"{size} actors: bare call minus its slowest actor (ms)": 1000 * float(np.median(bare)),
        f"{size} actors: step minus its slowest actor (ms)": 1000 * float(np.median(own)),
    }


def driver() -> dict[str, float]:
    """Measure the driver's overhead with 1, 2 and 4 actors."""
    import ray

    from ray_soup.actors.ray_session import connect

    folder, results = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark")), {}
    try:
        recipe = write_tiny_inputs(folder)
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)  # more than there may be
        with connect():
            for size in (1, 2, 4):
                results |= overhead(recipe, size)
        return results
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def scaling() -> dict[str, float]:
    """Measure a step of ViT-B/32 with one and two actors; each case twice, and the faster one counts."""
    from ray_soup.actors.ray_session import connect
    from ray_soup.recipe import make_recipe
    from ray_soup.task.data import Split
    from tests.benchmarks.ingredients import write_zoo

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    cache = patch.dict(os.environ, {"RAY_SOUP_CACHE": str(folder / "cache")})  # actors inherit it
    cache.start()
    times: dict[tuple[int, int], float] = {}
    try:
        write_zoo(folder, MODEL, COUNT)
        write_data(folder)
        recipe = make_recipe(
            {"model": MODEL, "ingredients": f"{folder}/*.safetensors", "data": {"fit": str(folder / "data.npz")}}
        )
        with connect():
            for size, batches in ((1, (64, 128)), (2, (128,)), (1, (64, 128)), (2, (128,))):
                pool, blocks = opened(recipe, size)
                x = np.full((COUNT, blocks), 1e-4, np.float32)
                for count in batches:
                    batch = Split("fit", np.arange(count, dtype=np.int32))
                    seconds = typical(lambda a=pool, b=batch, x=x: a.step(x, 1.0, b), 3)
                    times[size, count] = min(seconds, times.get((size, count), float("inf")))
                pool.close()
        payload = COUNT * blocks * (4 + 8) + 4 * 128 // 2
        return {
            "1 actor, batch 64 (s)": times[1, 64],
            "1 actor, batch 128 (s)": times[1, 128],
            "2 actors, batch 128 (s)": times[2, 128],
            "strong scaling: 1 / 2 actors": times[1, 128] / times[2, 128],
            "weak scaling: 1 actor, half the batch / 2 actors": times[1, 64] / times[2, 128],
            "payload per step and actor (KB)": payload / 1e3,
        }
    finally:
        cache.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> dict[str, float]:
    """Run both parts."""
    results = driver() | scaling()
    results["2 actors: overhead / step of ViT-B/32"] = (
        results["2 actors: step minus its slowest actor (ms)"] / 1000 / results["2 actors, batch 128 (s)"]
    )
    return results

"""What the driver adds to a step, and one actor of one thread against two.

*driver*: the time of a step less that of its slowest actor, against a bare call with the same payload, for 1, 2 and 4 actors
of a model with as many blocks as ViT-B/32. *scaling*: the step at ViT-B/32 shape, a model batch of 18.
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


def many_blocks() -> torch.nn.Module:
    """A model of BLOCKS tensors that takes no time."""
    model = torch.nn.Sequential(*(torch.nn.Linear(10, 10) for _ in range(BLOCKS // 2)))
    for layer in model:
        torch.nn.init.eye_(layer.weight)
    return model


def opened(recipe: Any, size: int) -> tuple[Any, int]:
    """`size` actors of one thread at the beginning of a model batch of all ingredients, and the number of blocks."""
    from ray_soup.actors import Actors, quiet
    from ray_soup.pipeline import prepare
    from ray_soup.shard import Mesh

    ingredients, _ = prepare(recipe)
    actors = Actors(recipe, ingredients, Mesh(size, 1), 1)
    actors.setup(quiet)
    blocks = actors.take(tuple(range(COUNT)), "tensor", quiet).partition.count
    actors.begin(np.arange(COUNT), np.zeros((COUNT, blocks), np.float32), actors.choose_precision())
    return actors, blocks


def driver() -> dict[str, float]:
    import ray

    from ray_soup.actors import connect
    from ray_soup.data import Split
    from ray_soup.recipe import make_recipe
    from tests.benchmarks.ingredients import write_zoo

    class Echo:
        """Answers with as much as a shard does, after being busy for as long."""

        def step(self, x: np.ndarray, factor: float, batch: Any, busy_s: float) -> tuple[np.ndarray, float, float]:
            start = time.perf_counter()
            while time.perf_counter() - start < busy_s:
                pass
            return x.astype(np.float64), factor, time.perf_counter() - start

    folder, results = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark")), {}
    model = "tests.benchmarks.scaling:many_blocks"
    try:
        write_zoo(folder, model, COUNT)
        random = np.random.default_rng(0)
        images = random.standard_normal((128, 10)).astype(np.float32)
        np.savez(folder / "data.npz", images=images, labels=random.integers(0, 10, 128))
        recipe = make_recipe(
            {"model": model, "ingredients": f"{folder}/*.safetensors", "data": {"fit": str(folder / "data.npz")}}
        )
        batch = Split("fit", np.arange(128, dtype=np.int32))
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)  # more than there may be
        with connect():
            for size in (1, 2, 4):
                actors, blocks = opened(recipe, size)
                x = np.full((COUNT, blocks), 1e-4, np.float32)
                own: list[float] = []
                bare: list[float] = []
                busy: list[float] = []
                echoes = [ray.remote(Echo).options(num_cpus=0).remote() for _ in range(size)]
                parts = batch.parts(size)

                for _ in range(300):
                    start = time.perf_counter()
                    partials = actors.step(x, 1.0, batch)
                    busy.append(max(p.seconds for p in partials))
                    own.append(time.perf_counter() - start - busy[-1])
                    start = time.perf_counter()
                    calls = [e.step.remote(x, 1.0, part, busy[-1]) for e, part in zip(echoes, parts, strict=True)]
                    spent = max(answer[2] for answer in ray.get(calls))
                    bare.append(time.perf_counter() - start - spent)
                results[f"{size} actors: a step's own time (ms)"] = 1000 * float(np.median(busy))
                results[f"{size} actors: bare call less its own time (ms)"] = 1000 * float(np.median(bare))
                results[f"{size} actors: step less its slowest actor (ms)"] = 1000 * float(np.median(own))
                for echo in echoes:
                    ray.kill(echo)
                actors.close()
        return results
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def scaling() -> dict[str, float]:
    from ray_soup.actors import connect
    from ray_soup.data import Split
    from ray_soup.recipe import make_recipe
    from tests.benchmarks.ingredients import write_zoo

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    cache = patch.dict(os.environ, {"RAY_SOUP_CACHE": str(folder / "cache")})  # the actors', too
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
                actors, blocks = opened(recipe, size)
                x = np.full((COUNT, blocks), 1e-4, np.float32)
                for count in batches:
                    batch = Split("fit", np.arange(count, dtype=np.int32))
                    seconds = typical(lambda a=actors, b=batch, x=x: a.step(x, 1.0, b), 3)
                    times[size, count] = min(seconds, times.get((size, count), float("inf")))
                actors.close()
        payload = COUNT * blocks * (4 + 8) + 4 * 128 // 2
        return {
            "1 actor, batch 64 (s)": times[1, 64],
            "1 actor, batch 128 (s)": times[1, 128],
            "2 actors, batch 128 (s)": times[2, 128],
            "strong scaling: 1 / 2 actors": times[1, 128] / times[2, 128],
            "weak scaling: 1 actor, half the batch / 2 actors": times[1, 64] / times[2, 128],
            "traffic of a step and actor, without envelopes (KB)": payload / 1e3,
        }
    finally:
        cache.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> dict[str, float]:
    results = driver() | scaling()
    results["2 actors: overhead / step of ViT-B/32"] = (
        results["2 actors: step less its slowest actor (ms)"] / 1000 / results["2 actors, batch 128 (s)"]
    )
    return results

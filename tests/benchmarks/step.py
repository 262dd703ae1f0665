"""One step at ViT-B/32 shape with a model batch of 18: ours against the published procedure's, time and memory.

Each side runs in a process of its own on two threads. Memory: private memory plus the resident pages of the store, sampled.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL, COUNT, ROUNDS = "open_clip:ViT-B-32?classes=1000", 18, 5
BATCHES = (32, 128)
CODE = """
import json, sys
from pathlib import Path
from tests.benchmarks import step
print(json.dumps(step.{name}(Path(sys.argv[1]))))
"""


class Resident:
    """Largest private memory plus resident pages of files named rows.bin and center.bin, of this process, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _now(self) -> int:
        total, ours = 0, False
        with open("/proc/self/smaps") as maps:
            for line in maps:
                first = line.split(maxsplit=1)[0]
                if not first.endswith(":"):
                    ours = line.rstrip().endswith(("rows.bin", "center.bin"))
                elif first == "Rss:" and ours:
                    total += int(line.split()[1]) * 1024
        with open("/proc/self/status") as status:
            return total + next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def write_data(folder: Path) -> None:
    random = np.random.default_rng(0)
    images = random.standard_normal((max(BATCHES), 3, 224, 224)).astype(np.float32)
    np.savez(folder / "data.npz", images=images, labels=random.integers(0, 1000, len(images)))


def data_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    with np.load(folder / "data.npz") as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def timed(step: Any) -> float:
    step()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def reference(folder: Path) -> dict[str, float]:
    from ray_soup.checkpoints import open_ingredients
    from ray_soup.models import build
    from tests.benchmarks.reference import Reference

    torch.set_num_threads(2)
    model = build(MODEL).model.eval()
    names = [name for name, _ in model.named_parameters()]
    images, labels = data_of(folder)
    results: dict[str, float] = {}
    with Resident() as resident:
        zoo = torch.stack(
            [torch.cat([i.read(n).float() for n in names]) for i in open_ingredients(f"{folder}/*.safetensors")]
        )
        side = Reference(model, zoo)
        side.begin(list(range(COUNT)), zoo.mean(dim=0), 0.01, 1000)
        for size in BATCHES:
            results[f"batch {size}"] = timed(lambda size=size: side.step(images[:size], labels[:size]))
    return {**results, "peak": resident.peak}


def ours(folder: Path) -> dict[str, float]:
    from ray_soup.data import Split
    from ray_soup.pipeline import prepare
    from ray_soup.recipe import make_recipe
    from ray_soup.shard import Mesh, Shard

    data = {"fit": str(folder / "data.npz"), "select": str(folder / "select.npz")}
    recipe = make_recipe({"model": MODEL, "ingredients": f"{folder}/*.safetensors", "data": data, "precision": "float32"})
    ingredients, _ = prepare(recipe)
    shard = Shard(recipe, ingredients, Mesh(1, 1), 0, 2)
    list(shard.setup())
    blocks = list(shard.take(tuple(range(COUNT)), "tensor"))[-1].partition.count
    results: dict[str, float] = {}
    with Resident() as resident:
        shard.begin(np.arange(COUNT), np.zeros((COUNT, blocks), np.float32))
        x = np.full((COUNT, blocks), 1e-3, np.float32)
        for size in BATCHES:
            batch = Split("fit", np.arange(size, dtype=np.int32))
            results[f"batch {size}"] = timed(lambda batch=batch: shard.step(x, 1.0, batch))
    return {**results, "peak": resident.peak}


def main() -> dict[str, float]:
    from ray_soup.models import describe
    from tests.benchmarks.ingredients import write_zoo

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    try:
        write_zoo(folder, describe(MODEL).state_shapes, COUNT)
        write_data(folder)
        random = np.random.default_rng(1)
        np.savez(
            folder / "select.npz", images=random.standard_normal((4, 3, 224, 224)).astype(np.float32), labels=np.arange(4)
        )
        sides: dict[str, dict[str, float]] = {}
        for _ in range(2):  # the first run of ours makes the store
            for name in ("ours", "reference"):
                code = CODE.format(name=name)
                done = subprocess.run(
                    [sys.executable, "-c", code, str(folder)],
                    env={**os.environ, "RAY_SOUP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"},
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                sides[name] = json.loads(done.stdout.splitlines()[-1])
        results: dict[str, float] = {}
        for size in BATCHES:
            a, b = sides["ours"][f"batch {size}"], sides["reference"][f"batch {size}"]
            results |= {
                f"batch {size}, ours (s)": a,
                f"batch {size}, reference (s)": b,
                f"batch {size}: reference / ours": b / a,
            }
        results |= {f"memory, {name} (GB)": sides[name]["peak"] / 1e9 for name in sides}
        results["memory: ours / reference"] = sides["ours"]["peak"] / sides["reference"]["peak"]
        return results
    finally:
        shutil.rmtree(folder)

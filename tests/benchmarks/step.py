"""One step of ViT-B/32 with a model batch of 18: time and memory, compared with the published procedure.

Each side runs in its own process on two threads: ours in the default precision (bfloat16 if it is measured to be faster) and
in float32, the published procedure in float32 as described. Memory is private memory plus resident pages of the direction
store, sampled. The results also show the best that is possible: a step of nothing but passes, at the rate of a large matrix
product.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.timing import pass_flops, product_rate, typical

MODEL, COUNT = "open_clip:ViT-B-32?classes=1000", 18
BATCHES = (32, 128)
CODE = """
import json, sys
from pathlib import Path
from tests.benchmarks import step
folder = Path(sys.argv[1])
print(json.dumps(step.{call}))
"""
CALLS = {
    "building the store": "opened(folder, 'float32') and {}",
    "ours": "ours(folder, 'auto')",
    "ours in float32": "ours(folder, 'float32')",
    "reference": "reference(folder)",
}
"""What runs in a process of its own, in this order."""


class Resident:
    """Peak of this process's private memory plus resident pages of files named rows.bin and center.bin, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

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

    def _sample(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self._now())

    def __enter__(self) -> Resident:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


class Private(Resident):
    """Peak of this process's private memory above what it is at the beginning, in bytes."""

    def __enter__(self) -> Resident:
        self._before = self._now()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.peak -= self._before

    def _now(self) -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def write_data(folder: Path) -> None:
    """Write random images and labels, as many as the largest batch."""
    random = np.random.default_rng(0)
    images = random.standard_normal((max(BATCHES), 3, 224, 224)).astype(np.float32)
    np.savez(folder / "data.npz", images=images, labels=random.integers(0, 1000, len(images)))


def data_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read them: images float32 [n, 3, 224, 224], labels int64 [n]."""
    with np.load(folder / "data.npz") as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])


def reference(folder: Path) -> dict[str, float]:
    """Measure the published procedure."""
    from ray_soup.io.find import open_ingredients
    from ray_soup.task.models import build
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
        side.step(images, labels)
    for size in BATCHES:  # after the sampling of memory, which would take time from the steps
        results[f"batch {size}"] = typical(lambda size=size: side.step(images[:size], labels[:size]))
    fastest = pass_flops(model, images[:1]) / max(map(product_rate, (torch.float32, torch.bfloat16)))
    return {**results, "peak": resident.peak, "fastest passes": fastest}


def opened(folder: Path, precision: str) -> tuple[Any, int]:
    """Return a shard that holds all ingredients, and the number of blocks."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.shard import Shard
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.inputs import open_inputs

    data = {"fit": str(folder / "data.npz"), "select": str(folder / "select.npz")}
    recipe = make_recipe({"model": MODEL, "ingredients": f"{folder}/*.safetensors", "data": data, "precision": precision})
    shard = Shard(recipe, open_inputs(recipe).ingredients, Mesh(1, 1), 0, 2)
    list(shard.setup())
    return shard, list(shard.open_store(tuple(range(COUNT)), "tensor"))[-1].partition.count


def ours(folder: Path, precision: str) -> dict[str, float]:
    """Measure ours."""
    from ray_soup.task.data import Split

    shard, blocks = opened(folder, precision)
    results: dict[str, float] = {}
    with Resident() as resident:
        shard.begin(np.arange(COUNT), np.zeros((COUNT, blocks), np.float32), shard.choose_precision())
        x = np.full((COUNT, blocks), 1e-3, np.float32)
        batches = [Split("fit", np.arange(size, dtype=np.int32)) for size in BATCHES]
        shard.step(x, 1.0, batches[-1])
    for batch in batches:
        results[f"batch {len(batch)}"] = typical(lambda batch=batch: shard.step(x, 1.0, batch))
    return {**results, "peak": resident.peak}


def in_own_process(folder: Path, call: str) -> dict[str, float]:
    """Evaluate a call of this module in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(call=call), str(folder)],
        env={**os.environ, "RAY_SOUP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def compared(sides: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the measurements of all sides and their ratios."""
    results: dict[str, float] = {}
    baseline = sides["reference"]
    for name, side in sides.items():
        results |= {f"batch {size}, {name} (s)": side[f"batch {size}"] for size in BATCHES}
        results[f"memory, {name} (GB)"] = side["peak"] / 1e9
    for name in ("ours", "ours in float32"):
        for size in BATCHES:
            results[f"batch {size}: reference / {name}"] = baseline[f"batch {size}"] / sides[name][f"batch {size}"]
        results[f"memory: {name} / reference"] = sides[name]["peak"] / baseline["peak"]
    for size in BATCHES:
        fastest = size * baseline["fastest passes"]
        results[f"batch {size}: reference / passes at the rate of a matrix product"] = baseline[f"batch {size}"] / fastest
    return results


def main() -> dict[str, float]:
    """Write ingredients and data, and measure every side."""
    from tests.benchmarks.ingredients import write_zoo

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    try:
        write_zoo(folder, MODEL, COUNT)
        write_data(folder)
        images = np.random.default_rng(1).standard_normal((4, 3, 224, 224)).astype(np.float32)
        np.savez(folder / "select.npz", images=images, labels=np.arange(4))
        sides = {name: in_own_process(folder, call) for name, call in CALLS.items()}
        del sides["building the store"]
        return compared(sides)
    finally:
        shutil.rmtree(folder)

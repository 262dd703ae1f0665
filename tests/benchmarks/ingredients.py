"""What reads 24 ingredients of ViT-B/32 size (8.4 GB): inspecting, hashing, the uniform soup, the direction store.

The uniform soup is compared with a plain loop over the files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from ray_soup.io.ingredient import Ingredient
    from ray_soup.mixing.blocks import Layout
    from ray_soup.mixing.coefficients import Coefficients

COUNT = 24
MODEL = "open_clip:ViT-B-32?classes=1000"
ROUNDS = 4  # the first warms the page cache and compiles


def write_zoo(folder: Path, model: str, count: int = COUNT) -> None:
    """Write ingredients: the model's own initialization plus noise.

    With arbitrary parameters, which no training produces, passes can be several times slower: they meet denormal values.
    """
    from ray_soup.task.models import build

    torch.manual_seed(0)
    center = build(model).model.state_dict()
    noise = torch.randn(sum(t.numel() for t in center.values()))
    for k in range(count):
        parts = noise.roll(1009 * k).split([t.numel() for t in center.values()])
        state = {n: t + 0.001 * part.view(t.shape) for (n, t), part in zip(center.items(), parts, strict=True)}
        save_file(state, folder / f"model_{k}.safetensors")


def open_zoo(folder: Path, layout: Layout) -> list[Ingredient]:
    """Open the ingredients in `folder` and bind them to the layout."""
    from ray_soup.io.check import check_together
    from ray_soup.io.find import open_ingredients

    return check_together(open_ingredients(str(folder)), layout.state_shapes, layout.tied)


def uniform_soup(ingredients: list[Ingredient], layout: Layout) -> Coefficients:
    """Return the coefficients of the uniform soup."""
    from ray_soup.mixing.blocks import partition
    from ray_soup.mixing.coefficients import Coefficients
    from ray_soup.soups.mixture import mean_of

    whole = partition(layout, "model")
    block_of = dict(zip(layout.names, whole.block.tolist(), strict=True))
    values = mean_of(range(len(ingredients)), len(ingredients))
    return Coefficients(values, tuple(i.name for i in ingredients), whole.names, block_of)


def plain_loop(files: list[Path]) -> dict[str, torch.Tensor]:
    """Average checkpoints in the usual way: load one file after another and add."""
    total: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    return {name: tensor.div_(len(files)) for name, tensor in total.items()}


class PeakPrivate:
    """Peak private memory (RssAnon) of a process in bytes, sampled every 10 ms."""

    def __init__(self, pid: int):
        self.peak = 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            try:
                with open(f"/proc/{self._process.pid}/status") as status:
                    lines = dict(line.split(":", 1) for line in status)
                self.peak = max(self.peak, int(lines.get("RssAnon", "0 kB").split()[0]) * 1024)
            except OSError:
                return

    def __enter__(self) -> PeakPrivate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


STORE = """
import sys, time
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.progress import drain
from ray_soup.mixing.directions import open_store
from ray_soup.task.models import describe
layout = describe(sys.argv[2])
ingredients = check_together(open_ingredients(sys.argv[1]), layout.state_shapes, layout.tied)
start = time.perf_counter()
drain(open_store(ingredients, layout, "int8", 2))
print(time.perf_counter() - start)
"""


def measure_uniform(folder: Path, ingredients: list[Ingredient], layout: Layout) -> dict[str, float]:
    """Time the uniform soup, written to disk, and the plain loop in turn; compare what they write."""
    from ray_soup.mixing.bake import bake

    soup = uniform_soup(ingredients, layout)
    files = sorted(folder.glob("*.safetensors"))
    ours, plain = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        bake(soup, ingredients, folder / "soup.out")
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        mean = plain_loop(files)
        save_file(mean, folder / "plain.out")
        with open(folder / "plain.out", "rb+") as file:
            os.fsync(file.fileno())
        plain.append(time.perf_counter() - start)
    return {
        "uniform, written (s, best of 3)": min(ours[1:]),
        "plain loop, written (s, best of 3)": min(plain[1:]),
        "uniform / plain loop": min(ours[1:]) / min(plain[1:]),
        "largest difference between the two": max(
            float((load_file(folder / "soup.out")[n] - t).abs().max()) for n, t in mean.items()
        ),
    }


def measure_store(folder: Path) -> dict[str, float]:
    """Build the direction store in a process of its own: time and private memory."""
    environment: dict[str, Any] = {**os.environ, "RAY_SOUP_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", STORE, str(folder), MODEL]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with PeakPrivate(process.pid) as private:
        said, _ = process.communicate()
    return {
        "direction store, int8, with hashing (s)": float(said),
        "its private memory, peak RssAnon (GB)": private.peak / 1e9,
    }


def main() -> dict[str, float]:
    """Write the ingredients and measure everything that reads them."""
    from ray_soup.io.hashing import hash_ingredients
    from ray_soup.task.models import describe

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    try:
        layout = describe(MODEL)
        write_zoo(folder, MODEL)
        os.sync()  # so that writing the ingredients is not measured
        nbytes = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ray_soup.cli", "inspect", str(folder)], check=True, stdout=subprocess.DEVNULL)
        results = {"parameters (million)": layout.numel / 1e6, "bytes (GB)": nbytes / 1e9}
        results["inspect (s)"] = time.perf_counter() - start
        ingredients = open_zoo(folder, layout)
        start = time.perf_counter()
        hash_ingredients(ingredients)
        results["hashing (s)"] = time.perf_counter() - start
        return results | measure_uniform(folder, ingredients, layout) | measure_store(folder)
    finally:
        shutil.rmtree(folder)

"""24 ingredients of ViT-B/32 size (8.4 GB): headers, the direction store, and the uniform soup against a plain loop."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

COUNT = 24
MODEL = "open_clip:ViT-B-32?classes=1000"


def write_zoo(folder: Path, model: str, count: int = COUNT) -> None:
    """Ingredients around the model's own initialisation: with numbers that no training leaves, passes may take several times
    as long (they meet denormal ones)."""
    from ray_soup.models import build

    torch.manual_seed(0)
    center = build(model).model.state_dict()
    noise = torch.randn(sum(t.numel() for t in center.values()))
    for k in range(count):
        parts = noise.roll(1009 * k).split([t.numel() for t in center.values()])
        state = {n: t + 0.001 * part.view(t.shape) for (n, t), part in zip(center.items(), parts, strict=True)}
        save_file(state, folder / f"model_{k}.safetensors")


def plain_loop(files: list[Path]) -> dict[str, torch.Tensor]:
    """What people write: load each file in turn and add."""
    total: dict[str, torch.Tensor] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            total[name] = total[name].add_(tensor) if name in total else tensor.clone()
    return {name: tensor.div_(len(files)) for name, tensor in total.items()}


class PeakPrivate:
    """Largest RssAnon of a process, sampled every 10 ms."""

    def __init__(self, pid: int):
        self.peak = 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
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
from ray_soup.checkpoints import check_together, open_ingredients
from ray_soup.directions import open_store
from ray_soup.cache import drained
from ray_soup.models import describe
layout = describe(sys.argv[2])
ingredients = open_ingredients(sys.argv[1])
check_together(ingredients, layout.state_shapes, layout.tied)
start = time.perf_counter()
drained(open_store(ingredients, layout, "int8", 2))
print(time.perf_counter() - start)
"""


def main() -> dict[str, float]:
    from ray_soup.bake import bake
    from ray_soup.blocks import partition
    from ray_soup.checkpoints import check_together, open_ingredients
    from ray_soup.coefficients import Coefficients
    from ray_soup.greedy import uniform
    from ray_soup.models import describe
    from ray_soup.pipeline import hash_ingredients

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    try:
        layout = describe(MODEL)
        write_zoo(folder, MODEL)
        os.sync()  # the writing of the zoo is not what is measured
        files = sorted(folder.glob("*.safetensors"))
        nbytes = sum(f.stat().st_size for f in files)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "ray_soup.cli", "inspect", str(folder)], check=True, stdout=subprocess.DEVNULL)
        results = {"parameters (million)": layout.numel / 1e6, "bytes (GB)": nbytes / 1e9}
        results["inspect (s)"] = time.perf_counter() - start

        ingredients = open_ingredients(str(folder))
        check_together(ingredients, layout.state_shapes, layout.tied)
        start = time.perf_counter()
        hash_ingredients(ingredients)
        results["hashing (s)"] = time.perf_counter() - start
        whole = partition(layout, "model")
        block_of = dict(zip(layout.names, whole.block.tolist(), strict=True))
        soup = Coefficients(uniform(COUNT), tuple(i.name for i in ingredients), whole.names, block_of)
        ours, plain = [], []
        for _ in range(4):  # the first round warms the page cache and compiles
            start = time.perf_counter()
            bake(soup, ingredients, folder / "soup.out")
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            mean = plain_loop(files)
            save_file(mean, folder / "plain.out")
            with open(folder / "plain.out", "rb+") as file:
                os.fsync(file.fileno())
            plain.append(time.perf_counter() - start)
        worst = max(float((load_file(folder / "soup.out")[n] - t).abs().max()) for n, t in mean.items())
        del mean
        results["uniform, written (s, best of 3)"] = min(ours[1:])
        results["plain loop, written (s, best of 3)"] = min(plain[1:])
        results["uniform / plain loop"] = min(ours[1:]) / min(plain[1:])
        results["largest difference of the two"] = worst

        environment = {**os.environ, "RAY_SOUP_CACHE": str(folder / "cache")}
        command = [sys.executable, "-c", STORE, str(folder), MODEL]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        with PeakPrivate(process.pid) as private:
            said, _ = process.communicate()
        results["direction store, int8, with hashes (s)"] = float(said)
        results["its private memory, peak RssAnon (GB)"] = private.peak / 1e9
        return results
    finally:
        shutil.rmtree(folder)

"""How close each part of the work comes to what this machine can do, measured in the same run.

Combine and project are compared with the rate at which the same threads read and copy memory, forward and backward passes
with the rate of a large matrix product, and the direction store and baking with reading and writing the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.timing import pass_flops, product_rate, seconds

MODEL, COUNT, THREADS = "open_clip:ViT-B-32?classes=1000", 18, 2
ZOO = 8  # ingredients for the store and for baking


def bandwidth() -> float:
    """Measure memory bandwidth in bytes per second on THREADS threads: the better of reading (a sum) and copying."""
    torch.set_num_threads(THREADS)
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    nbytes = source.numel() * 4
    return max(nbytes / seconds(lambda: source.sum()), 2 * nbytes / seconds(lambda: target.copy_(source)))


def hyperplane() -> dict[str, float]:
    """Measure combine and project for COUNT directions in each dtype, with the memory bandwidth measured in between."""
    from ray_soup.mixing.hyperplane import synthetic_plane
    from ray_soup.task.models import describe

    numel = describe(MODEL).numel
    results: dict[str, float] = {}
    rates, limit = {}, bandwidth()
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        plane = synthetic_plane(dtype, COUNT, numel, torch.device("cpu"), THREADS)
        out, base = torch.zeros(numel), torch.zeros(numel)
        x = np.full((COUNT, 1), 1e-3, np.float32)
        rows = plane.store.rows.nbytes
        for name, work, more in (
            ("combine", lambda p=plane, o=out, b=base, x=x: p.combine(o, b, x), 2 * out.nbytes),
            ("project", lambda p=plane, o=out: p.project(o), out.nbytes),
        ):
            took = seconds(work)
            results[f"{name}, {dtype} (ms)"] = 1000 * took
            rates[f"{name}, {dtype}: share of the bandwidth"] = (rows + more) / took
            limit = max(limit, bandwidth())
        del plane
    results |= {"memory bandwidth (GB/s)": limit / 1e9} | {key: rate / limit for key, rate in rates.items()}
    for name in ("combine", "project"):
        results[f"{name}: int8 / float32 time"] = results[f"{name}, int8 (ms)"] / results[f"{name}, float32 (ms)"]
        results[f"{name}: int4 / int8 time"] = results[f"{name}, int4 (ms)"] / results[f"{name}, int8 (ms)"]
    return results


def passes() -> dict[str, float]:
    """Measure forward and backward passes of a batch of 32 in each precision, and a matrix product in the same precision."""
    from ray_soup.actors.precision import autocast
    from ray_soup.task.attention import FastAttention
    from ray_soup.task.models import build

    torch.set_num_threads(THREADS)
    model = build(MODEL).model.eval()
    images = torch.randn(32, 3, 224, 224)
    results: dict[str, float] = {}
    flops = pass_flops(model, images)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rate = product_rate(dtype)

        def work(name: str = name) -> None:
            model.zero_grad()
            with FastAttention():
                with autocast(name, images.device):
                    loss = model(images).float().sum()
                loss.backward()

        took = seconds(work, 3)
        results[f"forward and backward, {name} (s)"] = took
        results[f"matrix product, {name} (GFLOP/s)"] = rate / 1e9
        results[f"forward and backward, {name}: share of the rate"] = flops / took / rate
    return results


def read_all(paths: list[Path]) -> None:
    """Read all files on THREADS threads."""
    buffer = [memoryview(bytearray(1 << 24)) for _ in range(THREADS)]

    def read(thread: int) -> None:
        for path in paths[thread::THREADS]:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer[thread]):
                    pass

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(THREADS)))


def cold_seconds(paths: list[Path], work: Callable[[], object]) -> float:
    """Time `work` twice with none of the files in the page cache, and return the lower time."""
    found = []
    for _ in range(2):
        for path in paths:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def time_writing(path: Path, nbytes: int) -> float:
    """Time writing about `nbytes` bytes to disk, in seconds."""
    some = os.urandom(1 << 24)

    def work() -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(0, nbytes, len(some)):
                file.write(some)
            os.fsync(file.fileno())

    return seconds(work, 2)


def files() -> dict[str, float]:
    """Measure the direction store and baking from files in the page cache, with reading and writing the same bytes."""
    import hashlib

    from ray_soup.io.cache import cache_at
    from ray_soup.io.progress import drain
    from ray_soup.mixing.bake import bake
    from ray_soup.mixing.directions import open_store
    from ray_soup.task.models import describe
    from tests.benchmarks.ingredients import open_zoo, uniform_soup, write_zoo

    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made, cache_at(Path(made) / "cache"):
        folder = Path(made)
        layout = describe(MODEL)
        write_zoo(folder, MODEL, ZOO)
        os.sync()
        paths = sorted(folder.glob("*.safetensors"))
        source = sum(p.stat().st_size for p in paths)
        reading = seconds(lambda: read_all(paths), 3)
        some = bytes(1 << 26)
        per_byte = seconds(lambda: hashlib.sha256(some).digest()) / len(some) / THREADS
        hashing = source * per_byte
        results = {"source (GB)": source / 1e9, "reading it (s)": reading, "hashing it (s)": hashing}
        ingredients = open_zoo(folder, layout)
        soup = uniform_soup(ingredients, layout)
        baking = seconds(lambda: bake(soup, ingredients, folder / "soup.out"), 3)
        nbytes = (folder / "soup.out").stat().st_size
        writing = time_writing(folder / "written", nbytes)
        read_cold = cold_seconds(paths, lambda: read_all(paths))
        bake_cold = cold_seconds(paths, lambda: bake(soup, ingredients, folder / "soup.out"))
        bare, bare_cold = (took - nbytes * per_byte for took in (baking, bake_cold))
        results |= {
            "baking, with hashing what is written (s)": baking,
            "writing the soup (s)": writing,
            "slower of reading and writing / baking without hashing": max(reading, writing) / bare,
            "reading and writing in turn / baking without hashing": (reading + writing) / bare,
            "reading files that are not in memory (s)": read_cold,
            "baking them, with hashing what is written (s)": bake_cold,
            "reading / baking without hashing, not in memory": read_cold / bare_cold,
            "reading and writing in turn / baking without hashing, not in memory": (read_cold + writing) / bare_cold,
        }

        def store() -> None:
            shutil.rmtree(folder / "cache" / "directions", ignore_errors=True)
            drain(open_store(ingredients, layout, "int8", THREADS)).hold.close()

        building = seconds(store, 2)
        writing = time_writing(folder / "written", layout.numel * (4 + ZOO))
        results |= {
            "direction store, with hashing (s)": building,
            "writing the store (s)": writing,
            "slower of reading and writing / direction store without hashing": max(reading, writing) / (building - hashing),
            "reading and writing in turn / direction store without hashing": (reading + writing) / (building - hashing),
        }
        return results


def main() -> dict[str, float]:
    """Run all three parts."""
    return hyperplane() | passes() | files()

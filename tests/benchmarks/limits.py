"""How near the parts of the work are to what this machine can do, measured in the same run.

Combine and project against the rate at which the same threads read and copy memory; forward and backward passes against the
rate of a large matrix product; the direction store and baking against reading and writing the bytes concerned.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks.timing import pass_flops, product_rate, seconds

MODEL, COUNT, THREADS = "open_clip:ViT-B-32?classes=1000", 18, 2
ZOO = 8  # ingredients of the store and of baking


def bandwidth() -> float:
    """Bytes a second that THREADS threads move: the better of reading (a sum) and copying (read and written)."""
    torch.set_num_threads(THREADS)
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    nbytes = source.numel() * 4
    return max(nbytes / seconds(lambda: source.sum()), 2 * nbytes / seconds(lambda: target.copy_(source)))


def hyperplane() -> dict[str, float]:
    """Combine and project of COUNT directions of the model, by dtype, against the memory bandwidth seen in between."""
    from ray_soup.hyperplane import made_up_plane
    from ray_soup.models import describe

    numbers = describe(MODEL).numel
    results: dict[str, float] = {}
    rates, limit = {}, bandwidth()
    for dtype in ("float32", "bfloat16", "int8"):
        plane = made_up_plane(dtype, COUNT, numbers, torch.device("cpu"), THREADS)
        out, base = torch.zeros(numbers), torch.zeros(numbers)
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
    return results


def passes() -> dict[str, float]:
    """Forward and backward passes of a batch of 32, by precision, against matrix products of the same."""
    from ray_soup.models import build

    torch.set_num_threads(THREADS)
    model = build(MODEL).model.eval()
    images = torch.randn(32, 3, 224, 224)
    results: dict[str, float] = {}
    flops = pass_flops(model, images)
    for name, low in (("float32", False), ("bfloat16", True)):
        rate = product_rate(torch.bfloat16 if low else torch.float32)

        def work(low: bool = low) -> None:
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = model(images).float().sum()
            loss.backward()

        took = seconds(work, 3)
        results[f"forward and backward, {name} (s)"] = took
        results[f"matrix product, {name} (GFLOP/s)"] = rate / 1e9
        results[f"forward and backward, {name}: share of the rate"] = flops / took / rate
    return results


def files() -> dict[str, float]:
    """The direction store and baking, of warm files, against reading all bytes and writing those that come out."""
    import hashlib

    from ray_soup.bake import bake
    from ray_soup.blocks import partition
    from ray_soup.cache import cache_at, drained
    from ray_soup.checkpoints import check_together, open_ingredients
    from ray_soup.coefficients import Coefficients
    from ray_soup.directions import open_store
    from ray_soup.greedy import uniform
    from ray_soup.models import describe
    from tests.benchmarks.ingredients import write_zoo

    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made, cache_at(Path(made) / "cache"):
        folder = Path(made)
        layout = describe(MODEL)
        write_zoo(folder, MODEL, ZOO)
        os.sync()
        paths = sorted(folder.glob("*.safetensors"))
        source = sum(p.stat().st_size for p in paths)
        buffer = [memoryview(bytearray(1 << 24)) for _ in range(THREADS)]

        def read_all() -> None:
            def read(number: int) -> None:
                for path in paths[number::THREADS]:
                    with open(path, "rb", buffering=0) as file:
                        while file.readinto(buffer[number]):
                            pass

            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(read, range(THREADS)))

        def write(nbytes: int) -> float:
            some = os.urandom(1 << 24)

            def work() -> None:
                with open(folder / "written", "wb", buffering=0) as file:
                    for _ in range(0, nbytes, len(some)):
                        file.write(some)
                    os.fsync(file.fileno())

            return seconds(work, 2)

        reading = seconds(read_all, 3)
        some = bytes(1 << 26)
        hashing = source * seconds(lambda: hashlib.sha256(some).digest()) / len(some) / THREADS
        results = {"source (GB)": source / 1e9, "reading it (s)": reading, "hashing it (s)": hashing}
        ingredients = open_ingredients(str(folder))
        check_together(ingredients, layout.state_shapes, layout.tied)
        whole = partition(layout, "model")
        block_of = dict(zip(layout.names, whole.block.tolist(), strict=True))
        soup = Coefficients(uniform(ZOO), tuple(i.name for i in ingredients), whole.names, block_of)
        baking = seconds(lambda: bake(soup, ingredients, folder / "soup.out"), 3)
        writing = write((folder / "soup.out").stat().st_size)
        results |= {
            "baking (s)": baking,
            "writing the soup (s)": writing,
            "baking: the slower of reading and writing / it": max(reading, writing) / baking,
        }

        def store() -> None:
            shutil.rmtree(folder / "cache" / "directions", ignore_errors=True)
            drained(open_store(ingredients, layout, "int8", THREADS)).hold.close()

        making = seconds(store, 2)
        writing = write(layout.numel * (4 + ZOO))
        results |= {
            "direction store, with hashes (s)": making,
            "writing the store (s)": writing,
            "direction store: the slower of reading and writing / the rest": max(reading, writing) / (making - hashing),
        }
        return results


def main() -> dict[str, float]:
    return hyperplane() | passes() | files()

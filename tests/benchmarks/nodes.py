"""Baking and hashing 24 ingredients of ViT-B/32 size (8.4 GB) from two simulated hosts, compared with one of them.

Each host is confined to one core. The files are in the page cache, so this is the speed of the cores, not of a disk.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

SHARD = 30_000_000
CODE = """
import json, sys
from pathlib import Path
from tests.benchmarks import nodes
print(json.dumps(nodes.measure(Path(sys.argv[1]))))
"""


def measure(folder: Path) -> dict[str, float]:
    """Return the seconds of each way, and how often each byte was read; called on one host."""
    from ray_soup.actors.messages import ModelFiles
    from ray_soup.actors.on_ray import BakingPool
    from ray_soup.actors.ray_session import connect
    from ray_soup.io.hashing import hash_ingredients
    from ray_soup.io.progress import no_progress
    from ray_soup.mixing.bake import bake, plan_baking, read_bytes
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.inputs import open_inputs
    from ray_soup.soups.mixture import mean_coefficients
    from tests.benchmarks.ingredients import MODEL
    from tests.benchmarks.timing import typical

    recipe = make_recipe({"method": "uniform", "model": MODEL, "ingredients": str(folder / "zoo")})
    inputs = open_inputs(recipe)
    ingredients, everything = list(inputs.ingredients), tuple(inputs.everything)
    coefficients = mean_coefficients(recipe, inputs, everything)
    (folder / "out").mkdir()
    path = folder / "out" / "model.safetensors"
    files = plan_baking(coefficients, ingredients, path, "keep", SHARD)
    found = {
        "one host: bake (s)": typical(lambda: bake(coefficients, ingredients, path, 1, shard_size=SHARD)),
        "one host: hash (s)": typical(lambda: hash_ingredients(ingredients)),
    }
    with connect():
        pool = BakingPool(recipe, ingredients)
        pool.setup(no_progress)
        model, read = ModelFiles(everything, coefficients, str(path), "keep", SHARD), list[int]()
        found["two hosts: bake (s)"] = typical(lambda: read.append(pool.bake(model, files, lambda _: None)))
        found["two hosts: hash (s)"] = typical(lambda: pool.hash(no_progress))
        pool.close()
    found["two hosts: times that each byte is read"] = float(np.max(read)) / read_bytes(coefficients, ingredients, files)
    for what in ("bake", "hash"):
        found[f"{what}: one host / two hosts"] = found[f"one host: {what} (s)"] / found[f"two hosts: {what} (s)"]
    return found


def main() -> dict[str, float]:
    """Start the hosts, confine each to a core, and measure from the first."""
    from tests.benchmarks.ingredients import MODEL, write_zoo
    from tests.ray.test_hosts import ip, two_hosts

    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made, two_hosts() as hosts:
        folder = Path(made)
        (folder / "zoo").mkdir()
        write_zoo(folder / "zoo", MODEL)
        for core, name in enumerate(hosts.names):
            for pid in map(int, ip("netns", "pids", name).split()):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(int(thread), {core})
        command = ["taskset", "-c", "0", sys.executable, "-c", CODE, made]
        process = hosts.start(0, command, "measure.log", RAY_ADDRESS=hosts.address)
        process.wait()
        log = (hosts.folder / "measure.log").read_text()
        assert process.returncode == 0, log
    found: dict[str, float] = json.loads(log.splitlines()[-1])
    return found

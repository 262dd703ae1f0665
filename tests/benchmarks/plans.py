"""The estimates of `plan` and of `plan --cluster` compared with measured runs on simulated nodes of one core each.

Four recipes differ in the number of ingredients, the model batch, the dtype of the directions, and the mesh. `plan` measures
on an actor of the cluster; `plan --cluster "N x CPU"` measures in this process, from the shapes of the model, without the
checkpoints and the data, while other processes keep the cores of the other nodes busy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "tests.benchmarks.greedy:larger_vit"
CASES: dict[str, dict[str, Any]] = {
    "6 in one batch, int8, 1 x 1": {"count": 6, "model_batch": "auto", "dtype": "int8", "mesh": (1, 1)},
    "12 in batches of 4, float32, 2 x 1": {"count": 12, "model_batch": 4, "dtype": "float32", "mesh": (2, 1)},
    "12 in one batch, bfloat16, 1 x 2": {"count": 12, "model_batch": 12, "dtype": "bfloat16", "mesh": (1, 2)},
    "24 in batches of 12, int8, 2 x 1": {"count": 24, "model_batch": 12, "dtype": "int8", "mesh": (2, 1)},
}
"""By ingredients, model batch, dtype of the directions, and mesh (replicas x shards)."""
RUNS = 3
PASSES = """
import torch
from tests.benchmarks.greedy import larger_vit
torch.set_num_threads(1)
model, images = larger_vit(), torch.zeros(64, 28, 28, dtype=torch.uint8)
print(flush=True)
while True:
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images)
    outputs.float().sum().backward()
"""


def measure(folder: Path, case: dict[str, Any]) -> dict[str, float]:
    """Compare the plan of one case with the median of RUNS runs; the direction store exists before all of them."""
    from ray_soup.io.cache import cache_folder
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.plan import plan
    from ray_soup.soups.run import run

    replicas, shards = case["mesh"]
    recipe = make_recipe(
        {
            "model": MODEL,
            "ingredients": [str(folder / f"model_{k}.safetensors") for k in range(case["count"])],
            "data": {"fit": str(folder / "heldout.npz"), "test": str(folder / "test.npz")},
            "learn": {"model_batch": case["model_batch"], "epochs": 2},
            "directions": {"dtype": case["dtype"]},
            "actors": {"replicas": replicas, "shards": shards, "cpus": 1},
        }
    )
    run(recipe, folder / "out")  # builds the store and compiles the kernels
    said = plan(recipe)
    with busy_cores(replicas * shards - 1):
        other = cluster_figures(recipe, case, said)
    seconds, steps, memory = [], [], []
    for _ in range(RUNS):
        shutil.rmtree(folder / "out")
        shutil.rmtree(cache_folder() / "evaluations")  # those of the ingredients are part of the estimate
        record = run(recipe, folder / "out").record
        seconds.append(record["wall_s"])
        steps.append(record["step_ms"] / 1000)
        memory.append(record["peak_memory_bytes"])
    shutil.rmtree(folder / "out")
    found = {}
    for name, estimate, runs in (
        ("time (s)", said["wall_s"], seconds),
        ("step (s)", said["step_s"], steps),
        ("memory (GB)", said["memory_bytes_per_actor"] / 1e9, [m / 1e9 for m in memory]),
        ("--cluster, time (s)", other["wall_s"], seconds),
        ("--cluster, step (s)", other["step_s"], steps),
        ("--cluster, memory (GB)", other["memory_bytes_per_actor"] / 1e9, [m / 1e9 for m in memory]),
    ):
        found |= {f"{name}, estimated": estimate, f"{name}, measured": float(np.median(runs))}
        found[f"{name}: estimated / measured"] = estimate / float(np.median(runs))
    return found


def cluster_figures(recipe: Any, case: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Plan the case from shapes, for nodes of one core per shard; the direction store exists, as in the runs."""
    from ray_soup.soups.cluster_plan.predict import plan_cluster

    (replicas, shards), examples = case["mesh"], said["examples"]
    found = plan_cluster(recipe, f"{shards} x CPU", (replicas,), ingredients=case["count"])
    assert found["examples"] == examples
    figures: dict[str, Any] = found["plans"][0]
    mesh = figures["mesh"]
    assert (mesh["replicas"], mesh["shards"]) == (replicas, shards)
    return {**figures, "wall_s": figures["wall_s"] - figures["seconds"]["store"]}


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Let `count` other processes compute passes meanwhile, as the other nodes of this machine do in the runs."""
    others = [subprocess.Popen([sys.executable, "-c", PASSES], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


@contextmanager
def simulated_nodes(count: int) -> Iterator[None]:
    """Start a Ray cluster of `count` nodes with one core each on this machine, and connect to it."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def main() -> dict[str, float]:
    """Run all cases."""
    from ray_soup.tune.demo import write_digits
    from tests.benchmarks.ingredients import write_zoo

    folder, results = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark")), {}
    os.environ["RAY_SOUP_CACHE"] = str(folder / "cache")
    try:
        write_zoo(folder, MODEL, max(case["count"] for case in CASES.values()))
        write_digits(folder)
        with simulated_nodes(2):
            for name, case in CASES.items():
                results |= {f"{name}: {key}": value for key, value in measure(folder, case).items()}
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)

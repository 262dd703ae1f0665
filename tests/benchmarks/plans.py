"""The estimates of `plan` compared with measured runs.

Four recipes differ in the number of ingredients, the model batch, the dtype of the directions, and the mesh.
"""

from __future__ import annotations

import shutil
import tempfile
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


def measure(folder: Path, case: dict[str, Any]) -> dict[str, float]:
    """Compare the plan of one case with the median of RUNS runs; the direction store exists before all of them."""
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
    seconds, steps, memory = [], [], []
    for _ in range(RUNS):
        shutil.rmtree(folder / "out")
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
    ):
        found |= {f"{name}, estimated": estimate, f"{name}, measured": float(np.median(runs))}
        found[f"{name}: estimated / measured"] = estimate / float(np.median(runs))
    return found


def main() -> dict[str, float]:
    """Run all cases."""
    from ray_soup.actors.ray_session import connect
    from ray_soup.tune.demo import write_digits
    from tests.benchmarks.ingredients import write_zoo

    folder, results = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark")), {}
    try:
        write_zoo(folder, MODEL, max(case["count"] for case in CASES.values()))
        write_digits(folder)
        with connect():
            for name, case in CASES.items():
                results |= {f"{name}: {key}": value for key, value in measure(folder, case).items()}
        return results
    finally:
        shutil.rmtree(folder, ignore_errors=True)

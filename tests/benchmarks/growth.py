"""How costs grow: the exponents of tests/benchmarks/laws.py, then time and memory of steps of models of open_clip.

The largest case has 72 ingredients of ViT-B/32 size in one model batch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SMALL, LARGE = "open_clip:ViT-S-32-alt?classes=1000", "open_clip:ViT-B-32?classes=1000"
BATCH, LARGE_BATCH, ALL = 16, 128, 72
CODE = """
import json, sys
from pathlib import Path
from tests.benchmarks import growth
print(json.dumps(growth.step(Path(sys.argv[1]), *json.loads(sys.argv[2]))))
"""


def step(folder: Path, model: str, count: int, model_batch: int, batch: int) -> dict[str, float]:
    """Measure time and memory of a step that moves `model_batch` of `count` ingredients, on two threads of this process."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.shard import Shard
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.inputs import open_inputs
    from ray_soup.task.data import Split
    from tests.benchmarks.step import Resident
    from tests.benchmarks.timing import typical

    recipe = make_recipe(
        {
            "model": model,
            "ingredients": [str(folder / f"model_{k}.safetensors") for k in range(count)],
            "data": {"fit": str(folder / "data.npz")},
        }
    )
    inputs = open_inputs(recipe)
    shard = Shard(recipe, inputs.ingredients, Mesh(1, 1), 0, 2)
    list(shard.setup())
    start = time.perf_counter()
    blocks = list(shard.open_store(tuple(range(count)), "tensor"))[-1].partition.count
    store = time.perf_counter() - start
    split = Split("fit", np.arange(batch, dtype=np.int32))
    with Resident() as resident:
        shard.begin(np.arange(model_batch), np.zeros((count, blocks), np.float32), shard.choose_precision())
        x = np.full((model_batch, blocks), 1e-4, np.float32)
        shard.reset_peak()
        shard.step(x, 1.0, split)
    seconds = typical(lambda: shard.step(x, 1.0, split))
    return {
        "step (s)": seconds, "memory (GB)": resident.peak / 1e9, "peak resident memory (GB)": shard.peak_memory() / 1e9,
        "store (s)": store, "parameters (million)": inputs.layout.numel / 1e6,
    }  # fmt: skip


def in_own_process(folder: Path, *arguments: Any) -> dict[str, float]:
    """Call `step` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), json.dumps(arguments)],
        env={**os.environ, "RAY_SOUP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> dict[str, float]:
    """Measure every case, the largest last."""
    from tests.benchmarks import laws
    from tests.benchmarks.ingredients import write_zoo
    from tests.benchmarks.step import write_data

    results = laws.main()
    for model, counts in ((SMALL, (6, 12, 24, 48)), (LARGE, (6,))):
        folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
        try:
            write_zoo(folder, model, max(counts))
            write_data(folder)
            in_own_process(folder, model, counts[0], 1, 1)  # compiles the kernels
            cases = {f"{count} in one batch": (count, count) for count in counts}
            cases |= {f"{counts[-1]} in batches of {m}": (counts[-1], m) for m in (6, 12, 24) if m < counts[-1]}
            for name, (count, model_batch) in cases.items():
                found = in_own_process(folder, model, count, model_batch, BATCH)
                results |= {f"{model[10:20]}, {name}: {key}": value for key, value in found.items()}
        finally:
            shutil.rmtree(folder)
    return results | largest()


def largest() -> dict[str, float]:
    """Measure up to 72 ingredients of the large model in one model batch; fewer if the disk cannot hold them."""
    from ray_soup.task.models import describe
    from tests.benchmarks.ingredients import write_zoo
    from tests.benchmarks.step import write_data

    folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
    try:
        layout = describe(LARGE)
        count = min(ALL, int(shutil.disk_usage(folder).free * 0.9 / (5 * layout.numel)))
        write_zoo(folder, LARGE, count)
        write_data(folder)
        found = in_own_process(folder, LARGE, count, count, LARGE_BATCH)
        return {f"{count} x ViT-B/32 in one batch, {LARGE_BATCH} images: {key}": value for key, value in found.items()}
    finally:
        shutil.rmtree(folder)

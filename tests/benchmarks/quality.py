"""Wall time from the first step to the published procedure's final NLL on select, on the demo's zoo and on one of 36.

Both sides use all cores, the same held-out digits with the same split, and their own defaults; the published procedure uses
model batches of a quarter of the ingredients. What ours does before its first step (actors, data, store, compiled kernels,
choice of precision) is reported separately; and so is the first run on a machine, which compiles kernels in its first steps.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

SIZES = {"demo zoo of 12": 12, "zoo of 36": 36}


def make_zoo(folder: Path, count: int) -> Any:
    """Write the digits and fine-tune `count` ingredients; return the recipe."""
    from ray_soup.recipe import make_recipe
    from ray_soup.tune.demo import RECIPE, write_digits
    from ray_soup.tune.finetune import finetune

    write_digits(folder)
    recipe = make_recipe(
        {
            **RECIPE,
            "actors": {},
            "finetune": {**RECIPE["finetune"], "trials": count},
            "data": {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")},
            "ingredients": f"{folder}/zoo/*.safetensors",
        }
    )
    finetune(recipe, folder / "zoo")
    return recipe


def theirs(recipe: Any, splits: dict[str, Any]) -> dict[str, float]:
    """Run the published procedure: its time, steps and final NLL on select."""
    from ray_soup.io.find import open_ingredients
    from ray_soup.task.data import batch_positions
    from ray_soup.task.models import build
    from tests.benchmarks.reference import learn

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = build(recipe.model).model.eval()
    names = [name for name, _ in model.named_parameters()]
    zoo = torch.stack([torch.cat([i.read(n).float() for n in names]) for i in open_ingredients(recipe.ingredients)])
    with np.load(recipe.data.fit) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    fit, select = splits["fit"].rows, torch.from_numpy(splits["select"].rows)
    size = recipe.learn.batch_size

    def batches(epoch: int) -> Any:
        for positions in batch_positions(len(fit), size, 1, epoch):
            rows = torch.from_numpy(fit[positions])
            yield images[rows], labels[rows]

    start = time.perf_counter()
    _, steps = learn(model, zoo, batches, -(-len(fit) // size), -(-len(zoo) // 4), 1)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        nll = F.cross_entropy(model(images[select]), labels[select]).item()
    return {"seconds": seconds, "steps": steps, "nll": nll}


def ours(recipe: Any, goal: float) -> dict[str, float]:
    """Run ours: seconds until an epoch ends with an NLL on select of at most `goal` (inf if none does), and in total."""
    from ray_soup.actors.on_ray import RayPool
    from ray_soup.actors.placement import resolve_mesh
    from ray_soup.io.progress import no_progress
    from ray_soup.soups.granularity import resolved_blocks
    from ray_soup.soups.inputs import open_inputs
    from ray_soup.soups.learn import learn
    from ray_soup.soups.state import LearnState

    begun = time.perf_counter()
    inputs = open_inputs(recipe)
    mesh, cpus = resolve_mesh(recipe, inputs.layout.numel, len(inputs.ingredients))
    pool = RayPool(recipe, inputs.ingredients, mesh, cpus)
    reached: list[tuple[float, int]] = []
    begins: list[float] = []
    try:
        splits = splits_of(recipe, pool.setup(no_progress))
        kind = resolved_blocks(recipe.blocks, inputs.layout, len(inputs.ingredients), len(splits["fit"]))
        info = pool.open_store(inputs.everything, kind, no_progress)
        step_of_pool = pool.step

        def step_and_note(*arguments: Any) -> Any:
            begins.append(time.perf_counter())
            return step_of_pool(*arguments)

        pool.step = step_and_note

        def look(step: int, steps: int, state: LearnState) -> None:
            if state.curve[-1]["select_nll"] <= goal:
                reached.append((time.perf_counter() - begins[0], step))

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "s.pt")
            state = learn(recipe, pool, info.norms, splits, len(inputs.ingredients), file, after_epoch=look)
        seconds, steps = reached[0] if reached else (float("inf"), state.steps)
        return {
            "before": begins[0] - begun,
            "seconds": seconds,
            "steps": steps,
            "all": time.perf_counter() - begins[0],
            "nll": state.best_cost,
        }
    finally:
        pool.close()


def splits_of(recipe: Any, setup: Any) -> Any:
    """Split the held-out set into fit and select."""
    from ray_soup.task.data import cut_splits

    return cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)


def main() -> dict[str, float]:
    """Run both sides on both zoos."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.on_ray import RayPool
    from ray_soup.actors.ray_session import connect
    from ray_soup.io.progress import no_progress

    results: dict[str, float] = {}
    for name, count in SIZES.items():
        folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
        try:
            with connect():
                recipe = make_zoo(folder, count)
                pool = RayPool(recipe, [], Mesh(1, 1), 1)
                splits = splits_of(recipe, pool.setup(no_progress))
                pool.close()
            reference = theirs(recipe, splits)
            with connect():
                first = ours(recipe, reference["nll"])
            with connect():
                found = ours(recipe, reference["nll"])
            results[f"{name}: ours, seconds in the first run"] = first["seconds"]
            results |= {f"{name}: reference, {key}": value for key, value in reference.items()}
            results |= {f"{name}: ours, {key}": value for key, value in found.items()}
            results[f"{name}: ours / reference, time to the reference's NLL"] = found["seconds"] / reference["seconds"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return results

"""Wall time from the first step to the published procedure's final NLL on select: on the demo's zoo, and on one of 36.

Both sides on all cores, on the same cut of the same held-out digits, at their defaults; the published procedure with model
batches of a quarter. What ours takes before its first step is shown apart (actors, data, store,
compiled loops, the choice of a precision).
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
    from ray_soup.demo import RECIPE, write_digits
    from ray_soup.finetune import finetune
    from ray_soup.recipe import make_recipe

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
    """The published procedure: its time, steps and final NLL on select."""
    from ray_soup.checkpoints import open_ingredients
    from ray_soup.data import batch_positions
    from ray_soup.models import build
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
    """Seconds until an epoch's end at which select's NLL is at most `goal` (inf where none is), and of all."""
    from ray_soup.actors import Actors, quiet, resolve_mesh
    from ray_soup.learn import State, learn
    from ray_soup.pipeline import prepare

    begun = time.perf_counter()
    ingredients, layout = prepare(recipe)
    mesh, cpus = resolve_mesh(recipe, layout.numel, len(ingredients))
    actors = Actors(recipe, ingredients, mesh, cpus)
    reached: list[tuple[float, int]] = []
    begins: list[float] = []
    try:
        ready = actors.setup(quiet)
        splits = cut_of(recipe, ready)
        taken = actors.take(tuple(range(len(ingredients))), recipe.blocks, quiet)
        step_of_actors = actors.step

        def step_and_note(*arguments: Any) -> Any:
            begins.append(time.perf_counter())
            return step_of_actors(*arguments)

        actors.step = step_and_note

        def look(step: int, steps: int, state: State) -> None:
            if state.curve[-1]["select_nll"] <= goal:
                reached.append((time.perf_counter() - begins[0], step))

        with tempfile.TemporaryDirectory() as folder:
            state = learn(recipe, actors, taken.norms, splits, len(ingredients), Path(folder, "s.pt"), after_epoch=look)
        seconds, steps = reached[0] if reached else (float("inf"), state.steps)
        return {
            "before": begins[0] - begun,
            "seconds": seconds,
            "steps": steps,
            "all": time.perf_counter() - begins[0],
            "nll": state.best_nll,
        }
    finally:
        actors.close()


def cut_of(recipe: Any, ready: Any) -> Any:
    from ray_soup.data import cut

    return cut(recipe.data, ready.sizes, ready.fit_digests, recipe.learn.seed)


def main() -> dict[str, float]:
    from ray_soup.actors import Actors, connect, quiet
    from ray_soup.shard import Mesh

    results: dict[str, float] = {}
    for name, count in SIZES.items():
        folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
        try:
            with connect():
                recipe = make_zoo(folder, count)
                actors = Actors(recipe, [], Mesh(1, 1), 1)
                splits = cut_of(recipe, actors.setup(quiet))
                actors.close()
            reference = theirs(recipe, splits)
            with connect():
                found = ours(recipe, reference["nll"])
            results |= {f"{name}: reference, {key}": value for key, value in reference.items()}
            results |= {f"{name}: ours, {key}": value for key, value in found.items()}
            results[f"{name}: ours / reference, time to its NLL"] = found["seconds"] / reference["seconds"]
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return results

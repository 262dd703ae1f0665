"""The greedy search on real digits with one and two actors of one thread each, compared with the plain loop over all images.

It runs on the demo's model, where a candidate takes milliseconds and the overhead of calls shows, and on a model ten times
as large.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timing import seconds

SMALL = {"model": "ray_soup.tune.demo:digits_vit"}
LARGE: dict[str, Any] = {
    "model": "tests.benchmarks.greedy:larger_vit",
    "finetune": {"trials": 8, "epochs": {"randint": [2, 4]}, "trunk": {
        "lr": 1e-3, "wd": 0.05, "epochs": 6, "shift": 1, "label_smoothing": 0.0, "mixup": 0.0}},
}  # fmt: skip


def larger_vit() -> torch.nn.Module:
    """Build a larger version of the demo's vision transformer."""
    from ray_soup.tune.demo import DigitsViT

    return DigitsViT(width=192, layers=6, heads=6)


def make_recipe_and_zoo(values: dict[str, Any], folder: Path) -> Any:
    """Fine-tune the ingredients in `folder`; return the recipe."""
    from ray_soup.recipe import make_recipe
    from ray_soup.tune.demo import RECIPE
    from ray_soup.tune.finetune import finetune

    zoo = folder / "zoo"
    tuned = {**RECIPE["finetune"], **values.get("finetune", {})}
    data = {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")}
    recipe = make_recipe({**RECIPE, **values, "finetune": tuned, "data": data, "ingredients": f"{zoo}/*.safetensors"})
    finetune(recipe, zoo)
    return recipe


def measure(values: dict[str, Any], folder: Path) -> dict[str, float]:
    """Time the search and the plain loop for one model. Both must keep the same ingredients."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.on_ray import RayPool
    from ray_soup.io.progress import no_progress
    from ray_soup.soups.inputs import open_inputs
    from ray_soup.soups.methods.greedy import greedy, ranking
    from ray_soup.soups.session import Session

    recipe = make_recipe_and_zoo(values, folder)
    inputs = open_inputs(recipe)
    results: dict[str, float] = {"parameters (million)": inputs.layout.numel / 1e6}
    took = {}
    for size in (1, 2):
        mesh = Mesh(size, 1)
        pool = RayPool(recipe, inputs.ingredients, mesh, 1)
        try:
            session = Session(recipe, inputs, pool, pool.setup(no_progress), mesh, 1, 0)
            held_out, splits = dict(enumerate(session.individual())), session.held_out

            def plain_loop() -> list[int]:
                order = ranking(held_out)  # noqa: B023
                kept, best = [order[0]], int(held_out[order[0]].correct.sum())  # noqa: B023
                for k in order[1:]:
                    correct = pool.try_candidate(tuple(kept), k, splits).correct  # noqa: B023
                    if correct >= best:
                        kept, best = [*kept, k], correct
                pool.forget()  # noqa: B023
                return kept

            search = greedy(pool, held_out, splits)
            assert search.kept == plain_loop()
            took[size] = (seconds(lambda: greedy(pool, held_out, splits)), seconds(plain_loop))  # noqa: B023
        finally:
            pool.close()
        results |= {f"search, {size} actors (s)": took[size][0], f"plain loop, {size} actors (s)": took[size][1]}
    results["ingredients kept"] = len(search.kept)
    results["share of the candidates' images evaluated"] = search.looked / (search.candidates * len(held_out[0]))
    results["search: 2 actors / 1"] = took[2][0] / took[1][0]
    results["plain loop: 2 actors / 1"] = took[2][1] / took[1][1]
    results["search / plain loop, 1 actor"] = took[1][0] / took[1][1]
    return results


def main() -> dict[str, float]:
    """Run both models."""
    from ray_soup.actors.ray_session import connect
    from ray_soup.tune.demo import write_digits

    results = {}
    with connect():
        for name, values in (("demo", SMALL), ("larger", LARGE)):
            folder = Path(tempfile.mkdtemp(prefix="ray_soup_benchmark"))
            try:
                write_digits(folder)
                results |= {f"{name}: {key}": value for key, value in measure(values, folder).items()}
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    return results

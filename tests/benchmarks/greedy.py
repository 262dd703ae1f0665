"""The greedy search on real digits: one actor of one thread and two, against the plain loop over all images. On the demo's
model, where a candidate takes milliseconds and the calls are felt, and on one that is ten times as large."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.timing import seconds

SMALL = {"model": "ray_soup.demo:digits_vit"}
LARGE: dict[str, Any] = {
    "model": "tests.benchmarks.greedy:larger_vit",
    "finetune": {"trials": 8, "epochs": {"randint": [2, 4]}, "trunk": {
        "lr": 1e-3, "wd": 0.05, "epochs": 6, "shift": 1, "label_smoothing": 0.0, "mixup": 0.0}},
}  # fmt: skip


def larger_vit() -> torch.nn.Module:
    from open_clip.transformer import VisionTransformer

    from ray_soup.demo import digits_vit

    small = digits_vit()
    large = VisionTransformer(28, 7, width=192, layers=6, heads=6, mlp_ratio=4, output_dim=10, pool_type="avg")
    large.__class__ = small.__class__  # which takes uint8 digits
    return large


def measure(values: dict[str, Any], folder: Path) -> dict[str, float]:
    from ray_soup.actors import Actors, quiet
    from ray_soup.demo import RECIPE
    from ray_soup.finetune import finetune
    from ray_soup.greedy import greedy, ranking
    from ray_soup.pipeline import Bench, prepare
    from ray_soup.recipe import make_recipe
    from ray_soup.shard import Mesh

    zoo = folder / "zoo"
    tuned = {**RECIPE["finetune"], **values.get("finetune", {})}
    data = {"train": str(folder / "train.npz"), "fit": str(folder / "heldout.npz")}
    recipe = make_recipe({**RECIPE, **values, "finetune": tuned, "data": data, "ingredients": f"{zoo}/*.safetensors"})
    finetune(recipe, zoo)
    ingredients, layout = prepare(recipe)
    results: dict[str, float] = {"parameters (million)": layout.numel / 1e6}
    took = {}
    for size in (1, 2):
        actors = Actors(recipe, ingredients, Mesh(size, 1), 1)
        try:
            bench = Bench(recipe, ingredients, layout, Mesh(size, 1), 1, 0, actors, actors.setup(quiet), quiet)
            held_out, splits = dict(enumerate(bench.individual())), bench.held_out

            def plain_loop() -> list[int]:
                order = ranking(held_out)  # noqa: B023
                kept, best = [order[0]], int(held_out[order[0]].correct.sum())  # noqa: B023
                for k in order[1:]:
                    correct = actors.try_candidate(tuple(kept), k, splits)  # noqa: B023
                    if correct >= best:
                        kept, best = [*kept, k], correct
                actors.forget()  # noqa: B023
                return kept

            search = greedy(actors, held_out, splits)
            assert search.kept == plain_loop()
            took[size] = (seconds(lambda: greedy(actors, held_out, splits)), seconds(plain_loop))  # noqa: B023
        finally:
            actors.close()
        results |= {f"search, {size} actors (s)": took[size][0], f"plain loop, {size} actors (s)": took[size][1]}
    results["ingredients kept"] = len(search.kept)
    results["candidates' images looked at"] = search.looked / (search.candidates * len(held_out[0]))
    results["search: 2 actors / 1"] = took[2][0] / took[1][0]
    results["plain loop: 2 actors / 1"] = took[2][1] / took[1][1]
    results["search / plain loop, 1 actor"] = took[1][0] / took[1][1]
    return results


def main() -> dict[str, float]:
    from ray_soup.actors import connect
    from ray_soup.demo import write_digits

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

"""How each cost grows, compared with the law that it should follow: cost = constant * size ^ exponent.

A cost is the CPU time of this process, all threads, so that other work on the machine matters little; the exponent is fitted
to the largest four sizes, where what does not grow matters least. An exponent above its law is a cost that will dominate.

    ingredients    6 to 384 of a small model: opening, directions, baking, a step of all, a step of six, inner products
    parameters     of six ingredients: directions, baking, combine and project
    batch          examples in a step
    blocks         of a fixed number of parameters: a step, and the driver's part of it
    documents      texts that become tokens, and the search for those that fit and test share
    actors         the driver's main thread in a step, from the benchmark `driver`
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

COUNTS = (6, 12, 24, 48, 96, 192, 384)
WIDTHS = (64, 128, 256, 512, 1024)
BATCHES = (64, 128, 256, 512, 1024)
GROUPS = (1, 4, 16, 64, 256)
DOCUMENTS = (250, 500, 1000, 2000, 4000, 8000)
WIDTH, CLASSES, LAST = 128, 10, 4
Costs = dict[tuple[str, float], dict[int, float]]
"""Seconds by size, for each cost and the exponent that it should have."""


def model_of(width: int = WIDTH) -> torch.nn.Module:
    """Build a model of eight tensors."""
    sizes = (width, width, width, width, CLASSES)
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def exponent(costs: Mapping[int, float]) -> float:
    """Fit cost = constant * size ^ exponent to the largest LAST sizes."""
    sizes = sorted(costs)[-LAST:]
    return float(np.polyfit(np.log(sizes), np.log([costs[size] for size in sizes]), 1)[0])


def cpu_seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """Return the CPU seconds of `work`, the least of some rounds after a first one."""
    work()
    least = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        repeats = 0
        while repeats == 0 or time.process_time() - start < 0.02:
            work()
            repeats += 1
        least = min(least, (time.process_time() - start) / repeats)
    return least


class Case:
    """A shard of some ingredients of a width, in a folder of their own, and what can be measured of it."""

    def __init__(self, folder: Path, width: int, count: int, blocks: Any = "tensor", examples: int = BATCHES[0]) -> None:
        from ray_soup.actors.messages import Mesh
        from ray_soup.actors.shard import Shard
        from ray_soup.recipe import make_recipe
        from ray_soup.soups.inputs import open_inputs

        self.recipe = make_recipe(
            {
                "model": f"tests.benchmarks.laws:width_{width}",
                "ingredients": [str(folder / f"{width}_{k}.safetensors") for k in range(count)],
                "data": {"fit": str(data_of(folder, width, examples))},
                "precision": "float32",
            }
        )
        self.inputs = open_inputs(self.recipe)
        self.everything = tuple(range(count))
        self.shard = Shard(self.recipe, self.inputs.ingredients, Mesh(1, 1), 0, 1)
        list(self.shard.setup())
        info = list(self.shard.open_store(self.everything, blocks))[-1]
        self.norms, self.blocks = info.norms, info.partition.count

    def step(self, model_batch: int, examples: int = 8) -> Callable[[], object]:
        """Return a step of the first ingredients on some examples."""
        from ray_soup.task.data import Split

        x = np.full((model_batch, self.blocks), 1e-4, np.float32)
        self.shard.begin(np.arange(model_batch), np.zeros((len(self.everything), self.blocks), np.float32), "float32")
        return lambda: self.shard.step(x, 1.0, Split("fit", np.arange(examples, dtype=np.int32)))

    def build_store(self) -> object:
        """Build the direction store in an empty cache."""
        from ray_soup.io.cache import cache_at
        from ray_soup.io.progress import drain
        from ray_soup.mixing.stores import open_store

        with tempfile.TemporaryDirectory() as made, cache_at(Path(made)):
            store = drain(open_store(self.inputs.ingredients, self.inputs.layout, "int8", 1))
            store.hold.close()
        return store

    def bake(self) -> object:
        """Bake the uniform soup."""
        from ray_soup.mixing.bake import bake
        from tests.benchmarks.ingredients import uniform_soup

        with tempfile.TemporaryDirectory() as made:
            soup = uniform_soup(self.inputs.ingredients, self.inputs.layout)
            return bake(soup, self.inputs.ingredients, Path(made) / "soup.safetensors")

    def driver(self) -> object:
        """Do the driver's part of a step of all ingredients: to coordinates, and the chain rule back."""
        from ray_soup.mixing.coefficients import to_coefficients, to_x

        return to_coefficients(to_x(to_x(np.ones_like(self.norms), self.norms), self.norms))


def __getattr__(name: str) -> Any:
    """Return the function `width_64`, ... which builds a model: a recipe names one."""
    width = re.fullmatch(r"width_(\d+)", name)
    if width is None:
        raise AttributeError(name)
    return lambda: model_of(int(width[1]))


def data_of(folder: Path, width: int, examples: int) -> Path:
    """Write random examples once, and return the file."""
    file = folder / f"{width}_{examples}.npz"
    if not file.exists():
        random = np.random.default_rng(0)
        images = random.standard_normal((examples, width)).astype(np.float32)
        np.savez(file, images=images, labels=random.integers(0, CLASSES, examples))
    return file


def write(folder: Path, width: int, count: int) -> None:
    """Write ingredients of a width."""
    from safetensors.torch import save_file

    start = model_of(width).state_dict()
    for k in range(count):
        torch.manual_seed(k)
        save_file({n: t + 0.01 * torch.randn_like(t) for n, t in start.items()}, folder / f"{width}_{k}.safetensors")


def by_ingredients(folder: Path) -> Costs:
    """Measure 6 to 384 ingredients."""
    from ray_soup.soups.inputs import open_inputs

    costs: Costs = {}
    write(folder, WIDTH, COUNTS[-1])
    for count in COUNTS:
        case = Case(folder, WIDTH, count)
        works: list[tuple[str, int, Callable[[], object]]] = [
            ("opening and checking them", 1, lambda c=case: open_inputs(c.recipe)),
            ("directions", 1, case.build_store),
            ("baking", 1, case.bake),
            ("the driver's part of a step of all", 1, case.driver),
            ("inner products", 2, lambda c=case: c.shard.gram((0, 1))),
        ]
        for name, law, work in works:
            costs.setdefault((f"ingredients: {name}", law), {})[count] = cpu_seconds(work)
        costs.setdefault(("ingredients: a step of all", 1), {})[count] = cpu_seconds(case.step(count))
        costs.setdefault(("ingredients: a step of six", 0), {})[count] = cpu_seconds(case.step(COUNTS[0]))
    return costs


def by_parameters(folder: Path) -> Costs:
    """Measure models of several sizes."""
    costs: Costs = {}
    for width in WIDTHS:
        write(folder, width, COUNTS[0])
        case = Case(folder, width, COUNTS[0])
        for name, work in (("directions", case.build_store), ("baking", case.bake), ("a step", case.step(COUNTS[0]))):
            costs.setdefault((f"parameters: {name}", 1), {})[case.inputs.layout.numel] = cpu_seconds(work)
    return costs


def by_batch(folder: Path) -> Costs:
    """Measure steps of several batches."""
    case = Case(folder, WIDTHS[-1], COUNTS[0], examples=BATCHES[-1])
    return {("batch: a step", 1): {size: cpu_seconds(case.step(COUNTS[0], size)) for size in BATCHES}}


def by_blocks(folder: Path) -> Costs:
    """Measure blocks of fewer and fewer rows of the same tensors."""
    step: dict[int, float] = {}
    driver: dict[int, float] = {}
    for groups in GROUPS:
        case = Case(folder, WIDTHS[-1], COUNTS[0], {"tensor": groups})
        step[case.blocks], driver[case.blocks] = cpu_seconds(case.step(COUNTS[0])), cpu_seconds(case.driver)
    return {("blocks: a step", 0): step, ("blocks: the driver's part of it", 1): driver}


def by_documents(folder: Path) -> Costs:
    """Measure texts that are read, become tokens and are compared."""
    from ray_soup.io.cache import cache_at
    from ray_soup.io.progress import drain
    from ray_soup.recipe import make_recipe
    from ray_soup.task.data import load_sources
    from ray_soup.task.leaks import check_leaks
    from ray_soup.task.preprocess_key import build_for
    from tests.unit.task.language_models import byte_tokenizer, llama, saved

    saved(llama(), byte_tokenizer(), folder / "llama")
    random, costs = np.random.default_rng(0), Costs()
    for count in DOCUMENTS:
        for name in ("fit", "test"):
            words = random.integers(0, 1000, (count, 40))
            lines = [json.dumps({"text": f"{name} {n} " + " ".join(map(str, row))}) for n, row in enumerate(words)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        data = {name: str(folder / f"{name}.jsonl") for name in ("fit", "test")}
        recipe = make_recipe({"model": f"transformers:{folder}/llama?length=64", "data": data})
        preprocess = build_for(recipe).preprocess

        def load(recipe: Any = recipe, preprocess: Any = preprocess) -> object:
            with tempfile.TemporaryDirectory() as made, cache_at(Path(made)):  # tokens are kept in the cache
                return drain(load_sources(recipe.data, preprocess, lambda first: None, "tokens"))

        def compare(recipe: Any = recipe, preprocess: Any = preprocess) -> object:
            return drain(check_leaks(recipe.data, preprocess, "tokens"))

        costs.setdefault(("documents: reading and tokens", 1), {})[count] = cpu_seconds(load, 1)
        costs.setdefault(("documents: comparing fit and test", 1), {})[count] = cpu_seconds(compare, 1)
    return costs


def by_actors() -> Costs:
    """Take the main thread's milliseconds from the benchmark `driver`."""
    from tests.benchmarks import driver

    costs: Costs = {}
    for name, value in driver.main().items():
        found = re.fullmatch(r"(\d+) actors, (m = \d+): main thread \(ms\)", name)
        if found:
            costs.setdefault((f"actors: the driver's main thread, {found[2]}", 1), {})[int(found[1])] = value / 1000
    return costs


def measured() -> Iterator[Costs]:
    """Measure everything."""
    from ray_soup.io.cache import cache_at

    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made, cache_at(Path(made) / "cache"):
        for part in (by_ingredients, by_parameters, by_batch, by_blocks, by_documents):
            yield part(Path(made))
    yield by_actors()


def main() -> dict[str, float]:
    """Return, for each cost, that of the largest size, its exponent, and how far it is above its law."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    results: dict[str, float] = {}
    for costs in measured():
        for (name, law), of_sizes in costs.items():
            largest, found = max(of_sizes), exponent(of_sizes)
            results[f"{name}: CPU at {largest:,} (ms)"] = 1000 * of_sizes[largest]
            results[f"{name}: exponent"] = found
            results[f"{name}: exponent minus its law, {law}"] = found - law
    return results

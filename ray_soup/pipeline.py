"""Soups: one run from recipe to output folder, and what is asked of a finished one."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup import storage
from ray_soup.actors import Actors, Watch, actor_bytes, connect, has_room, memory_of_each, quiet, resolve_mesh
from ray_soup.bake import bake, mix_range, put, soup_buffer
from ray_soup.blocks import Layout, Partition, partition
from ray_soup.checkpoints import (
    Ingredient,
    check_floats,
    check_together,
    combined_sha256,
    find_sweeps,
    open_ingredient,
    open_ingredients,
    reading_threads,
    sha256_file,
)
from ray_soup.coefficients import Coefficients, load_coefficients, save_coefficients, save_table
from ray_soup.data import Split, calibration_batches, cut
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.folder import (
    BOARD,
    COEFFICIENTS,
    MODEL,
    TABLE,
    Clock,
    Soup,
    begun,
    completed,
    failures_recorded,
    finished_record,
    locked,
    new_folder,
    publish,
    scalars,
    seen_by_actors,
    shared_files,
    versions,
    write,
)
from ray_soup.greedy import evaluation_key, greedy, individual_outcomes, mean_of, one_hot, ranking, uniform
from ray_soup.learn import State, learn, parametrisation, summary
from ray_soup.models import describe, loading_line, write_companions
from ray_soup.outcomes import Outcome, best_log_factor, calibration_error, join, judged, scaled_nll, test_sets
from ray_soup.recipe import SOFTMAX, Data, Recipe, changed, load_recipe
from ray_soup.report import Report, html, model_card
from ray_soup.running_statistics import buffers_of
from ray_soup.shard import Mesh, Ready, Taken
from ray_soup.sources import check_there

LEARNED = (*SOFTMAX, "mehl", "mehl+")
CALIBRATION = 10_000  # images of fit, at most, that a soup's running statistics are computed on
CALIBRATION_WHILE_CHOOSING = 512  # likewise of points on the way and of greedy candidates


def prepare(recipe: Recipe, needs_fit: bool = False) -> tuple[list[Ingredient], Layout]:
    """Open and check the ingredients against each other and the model, from headers alone."""
    if recipe.data.fit is None and (needs_fit or recipe.method != "uniform"):
        raise RecipeError("The recipe names no data.fit, held-out data to learn on. Add it, as in data: {fit: heldout.npz}.")
    if recipe.data.fit is None and recipe.buffers == "recalibrate":
        raise RecipeError("buffers: recalibrate needs data.fit, held-out images to compute running statistics on. Add it.")
    check_there(recipe.data)
    ingredients = open_ingredients(recipe.ingredients)
    layout = describe(recipe.model)
    check_together(ingredients, layout.state_shapes, layout.tied)
    check_floats(ingredients, layout.names)
    return ingredients, layout


def have_own_statistics(layout: Layout, ingredients: list[Ingredient]) -> bool:
    """Whether the ingredients' running statistics differ. They do not where BatchNorm layers were frozen."""
    names = [name for name in buffers_of(layout.tracking) if name in layout.buffers and "num_batches" not in name]
    first = ingredients[0]
    return any(not torch.equal(i.read(name), first.read(name)) for name in names for i in ingredients[1:])


def recalibrates(recipe: Recipe, layout: Layout, ingredients: list[Ingredient]) -> bool:
    """Whether soups get running statistics of their own."""
    if recipe.data.fit is None or recipe.buffers not in ("auto", "recalibrate"):
        return False
    return bool(layout.tracking) and (recipe.buffers == "recalibrate" or have_own_statistics(layout, ingredients))


@dataclass
class Bench:
    """Actors at work on a set of ingredients, and what is known of these so far."""

    recipe: Recipe
    ingredients: list[Ingredient]
    layout: Layout
    mesh: Mesh
    cpus: float
    model_batch: int
    actors: Actors
    ready: Ready
    watch: Watch
    sha256: list[str] = field(default_factory=list)
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    """What each ingredient does on a source."""

    @cached_property
    def recalibrates(self) -> bool:
        return recalibrates(self.recipe, self.layout, self.ingredients)

    def calibration(self, recipe: Recipe, splits: dict[str, Split], most: int) -> list[Split]:
        """Batches of fit that running statistics are computed on, none where they are mixed."""
        if not self.recalibrates:
            return []
        return calibration_batches(splits["fit"], recipe.learn.batch_size, recipe.learn.seed, most)

    @property
    def held_out(self) -> list[Split]:
        """Fit and select together."""
        return [self.whole(source) for source in ("fit", "select") if source in self.ready.sizes]

    def whole(self, source: str) -> Split:
        return Split(source, np.arange(self.ready.sizes[source], dtype=np.int32))

    def cut(self, seed: int) -> dict[str, Split]:
        return cut(self.recipe.data, self.ready.sizes, self.ready.fit_digests, seed)

    def take(self, subset: tuple[int, ...], blocks: str | int) -> Taken:
        taken = self.actors.take(subset, blocks, self.watch)
        if taken.partition.count == 0:
            raise IngredientError(f"All {len(subset)} ingredients hold the same numbers: there is nothing to learn.")
        if len(subset) == len(self.ingredients):
            self.sha256 = list(taken.sha256)
        return taken

    def keys(self, splits: list[Split]) -> list[list[str]]:
        """The names that evaluations of the ingredients on whole sources are kept under, [K][splits]."""
        self.sha256 = self.sha256 or hash_ingredients(self.ingredients, self.watch)
        device = "cuda" if self.recipe.actors.gpus else "cpu"
        known = [(self.ready.fingerprint, self.ready.contents[s.source], device, versions()["torch"]) for s in splits]
        which = [digest + i.key for digest, i in zip(self.sha256, self.ingredients, strict=True)]
        return [[evaluation_key(name, *parts) for parts in known] for name in which]

    def individual(self) -> list[Outcome]:
        """What each ingredient does on the held-out set."""
        splits = self.held_out
        if any(s.source not in self.outcomes for s in splits):
            found = individual_outcomes(
                self.actors,
                [i.path for i in self.ingredients],
                self.keys(splits),
                splits,
                lambda done, total: self.watch("evaluating ingredients", done, total),
            )
            self.outcomes |= {s.source: [row[n] for row in found] for n, s in enumerate(splits)}
        return [join(row) for row in zip(*(self.outcomes[s.source] for s in splits), strict=True)]


@contextmanager
def open_bench(
    recipe: Recipe, ingredients: list[Ingredient], layout: Layout, out: Path, learning: bool, watch: Watch
) -> Iterator[Bench]:
    """Actors on the mesh that this run was begun with, set up."""
    with connect():
        mesh, cpus, model_batch = _resolved(recipe, layout, len(ingredients), out, learning, watch)
        actors = Actors(recipe, ingredients, mesh, cpus)
        try:
            ready = actors.setup(watch, shared_files(out))
            yield Bench(recipe, ingredients, layout, mesh, cpus, model_batch, actors, ready, watch)
        finally:
            actors.close()


def _resolved(
    recipe: Recipe, layout: Layout, count: int, out: Path, learning: bool, watch: Watch
) -> tuple[Mesh, float, int]:
    """Mesh, CPUs of an actor and model batch: what `auto` meant when this run was begun. On a cluster that is smaller now,
    or where the recipe asks for other actors now, the mesh is another one; the optimisation stays the same."""
    file = out / "state" / "resolved.json"
    asked, ingredients = recipe.actors.model_dump(), count if learning else 0
    kept = json.loads(file.read_text()) if file.exists() else None
    if kept is not None and kept["actors"] == asked and has_room(recipe, Mesh(*kept["mesh"]), kept["cpus"]):
        return Mesh(*kept["mesh"]), kept["cpus"], kept["model_batch"]
    try:
        mesh, cpus = resolve_mesh(recipe, layout.numel, ingredients, watch)
    except RecipeError:
        if kept is None:
            raise
        fewer = changed(recipe, {"actors.replicas": "auto", "actors.shards": "auto"})
        mesh, cpus = resolve_mesh(fewer, layout.numel, ingredients)
    model_batch = model_batch_in(recipe, layout.numel, count, mesh) if kept is None else kept["model_batch"]
    write(file, json.dumps(
        {"mesh": [mesh.replicas, mesh.shards], "cpus": cpus, "model_batch": model_batch, "actors": asked}
    ))  # fmt: skip
    return mesh, cpus, model_batch


def model_batch_in(recipe: Recipe, parameters: int, count: int, mesh: Mesh) -> int:
    """The model batch on this mesh: auto takes all ingredients, or equal parts of them where the cluster's memory does not
    hold all."""
    asked, room = model_batch_of(recipe, count), memory_of_each(mesh)
    if recipe.learn.model_batch != "auto" or recipe.method in SOFTMAX:
        return asked
    parts = (-(-count // n) for n in range(1, count + 1))
    return next((m for m in parts if actor_bytes(recipe, parameters, m, mesh.shards) <= room), 1)


def model_batch_of(recipe: Recipe, count: int) -> int:
    """How many of `count` ingredients move at a time; a softmax needs all of them."""
    asked = recipe.learn.model_batch
    return count if asked == "auto" or recipe.method in SOFTMAX else min(asked, count)


@dataclass
class Made:
    """The coefficients of a soup, and how they came about."""

    coefficients: Coefficients
    figures: dict[str, Any] = field(default_factory=dict)
    """For run.json: steps, image_passes, curve and others."""
    notes: list[str] = field(default_factory=list)


def make_soup(
    bench: Bench,
    recipe: Recipe,
    subset: tuple[int, ...],
    splits: dict[str, Split],
    model_batch: int,
    state_file: Path,
    after_epoch: Callable[[int, int, State], None] = lambda step, steps, state: None,
) -> Made:
    """The soup of the ingredients `subset` by the recipe's method. What was learned lies in `state_file`, and is gone on
    with; `after_epoch` as for `learn`."""
    whole, count, watch = partition(bench.layout, "model"), len(subset), bench.watch
    calibration = bench.calibration(recipe, splits, CALIBRATION_WHILE_CHOOSING)

    def made(values: np.ndarray, parts: Partition, **options: Any) -> Coefficients:
        block_of = dict(zip(bench.layout.names, parts.block.tolist(), strict=True))
        names = tuple(bench.ingredients[k].name for k in subset)
        return Coefficients(values, names, parts.names, block_of, policy_of(recipe), bench.layout.tied, **options)

    if recipe.method == "uniform":
        return Made(made(uniform(count), whole))
    if recipe.method in ("best_single", "greedy"):
        all_held_out = bench.individual()
        held_out = {k: all_held_out[k] for k in subset}
        passes = count * len(all_held_out[0])
        names = [bench.ingredients[k].name for k in range(len(bench.ingredients))]
        figures: dict[str, Any] = {
            "held_out": {names[k]: {"accuracy": o.accuracy, "nll": o.nll} for k, o in held_out.items()}
        }
        if recipe.method == "best_single":
            best = ranking(held_out)[0]
            note = f"Best single on fit and select together: {names[best]}."
            figures |= {"best_single": names[best], "image_passes": passes}
            return Made(made(one_hot(subset.index(best), count), whole), figures, [note])
        search = greedy(
            bench.actors, held_out, bench.held_out, recipe.greedy.keep,
            lambda done, total: watch("greedy", done, total), calibration,
        )  # fmt: skip
        share = search.looked / max(1, search.candidates * len(all_held_out[0]))
        figures |= {
            "image_passes": passes + search.looked,
            "greedy": {"kept": [names[k] for k in search.kept], "candidates": search.candidates, "looked_share": share},
        }
        note = (
            f"Greedy kept {len(search.kept)} of {count} ingredients, and looked at {share:.0%} of its candidates' held-out "
            "images."
        )
        return Made(made(mean_of([subset.index(k) for k in search.kept], count), whole), figures, [note])
    taken = bench.take(subset, recipe.blocks)
    state = learn(
        recipe,
        bench.actors,
        taken.norms,
        splits,
        model_batch,
        state_file,
        lambda step, steps, _: watch(f"learning {recipe.method}", step, steps),
        after_epoch,
        calibration=calibration,
    )
    notes = []
    if not state.y.any():
        notes.append(f"{recipe.method}: nothing better on select was found than the uniform soup: this is the uniform soup.")
    options: dict[str, Any] = {}
    if recipe.method in SOFTMAX:
        options = {"factor": state.factor.item(), "factored": taken.output}
        if not taken.output:
            notes.append(
                f"{recipe.method}: no layer of the model scales its logits; the learned factor {state.factor.item():.4f} on "
                "them is kept beside the coefficients, and the model's NLL is without it."
            )
    values = parametrisation(recipe.method, taken.norms).coefficients(state.y.numpy())
    return Made(made(values, taken.partition, **options), summary(state), notes)


def policy_of(recipe: Recipe) -> str:
    """How buffers are mixed, those aside that are computed anew."""
    return "first" if recipe.buffers == "first" else "average"


def baked(
    bench: Bench,
    made: Made,
    subset: tuple[int, ...],
    path: Path,
    splits: dict[str, Split],
    calibration: list[Split],
    shard_size: int | None = None,
) -> dict[str, Outcome]:
    """Write the soup to `path`, with running statistics of the batches `calibration` if there are any; what that file does
    on each of `splits`. A soup of one ingredient keeps that one's statistics."""
    chosen = [bench.ingredients[k] for k in subset]
    file = bake(
        made.coefficients, chosen, path, None, lambda done, total: bench.watch("mixing", done, total),
        bench.recipe.out_dtype, shard_size,
    )  # fmt: skip
    if calibration and len(made.coefficients.used()) > 1:
        found = bench.actors.statistics_of_file(seen_by_actors(file), calibration, bench.watch)
        found = {name: values for name, values in found.items() if name in bench.layout.buffers}
        put(found, file)
        made.coefficients = replace(made.coefficients, statistics=found)
        made.notes.append(
            f"Running statistics of {len(bench.layout.tracking)} BatchNorm layers were computed anew on "
            f"{sum(map(len, calibration)):,} images of fit."
        )
    outcomes = bench.actors.evaluate_file(seen_by_actors(file), list(splits.values()), bench.watch)
    return dict(zip(splits, outcomes, strict=True))


def figures_of(outcomes: dict[str, Outcome]) -> dict[str, float]:
    """The keys of results.jsonl for what a model does on each split; the temperature is found on select."""
    row: dict[str, float] = {}
    select = outcomes.get("select")
    factor = best_log_factor(select) if select is not None and select.factored is not None else None
    for split, outcome in outcomes.items():
        row |= {f"{split}_accuracy": outcome.accuracy, f"{split}_nll": outcome.nll}
        if factor is not None and split != "select":
            row[f"{split}_nll_scaled"] = scaled_nll(outcome, factor)
        if outcome.scores is not None:
            row[f"{split}_metric"] = float(outcome.scores.mean(dtype=np.float64))
        row[f"{split}_ece"] = calibration_error(outcome)
    if factor is not None:
        row["temperature"] = float(np.exp(-factor))
    return row


def reported(splits: dict[str, Split]) -> dict[str, Split]:
    """The splits that a finished soup is evaluated on."""
    return {name: splits[name] for name in ("select", *test_sets(splits)) if name in splits}


def cosines(gram: np.ndarray) -> np.ndarray:
    """Of directions with these inner products, [K, K]."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.outer(lengths, lengths)
    return np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)


def run(recipe: Recipe, out: str | Path, watch: Watch = quiet, state: Path | None = None) -> Soup:
    """Make the soup that `recipe` describes in the folder `out`; goes on where a run before this one was stopped, or at
    `state`, or returns what is complete. Raises SoupError."""
    ingredients, layout = prepare(recipe)
    with locked(out, watch, recipe.ingredients) as folder:
        soup = completed(folder, begun(recipe, ingredients))
        if soup is None:
            with failures_recorded(folder):
                if state is not None:
                    shutil.copyfile(state, folder / "state" / "learn.pt")
                soup = make_in(recipe, ingredients, layout, folder, watch)
    return soup.at(out)


def make_in(
    recipe: Recipe,
    ingredients: list[Ingredient],
    layout: Layout,
    out: Path,
    watch: Watch,
    more: dict[str, Any] | None = None,
) -> Soup:
    """The soup in a folder that is locked and begun; `more` goes into run.json and the report."""
    clock, folder = Clock(), new_folder(out)
    everything, learning = tuple(range(len(ingredients))), recipe.method in LEARNED
    row: dict[str, Any] = {"model_name": recipe.method}
    record: dict[str, Any] = {"method": recipe.method, "seed": recipe.learn.seed, "exit": 0}
    sha256: list[str] = []
    shown: dict[str, Outcome] = {}
    similar: np.ndarray | None = None
    if recipe.data == Data():
        whole = partition(layout, "model")
        block_of = dict.fromkeys(layout.names, 0)
        values = uniform(len(ingredients))
        names = tuple(i.name for i in ingredients)
        made = Made(Coefficients(values, names, whole.names, block_of, policy_of(recipe), layout.tied))
        made.notes.append("The recipe names no data: this soup was not evaluated.")
        bake_in(folder, recipe, made.coefficients, ingredients, watch)
        clock.lap("mixing")
    else:
        with open_bench(recipe, ingredients, layout, out, learning, watch) as bench:
            if learning:
                bench.take(everything, recipe.blocks)
            clock.lap("start")
            splits = bench.cut(recipe.learn.seed)
            made = make_soup(
                bench,
                recipe,
                everything,
                splits,
                bench.model_batch,
                out / "state" / "learn.pt",
                scalars(out / BOARD / recipe.method),
            )
            clock.lap(recipe.method)
            peak = max(bench.actors.peak_memory())
            similar = cosines(bench.actors.gram()) if learning else None
            last = bench.calibration(recipe, splits, CALIBRATION)
            outcomes = baked(bench, made, everything, folder / MODEL, reported(splits), last, recipe.shard_size)
            clock.lap("mixing and evaluation")
            row |= figures_of(outcomes)
            shown = {recipe.method: outcomes[judged(outcomes)[0]]} if outcomes else {}
            sha256 = bench.sha256
        clock.lap("stop")
        figures = made.figures
        if bench.mesh.shards > 1 and learning:  # gather and scatter among the shards
            figures["wire_bytes_per_step"] += 8 * layout.numel * (bench.mesh.shards - 1) // bench.mesh.shards
        record |= {
            "mesh": {"replicas": bench.mesh.replicas, "shards": bench.mesh.shards, "cpus": bench.cpus},
            "model_batch": bench.model_batch if learning else None,
            "examples": {name: len(split) for name, split in splits.items()},
            "peak_memory_bytes": peak,
            **figures,
        }
        row |= {"steps": figures.get("steps"), "image_passes": figures.get("image_passes"), "peak_memory_bytes": peak}
    row["ingredients_used"] = len(made.coefficients.used())
    sha256 = sha256 or hash_ingredients(ingredients, watch)
    clock.lap("hashing")
    notes = made.notes + remarks(recipe, ingredients, sha256)
    if len(made.coefficients.used()) > 1:
        notes += stale_statistics(recipe, layout, ingredients)
    record |= {
        "parameters": layout.numel,
        "blocks": len(made.coefficients.blocks),
        "wall_s": clock.total(),
        "seconds": clock.laps,
        "versions": versions(),
        "ingredients": listed(ingredients, sha256),
        "notes": notes,
        **(more or {}),
    }
    row["seconds"] = clock.total()
    add_companions(folder, recipe, made.coefficients, [row], record, recipe.model)
    learned = {recipe.method: made.coefficients} if learning else {}
    curves = {recipe.method: made.figures["curve"]} if learning else {}
    title = f"{recipe.method} soup of {len(ingredients)} ingredients"
    report = Report(title, recipe, [row], record, learned, curves, shown, similar)
    (folder / "report.html").write_text(html(report))
    publish(recipe, [row], record, folder, out)
    return Soup(out, [row], record, notes)


def bake_in(folder: Path, recipe: Recipe, coefficients: Coefficients, ingredients: list[Ingredient], watch: Watch) -> None:
    """The soup's model in `folder`, as the recipe wants it written."""
    bake(
        coefficients, ingredients, folder / MODEL, None, lambda done, total: watch("mixing", done, total),
        recipe.out_dtype, recipe.shard_size,
    )  # fmt: skip


def add_companions(
    folder: Path,
    recipe: Recipe,
    coefficients: Coefficients,
    rows: list[dict[str, Any]],
    record: dict[str, Any],
    model: str,
) -> None:
    """What lies beside the model in `folder`: coefficients, the files that its library wants (as of `model`), and the model
    card."""
    save_coefficients(coefficients, folder / COEFFICIENTS)
    save_table(coefficients, folder / TABLE)
    dtypes = Counter(info.dtype for info in open_ingredient(str(folder)).tensors.values() if info.dtype.is_floating_point)
    write_companions(model, folder, dtypes.most_common(1)[0][0])
    line = loading_line(model, [file.name for file in folder.iterdir()])
    (folder / "README.md").write_text(model_card(recipe, coefficients, rows, record, line))


def hash_ingredients(ingredients: list[Ingredient], watch: Watch = quiet) -> list[str]:
    """SHA-256 of each ingredient."""
    total = sum(i.nbytes for i in ingredients)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        watch("hashing", min(done, total), total)

    with ThreadPoolExecutor(reading_threads()) as pool:
        return list(pool.map(lambda i: combined_sha256([sha256_file(f, count) for f in i.files]), ingredients))


def listed(ingredients: list[Ingredient], sha256: list[str]) -> list[dict[str, Any]]:
    """Ingredients for run.json; with hyperparameters and metrics where they came from a sweep."""
    return [
        {"name": i.name, "path": i.path, "sha256": s}
        | ({"hyperparameters": i.trial.config, "metrics": i.trial.metrics} if i.trial else {})
        for i, s in zip(ingredients, sha256, strict=True)
    ]


def remarks(recipe: Recipe, ingredients: list[Ingredient], sha256: list[str]) -> list[str]:
    """What the user should know of the ingredients: trials of a sweep that were left out, and ingredients that are another
    one over again."""
    notes = [note for sweep in find_sweeps(recipe.ingredients) if (note := sweep.note())]
    tower = [name for name in ingredients[0].left_out if not name.endswith("position_ids")]
    if tower:
        notes.append(f"The text tower ({len(tower)} tensors, {tower[0]} and others) is left out: the model has none.")
    first: dict[str, str] = {}
    for ingredient, digest in zip(ingredients, sha256, strict=True):
        if digest in first:
            notes.append(f"{ingredient.name} and {first[digest]} hold the same bytes: one model counts twice.")
        first.setdefault(digest, ingredient.name)
    return notes


def stale_statistics(recipe: Recipe, layout: Layout, ingredients: list[Ingredient]) -> list[str]:
    """What the user should know where running statistics that differ are mixed."""
    cure = "set buffers: recalibrate" if recipe.data.fit is not None else "name data.fit"
    if recalibrates(recipe, layout, ingredients) or not have_own_statistics(layout, ingredients):
        return []
    return [
        f"This model has {len(layout.tracking)} BatchNorm layers, and a soup's running statistics are mixed from those of "
        f"the ingredients. They do not fit it, and it may be much worse for them: {cure}."
    ]


# A finished soup


def evaluate(recipe: Recipe, model: str, split: str, watch: Watch = quiet) -> dict[str, Any]:
    """What a checkpoint, or a soup's folder, does on one split, or for `test` on all test sets; with a temperature where
    there is a select to find it on."""
    open_ingredient(model)
    layout = describe(recipe.model)
    with connect():
        mesh, cpus = resolve_mesh(recipe, layout.numel, 0, watch)
        actors = Actors(recipe, [], Mesh(mesh.size, 1), cpus)
        try:
            ready = actors.setup(watch)
            splits = cut(recipe.data, ready.sizes, ready.fit_digests, recipe.learn.seed)
            chosen = [split] if split in splits else test_sets(splits) if split == "test" else []
            if not chosen:
                raise RecipeError(f"The recipe names no data.{split}; it has {', '.join(splits) or 'none'}.")
            wanted = {name: splits[name] for name in dict.fromkeys((*chosen, "select")) if name in splits}
            outcomes = dict(zip(wanted, actors.evaluate_file(model, list(wanted.values()), watch), strict=True))
        finally:
            actors.close()
    found = figures_of(outcomes)
    kept = {
        key: value for key, value in found.items() if key.startswith(tuple(f"{s}_" for s in chosen)) or key == "temperature"
    }
    counts = [len(splits[s]) for s in chosen]
    return {
        "model_name": model,
        **kept,
        "examples": counts[0] if len(counts) == 1 else dict(zip(chosen, counts, strict=True)),
    }


def _of_folder(out: Path) -> tuple[Recipe, dict[str, Any], Coefficients, list[Ingredient]]:
    """Recipe, run.json, coefficients and ingredients of a finished soup."""
    record = finished_record(out)
    recipe = load_recipe(out / "recipe.yaml")
    coefficients = load_coefficients(out / COEFFICIENTS)
    ingredients = [open_ingredient(i["path"], i["name"]) for i in record["ingredients"]]
    if tuple(i.name for i in ingredients) != coefficients.ingredients:
        raise RecipeError(f"{out}: run.json and {COEFFICIENTS} name different ingredients.")
    names = open_ingredient(str(out)).tensors
    check_together(ingredients, {name: info.shape for name, info in names.items()}, coefficients.tied)
    return recipe, record, coefficients, ingredients


def bake_again(out: str | Path, new_out: str | Path, watch: Watch = quiet) -> Soup:
    """The soup in `out` again, from its coefficients and the ingredients alone, in a new folder."""
    source = _here(out, watch)
    recipe, record, coefficients, ingredients = _of_folder(source)
    with locked(new_out, watch) as new:
        if any(f.name != "state" for f in new.iterdir()):
            raise RecipeError(f"{new_out} is not empty. Choose a new folder.")
        sha256 = hash_ingredients(ingredients, watch)
        _same_ingredients(record, ingredients, sha256)
        folder = new_folder(new)
        bake_in(folder, recipe, coefficients, ingredients, watch)
        rows = [json.loads(line) for line in (source / "results.jsonl").read_text().splitlines()]
        write(new / "state" / "begun.json", json.dumps(begun(recipe, ingredients)))
        beside = f"transformers:{source}" if recipe.model.startswith("transformers:") else recipe.model
        add_companions(folder, recipe, coefficients, rows, record, beside)
        shutil.copyfile(source / "report.html", folder / "report.html")
        publish(recipe, rows, record, folder, new)
    return Soup(new, rows, record).at(new_out)


def _here(out: str | Path, watch: Watch) -> Path:
    """The folder of a finished soup on this machine. Raises RecipeError."""
    work = storage.local_copy(str(out))
    try:
        while True:
            watch("fetching", *next(work))
    except StopIteration as stop:
        return Path(stop.value).absolute()
    except FileNotFoundError:
        raise RecipeError(f"{out} is not a finished soup: there is nothing.") from None


def _same_ingredients(record: dict[str, Any], ingredients: list[Ingredient], sha256: list[str]) -> None:
    for known, ingredient, digest in zip(record["ingredients"], ingredients, sha256, strict=True):
        if known["sha256"] != digest:
            raise IngredientError(
                f"{ingredient.path} has changed since the soup was made: SHA-256 is {digest[:16]}..., was "
                f"{known['sha256'][:16]}.... Bring the old file back."
            )


def verify(out: str | Path, watch: Watch = quiet) -> list[str]:
    """Hold a finished soup against itself: hashes of its files, column sums, hashes of the ingredients, and the model
    against its coefficients, bit for bit. Returns what was checked; raises SoupError for the first thing that is wrong."""
    out = _here(out, watch)
    record = finished_record(out)
    for name, digest in record["files"].items():
        found = sha256_file(str(out / name)) if (out / name).exists() else "missing"
        if found != digest:
            raise SoupError(f"{out / name}: SHA-256 is {found[:16]}, run.json says {digest[:16]}: the file was changed.")
    _, _, coefficients, ingredients = _of_folder(out)
    off = float(np.abs(coefficients.values.sum(axis=0) - 1).max())
    if off > 1e-12:
        raise SoupError(f"{out / COEFFICIENTS}: a column sums to 1 within {off:.1e} only; expected 1e-12.")
    _same_ingredients(record, ingredients, hash_ingredients(ingredients, watch))
    used = [ingredients[k] for k in coefficients.used()]
    model = open_ingredient(str(out))
    total = len(model.tensors)
    for done, (name, info) in enumerate(model.tensors.items()):
        if name in coefficients.block_of:
            again = mix_range(ingredients, name, coefficients.of(name), 0, info.numel, info.dtype)
        else:
            again = soup_buffer(coefficients, used, name).to(info.dtype)
        if not torch.equal(again.view(torch.uint8), model.read(name).view(torch.uint8)):
            raise SoupError(f"{model.files[info.file]}: the tensor {name} is not what coefficients and ingredients make.")
        watch("comparing", done + 1, total)
    return [
        f"{len(record['files'])} files have the hashes of run.json",
        f"{coefficients.values.shape[1]} columns sum to 1 within {off:.0e}",
        f"{len(ingredients)} ingredients have the hashes of run.json",
        f"{total} tensors are what coefficients and ingredients make, bit for bit",
    ]

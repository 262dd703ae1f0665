"""Every soup of the paper on the same ingredients, and what they are measured against, in one table.

Work that methods share is done once: evaluations of ingredients, directions, decoded data. Test is read once for each
finished soup, and steers nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors import Watch, quiet
from ray_soup.blocks import Layout
from ray_soup.checkpoints import Ingredient
from ray_soup.coefficients import Coefficients, load_coefficients, save_coefficients
from ray_soup.data import Split
from ray_soup.errors import RecipeError
from ray_soup.folder import (
    BOARD,
    COEFFICIENTS,
    Clock,
    Soup,
    begun,
    completed,
    failures_recorded,
    locked,
    new_folder,
    publish,
    scalars,
    versions,
    write,
)
from ray_soup.greedy import ensemble_outcomes, ranking, recall
from ray_soup.outcomes import Outcome, judged, load_outcomes, paired_test, save_outcomes, test_sets
from ray_soup.pipeline import (
    CALIBRATION,
    LEARNED,
    Bench,
    add_companions,
    bake_in,
    baked,
    cosines,
    figures_of,
    listed,
    make_soup,
    open_bench,
    prepare,
    remarks,
    reported,
    stale_statistics,
)
from ray_soup.recipe import Recipe, for_method
from ray_soup.report import AGAINST, Report, html

SEEDLESS = ("best_single", "uniform", "greedy")
MADE_SO = ("steps", "image_passes", "seconds", "peak_memory_bytes", "ingredients_used")
OF_DROPPED = ("best_single", "uniform", "greedy", "mehl+")
OF_COUNTED = ("greedy", "mehl+")


@dataclass(frozen=True)
class Options:
    seeds: int = 1
    """Cuts of the held-out set into fit and select, and orders of batches; the ingredients and test stay."""
    drop_top: tuple[int, ...] = ()
    """Leave out as many of the best ingredients."""
    by_count: tuple[int, ...] = ()
    """Take only as many ingredients, the first of a shuffle."""

    def check(self, ingredients: int) -> None:
        """Raises RecipeError."""
        for name, values, low, high in (
            ("--seeds", (self.seeds,), 1, 1000),
            ("--drop-top", self.drop_top, 0, ingredients - 2),
            ("--by-count", self.by_count, 2, ingredients),
        ):
            wrong = [value for value in values if not low <= value <= high]
            if wrong:
                raise RecipeError(f"{name}: {wrong[0]} found; expected {low} to {high} with {ingredients} ingredients.")


@dataclass(frozen=True)
class Entry:
    """One soup to be made: a method on a subset of the ingredients, by a seed, with a model batch where it learns."""

    method: str
    subset: tuple[int, ...]
    seed: int
    model_batch: int

    @property
    def label(self) -> str:
        """Its name in the table: of the paper, and with the model batch where not all ingredients are in it."""
        return self.method if self.model_batch >= len(self.subset) else f"{self.method}-m{self.model_batch}"

    @property
    def file(self) -> str:
        digest = hashlib.sha256(repr(self.subset).encode()).hexdigest()[:12]
        return f"{self.label}_seed{self.seed}_{digest}"


@dataclass
class Result:
    """What a model does, on select and test or, where no seed matters, on every source; and how it was made."""

    outcomes: dict[str, Outcome]
    figures: dict[str, Any] = field(default_factory=dict)
    coefficients: Coefficients | None = None
    notes: list[str] = field(default_factory=list)

    def on(self, name: str, splits: dict[str, Split]) -> Outcome:
        """On a split, as `splits` cuts it."""
        split = splits[name]
        return self.outcomes[name] if name in self.outcomes else self.outcomes[split.source].at(split.rows)

    def row(self, splits: dict[str, Split]) -> dict[str, Any]:
        """Keys and values for results.jsonl."""
        plain = {key: self.figures[key] for key in MADE_SO if key in self.figures}
        return {**figures_of({name: self.on(name, splits) for name in reported(splits)}), **plain}


def table_entries(count: int, model_batch: int, seed: int) -> list[Entry]:
    """The soups of the table for one seed; MEHL soups with all ingredients in one model batch, and with `model_batch`."""
    everything = tuple(range(count))
    entries = [Entry(method, everything, seed, count) for method in (*SEEDLESS, *LEARNED)]
    if model_batch < count:
        entries += [Entry(method, everything, seed, model_batch) for method in ("mehl", "mehl+")]
    return entries


def compare(recipe: Recipe, out: str | Path, options: Options = Options(), watch: Watch = quiet) -> Soup:
    """Make every soup, and write the table, the report and the soup that is best on select to `out`; goes on where a run
    before this one was stopped, or returns what is complete. Raises SoupError."""
    ingredients, layout = prepare(recipe, needs_fit=True)
    options.check(len(ingredients))
    with locked(out, watch, recipe.ingredients) as folder:
        asked = [options.seeds, list(options.drop_top), list(options.by_count)]
        soup = completed(folder, begun(recipe, ingredients, compare=asked))
        if soup is None:
            with failures_recorded(folder):
                soup = _compare(recipe, ingredients, layout, folder, options, watch)
    return soup.at(out)


def _compare(
    recipe: Recipe, ingredients: list[Ingredient], layout: Layout, out: Path, options: Options, watch: Watch
) -> Soup:
    clock, folder = Clock(), new_folder(out)
    with open_bench(recipe, ingredients, layout, out, True, watch) as bench:
        bench.take(tuple(range(len(ingredients))), "tensor")
        clock.lap("start and directions")
        shared = _shared(bench, out / "state" / "soups")
        clock.lap("evaluating ingredients")
        made = _make_all(bench, shared, options, out / "state" / "soups")
        clock.lap("soups")
        sha256, mesh, cpus = bench.sha256, bench.mesh, bench.cpus
    own, first, table = made.own, made.first, made.table()
    label = min((name for name in own if name != "best_single"), key=lambda name: own[name].on("select", first).nll)
    coefficients = {name: result.coefficients for name, result in own.items() if result.coefficients is not None}
    for name, values in coefficients.items():
        save_coefficients(values, folder / f"{name}.{COEFFICIENTS}")
    bake_in(folder, recipe, coefficients[label], ingredients, watch)
    clock.lap("mixing")
    ours, single = own[label].on("select", first), own["best_single"].on("select", first)
    notes = [
        _verdict(label, ours, single),
        *_diagnosis(made.ensemble.on("select", first), single),
        *dict.fromkeys(note for result in own.values() for note in result.notes),
        *remarks(recipe, ingredients, sha256),
        *stale_statistics(recipe, layout, ingredients),
    ]
    record = {
        "method": label.partition("-m")[0],
        "chosen": label,
        "improvement": {"select_accuracy": ours.accuracy - single.accuracy, "select_nll": ours.nll - single.nll},
        "seed": made.seeds[0],
        "seeds": made.seeds,
        "exit": 0,
        "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus},
        "examples": {name: len(split) for name, split in first.items()},
        "parameters": layout.numel,
        "table": table,
        "tests": made.tests(),
        "eliminations": made.series("dropped", made.dropped, OF_DROPPED),
        "counts": made.series("count", made.counted, OF_COUNTED),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in table if "peak_memory_bytes" in row),
        "wall_s": clock.total(),
        "seconds": clock.laps,
        "versions": versions(),
        "ingredients": listed(ingredients, sha256),
        "notes": notes,
    }
    report = Report(
        f"{len(ingredients)} ingredients compared",
        recipe,
        table,
        record,
        {name: values for name, values in coefficients.items() if name not in SEEDLESS},
        {name: result.figures["curve"] for name, result in own.items() if "curve" in result.figures},
        {name: own[name].on(judged(first)[0], first) for name in ("best_single", label)},
        made.similarity,
    )
    (folder / "report.html").write_text(html(report))
    add_companions(folder, recipe, coefficients[label], table, record, recipe.model)
    rows = made.rows([ingredient.name for ingredient in ingredients])
    publish(recipe, rows, record, folder, out)
    return Soup(out, rows, record, notes)


@dataclass
class Shared:
    """What is found out once for all methods."""

    individual: list[Result]
    """What each ingredient does."""
    ensemble: Result
    """What the mean of their logits does."""
    similarity: np.ndarray
    """Cosines of their directions, [K, K]."""


@dataclass
class Comparison(Shared):
    """All soups that were made."""

    seeds: list[int]
    model_batch: int
    dropped: dict[int, tuple[int, ...]]
    """The ingredients that are left without so many of the best."""
    counted: dict[int, tuple[int, ...]]
    """So many ingredients."""
    splits: dict[int, dict[str, Split]]
    """By seed."""
    results: dict[Entry, Result]

    @property
    def first(self) -> dict[str, Split]:
        return self.splits[self.seeds[0]]

    @property
    def entries(self) -> list[Entry]:
        """The soups of the table, of the first seed."""
        return table_entries(len(self.individual), self.model_batch, self.seeds[0])

    @property
    def own(self) -> dict[str, Result]:
        return {entry.label: self.results[entry] for entry in self.entries}

    def table(self) -> list[dict[str, Any]]:
        """A row a method, means over the seeds; those that no seed changes are judged on every seed's select."""
        rows = [_mean("mean single", [result.row(self.first) for result in self.individual], spread=False)]
        for entry in self.entries:
            made = [self.results.get(replace(entry, seed=seed), self.results[entry]) for seed in self.seeds]
            rows.append(_mean(entry.label, [r.row(self.splits[s]) for r, s in zip(made, self.seeds, strict=True)]))
        rows.insert(2, _mean("ensemble", [self.ensemble.row(self.splits[seed]) for seed in self.seeds]))
        return rows

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A line for every ingredient, the ensemble, and every soup of all ingredients by every seed."""
        rows = [{"model_name": n, **r.row(self.first)} for n, r in zip(names, self.individual, strict=True)]
        rows.append({"model_name": "ensemble", **self.ensemble.row(self.first)})
        for entry, result in self.results.items():
            if len(entry.subset) == len(self.individual):
                settings = {"seed": entry.seed, "model_batch": entry.model_batch}
                rows.append({"model_name": entry.method, **settings, **result.row(self.splits[entry.seed])})
        return rows

    def tests(self) -> list[dict[str, Any]]:
        """Each soup against best single and greedy, on each test set."""
        found = {s: {name: r.on(s, self.first) for name, r in self.own.items()} for s in test_sets(self.first)}
        return [
            {"split": split, "model_name": name, "against": other, **paired_test(of[name], of[other])}
            for split, of in found.items()
            for other in AGAINST
            for name in of
            if name not in ("best_single", other)
        ]

    def series(self, key: str, subsets: dict[int, tuple[int, ...]], methods: Sequence[str]) -> list[dict[str, Any]]:
        """A line for each soup of a subset of the ingredients."""
        return [
            {key: n, "model_name": m, **self.results[Entry(m, subset, self.seeds[0], len(subset))].row(self.first)}
            for n, subset in subsets.items()
            for m in methods
        ]


def _make_all(bench: Bench, shared: Shared, options: Options, folder: Path) -> Comparison:
    count, asked, seed = len(bench.ingredients), bench.recipe.learn.model_batch, bench.recipe.learn.seed
    model_batch = -(-count // 4) if asked == "auto" else min(asked, count)  # a quarter, as in the paper
    seeds = [seed + n for n in range(options.seeds)]
    ranked = ranking(dict(enumerate(bench.individual())))
    shuffled = np.random.default_rng([seed, 4]).permutation(count).tolist()
    dropped = {n: tuple(sorted(ranked[n:])) for n in options.drop_top}
    counted = {n: tuple(sorted(shuffled[:n])) for n in options.by_count}
    entries = [entry for seed in seeds for entry in table_entries(count, model_batch, seed)]
    for subsets, methods in ((dropped, OF_DROPPED), (counted, OF_COUNTED)):
        entries += [Entry(method, subset, seed, len(subset)) for subset in subsets.values() for method in methods]
    entries = list(dict.fromkeys(replace(e, seed=seed) if e.method in SEEDLESS else e for e in entries))
    splits = {seed: bench.cut(seed) for seed in seeds}
    results, watch = {}, bench.watch
    for number, entry in enumerate(entries):
        bench.watch = lambda what, done, total, n=number: watch(f"{n + 1}/{len(entries)} {what}", done, total)
        results[entry] = _result(bench, entry, splits[entry.seed], folder / entry.file)
    return Comparison(**vars(shared), seeds=seeds, model_batch=model_batch, dropped=dropped, counted=counted, splits=splits,
                      results=results)  # fmt: skip


def _shared(bench: Bench, folder: Path) -> Shared:
    """Every ingredient and the ensemble on every source, unless they were before."""
    folder.mkdir(exist_ok=True)
    splits = [bench.whole(source) for source in bench.ready.sizes]
    keys, file = bench.keys(splits), folder / "ensemble.npz"
    known = [[recall(key) for key in row] for row in keys]
    if file.exists() and all(outcome is not None for row in known for outcome in row):
        ensemble, similarity = load_outcomes(file), np.load(folder / "cosines.npy")
    else:
        similarity = cosines(bench.actors.gram())
        np.save(folder / "cosines.npy", similarity)
        paths = [ingredient.path for ingredient in bench.ingredients]
        found, joint = ensemble_outcomes(
            bench.actors, paths, keys, splits, lambda done, total: bench.watch("evaluating ingredients", done, total)
        )
        known = [list(row) for row in found]
        ensemble = {split.source: outcome for split, outcome in zip(splits, joint, strict=True)}
        save_outcomes(ensemble, file)
    individual = [{s.source: o for s, o in zip(splits, row, strict=True) if o is not None} for row in known]
    bench.outcomes = {s.source: [outcomes[s.source] for outcomes in individual] for s in splits}
    together = Result(ensemble, {"ingredients_used": len(individual)})
    return Shared([Result(outcomes) for outcomes in individual], together, similarity)


def _result(bench: Bench, entry: Entry, splits: dict[str, Split], file: Path) -> Result:
    """The soup of an entry, made unless it lies at `file` already."""
    coefficients, outcomes, made_so = (file.with_name(f"{file.name}.{end}") for end in ("safetensors", "npz", "json"))
    if not made_so.exists():
        recipe = for_method(bench.recipe, entry.method, seed=entry.seed)
        clock = Clock()
        bench.actors.reset_peak()
        state, board = file.with_name(f"{file.name}.pt"), file.parents[2] / BOARD / file.name
        made = make_soup(bench, recipe, entry.subset, splits, entry.model_batch, state, scalars(board))
        made.figures |= {
            "seconds": round(clock.lap("making"), 3),
            "peak_memory_bytes": max(bench.actors.peak_memory()),
            "ingredients_used": len(made.coefficients.used()),
        }
        model = file.with_name("model.safetensors")
        on = {s: bench.whole(s) for s in bench.ready.sizes} if entry.method in SEEDLESS else reported(splits)
        calibration = bench.calibration(recipe, splits, CALIBRATION)
        save_outcomes(baked(bench, made, entry.subset, model, on, calibration), outcomes)
        model.unlink()
        save_coefficients(made.coefficients, coefficients)
        write(made_so, json.dumps({"figures": made.figures, "notes": made.notes}))
    return Result(load_outcomes(outcomes), coefficients=load_coefficients(coefficients), **json.loads(made_so.read_text()))


# The table


def _mean(name: str, rows: Sequence[dict[str, Any]], spread: bool = True) -> dict[str, Any]:
    """The mean of rows, with the standard deviations of what may vary by seed as `key_sd`."""
    found: dict[str, Any] = {"model_name": name}
    for key in dict.fromkeys(key for row in rows for key in row if key != "select_ece"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[key] = float(np.mean(values))
            if spread and key not in MADE_SO and np.ptp(values) > 0:
                found[f"{key}_sd"] = float(np.std(values, ddof=1))
    return found


def _verdict(label: str, ours: Outcome, single: Outcome) -> str:
    figures = f"{ours.nll:.4f} for {single.nll:.4f}, accuracy {ours.accuracy:.2%} for {single.accuracy:.2%}"
    if ours.nll < single.nll:
        return f"Chosen by its NLL on select: {label}, better than the best single there ({figures})."
    return f"No soup is better than the best single on select; the nearest is {label} ({figures}). Use the best single."


def _diagnosis(ensemble: Outcome, single: Outcome) -> Iterable[str]:
    if ensemble.accuracy <= single.accuracy and ensemble.nll >= single.nll:
        yield (
            "The logit ensemble of all ingredients does not beat the best single on select (accuracy "
            f"{ensemble.accuracy:.2%} for {single.accuracy:.2%}, NLL {ensemble.nll:.4f} for {single.nll:.4f}): no soup of "
            "them is likely to. They may be under-fitted, or not come from one initialisation."
        )

"""The results of a comparison, and the tables made from them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.schedules import are_even
from ray_soup.recipe import BASELINES, BEST_SINGLE, METHODS, POLISHED, TRAINED, Recipe, method_info
from ray_soup.soups.baseline import compared
from ray_soup.soups.evaluations import figures_of, reported
from ray_soup.soups.records import ResultRow
from ray_soup.soups.report.measures import Measures
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.report.tables import COSTS, ENSEMBLE, EVALUATE, MEAN_SINGLE, refitted
from ray_soup.task.choices import cost
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome, test_sets

SEEDLESS = tuple(name for name, info in METHODS.items() if not info.uses_seed)
NOT_LEARNED = tuple(name for name, info in METHODS.items() if not info.learns)
REFERENCES = tuple(name for name, info in METHODS.items() if info.is_reference)


def methods_for(steps: Sequence[int] | None, recipe: Recipe) -> tuple[str, ...]:
    """Return the methods of the table.

    Those for steps of one run only if the ingredients are such `steps`; the recipe's own method if it is the user's.
    """
    own = (recipe.method,) if recipe.info.is_own else ()
    if steps is None:
        return *(name for name, info in METHODS.items() if not info.needs_steps), *own
    return *(name for name, info in METHODS.items() if not (info.for_uneven_steps and are_even(steps))), *own


def methods_on(series: str) -> tuple[str, ...]:
    """Return the methods that a series over subsets, `dropped` or `counted`, is made of."""
    return tuple(name for name, info in METHODS.items() if series in info.on_subsets)


@dataclass(frozen=True)
class CompareOptions:
    """The options of `ray-soup compare`."""

    seeds: int = 1
    """Number of seeds. Each redraws the split into fit and select and the order of batches; ingredients and test stay."""
    drop_top: tuple[int, ...] = ()
    """Repeat without the N best ingredients."""
    by_count: tuple[int, ...] = ()
    """Repeat with only N ingredients, the first of a shuffled list."""
    trained: bool = True
    """Whether there is a row for training all weights on the same data."""

    @property
    def recorded(self) -> list[Any]:
        """The options in begun.json."""
        return [self.seeds, list(self.drop_top), list(self.by_count), *([] if self.trained else ["no-trained"])]

    def check(self, ingredients: int) -> None:
        """Check that the options suit this number of ingredients. Raises RecipeError."""
        for name, values, low, high in (
            ("--seeds", (self.seeds,), 1, 1000),
            ("--drop-top", self.drop_top, 0, ingredients - 2),
            ("--by-count", self.by_count, 2, ingredients),
        ):
            wrong = [value for value in values if not low <= value <= high]
            if wrong:
                raise RecipeError(
                    f"{name} is {wrong[0]}; expected {low} to {high} with {ingredients} ingredients. Change the option."
                )


def file_name(label: str) -> str:
    """Return a label as part of a file's name: without the colon, which many programs take for something else."""
    return label.replace(":", "-")


@dataclass(frozen=True)
class SoupEntry:
    """One soup to make: a method on a subset of the ingredients, with a seed and a model batch."""

    method: str
    subset: tuple[int, ...]
    seed: int
    model_batch: int

    @property
    def label(self) -> str:
        """Name in the table; the suffix `-mN` marks a model batch of N that is smaller than the number of ingredients."""
        return self.method if self.model_batch >= len(self.subset) else f"{self.method}-m{self.model_batch}"

    @property
    def file(self) -> str:
        """Stem of the soup's files in OUT/state/soups."""
        digest = hashlib.sha256(repr(self.subset).encode()).hexdigest()[:12]
        return f"{file_name(self.label)}_seed{self.seed}_{digest}"


@dataclass
class SoupResult:
    """Outcomes of a model on select and test, or on every source if no seed matters, and how the model was made."""

    outcomes: dict[str, Outcome]
    figures: dict[str, Any] = field(default_factory=dict)
    coefficients: Coefficients | None = None
    notes: list[str] = field(default_factory=list)

    def on(self, name: str, splits: dict[str, Split]) -> Outcome:
        """Return the outcome on a split, as `splits` cuts it."""
        split = splits[name]
        return self.outcomes[name] if name in self.outcomes else self.outcomes[split.source].at(split.rows)

    def row(self, splits: dict[str, Split]) -> ResultRow:
        """Return keys and values for results.jsonl."""
        costs = {key: self.figures[key] for key in COSTS if key in self.figures}
        own = {key: value for key, value in self.figures.items() if key.startswith(EVALUATE)} | refitted(self.figures)
        return {**figures_of({name: self.on(name, splits) for name in reported(splits)}), **own, **costs}


def table_entries(count: int, model_batch: int, seed: int, methods: Sequence[str]) -> list[SoupEntry]:
    """Return the soups of the table for one seed: every one of these methods on all ingredients.

    Methods on the hyperplane are listed a second time with `model_batch` if that is smaller than `count`.
    """
    everything = tuple(range(count))
    entries = [SoupEntry(method, everything, seed, count) for method in methods]
    if model_batch < count:
        batched = [name for name in methods if method_info(name).uses_model_batches]
        entries += [SoupEntry(method, everything, seed, model_batch) for method in batched]
    return entries


@dataclass
class SharedResults:
    """Results that are computed once for all methods."""

    individual: list[SoupResult]
    """The result of each ingredient."""
    ensemble: SoupResult
    """The result of the ensemble."""
    similarity: np.ndarray
    """Cosines of the ingredients' directions, float64 [K, K]."""


@dataclass
class Comparison(SharedResults):
    """All soups of a comparison."""

    seeds: list[int]
    model_batch: int
    dropped: dict[int, tuple[int, ...]]
    """The remaining ingredients, by the number of best ingredients that were dropped."""
    counted: dict[int, tuple[int, ...]]
    """The ingredients used, by their number."""
    splits: dict[int, dict[str, Split]]
    """The splits of each seed."""
    results: dict[SoupEntry, SoupResult]
    methods: tuple[str, ...]
    """The methods of the table."""
    foreign: dict[str, SoupResult] = field(default_factory=dict)
    """Results of models that another program made, by the name of the row."""
    trained: dict[str, dict[int, SoupResult]] = field(default_factory=dict)
    """Results of models all of whose weights were trained, by the name of the row and the seed."""

    @property
    def first(self) -> dict[str, Split]:
        """The splits of the first seed."""
        return self.splits[self.seeds[0]]

    @property
    def entries(self) -> list[SoupEntry]:
        """The soups of the table, of the first seed."""
        return table_entries(len(self.individual), self.model_batch, self.seeds[0], self.methods)

    @property
    def own(self) -> dict[str, SoupResult]:
        """The results of the table's soups by label, of the first seed."""
        return {entry.label: self.results[entry] for entry in self.entries}

    @property
    def own_trained(self) -> dict[str, SoupResult]:
        """The results of the models all of whose weights were trained, of the first seed."""
        return {name: by_seed[self.seeds[0]] for name, by_seed in self.trained.items()}

    @property
    def candidates(self) -> dict[str, SoupResult]:
        """The results that one is chosen from, by label, of the first seed."""
        found = {n: r for n, r in self.own.items() if n not in REFERENCES and r.coefficients is not None}
        return found | {name: result for name, result in self.own_trained.items() if name == POLISHED}

    def schedules(self) -> dict[str, Any]:
        """Return the key of run.json about the windows and decays that were chosen, by method; none without schedules."""
        found = {name: result.figures["schedule"] for name, result in self.own.items() if "schedule" in result.figures}
        return {"schedules": found} if found else {}

    def table(self) -> list[ResultRow]:
        """Return one row of means over the seeds per method; a method without a seed is evaluated on every seed's select."""
        rows = [_mean(MEAN_SINGLE, [result.row(self.first) for result in self.individual], spread=False)]
        for entry in self.entries:
            made = [self.results.get(replace(entry, seed=seed), self.results[entry]) for seed in self.seeds]
            rows.append(_mean(entry.label, [r.row(self.splits[s]) for r, s in zip(made, self.seeds, strict=True)]))
        for name, by_seed in self.trained.items():
            rows.append(_mean(name, [by_seed[seed].row(self.splits[seed]) for seed in self.seeds]))
        for name, result in self.foreign.items():
            rows.append(_mean(name, [result.row(self.splits[seed]) for seed in self.seeds]))
        rows.insert(2, _mean(ENSEMBLE, [self.ensemble.row(self.splits[seed]) for seed in self.seeds]))
        return rows

    def rows(self, names: Sequence[str]) -> list[ResultRow]:
        """Return a row for every ingredient, the ensemble, and every soup of all ingredients with every seed."""
        rows = [{"model_name": n, **r.row(self.first)} for n, r in zip(names, self.individual, strict=True)]
        rows.append({"model_name": ENSEMBLE, **self.ensemble.row(self.first)})
        for entry, result in self.results.items():
            if len(entry.subset) == len(self.individual):
                settings = {"seed": entry.seed, "model_batch": entry.model_batch}
                rows.append({"model_name": entry.method, **settings, **result.row(self.splits[entry.seed])})
        for name, by_seed in self.trained.items():
            for seed, result in by_seed.items():
                settings = {"seed": seed, "model_batch": len(self.individual)}
                rows.append({"model_name": name, **settings, **result.row(self.splits[seed])})
        rows += [{"model_name": name, **result.row(self.first)} for name, result in self.foreign.items()]
        return rows

    def tests(self) -> list[dict[str, Any]]:
        """Return paired tests of each soup against the baselines, on each test set."""
        soups = {**self.own, **self.own_trained, **self.foreign}
        found = {s: {name: r.on(s, self.first) for name, r in soups.items()} for s in test_sets(self.first)}
        return [
            {"split": split, "model_name": name, "against": other, **paired_test(of[name], of[other])}
            for split, of in found.items()
            for other in BASELINES
            for name in of
            if name not in (BEST_SINGLE, other)
        ]

    def series(self, series: str, key: str, subsets: dict[int, tuple[int, ...]]) -> list[dict[str, Any]]:
        """Return a row for each soup of the subsets, with the number that identifies the subset as `key`."""
        seed = self.seeds[0]
        return [
            {key: n, "model_name": m, **self.results[SoupEntry(m, subset, seed, len(subset))].row(self.first)}
            for n, subset in subsets.items()
            for m in methods_on(series)
        ]


def _mean(name: str, rows: Sequence[ResultRow], spread: bool = True) -> ResultRow:
    """Return the mean of rows, with standard deviations over the seeds as `key_sd`."""
    found: ResultRow = {"model_name": name}
    for key in dict.fromkeys(key for row in rows for key in row if key != "select_ece"):
        values = [row[key] for row in rows if row.get(key) is not None]
        if values:
            found[key] = float(np.mean(values))
            if spread and key not in COSTS and np.ptp(values) > 0:
                found[f"{key}_sd"] = float(np.std(values, ddof=1))
    return found


def verdict(label: str, ours: Outcome, single: Outcome, change: dict[str, float], measures: Measures = Measures()) -> str:
    """State whether the chosen soup beats the best single ingredient on select; `change` is from `improvement`."""
    figure = measures.decisive(change)
    figures = compared(ours, single, measures, figure)
    if measures.improved(change):
        return (
            f"Chosen by its {measures.name_of(figure)} on select: {label}, which beats the best single ingredient there "
            f"({figures})."
        )
    return f"No soup beats the best single ingredient on select; the closest is {label} ({figures}). Use that ingredient."


def what_training_gains(label: str, ours: Outcome, trained: Outcome, measures: Measures = Measures()) -> Iterable[str]:
    """Yield a sentence if training all weights beats the chosen soup `label` on select, with what that costs."""
    if cost(trained, measures.select_by) < cost(ours, measures.select_by):
        figure = measures.select_by if measures.select_by in ("accuracy", "metric") else "nll"
        price = "a model that is no longer an average of the ingredients"
        if label == POLISHED:
            price = "as much: neither model is an average of the ingredients"
        yield (
            f"Training all weights from the uniform soup on the same data ({TRAINED}) beats the chosen soup, {label}, on "
            f"select ({compared(trained, ours, measures, figure)}), and costs {price}."
        )


def diagnosis(ensemble: Outcome, single: Outcome, measures: Measures = Measures()) -> Iterable[str]:
    """Yield a warning if the ensemble of the ingredients does not beat the best single ingredient on select."""
    better = [ensemble.nll < single.nll]
    if ensemble.accuracy is not None and single.accuracy is not None:
        better.append(ensemble.accuracy > single.accuracy)
    if measures.select_by == "metric" and ensemble.metric is not None and single.metric is not None:
        better.append(ensemble.metric > single.metric)
    if not any(better):
        figures = compared(ensemble, single, measures, "metric" if measures.select_by == "metric" else "nll")
        yield (
            f"The ensemble of all ingredients does not beat the best single ingredient on select ({figures}), so a soup is "
            "not likely to either. The ingredients may be under-fitted, or may not share one initialization."
        )

"""The report: one self-contained HTML page with tables and figures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import BASELINES, BEST_SINGLE, Recipe, dump_recipe
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.report.tables import (
    TRIALS_LEGEND,
    Row,
    Table,
    cost,
    legend,
    of_seed,
    paired_legend,
    paired_table,
    pareto_legend,
    quality,
    searched_for,
    series_legend,
    series_table,
    table,
    titled,
    trials_table,
)
from ray_soup.soups.report.text import label, plain, preprocessing_text
from ray_soup.task.outcomes import Outcome, judged, test_sets

DUPLICATE_COSINE = 0.999
"""Two directions with a larger cosine are reported as near-duplicates."""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows; empty parts are left out."""

    title: str
    """The heading of the page."""
    recipe: Recipe
    """The recipe as run."""
    rows: Sequence[Row]
    """The rows of the main table."""
    record: Mapping[str, Any]
    """run.json."""
    coefficients: Mapping[str, Coefficients] = field(default_factory=dict)
    """Learned coefficients, by the soup's label."""
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Learning curves, by the soup's label."""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes on the first test set (on select if there is none), by the model's label: for the reliability diagram, and
    for intervals where no paired tests were made."""
    similarity: np.ndarray | None = None
    """Cosines of the ingredients' directions, float64 [K, K]."""
    steps: Sequence[int] | None = None
    """The step of each ingredient, if they are steps of one run."""
    weighted: Mapping[str, Coefficients] = field(default_factory=dict)
    """Coefficients to draw against the steps, by the soup's label."""
    unit: str = "step"
    """What a step is called."""

    @property
    def splits(self) -> list[str]:
        """The test sets, or select if there is none."""
        return judged(self.record.get("examples", {}))

    @property
    def measures(self) -> Measures:
        """What the figures are called."""
        return measures_in(self.record)


@dataclass(frozen=True)
class Section:
    """A table below the main one, with its heading and legend."""

    title: str
    """The heading."""
    table: Table
    """Headings and cells."""
    text: str
    """The legend; may be empty."""


@dataclass(frozen=True)
class Plot:
    """A figure with its title and caption."""

    title: str
    """The title above the figure."""
    text: str
    """The caption below it, and its alternative text."""
    svg: str
    """The drawing."""

    @property
    def source(self) -> str:
        """The drawing as a data URI, which needs no escaping."""
        from markupsafe import Markup

        return Markup("data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode())


def html(report: Report) -> str:
    """Render a report as one self-contained HTML page, without scripts or external resources.

    Every value passes through `_shown` and is escaped by the template engine.
    """
    from jinja2 import Environment

    record = report.record
    template = (files("ray_soup.soups.report") / "page.html.jinja").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, finalize=_shown).from_string(template).render(
        title=report.title,
        subtitle=f"{record['parameters']:,} parameters; model {report.recipe.model}; total time {record['wall_s']:.0f} s.",
        notes=record["notes"],
        table=table(report.rows, [*quality(report.rows, report.measures), *cost(report.measures)]),
        chosen=record.get("chosen"),
        legend=legend(record, report.rows),
        sections=list(_sections(report)),
        plots=list(_plots(report)),
        recipe=dump_recipe(report.recipe).strip(),
        preprocessing=preprocessing_text(record.get("preprocessing", {})),
        ingredients=record["ingredients"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """Return a value of the template without control characters and credentials; Markup is ours already."""
    return plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sections(report: Report) -> Iterator[Section]:
    record, measures = report.record, report.measures
    for split in report.splits:
        where = f", on {titled(split)}" if len(report.splits) > 1 else ""
        if record.get("tests"):
            for baseline in BASELINES:
                text = paired_legend(record["tests"], measures) if baseline == BASELINES[-1] else ""
                found = paired_table(record["tests"], baseline, split, measures)
                yield Section(f"Compared with {baseline}{where}", found, text)
        for name, key, title in (
            ("eliminations", "dropped", "Without the best ingredients"),
            ("counts", "count", "By number of ingredients"),
        ):
            if record.get(name):
                found = series_table(record[name], key, split, measures)
                yield Section(f"{title}{where}", found, series_legend(record[name], key, split, measures, of_seed(record)))
    search = record.get("search")
    if search:
        yield Section("Trials of the search", trials_table(search, "trials", measures), TRIALS_LEGEND)
        if search["pareto"]:  # empty if the time budget ended every trial
            yield Section("Pareto front", trials_table(search, "pareto", measures), pareto_legend(search, measures))


def _plots(report: Report) -> Iterator[Plot]:
    yield from _plots_of_quality(report)
    yield from _plots_of_learning(report)
    yield from _plots_of_models(report)


def _plots_of_quality(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures  # matplotlib is slow to import

    record, measures = report.record, report.measures
    for split in report.splits if len(report.rows) > 1 else ():
        count, figure = record["examples"][split], measures.leading(report.rows, split)
        key, name = f"{split}_{figure}", _capital(measures.name_of(figure))
        if figure == "accuracy" and measures.objective == "classification":
            intervals, text = figures.wilson(report.rows, key, count), "95 % Wilson intervals."
        else:
            intervals = _paired_intervals(report, split, figure)
            text = (
                "Lines: 95 % bootstrap intervals of the paired difference from the best single ingredient; if one contains "
                "the dotted line, the difference is not significant."
            )
        text += f" Dots: soups; diamonds: references. Dotted line: the best single ingredient.{_optimistic(report)}"
        title = f"{name} by method on {titled(split)}" if len(report.splits) > 1 else f"{name} by method"
        axis = f"{_axis(measures, figure, split)} ({count:,} examples)"
        yield Plot(title, text, figures.by_method(report.rows, key, axis, intervals, figure == "accuracy"))
    for split in report.splits if record.get("counts") else ():
        text = f"On {titled(split)}, with the first N ingredients of a shuffled list.{_optimistic(report)}"
        figure = measures.leading(record["counts"], split)
        axis, percent = _axis(measures, figure, split), figure == "accuracy"
        title = f"{_capital(measures.name_of(figure))} by number of ingredients"
        yield Plot(title, text, figures.by_count(record["counts"], f"{split}_{figure}", axis, percent))


def _capital(name: str) -> str:
    return f"{name[0].upper()}{name[1:]}"


def _axis(measures: Measures, figure: str, split: str) -> str:
    """Return the label of an axis."""
    return f"{label(titled(split))} {measures.name_of(figure)}{', %' if figure == 'accuracy' else ''}"


def _paired_intervals(report: Report, split: str, figure: str) -> dict[str, tuple[float, float]]:
    """Return for each row the interval of its difference from the best single ingredient, around the row's own figure."""
    tests = {
        t["model_name"]: t for t in report.record.get("tests", ()) if (t["against"], t["split"]) == (BEST_SINGLE, split)
    }
    if not tests and split == report.splits[0] and BEST_SINGLE in report.outcomes:
        single = report.outcomes[BEST_SINGLE]
        tests = {name: paired_test(ours, single) for name, ours in report.outcomes.items() if name != BEST_SINGLE}
    values = {row["model_name"]: row.get(f"{split}_{figure}") for row in report.rows}
    return {
        name: (values[name] - t[figure] + t[f"{figure}_low"], values[name] - t[figure] + t[f"{figure}_high"])
        for name, t in tests.items()
        if figure in t and values.get(name) is not None
    }


def _optimistic(report: Report) -> str:
    """Return a sentence for a caption if figures on select stand in for those on test."""
    return "" if test_sets(report.splits) else " Figures on select are optimistic: models were stopped or chosen on it."


def _plots_of_learning(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures

    search, measures = report.record.get("search", {}), report.measures
    varied = {"learn.lr", "learn.model_batch"} <= set(search.get("keys", ()))
    if varied and figures.on_plane(search["trials"], search["metric"]):
        better = f"{'lower' if search['metric'] == 'select_nll' else 'higher'} {searched_for(search, measures)}"
        text = f"Larger and darker points have a {better} on select; the ring marks the best of them."
        yield Plot("Learning rate and model batch", text, figures.search_plane(search["trials"], search["metric"]))
    if report.curves:
        text = (
            f"{_capital(measures.learned)} on fit (dashed) and select (solid); the ring marks the point that was kept. Both "
            "are optimistic: coefficients are learned on fit and stopped on select."
        )
        drawn = figures.learning_curves(report.curves, measures.learned, measures.select_by)
        yield Plot("Learning curves", text, drawn)
    if report.coefficients:
        text = "Hatched bars: negative coefficients. Dotted line: 1/K, the uniform soup."
        yield Plot("Distribution of coefficients", text, figures.distribution(report.coefficients))
    if report.steps is not None and report.weighted:
        from ray_soup.soups.report import trajectories

        drawn = trajectories.weights_by_step(report.weighted, report.steps, report.unit)
        yield Plot(f"Weight by {report.unit}", trajectories.CAPTION.format(unit=report.unit), drawn)
    for name, coefficients in report.coefficients.items():
        if coefficients.values.shape[1] > 1:
            text = "One row per ingredient, one column per block; white is 1/K, the uniform soup."
            yield Plot(f"Coefficients of {name}", text, figures.heat_map(coefficients))


def _plots_of_models(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures

    if report.similarity is not None:
        names = [ingredient["name"] for ingredient in report.record["ingredients"]]
        pairs = [(int(j), int(k)) for j, k in np.argwhere(np.triu(report.similarity > DUPLICATE_COSINE, 1))]
        listed = "; ".join(f"{names[j]} and {names[k]}" for j, k in pairs)
        duplicates = f"Crosses mark near-duplicates ({listed})." if pairs else "There are no near-duplicates."
        text = f"Rows and columns: ingredients minus their mean, in the order of the list below. {duplicates}"
        yield Plot("Cosines of directions", text, figures.similarity(report.similarity, names, pairs))
    if report.outcomes and all(o.confidence is not None and o.correct is not None for o in report.outcomes.values()):
        split = titled(report.splits[0])
        text = (
            f"Accuracy against confidence on {split}; points on the dotted line are perfectly calibrated."
            f"{_optimistic(report)}"
        )
        yield Plot("Reliability", text, figures.reliability_diagram(report.outcomes))

"""The report: one self-contained HTML page with tables and figures."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import BASELINES, Recipe, dump_recipe
from ray_soup.soups.report.tables import (
    COST,
    COUNTS_LEGEND,
    DROPPED_LEGEND,
    PARETO_LEGEND,
    TESTS_LEGEND,
    TRIALS_LEGEND,
    Row,
    Table,
    legend,
    quality,
    series_table,
    table,
    tests_table,
    titled,
    trials_table,
)
from ray_soup.soups.report.text import plain
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
    """Outcomes on the first test set (on select if there is none) for the reliability diagram, by the model's label."""
    similarity: np.ndarray | None = None
    """Cosines of the ingredients' directions, float64 [K, K]."""

    @property
    def splits(self) -> list[str]:
        """The test sets, or select if there is none."""
        return judged(self.record.get("examples", {}))


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
        table=table(report.rows, [*quality(report.rows), *COST]),
        chosen=record.get("chosen"),
        legend=legend(record),
        sections=list(_sections(report)),
        plots=list(_plots(report)),
        recipe=dump_recipe(report.recipe).strip(),
        ingredients=record["ingredients"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )  # fmt: skip


def _shown(value: Any) -> Any:
    """Return a value of the template without control characters and credentials; Markup is ours already."""
    return plain(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _sections(report: Report) -> Iterator[Section]:
    record = report.record
    for split in report.splits:
        where = f", on {titled(split)}" if len(report.splits) > 1 else ""
        if record.get("tests"):
            for baseline in BASELINES:
                text = TESTS_LEGEND if baseline == BASELINES[-1] else ""
                yield Section(f"Compared with {baseline}{where}", tests_table(record["tests"], baseline, split), text)
        if record.get("eliminations"):
            found = series_table(record["eliminations"], "dropped", split)
            yield Section(f"Without the best ingredients{where}", found, DROPPED_LEGEND)
        if record.get("counts"):
            yield Section(f"By number of ingredients{where}", series_table(record["counts"], "count", split), COUNTS_LEGEND)
    if record.get("search"):
        yield Section("Trials of the search", trials_table(record["search"], "trials"), TRIALS_LEGEND)
        if record["search"]["pareto"]:  # empty if the time budget ended every trial
            yield Section("Pareto front", trials_table(record["search"], "pareto"), PARETO_LEGEND)


def _plots(report: Report) -> Iterator[Plot]:
    yield from _plots_of_accuracy(report)
    yield from _plots_of_learning(report)
    yield from _plots_of_models(report)


def _plots_of_accuracy(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures  # matplotlib is slow to import

    record = report.record
    if len(report.rows) > 1:
        text = (
            "95 % Wilson intervals. Dots: soups; diamonds: references. Dotted line: the best single ingredient."
            f"{_optimistic(report)}"
        )
        for split in report.splits:
            title = f"Accuracy by method on {titled(split)}" if len(report.splits) > 1 else "Accuracy by method"
            yield Plot(title, text, figures.accuracy_by_method(report.rows, split, record["examples"][split]))
    if record.get("counts"):
        for split in report.splits:
            text = f"On {titled(split)}, with the first N ingredients of a shuffled list.{_optimistic(report)}"
            yield Plot("Accuracy by number of ingredients", text, figures.by_count(record["counts"], split))


def _optimistic(report: Report) -> str:
    """Return a sentence for a caption if figures on select stand in for those on test."""
    return "" if test_sets(report.splits) else " Figures on select are optimistic: models were stopped or chosen on it."


def _plots_of_learning(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures

    search = report.record.get("search", {})
    if {"learn.lr", "learn.model_batch"} <= set(search.get("keys", ())):
        text = "Larger and darker points have a lower NLL on select; the ring marks the best trial."
        yield Plot("Learning rate and model batch", text, figures.search_plane(search["trials"]))
    if report.curves:
        text = (
            "NLL on fit (dashed) and select (solid); the ring marks the point that was kept. Both are optimistic: "
            "coefficients are learned on fit and stopped on select."
        )
        yield Plot("Learning curves", text, figures.learning_curves(report.curves))
    if report.coefficients:
        text = "Hatched bars: negative coefficients. Dotted line: 1/K, the uniform soup."
        yield Plot("Distribution of coefficients", text, figures.distribution(report.coefficients))
    for label, coefficients in report.coefficients.items():
        if coefficients.values.shape[1] > 1:
            text = "One row per ingredient, one column per block; white is 1/K, the uniform soup."
            yield Plot(f"Coefficients of {label}", text, figures.heat_map(coefficients))


def _plots_of_models(report: Report) -> Iterator[Plot]:
    from ray_soup.soups.report import figures

    if report.similarity is not None:
        names = [ingredient["name"] for ingredient in report.record["ingredients"]]
        pairs = [(int(j), int(k)) for j, k in np.argwhere(np.triu(report.similarity > DUPLICATE_COSINE, 1))]
        listed = "; ".join(f"{names[j]} and {names[k]}" for j, k in pairs)
        duplicates = f"Crosses mark near-duplicates ({listed})." if pairs else "There are no near-duplicates."
        text = f"Rows and columns: ingredients minus their mean, in the order of the list below. {duplicates}"
        yield Plot("Cosines of directions", text, figures.similarity(report.similarity, names, pairs))
    if report.outcomes:
        split = titled(report.splits[0])
        text = (
            f"Accuracy against confidence on {split}; points on the dotted line are perfectly calibrated."
            f"{_optimistic(report)}"
        )
        yield Plot("Reliability", text, figures.reliability_diagram(report.outcomes))

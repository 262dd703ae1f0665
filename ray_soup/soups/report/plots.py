"""The figures of a report, with captions and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.report import figures, heat_map, trajectories
from ray_soup.soups.report.contents import Plot, Report
from ray_soup.soups.report.measures import Measures
from ray_soup.soups.report.settings import varied_settings
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.report.tables import Row, Table, is_reference, titled
from ray_soup.soups.report.text import capital, label, shortened
from ray_soup.soups.report.trials import searched_for
from ray_soup.task.outcomes import reliability, test_sets

DUPLICATE_COSINE = 0.999
"""Two directions with a larger cosine are reported as near-duplicates."""


def plots(report: Report) -> Iterator[Plot]:
    """Draw the figures of a report."""
    yield from _plots_of_quality(report)
    yield from _plots_of_learning(report)
    yield from _plots_of_coefficients(report)
    yield from _plots_of_models(report)


def _plots_of_quality(report: Report) -> Iterator[Plot]:
    record, measures = report.record, report.measures
    for split in report.splits if len(report.rows) > 1 else ():
        count, figure = record["examples"][split], measures.leading(report.rows, split)
        key, name = f"{split}_{figure}", capital(measures.name_of(figure))
        shown = [row for row in report.rows if row.get(key) is not None]
        if figure == "accuracy" and measures.objective == "classification":
            intervals, lines = figures.wilson(shown, key, count), "Lines: 95 % Wilson intervals."
        else:
            intervals = _paired_intervals(report, split, figure)
            lines = (
                "Lines: 95 % bootstrap intervals of the paired difference from the best single ingredient; if one contains "
                "the dotted line, the difference is not significant."
            )
        best = (min if figure == "nll" else max)(shown, key=lambda row: row[key])
        text = (
            f"{name} of each model on {titled(split)} ({count:,} examples): {best['model_name']} has the "
            f"{'lowest' if figure == 'nll' else 'highest'}, {measures.shown(figure, best[key])}. "
            f"{lines if intervals else ''}{_marks(shown)}{_optimistic(report)}"
        )
        title = f"{name} by method on {titled(split)}" if len(report.splits) > 1 else f"{name} by method"
        axis, percent = _axis(measures, figure, split), figure == "accuracy"
        yield Plot(title, text, figures.by_method(shown, key, axis, intervals, percent))
    for split in report.splits if record.get("counts") else ():
        figure = measures.leading(record["counts"], split)
        name = capital(measures.name_of(figure))
        text = f"{name} on {titled(split)} with the first N ingredients of a shuffled list.{_optimistic(report)}"
        axis, percent = _axis(measures, figure, split), figure == "accuracy"
        drawn = figures.by_count(record["counts"], f"{split}_{figure}", axis, percent)
        where = f" on {titled(split)}" if len(report.splits) > 1 else ""
        yield Plot(f"{name} by number of ingredients{where}", text, drawn)


def _marks(rows: Sequence[Row]) -> str:
    """Return what the marks mean that the rows have."""
    references = [is_reference(row["model_name"]) for row in rows]
    text = " Dots: soups; diamonds: references." if any(references) and not all(references) else ""
    single = any(row["model_name"] == BEST_SINGLE for row in rows)
    return f"{text} Dotted line: the best single ingredient." if single else text


def _axis(measures: Measures, figure: str, split: str) -> str:
    """Return the label of an axis, with its unit."""
    name = measures.name_of(figure)
    return f"{shortened(label(titled(split)), 20)} {f'{name}, %' if figure == 'accuracy' else with_unit(name)}"


def with_unit(loss: str) -> str:
    """Return the name of a loss with its unit, as far as it has one."""
    return f"{loss}, nats" if loss.startswith("NLL") else loss


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
    search, measures = report.record.get("search", {}), report.measures
    varied = {"learn.lr", "learn.model_batch"} <= set(search.get("keys", ()))
    if varied and figures.on_plane(search["trials"], search["metric"]):
        better = f"{'lower' if search['metric'] == 'select_nll' else 'higher'} {searched_for(search, measures)}"
        text = (
            f"Each point is a trial of the search: larger ones have a {better} on select; the ring marks the best of them."
        )
        yield Plot("Learning rate and model batch", text, figures.search_plane(search["trials"], search["metric"]))
    if report.curves:
        text = (
            f"{capital(measures.learned)} on fit (dashed) and select (solid) while the soup is learned; the ring marks the "
            "point that was kept. Both are optimistic: coefficients are learned on fit and stopped on select."
        )
        drawn = figures.learning_curves(report.curves, with_unit(measures.learned), measures.select_by)
        yield Plot("Learning curves", text, drawn, _numbers_of_curves(report))


def _numbers_of_curves(report: Report) -> Table:
    form = report.measures.loss_format

    def cell(point: Mapping[str, Any], key: str) -> str:
        return f"{point[key]:{form}}" if key in point else "-"

    lines = [
        [name, f"{point['steps']:,}", cell(point, "fit_nll"), cell(point, "select_nll")]
        for name, curve in report.curves.items()
        for point in curve
    ]
    loss = report.measures.learned
    return ["soup", "steps", f"fit {loss}", f"select {loss}"], lines


def _plots_of_coefficients(report: Report) -> Iterator[Plot]:
    if report.coefficients:
        negative = any((c.values < 0).any() for c in report.coefficients.values())
        text = (
            "How many coefficients of each soup have which value, one for each ingredient and block."
            f"{' Hatched bars: negative coefficients.' if negative else ''} Dotted line: 1/K, the uniform soup."
        )
        yield Plot("Distribution of coefficients", text, figures.distribution(report.coefficients))
    if report.steps is not None and report.weighted:
        drawn = trajectories.weights_by_step(report.weighted, report.steps, report.unit)
        yield Plot(f"Weight by {report.unit}", trajectories.CAPTION.format(unit=report.unit), drawn)
    settings = varied_settings(report.record["ingredients"])
    for name, coefficients in report.coefficients.items():
        if coefficients.values.shape[1] > 1:
            text, drawn = heat_map.caption(coefficients, settings), heat_map.heat_map(coefficients, settings)
            yield Plot(f"Coefficients of {name}", text, drawn, heat_map.numbers(coefficients), wide=True)


def _plots_of_models(report: Report) -> Iterator[Plot]:
    if report.similarity is not None:
        names = [ingredient["name"] for ingredient in report.record["ingredients"]]
        pairs = [(int(j), int(k)) for j, k in np.argwhere(np.triu(report.similarity > DUPLICATE_COSINE, 1))]
        listed = "; ".join(f"{names[j]} and {names[k]}" for j, k in pairs)
        duplicates = f"Crosses mark near-duplicates ({listed})." if pairs else "There are no near-duplicates."
        others = report.similarity[~np.eye(len(names), dtype=bool)]
        text = (
            "How alike the ingredients are: the cosine of the angle between each two of them, both minus the mean of all, "
            f"is from {others.min(initial=1):.2f} to {others.max(initial=-1):.2f}. {duplicates}"
        )
        yield Plot("Cosines of directions", text, figures.similarity(report.similarity, names, pairs))
    if report.outcomes and all(o.confidence is not None and o.correct is not None for o in report.outcomes.values()):
        split = titled(report.splits[0])
        text = (
            f"Accuracy against confidence on {split}; points on the dotted line are perfectly calibrated. Below: the number "
            f"of examples of each confidence. ECE: expected calibration error.{_optimistic(report)}"
        )
        lines = [
            [name, *(f"{100 * b[key]:.1f}" for key in ("confidence", "accuracy")), f"{b['count']:,}"]
            for name, outcome in report.outcomes.items()
            for b in reliability(outcome)
        ]
        head = ["model", "confidence %", "accuracy %", "examples"]
        yield Plot("Reliability", text, figures.reliability_diagram(report.outcomes), (head, lines))

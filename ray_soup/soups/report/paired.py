"""Paired tests of models as a table, and the legend that explains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from ray_soup.soups.report.measures import Measures
from ray_soup.soups.report.tables import Row, Table
from ray_soup.soups.report.text import number

SCORE = "score_"
"""Begins the keys of a paired test that belong to one of the objective's scores; its name follows."""


def paired_table(tests: Iterable[Row], against: str, split: str, measures: Measures) -> Table:
    """Format paired tests on a split: differences from the baseline `against`, with intervals and p-values.

    Accuracy, or the recipe's metric if it makes the choices, stands before the loss.
    """
    some = [t for t in tests if (t["against"], t["split"]) == (against, split)]
    first, scores = _first_tested(some, measures), _scores_tested(some)
    cells: list[tuple[str, str, Callable[[Row], str]]] = [
        ("model_name", f"minus {against}", lambda t: t["model_name"]),
        (first, "metric (95 %)" if first == "metric" else "points (95 %)", partial(_difference, first, measures)),
        ("mcnemar_p", "p", partial(_p_value, "mcnemar_p")),
        ("nll", f"{measures.loss_heading} (95 %)", partial(_difference, "nll", measures)),
        ("nll_p", "p", partial(_p_value, "nll_p")),
    ]
    for score in scores:
        cells += [
            (score, f"{score.removeprefix(SCORE)} (95 %)", partial(_difference, score, measures)),
            (f"{score}_p", "p", partial(_p_value, f"{score}_p")),
        ]
    shown = [c for c in cells if any(c[0] in t for t in some) and (c[0] != "mcnemar_p" or first == "accuracy")]
    return [heading for _, heading, _ in shown], [[cell(t) if key in t else "-" for key, _, cell in shown] for t in some]


def _scores_tested(tests: Sequence[Row]) -> list[str]:
    """Return the keys of the objective's scores in paired tests."""
    ends = ("_low", "_high", "_p")
    return list(dict.fromkeys(k for test in tests for k in test if k.startswith(SCORE) and not k.endswith(ends)))


def _difference(figure: str, measures: Measures, test: Row) -> str:
    """Format the difference in a figure with its interval; that of accuracy in percentage points."""
    difference, low, high = (test[key] for key in (figure, f"{figure}_low", f"{figure}_high"))
    if figure == "accuracy":
        shown = [number("{:+.2f}", 100 * value) for value in (difference, low, high)]
        return f"{shown[0]} ({shown[1]}, {shown[2]})"
    shown = [measures.shown(figure, value, "+") for value in (difference, low, high)]
    return f"{shown[0]} ({shown[1]}, {shown[2]})"


def _p_value(key: str, test: Row) -> str:
    return f"{test[key]:.2g}"


def paired_legend(tests: Sequence[Row], measures: Measures) -> str:
    """Return the legend of the paired tests."""
    first = _first_tested(tests, measures)
    points = f"{measures.accuracy} (percentage points)" if first == "accuracy" else "the metric"
    what = [points] if any(first in test for test in tests) else []
    scores = _scores_tested(tests)
    p_value = ""
    if first == "accuracy" and any("mcnemar_p" in test for test in tests):
        p_value = ", and the p-value of the exact McNemar test on accuracy"
    elif any("nll_p" in test for test in tests):
        p_value = (
            f", and the p-value of the paired permutation test on the {measures.loss}, which flips the signs of the "
            "differences of whole examples, or documents"
        )
    if scores:
        p_value += "; the p-values of the objective's scores are those of the paired permutation test"
    what += [measures.loss_per_unit, *(score.removeprefix(SCORE) for score in scores)]
    return (
        f"Paired tests on the test set: differences in {' and in '.join(what)} with 95 % "
        f"bootstrap intervals{p_value}. A negative {measures.loss} difference is an improvement. If an interval contains 0, "
        "the difference is not significant."
    )


def _first_tested(tests: Sequence[Row], measures: Measures) -> str:
    """Return the figure that stands before the loss in a table of tests."""
    return "metric" if measures.select_by == "metric" and any("metric" in test for test in tests) else "accuracy"

"""The tables of the zoos benchmark: figures of every model, and paired differences to the models that it must beat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

PLAIN = "mehl+ plain"
"""Name of the row of mehl+ with every variant off: what the variants are compared with."""
DEFAULT = "mehl+ default"
"""Name of the row of mehl+ with the defaults: what a variant that lacks one of them is compared with."""
REFERENCES = (PLAIN, DEFAULT, "best_single", "greedy", "uniform", "ensemble", "trained")
"""Rows that every row is compared with."""
COSTS = ("steps", "images")
"""Keys of what it costs to make a soup."""
PASSES = "passes"
"""Key of the passes over fit until the NLL on select was as low as the best of plain, divided by those of plain, or inf."""
TIE = 5e-5
"""Differences in NLL that the tables show as 0."""


@dataclass(frozen=True)
class Measure:
    """A figure on test."""

    key: str
    heading: str
    form: str
    """Format of a value."""
    scale: float = 1.0
    """Factor on a difference, for its display."""


NLL = Measure("nll", "NLL", "{:.4f}")
SCALED = Measure("scaled", "NLL scaled", "{:.4f}")
ACCURACY = Measure("accuracy", "accuracy %", "{:.2f}", 100.0)
MEASURES = (NLL, SCALED, ACCURACY)

Figures = Mapping[str, float]
"""Figures of one model on one zoo with one seed: nll, scaled, accuracy, steps, images, passes, as far as known."""
Results = Mapping[str, Mapping[int, Mapping[str, Figures]]]
"""Figures by zoo, seed and row."""


def rows_in(results: Results) -> list[str]:
    """List the rows in order of appearance."""
    return list(dict.fromkeys(row for seeds in results.values() for rows in seeds.values() for row in rows))


def values_on(results: Results, zoo: str, row: str, key: str) -> list[float]:
    """Return a figure of a row for each seed of a zoo that has it."""
    return [rows[row][key] for rows in results[zoo].values() if row in rows and key in rows[row]]


def differences_on(results: Results, zoo: str, row: str, other: str, key: str) -> list[float]:
    """Return a figure of a row minus that of another row, for each seed of a zoo that has both."""
    pairs = [(rows.get(row, {}).get(key), rows.get(other, {}).get(key)) for rows in results[zoo].values()]
    return [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def over_zoos(results: Results, on: Callable[[str], Sequence[float]]) -> list[float]:
    """Return the mean over seeds of what `on` returns for each zoo; zoos without a value are left out."""
    return [mean(found) for zoo in results if (found := on(zoo))]


def with_error(values: Sequence[float], measure: Measure) -> str:
    """Format the mean of differences and its standard error, as in -0.0065 (0.0019); a single value has no error."""
    if not values:
        return ""
    form = ".2f" if measure is ACCURACY else ".4f"
    text = f"{measure.scale * mean(values):+{form}}"
    return text if len(values) < 2 else f"{text} ({measure.scale * error_of(values):{form}})"


def error_of(values: Sequence[float]) -> float:
    """Return the standard error of the mean; 0 for a single value, of which nothing is known."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def better_and_worse(results: Results, row: str) -> str:
    """Count the zoos on which a row has a lower NLL than plain, and those on which it has a higher one."""
    found = over_zoos(results, lambda zoo: differences_on(results, zoo, row, PLAIN, NLL.key))
    return f"{sum(value < -TIE for value in found)}/{sum(value > TIE for value in found)}" if found else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table. Columns without a value are left out; without any, there is no table."""
    cells = [list(row) for row in rows]
    shown = [n for n in range(len(headings)) if n == 0 or any(row[n] for row in cells)]
    if len(shown) < 2:
        return ""
    lines = [[headings[n] for n in shown], ["---" if n == 0 else "---:" for n in shown]]
    lines += [[row[n] for n in shown] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main_table(results: Results) -> str:
    """Return the figures of each row, its NLL minus that of each reference, and its costs.

    Figures are means over the zoos that have the row, of means over seeds; `(of N)` follows one that only N of them have.
    """
    several = len(results) > 1
    headings = ["model", *(["zoos"] if several else []), *(measure.heading for measure in MEASURES)]
    headings += [f"NLL minus {name}" for name in REFERENCES] + (["better/worse"] if several else [])
    lines = []
    for row in rows_in(results):
        by_measure = [(m, figures_of(results, row, m.key)) for m in MEASURES]
        cells = [row, *([str(len(by_measure[0][1]))] if several else [])]
        for measure, values in by_measure:
            fewer = f" (of {len(values)})" if len(values) < len(by_measure[0][1]) else ""
            cells.append(measure.form.format(measure.scale * mean(values)) + fewer if values else "")
        cells += differences(results, row, NLL)
        cells += [better_and_worse(results, row)] if several else []
        for key in COSTS:
            values = figures_of(results, row, key)
            cells.append(f"{mean(values):,.0f}" if values else "")
        passes = [median(values) for zoo in results if (values := values_on(results, zoo, row, PASSES))]
        cells.append(("never" if math.isinf(median(passes)) else f"{median(passes):.2f}") if passes else "")
        lines.append(cells)
    return table([*headings, *COSTS, "passes to plain"], lines)


def figures_of(results: Results, row: str, key: str) -> list[float]:
    """Return a figure of a row on each zoo that has it."""
    return over_zoos(results, lambda zoo: values_on(results, zoo, row, key))


def differences(results: Results, row: str, measure: Measure) -> list[str]:
    """Format a figure of a row minus that of each reference, paired, with the standard error over zoos.

    If there is one zoo only, the error is that over its seeds.
    """
    found = []
    for other in REFERENCES:
        by_zoo = [differences_on(results, zoo, row, other, measure.key) for zoo in results]
        values = by_zoo[0] if len(results) == 1 else [mean(values) for values in by_zoo if values]
        found.append("" if row == other else with_error(values, measure))
    return found


def differences_table(results: Results, measure: Measure) -> str:
    """Return the table of a figure of each row minus that of each reference."""
    of = "accuracy, points" if measure is ACCURACY else measure.heading
    headings = [of, *(f"minus {name}" for name in REFERENCES)]
    return table(headings, [[row, *differences(results, row, measure)] for row in rows_in(results)])


def worse_than_plain(results: Results) -> dict[str, list[str]]:
    """Return, by row, the zoos on which its NLL is above that of plain by more than the standard error over the seeds.

    With one seed nothing is known about the error, and every rise counts.
    """
    found: dict[str, list[str]] = {}
    for row in rows_in(results):
        for zoo in results:
            values = differences_on(results, zoo, row, PLAIN, NLL.key)
            if values and mean(values) > max(TIE, error_of(values)):
                found.setdefault(row, []).append(zoo)
    return found

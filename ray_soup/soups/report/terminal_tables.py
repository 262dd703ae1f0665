"""Tables for the terminal, as text: wide ones continue below, under the first column again, and no number is cut.

Does not import torch.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_soup.recipe import BASELINES
from ray_soup.soups.report.console import LONGEST_NAME, NARROWEST
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.paired import paired_table
from ray_soup.soups.report.tables import (
    Row,
    Table,
    cost,
    of_seed,
    quality,
    results_in_parts,
    series_table,
    series_title,
    table,
    titled,
)
from ray_soup.soups.report.text import MARKS, one_line, shortened
from ray_soup.soups.report.trials import searched_for, trials_table
from ray_soup.task.outcomes import judged

WIDEST_NUMBER = 40
"""Characters that no number, with its interval and marks, exceeds."""
GAP = "  "


def width() -> int:
    """Return the columns that a table may take: those of the terminal or of COLUMNS; no limit in a pipe or a file."""
    columns = shutil.get_terminal_size((0, 0)).columns
    return columns if columns >= NARROWEST else sys.maxsize


def table_text(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Format a table, all columns but the first aligned to the right.

    A table that is too wide is split into several, each with the first column. Names are shortened in the middle if they
    take more than the whole width, those in the first column if they take more than half of it.

    Args:
        head: the headings.
        cells: the cells of each row.
    """
    from rich.cells import cell_len

    columns = [[one_line(text) for text in column] for column in zip(head, *cells, strict=True)]
    names = [shortened(text, min(LONGEST_NAME, max(NARROWEST, width() // 2))) for text in columns[0]]
    room = width() - max(map(cell_len, names)) - len(GAP)
    others = []
    for heading, *values in columns[1:]:
        values = [shortened(text, min(LONGEST_NAME, max(room, WIDEST_NUMBER))) for text in values]
        longest = max(map(cell_len, values), default=0)
        others.append([shortened(heading, min(LONGEST_NAME, max(room, longest))), *values])
    parts: list[list[list[str]]] = [[]]
    for unit in _units(others):
        if parts[-1] and sum(_width(column) + len(GAP) for column in (*parts[-1], *unit)) > room + len(GAP):
            parts.append([])
        parts[-1] += unit
    return "\n".join(_part([names, *part]) for part in parts)


def _units(columns: Sequence[list[str]]) -> Iterator[list[list[str]]]:
    """Yield columns that stay together: a p-value stands beside the difference that it belongs to."""
    unit: list[list[str]] = []
    for column in columns:
        if unit and column[0] != "p":
            yield unit
            unit = []
        unit.append(column)
    if unit:
        yield unit


def _width(column: Sequence[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, column))


def _part(columns: Sequence[Sequence[str]]) -> str:
    """Format columns that fit side by side; the first element of each is its heading."""
    from rich.cells import cell_len

    widths = [_width(column) for column in columns]
    lines = []
    for line in zip(*columns, strict=True):
        first, *rest = (" " * (size - cell_len(cell)) for size, cell in zip(widths, line, strict=True))
        lines.append(GAP.join([line[0] + first, *(pad + cell for pad, cell in zip(rest, line[1:], strict=True))]).rstrip())
    lines.insert(1, "-" * (sum(widths) + len(GAP) * (len(widths) - 1)))
    return "\n".join(lines) + "\n"


def figures_text(rows: Sequence[Row], measures: Measures = Measures()) -> str:
    """Format the figures of one model or two, one figure per line, and what their marks mean."""
    head, cells = table(rows, [*quality(rows, measures), *cost(measures)])
    first, *lines = zip(head, *cells, strict=True)
    return "\n".join([table_text(first, lines), *_marks(cells)])


def comparison_text(record: Mapping[str, Any]) -> str:
    """Format all tables of a comparison, each followed by an empty line.

    Args:
        record: run.json of a comparison.
    """
    return "\n".join([*_methods(record), *_series(record), *_tests(record)]).removesuffix("\n")


def trials_text(record: Mapping[str, Any]) -> str:
    """Format the trials of the search in run.json and its Pareto front, and say which trial is best."""
    found, measures = record["search"], measures_in(record)
    front = f"Pareto front of {searched_for(found, measures)}, memory and time"
    parts = []
    for title, which in (("Trials", "trials"), (front, "pareto")):
        parts += [f"{title}:", table_text(*trials_table(found, which, measures))]
    return "\n".join([*parts, *_marks(trials_table(found, "trials", measures)[1]), f"Best: trial {found['best']}."])


def _marks(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return what the marks on figures mean that are in a table."""
    return [note for mark, note in MARKS.items() if any(mark in cell for line in cells for cell in line)]


def _methods(record: Mapping[str, Any]) -> Iterator[str]:
    rows, measures = record["table"], measures_in(record)
    for _, columns in results_in_parts(rows, measures, len(judged(record["examples"])) > 1):
        yield table_text(*table(rows, columns))
    if marks := _marks(table(rows, quality(rows, measures))[1]):
        yield "\n".join(marks) + "\n"


def _series(record: Mapping[str, Any]) -> Iterator[str]:
    series = (("without the N best ingredients", "dropped", "eliminations"), ("with N ingredients", "count", "counts"))
    measures = measures_in(record)
    for which, key, name in series:
        for split in judged(record["examples"]) if record[name] else ():
            yield f"{series_title(record[name], split, measures)}, {which}{of_seed(record)}:\n"
            yield table_text(*series_table(record[name], key, split, measures))


def _tests(record: Mapping[str, Any]) -> Iterator[str]:
    for split in judged(record["examples"]) if record["tests"] else ():
        for baseline in BASELINES:
            yield f"Paired tests against {baseline} on {titled(split)}:\n"
            found: Table = paired_table(record["tests"], baseline, split, measures_in(record))
            yield table_text(*found)

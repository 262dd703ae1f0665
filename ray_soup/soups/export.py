"""The results of a finished soup in the formats of other programs: CSV, LaTeX and Markdown. Does not import torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_soup.soups.records import ResultRow
from ray_soup.soups.report.markdown import as_markdown, comparison_parts
from ray_soup.soups.report.measures import measures_in
from ray_soup.soups.report.tables import Table, cost, legend, quality, table
from ray_soup.soups.report.text import OPTIMISTIC, one_line
from ray_soup.soups.results import read_finished

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    OPTIMISTIC: r"$^\dagger$", "‡": r"$^\ddagger$", "±": r"$\pm$ ", "…": r"\ldots{}",
}  # fmt: skip


def export_text(out: str | Path, form: str) -> str:
    """Return the results of a finished soup as text.

    Args:
        out: the folder or URI of the soup.
        form: csv, latex or markdown, one of FORMS.

    Raises RecipeError if `out` is not a finished soup.
    """
    record, rows = read_finished(out)
    return FORMS[form](record, rows)


def csv_text(record: Mapping[str, Any], rows: Sequence[ResultRow]) -> str:
    """Return all rows of results.jsonl as CSV, in full precision; what a row lacks is empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def markdown_text(record: Mapping[str, Any], rows: Sequence[ResultRow]) -> str:
    """Return the tables with their legends as Markdown."""
    return as_markdown(_parts(record, rows)) + "\n"


def latex_text(record: Mapping[str, Any], rows: Sequence[ResultRow]) -> str:
    r"""Return the tables with their legends as LaTeX, each a tabular with the rules of the package booktabs."""
    parts = (
        f"{_escaped(part)}\\par" if isinstance(part, str) else "\n".join(_tabular(*part)) for part in _parts(record, rows)
    )
    return "% \\usepackage{booktabs}\n" + "\n\n".join(parts) + "\n"


FORMS: dict[str, Callable[[Mapping[str, Any], Sequence[ResultRow]], str]] = {
    "csv": csv_text, "latex": latex_text, "markdown": markdown_text
}  # fmt: skip
"""The formats by the names of their options."""


def _parts(record: Mapping[str, Any], rows: Sequence[ResultRow]) -> Iterator[Table | str]:
    """Yield the tables and legends of a run: those of a comparison, or the figures of one soup."""
    if "table" in record:
        yield from comparison_parts(record)
        return
    measures = measures_in(record)
    yield table(rows, [*quality(rows, measures), *cost(measures)])
    if "examples" in record:
        yield legend(record, rows)


def _tabular(head: Sequence[str], cells: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a tabular, all columns but the first aligned to the right."""

    def line(texts: Sequence[str]) -> str:
        return f"{' & '.join(map(_escaped, texts))} \\\\"

    yield f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    yield from ("\\toprule", line(head), "\\midrule", *map(line, cells), "\\bottomrule", "\\end{tabular}")


def _escaped(text: str) -> str:
    """Return LaTeX that shows a text; the hyphen before a number is a minus sign."""
    escaped = "".join(_LATEX.get(character, character) for character in one_line(text))
    return re.sub(r"(?<![\w.)])-(?=\d)", "$-$", escaped)

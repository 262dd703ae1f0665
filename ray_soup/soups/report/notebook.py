"""What a notebook or a Python prompt shows of a soup: a small table. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ray_soup.soups.report.measures import Measures
from ray_soup.soups.report.tables import Row, quality, table
from ray_soup.soups.report.text import one_line


def as_text(title: str, rows: Sequence[Row], measures: Measures = Measures()) -> str:
    """Return a title and the figures of some models as lines of plain text."""
    head, cells = table(rows, quality(rows, measures))
    lines = [head, *([one_line(cell) for cell in line] for line in cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
    return "\n".join([one_line(title), *shown])


def as_html(title: str, rows: Sequence[Row], measures: Measures = Measures()) -> str:
    """Return a title and the figures of some models as a table of HTML; every name is escaped."""
    head, cells = table(rows, quality(rows, measures))
    body = "".join(
        f'<tr><th scope="row" style="text-align: left">{_shown(line[0])}</th>'
        f"{''.join(f'<td>{_shown(cell)}</td>' for cell in line[1:])}</tr>"
        for line in cells
    )
    columns = "".join(f'<th scope="col">{_shown(heading)}</th>' for heading in head)
    caption = f'<caption style="text-align: left">{_shown(title)}</caption>'
    return f"<table>{caption}<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"


def _shown(text: str) -> str:
    return escape(one_line(text))

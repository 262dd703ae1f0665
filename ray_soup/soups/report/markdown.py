"""All tables of a comparison, one after the other, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from ray_soup.recipe import BASELINES
from ray_soup.soups.report.measures import measures_in
from ray_soup.soups.report.paired import paired_legend, paired_table
from ray_soup.soups.report.tables import (
    Table,
    cost,
    legend,
    markdown,
    of_seed,
    quality,
    series_legend,
    series_table,
    table,
    titled,
)
from ray_soup.soups.report.text import markdown_paragraph
from ray_soup.task.outcomes import judged


def comparison_parts(record: Mapping[str, Any]) -> Iterator[Table | str]:
    """Yield all tables of a comparison, and the lines of text that stand before or after them.

    Args:
        record: run.json of a comparison.
    """
    splits, measures, rows = judged(record["examples"]), measures_in(record), record["table"]

    def each(table_on: Callable[[str], Table]) -> Iterator[Table | str]:
        """Yield one table for each test set, under the set's name if there are several."""
        for split in splits:
            yield from [f"On {titled(split)}:"] if len(splits) > 1 else []
            yield table_on(split)

    yield table(rows, [*quality(rows, measures), *cost(measures)])
    yield legend(record, rows)
    if record["tests"]:
        for baseline in BASELINES:
            yield from each(partial(paired_table, record["tests"], baseline, measures=measures))
        yield paired_legend(record["tests"], measures)
    for name, key in (("eliminations", "dropped"), ("counts", "count")):
        if record[name]:
            yield from each(partial(series_table, record[name], key, measures=measures))
            yield series_legend(record[name], key, splits[0], measures, of_seed(record))


def as_markdown(parts: Iterable[Table | str]) -> str:
    """Format tables and lines of text as Markdown."""
    return "\n\n".join(markdown_paragraph(part) if isinstance(part, str) else markdown(*part) for part in parts)


def comparison_markdown(record: Mapping[str, Any]) -> str:
    """Format all tables of the comparison in run.json as Markdown, each followed by its legend."""
    return as_markdown(comparison_parts(record))

"""The report: one self-contained HTML page with tables and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from ray_soup.recipe import BASELINES, dump_recipe
from ray_soup.soups.report.contents import Report, Section
from ray_soup.soups.report.paired import paired_legend, paired_table
from ray_soup.soups.report.paths import shortener
from ray_soup.soups.report.plots import plots
from ray_soup.soups.report.settings import ingredients_table
from ray_soup.soups.report.tables import (
    legend,
    of_seed,
    results_in_parts,
    series_legend,
    series_table,
    table,
    titled,
)
from ray_soup.soups.report.text import plain, preprocessing_text
from ray_soup.soups.report.trials import TRIALS_LEGEND, pareto_legend, trials_table

__all__ = ["Report", "html"]


def html(report: Report) -> str:
    """Render a report as one self-contained HTML page without external resources; its only script sorts tables.

    Every value passes through `_shown`, loses the folders of this machine, and is escaped by the template engine.
    """
    from jinja2 import Environment

    record = report.record
    template = (files("ray_soup.soups.report") / "page.html.jinja").read_text(encoding="utf-8")
    parts = results_in_parts(report.rows, report.measures, len(report.splits) > 1)
    environment = Environment(autoescape=True, trim_blocks=True, finalize=_shown(shortener(report.recipe)))
    return environment.from_string(template).render(
        title=report.title,
        subtitle=f"{record['parameters']:,} parameters; model {report.recipe.model}; total time {record['wall_s']:.0f} s.",
        notes=record["notes"],
        results=[(name, table(report.rows, columns)) for name, columns in parts],
        chosen=record.get("chosen"),
        legend=legend(record, report.rows),
        sections=list(_sections(report)),
        plots=list(plots(report)),
        recipe=dump_recipe(report.recipe).strip(),
        preprocessing=preprocessing_text(record.get("preprocessing", {})),
        ingredients=ingredients_table(record, {**report.weighted, **report.coefficients}),
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )  # fmt: skip


def _shown(shorten: Callable[[str], str]) -> Callable[[Any], Any]:
    """Return a function that removes control characters, credentials and folders from a value; Markup is ours already."""

    def show(value: Any) -> Any:
        return shorten(plain(value)) if isinstance(value, str) and not hasattr(value, "__html__") else value

    return show


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

"""Terminal output: the progress bar, tables, and the names of written files. Does not import torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ray_soup.recipe import BASELINES
from ray_soup.soups.report.tables import (
    COST,
    comparison_markdown,
    insert,
    quality,
    series_table,
    table,
    tests_table,
    titled,
    trials_table,
)
from ray_soup.task.outcomes import judged

if TYPE_CHECKING:
    from rich.progress import Progress

    from ray_soup.io.ingredient import Ingredient
    from ray_soup.soups.output import Soup

LOG_INTERVAL_S = 10


class ProgressBar:
    """A ProgressCallback that draws a bar on a terminal, and prints a line every ten seconds elsewhere.

    Output goes to stderr. As a context manager, the object removes the bar at the end.
    """

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._what = ""
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of the work `what` are done."""
        now = time.monotonic()
        if what != self._what:
            self.stop()
            self._what, self._started, self._printed = what, now, now
        if self._console.is_terminal:
            self._draw(what, done, total)
        elif now - self._printed > LOG_INTERVAL_S:
            self._printed = now
            self._console.print(f"{what}: {done} of {total} ({now - self._started:.0f} s)", highlight=False)

    def _draw(self, what: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._bars is None:
            columns = (TextColumn("{task.description:<22}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._bars.start()
            self._task = self._bars.add_task(what, total=total)
        self._bars.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def print_json(found: object) -> None:
    """Print one object as a line of JSON."""
    click.echo(json.dumps(found))


def print_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table, all columns but the first aligned to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*head, box=box.SIMPLE, padding=(0, 1, 0, 0))  # narrow: a table should fit into 80 columns
    for number, column in enumerate(shown.columns):
        column.justify, column.no_wrap = ("right" if number else "left"), True
    for line in cells:
        shown.add_row(*line)
    Console().print(shown)


def print_row(row: Mapping[str, Any]) -> None:
    """Print the figures of one model, one per line: side by side they do not fit into 80 columns."""
    (model, *names), ((name, *figures),) = table([row], [*quality([row]), *COST])
    print_table([model, name], [list(line) for line in zip(names, figures, strict=True)])


def print_soup(soup: Soup, as_json: bool) -> None:
    """Print the figures of a soup, and where it was written."""
    if soup.was_complete:
        click.echo(f"{soup.out} is complete; nothing was run. To check it: ray-soup verify {soup.out}", err=True)
    _print_notes(soup)
    if as_json:
        print_json({"out": str(soup.out), "results": soup.rows, "run": soup.record})
        return
    print_row(soup.rows[0])
    model = max((name for name in soup.record["files"] if name.startswith("model")), default="model.safetensors")
    click.echo(f"Wrote {soup.out}/{model}, its coefficients, and README.md (the model card).")


def print_comparison(soup: Soup, as_json: bool, markdown: bool = False, into: str | None = None) -> None:
    """Print the tables of a comparison.

    Args:
        soup: a finished comparison.
        as_json: print one JSON object and no tables.
        markdown: print the tables as Markdown.
        into: also write the Markdown between the two marks of this file.

    Raises RecipeError if the file `into` has no marks.
    """
    if into:
        insert(comparison_markdown(soup.record), into)
        click.echo(f"Wrote the tables into {into}.", err=True)
    if markdown:
        click.echo(comparison_markdown(soup.record))
    _print_notes(soup)
    if as_json:
        print_json({"out": str(soup.out), "results": soup.rows, "run": soup.record})
    if markdown or as_json:
        return
    _print_methods(soup.record)
    _print_series(soup.record)
    _print_tests(soup.record)
    click.echo(
        f"Wrote {soup.out}/report.html with tables and figures, and model.safetensors with the soup {soup.record['chosen']}."
    )


def print_trials(found: Mapping[str, Any]) -> None:
    """Print the trials of a search, its Pareto front, and which trial is best."""
    for title, which in (("Trials", "trials"), ("Pareto front of NLL, memory and time", "pareto")):
        click.echo(f"{title}:")
        print_table(*trials_table(found, which))
    click.echo(f"Best: trial {found['best']}.")


def print_zoo(entries: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], out: str) -> None:
    """Print the fine-tuned checkpoints, and how many training runs failed."""
    for entry in entries:
        accuracy = f"  held-out accuracy {entry['accuracy']:.2%}" if "accuracy" in entry else ""
        click.echo(f"{entry['file']}  lr {entry['lr']:.1e}  epochs {entry['epochs']}{accuracy}")
    if failures:
        click.echo(f"{len(failures)} more failed ({out}/state/failures.json). The first error: {failures[0]['error']}")
    click.echo(f"Wrote {len(entries)} checkpoints and manifest.json to {out}.")


def print_ingredients(ingredients: Sequence[Ingredient], names: Sequence[str], as_json: bool) -> None:
    """Print the tensors `names`, which all ingredients have, and the size and path of each ingredient."""
    tensors = ingredients[0].tensors
    elements = sum(tensors[name].numel for name in names)
    nbytes = sum(ingredient.nbytes for ingredient in ingredients)
    if as_json:
        shown = {name: [str(tensors[name].dtype).removeprefix("torch."), list(tensors[name].shape)] for name in names}
        listed = [{"name": i.name, "path": i.path, "bytes": i.nbytes} for i in ingredients]
        print_json({"ingredients": listed, "tensors": shown, "numbers": elements, "bytes": nbytes})
        return
    for name in names:
        click.echo(f"{name:<60} {tensors[name]}")
    for ingredient in ingredients:
        click.echo(f"{ingredient.name:<40} {ingredient.nbytes:>15,} bytes  {ingredient.path}")
    click.echo(
        f"{len(ingredients)} ingredients fit together: {len(names)} tensors with {elements:,} elements each, "
        f"{nbytes:,} bytes in total."
    )


def _print_notes(soup: Soup) -> None:
    for note in soup.notes:
        click.echo(note, err=True)


def _print_methods(record: Mapping[str, Any]) -> None:
    splits, rows = judged(record["examples"]), record["table"]
    columns = [column for column in quality(rows) if column[0] != "select_accuracy"]  # without it: 80 columns
    if len(splits) == 1:
        print_table(*table(rows, columns))
    else:  # one table for each figure, with a column for each test set
        print_table(*table(rows, [columns[0], *(c for c in columns if c[0].endswith("_accuracy"))]))
        for figure in ("_metric", "_nll"):
            some = [c for c in columns if c[0].endswith(figure) and any(c[0] in row for row in rows)]
            if some:
                print_table(*table(rows, [columns[0], *some]))
    print_table(*table(rows, [*quality(rows)[:2], *COST]))


def _print_series(record: Mapping[str, Any]) -> None:
    series = (("without the N best ingredients", "dropped", "eliminations"), ("with N ingredients", "count", "counts"))
    for which, key, name in series:
        for split in judged(record["examples"]) if record[name] else ():
            click.echo(f"Accuracy on {titled(split)} in percent, {which}:")
            print_table(*series_table(record[name], key, split))


def _print_tests(record: Mapping[str, Any]) -> None:
    for split in judged(record["examples"]) if record["tests"] else ():
        for baseline in BASELINES:
            click.echo(f"Paired tests against {baseline} on {titled(split)}:")
            print_table(*tests_table(record["tests"], baseline, split))

"""Terminal output: the progress bar, tables, and the names of written files. Does not import torch.

Everything goes through `echo` and `say`: without credentials, without terminal escapes, and in whatever encoding and state
the terminal is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from ray_soup.errors import OutputClosed, SoupError
from ray_soup.io.disk import json_text
from ray_soup.io.redact import printable, redact
from ray_soup.recipe import BASELINES, BEST_SINGLE
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.tables import (
    Columns,
    comparison_markdown,
    cost,
    insert,
    of_seed,
    own_columns,
    paired_table,
    quality,
    searched_for,
    series_table,
    series_title,
    steps_table,
    table,
    titled,
    trials_table,
)
from ray_soup.soups.report.text import MARKS, preprocessing_text
from ray_soup.task.outcomes import judged

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ray_soup.io.ingredient import Ingredient
    from ray_soup.soups.output import Soup

LOG_INTERVAL_S = 10
NARROWEST = 20
"""Terminal columns below which a width cannot be true."""
WIDTH = 80
"""Terminal columns that tables fit into."""
LONGEST_NAME = 120
"""Terminal columns of the longest name that is shown whole."""


def echo(text: str) -> None:
    """Print a text to stdout. Raises OutputClosed if its reader has ended, SoupError if it cannot be written."""
    _echo_styled(printable(redact(text)))


def _echo_styled(text: str) -> None:
    """Print a text whose terminal escapes are ours."""
    try:
        click.echo(text)
    except (OSError, ValueError) as error:
        raise unwritable(error) from error


def unwritable(error: OSError | ValueError) -> SoupError:
    """Return the error to raise if stdout cannot be written; the rest of the output is dropped."""
    _redirect(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return OutputClosed("Nobody reads the standard output.")
    reason = getattr(error, "strerror", None) or error
    return SoupError(f"The standard output cannot be written: {reason}. Rerun the command with another output.")


def say(text: str) -> None:
    """Print a text to stderr; if that cannot be written, nothing is printed, and the run continues."""
    try:
        click.echo(printable(redact(text)), err=True)
    except (OSError, ValueError):
        _redirect(sys.stderr)


def flush() -> None:
    """Flush stdout and stderr at the end of a command. Raises as `echo` does."""
    for stream in (sys.stderr, sys.stdout):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError) as error:
            _redirect(stream)
            if stream is sys.stdout:
                raise unwritable(error) from error


def _redirect(stream: TextIO) -> None:
    """Send what is left in the buffer of a broken stream to /dev/null: Python would complain about it at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def name_of(text: str, width: int = 0, longest: int = LONGEST_NAME) -> str:
    """Return a name on one line, padded to `width` terminal columns, and cut if it takes more than `longest`."""
    from rich.cells import cell_len, set_cell_size

    text = printable(redact(text)).replace("\n", "\\n").replace("\t", "\\t")
    if cell_len(text) > longest:
        text = set_cell_size(text, longest - 1).rstrip() + "…"
    return text + " " * (width - cell_len(text))


class ProgressBar:
    """A ProgressCallback that draws a bar on a terminal, and prints a line every ten seconds elsewhere.

    Output goes to stderr. As a context manager, the object removes the bar at the end.
    """

    def __init__(self) -> None:
        self._console = _console(stderr=True)
        self._bars: Progress | None = None
        self._what = ""
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of the work `what` are done; a terminal that is gone does not end the run."""
        now = time.monotonic()
        if what != self._what:
            self.stop()
            self._what, self._started, self._printed = what, now, now
        if self._console.is_terminal:
            with suppress(OSError, ValueError):
                self._draw(name_of(what), done, total)
        elif now - self._printed > LOG_INTERVAL_S:
            self._printed = now
            say(f"{name_of(what)}: {done} of {total} ({now - self._started:.0f} s)")

    def _draw(self, what: str, done: int, total: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._bars is None:
            text = TextColumn("{task.description:<22}", markup=False)
            columns = (text, BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
            self._bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._bars.start()
            self._task = self._bars.add_task(what, total=total)
        self._bars.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Remove the bar."""
        bars, self._bars = self._bars, None
        if bars is not None:
            with suppress(OSError, ValueError):
                bars.stop()


def _console(**options: Any) -> Console:
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            """Raise what the caller can handle; by default, the console ends the process with exit code 1."""
            raise BrokenPipeError

    terminal = Terminal(**options)
    return terminal if terminal.width >= NARROWEST else Terminal(width=80, **options)  # as with COLUMNS=0


def print_json(found: object) -> None:
    """Print one object as a line of valid JSON."""
    echo(json_text(found))


def print_table(head: Sequence[str], cells: Sequence[Sequence[str]], whole: bool = False) -> None:
    """Print a table, all columns but the first aligned to the right.

    Args:
        head: the headings.
        cells: the cells of each row.
        whole: True to cut the other headings, and neither the first column nor any cell, if the table is too wide.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console()
    shown = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))  # narrow: a table should fit into 80 columns
    longest = [max((len(name_of(line[n])) for line in cells), default=0) if whole else 0 for n in range(len(head))]
    room = (console.width - longest[0]) // max(1, len(head) - 1) - 3 if whole else LONGEST_NAME
    for number, name in enumerate(head):
        heading = name_of(name, longest=min(LONGEST_NAME, max(longest[number], room)) if number else LONGEST_NAME)
        shown.add_column(
            Text(heading), justify="right" if number else "left", no_wrap=True, min_width=longest[number] or None
        )
    for line in cells:
        shown.add_row(*(Text(name_of(cell)) for cell in line))
    with console.capture() as captured:
        console.print(shown)
    _echo_styled(captured.get().removesuffix("\n"))


def print_row(*rows: Mapping[str, Any], measures: Measures = Measures()) -> None:
    """Print the figures of one model or two, one figure per line: side by side they do not fit into 80 columns."""
    head, cells = table(rows, [*quality(rows, measures), *cost(measures)])
    first, *lines = zip(head, *cells, strict=True)
    print_table(first, lines, whole=True)  # a long path must not cut the names of the figures
    _explain_marks(cells)


def print_evaluation(row: Mapping[str, Any], as_json: bool) -> None:
    """Print the figures of one model that `ray-soup evaluate` computed, its notes, and how the data were preprocessed."""
    for note in row.get("notes", ()):
        say(note)
    if as_json:
        return print_json(row)
    print_row(row, measures=measures_in(row))
    if preprocessing := preprocessing_text(row.get("preprocessing", {})):
        echo(f"Preprocessing: {preprocessing}")
    return None


def _explain_marks(cells: Sequence[Sequence[str]]) -> None:
    """Print what the marks on figures mean that are in a table."""
    for mark, note in MARKS.items():
        if any(mark in cell for line in cells for cell in line):
            echo(note)


def _rows_of(soup: Soup) -> list[Mapping[str, Any]]:
    """Return the rows of a soup and of the best single ingredient, of all rows of its run."""
    if "chosen" not in soup.record:
        return [*soup.rows]
    found = {row["model_name"]: row for row in soup.record["table"]}
    return [found[name] for name in (soup.record["chosen"], BEST_SINGLE) if name in found]


def print_soup(soup: Soup, as_json: bool) -> None:
    """Print the figures of a soup, and where it was written."""
    _print_notes(soup)
    if as_json:
        print_json({"out": str(soup.out), "results": soup.rows, "run": soup.record})
        return
    print_row(*_rows_of(soup), measures=measures_in(soup.record))
    if "trajectory" in soup.record:
        print_table(*steps_table(soup.record["trajectory"]))
        echo("Weights are means over blocks; learning rate: the factor that they amount to, on the updates before a step.")
    names = (name for name in soup.record["files"] if name.startswith(("model", "adapter_model")))
    model = _distributed(soup) or max(names, default="model.safetensors")
    if not soup.was_complete:
        echo(f"Wrote {soup.out}/{model}, its coefficients, and README.md (the model card).")


def _distributed(soup: Soup) -> str:
    """Return the files of a soup that is a distributed checkpoint of torch, for a sentence; empty for any other one."""
    parts = [name for name in soup.record.get("files", ()) if name.endswith(".distcp")]
    return f".metadata and {len(parts)} .distcp file{'s' * (len(parts) > 1)}" if parts else ""


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
        say(f"Wrote the tables into {into}.")
    if markdown:
        echo(comparison_markdown(soup.record))
    _print_notes(soup)
    if as_json:
        print_json({"out": str(soup.out), "results": soup.rows, "run": soup.record})
    if markdown or as_json:
        return
    _print_methods(soup.record)
    _print_series(soup.record)
    _print_tests(soup.record)
    adapter = any(name.startswith("adapter_model") for name in soup.record["files"])
    model = _distributed(soup) or ("adapter_model" if adapter else "model") + ".safetensors"
    if not soup.was_complete:
        echo(f"Wrote {soup.out}/report.html with tables and figures, and {model} with the soup {soup.record['chosen']}.")


def print_trials(record: Mapping[str, Any]) -> None:
    """Print the trials of the search in run.json, its Pareto front, and which trial is best."""
    found, measures = record["search"], measures_in(record)
    front = f"Pareto front of {searched_for(found, measures)}, memory and time"
    for title, which in (("Trials", "trials"), (front, "pareto")):
        echo(f"{title}:")
        whole = trials_table(found, which, measures)
        print_table(*(whole if _fits(*whole) else trials_table(found, which, measures, everything=False)))
    _explain_marks(trials_table(found, "trials", measures)[1])
    echo(f"Best: trial {found['best']}.")


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
        echo(f"{name_of(name, 60)} {tensors[name]}")
    for ingredient in ingredients:
        echo(f"{name_of(ingredient.name, 40)} {ingredient.nbytes:>15,} bytes  {name_of(ingredient.path, longest=4096)}")
    echo(
        f"{len(ingredients)} ingredients fit together: {len(names)} tensors with {elements:,} elements each, "
        f"{nbytes:,} bytes in total."
    )


def _print_notes(soup: Soup) -> None:
    """Print that nothing was run, if the soup had been finished before, and its notes."""
    if soup.was_complete:
        say(f"{soup.out} is complete; nothing was run. To check it: ray-soup verify {soup.out}")
    for note in soup.notes:
        say(note)


def _print_methods(record: Mapping[str, Any]) -> None:
    splits, rows, measures = judged(record["examples"]), record["table"], measures_in(record)
    everything, own = quality(rows, measures), own_columns(rows)
    accuracy = [c for c in everything if c[0] == "select_accuracy"]
    columns = [c for c in everything if c not in (*accuracy, *own)]  # without them: 80 columns
    if len(splits) == 1:
        for part in _parts(rows, columns):
            print_table(*table(rows, part))
    else:  # one table for each figure, with a column for each test set
        for figure in ("_accuracy", "_metric", "_nll", "_perplexity", "_bits_per_byte"):
            some = [c for c in columns if c[0].endswith(figure) and any(c[0] in row for row in rows)]
            if some:
                print_table(*table(rows, [columns[0], *some]))
    while own:  # as many to a table as fit
        count = next((n for n in range(len(own), 1, -1) if _fits(*table(rows, [columns[0], *own[:n]]))), 1)
        print_table(*table(rows, [columns[0], *own[:count]]))
        own = own[count:]
    print_table(*table(rows, [columns[0], *accuracy, *cost(measures)]))
    _explain_marks(table(rows, everything)[1])


def _parts(rows: Sequence[Mapping[str, Any]], columns: Columns) -> list[Columns]:
    """Cut a table at the end of the figures on select if it is too wide; each part begins with the model's name."""
    if _fits(*table(rows, columns)):
        return [columns]
    on_select = [column for column in columns if column[0].startswith("select_")]
    rest = [column for column in columns[1:] if column not in on_select]
    return [[columns[0], *part] for part in (on_select, rest) if part]


def _fits(head: Sequence[str], cells: Sequence[Sequence[str]]) -> bool:
    """Return whether a table fits into WIDTH columns."""
    return sum(max(map(len, column)) + 2 for column in zip(head, *cells, strict=True)) < WIDTH


def _print_series(record: Mapping[str, Any]) -> None:
    series = (("without the N best ingredients", "dropped", "eliminations"), ("with N ingredients", "count", "counts"))
    measures = measures_in(record)
    for which, key, name in series:
        for split in judged(record["examples"]) if record[name] else ():
            echo(f"{series_title(record[name], split, measures)}, {which}{of_seed(record)}:")
            print_table(*series_table(record[name], key, split, measures))


def _print_tests(record: Mapping[str, Any]) -> None:
    for split in judged(record["examples"]) if record["tests"] else ():
        for baseline in BASELINES:
            echo(f"Paired tests against {baseline} on {titled(split)}:")
            head, cells = paired_table(record["tests"], baseline, split, measures_in(record))
            whole = range(len(head))
            at = next((n for n in whole if head[n].startswith(measures_in(record).loss_heading)), 0)
            parts = [whole] if at < 2 or _fits(head, cells) else [whole[:at], (0, *whole[at:])]
            for columns in parts:
                print_table([head[n] for n in columns], [[line[n] for n in columns] for line in cells])

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
from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.tables import comparison_markdown, insert, steps_table
from ray_soup.soups.report.terminal_tables import comparison_text, figures_text, table_text, trials_text
from ray_soup.soups.report.text import preprocessing_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from ray_soup.io.ingredient import Ingredient
    from ray_soup.soups.output import Soup

LOG_INTERVAL_S = 10
NARROWEST = 20
"""Terminal columns below which a width cannot be true."""
LONGEST_NAME = 120
"""Terminal columns of the longest name that is shown whole."""


def echo(text: str) -> None:
    """Print a text to stdout. Raises OutputClosed if its reader has ended, SoupError if it cannot be written."""
    try:
        click.echo(printable(redact(text)))
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


def print_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table, as `table_text` formats it."""
    echo(table_text(head, cells))


def print_row(*rows: Mapping[str, Any], measures: Measures = Measures()) -> None:
    """Print the figures of one model or two, one figure per line: side by side they do not fit into 80 columns."""
    echo(figures_text(rows, measures))


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


def _rows_of(soup: Soup) -> list[Mapping[str, Any]]:
    """Return the rows of a soup and of the best single ingredient, of all rows of its run."""
    if "chosen" not in soup.record:
        return [*soup.rows]
    found = {row["model_name"]: row for row in soup.record["table"]}
    return [found[name] for name in (soup.record["chosen"], BEST_SINGLE) if name in found]


def print_soup(soup: Soup, as_json: bool) -> None:
    """Print the figures of a soup, and where it was written."""
    if soup.was_complete:
        say(f"{soup.out} is complete; nothing was run. To check it: ray-soup verify {soup.out}")
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
    echo(comparison_text(soup.record))
    adapter = any(name.startswith("adapter_model") for name in soup.record["files"])
    model = _distributed(soup) or ("adapter_model" if adapter else "model") + ".safetensors"
    echo(f"Wrote {soup.out}/report.html with tables and figures, and {model} with the soup {soup.record['chosen']}.")


def print_trials(record: Mapping[str, Any]) -> None:
    """Print the trials of the search in run.json, its Pareto front, and which trial is best."""
    echo(trials_text(record))


def print_zoo(entries: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]], out: str) -> None:
    """Print the fine-tuned checkpoints, and how many training runs failed."""
    for entry in entries:
        accuracy = f"  held-out accuracy {entry['accuracy']:.2%}" if "accuracy" in entry else ""
        echo(f"{entry['file']}  lr {entry['lr']:.1e}  epochs {entry['epochs']}{accuracy}")
    if failures:
        echo(f"{len(failures)} more failed ({out}/state/failures.json). The first error: {failures[0]['error']}")
    echo(f"Wrote {len(entries)} checkpoints and manifest.json to {out}.")


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
    for note in soup.notes:
        say(note)

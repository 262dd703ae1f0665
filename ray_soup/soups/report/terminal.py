"""The results of commands on the terminal: tables, sentences, and the names of written files. Does not import torch.

What makes tables is imported by the functions that print them: a help text and `ray-soup inspect` need none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.report.console import echo, name_of, print_json, say
from ray_soup.soups.report.marks import insert
from ray_soup.soups.report.progress_bar import ProgressBar

if TYPE_CHECKING:
    from ray_soup.soups.output import Soup
    from ray_soup.soups.report.measures import Measures

__all__ = [
    "ProgressBar", "echo", "print_comparison", "print_evaluation", "print_ingredients", "print_json", "print_row",
    "print_soup", "print_table", "print_trials", "say",
]  # fmt: skip


def print_table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table, as `table_text` formats it."""
    from ray_soup.soups.report.terminal_tables import table_text

    echo(table_text(head, cells))


def print_row(*rows: Mapping[str, Any], measures: Measures | None = None) -> None:
    """Print the figures of one model or two, one figure per line: side by side they do not fit into 80 columns."""
    from ray_soup.soups.report.measures import Measures
    from ray_soup.soups.report.terminal_tables import figures_text

    echo(figures_text(rows, measures or Measures()))


def print_evaluation(row: Mapping[str, Any], as_json: bool) -> None:
    """Print the figures of one model that `ray-soup evaluate` computed, its notes, and how the data were preprocessed."""
    from ray_soup.soups.report.measures import measures_in
    from ray_soup.soups.report.text import preprocessing_text

    for note in row.get("notes", ()):
        say(note)
    if as_json:
        return print_json(row)
    print_row(row, measures=measures_in(row))
    if preprocessing := preprocessing_text(row.get("preprocessing", {})):
        echo(f"Preprocessing: {preprocessing}")
    if "dtype" in row:
        echo(f"Computed with weights in {row['dtype']}.")
    return None


def _rows_of(soup: Soup) -> list[Mapping[str, Any]]:
    """Return the rows of a soup and of the best single ingredient, of all rows of its run."""
    if "chosen" not in soup.record:
        return [*soup.rows]
    found = {row["model_name"]: row for row in soup.record["table"]}
    return [found[name] for name in (soup.record["chosen"], BEST_SINGLE) if name in found]


def print_soup(soup: Soup, as_json: bool) -> None:
    """Print the figures of a soup, where it was written, and how to load it."""
    from ray_soup.soups.report.measures import measures_in
    from ray_soup.soups.report.tables import steps_table

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
    is_sum = soup.record.get("own_method", {}).get("returned") != "model"
    _print_ending(soup, f"{soup.out}/{model}{', its coefficients,' if is_sum else ''} and README.md (the model card)")


def _print_ending(soup: Soup, files: str) -> None:
    """Print what a run has made, how good it is, where it is, and how to load it."""
    from ray_soup.soups.report.ending import how_good, how_to_load, what_was_made

    rows = _rows_of(soup)
    echo(what_was_made(soup.record, rows))
    if good := how_good(soup.record, rows):
        echo(good)
    echo(f"{'It is in' if soup.was_complete else 'Wrote'} {files}.")
    for line in how_to_load(soup.record):
        echo(line)


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
    from ray_soup.soups.report.markdown import comparison_markdown
    from ray_soup.soups.report.terminal_tables import comparison_text

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
    _print_ending(soup, f"{soup.out}/report.html with tables and figures, and {model} with the soup {soup.record['chosen']}")


def print_trials(record: Mapping[str, Any]) -> None:
    """Print the trials of the search in run.json, its Pareto front, and which trial is best."""
    from ray_soup.soups.report.terminal_tables import trials_text

    echo(trials_text(record))


def print_ingredients(found: Mapping[str, Any], as_json: bool) -> None:
    """Print the tensors that all ingredients have, the size and path of each ingredient, and notes."""
    ingredients, tensors = found["ingredients"], found["tensors"]
    if as_json:
        print_json({key: value for key, value in found.items() if key != "notes"})
    else:
        for name, (dtype, shape) in tensors.items():
            echo(f"{name_of(name, 60)} {dtype} {shape}")
        for one in ingredients:
            echo(f"{name_of(one['name'], 40)} {one['bytes']:>15,} bytes  {name_of(one['path'], longest=4096)}")
        echo(
            f"{len(ingredients)} ingredients fit together: {len(tensors)} tensors with {found['numbers']:,} elements each, "
            f"{found['bytes']:,} bytes in total."
        )
    for note in found["notes"]:
        say(note)


def _print_notes(soup: Soup) -> None:
    """Print that nothing was run, if the soup had been finished before, and its notes."""
    if soup.was_complete:
        say(f"{soup.out} is complete; nothing was run. To check it: ray-soup verify {soup.out}")
    for note in soup.notes:
        say(note)

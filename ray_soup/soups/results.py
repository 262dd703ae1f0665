"""The rows of results.jsonl: what each row is, and all of them as a table of pandas. Does not import torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.recipe import METHODS, PEFT_MERGES, TRAINED
from ray_soup.soups.place import local_folder
from ray_soup.soups.records import ResultRow, RunRecord, check_files, finished_record, read_results
from ray_soup.soups.report.tables import ENSEMBLE

if TYPE_CHECKING:
    import pandas as pd

RESULTS = "results.jsonl"
KINDS = {
    "ingredient": "an ingredient",
    "single": "the ingredient that a method chose, as best_single",
    "ensemble": "the ensemble of all ingredients",
    "soup": "a soup, of one seed",
    "reference": "a model that is no soup of ray_soup, for comparison, as the row trained",
    "mean": "a row of the table of `compare`: the mean over `seeds` seeds, with standard deviations as KEY_sd",
    "dropped": "a soup without the best ingredients, as many as `dropped` says",
    "counted": "a soup of fewer ingredients, as many as `count` says",
}
"""The kinds of rows, and what a row of that kind is."""


def with_kinds(rows: Sequence[ResultRow], record: Mapping[str, Any]) -> list[ResultRow]:
    """Return the rows of a run with their kind and name, followed by the means and the series of a comparison.

    Args:
        rows: the rows, one for each model; those of earlier versions have no `kind`.
        record: run.json.

    `kind` is one of KINDS, and `name` is the model's name in the tables, as in mehl+-m3. Rows that have both stay unchanged.
    """
    if any("kind" in row for row in rows):
        return [*rows]
    names = {ingredient["name"] for ingredient in record["ingredients"]}
    found = [{"kind": _kind(row, names, record), "name": _name(row, len(names)), **row} for row in rows]
    seeds = record.get("seeds", [])
    found += [{"kind": "mean", "name": row["model_name"], "seeds": len(seeds), **row} for row in record.get("table", ())]
    for kind, series in (("dropped", "eliminations"), ("counted", "counts")):
        of_first = {"seed": record.get("seed")}
        found += [{"kind": kind, "name": row["model_name"], **of_first, **row} for row in record.get(series, ())]
    return found


def _kind(row: ResultRow, ingredients: set[str], record: Mapping[str, Any]) -> str:
    name = row["model_name"]
    if name in ingredients:
        return "ingredient"
    if name in METHODS:
        return "single" if METHODS[name].is_reference else "soup"
    if name == ENSEMBLE:
        return "ensemble"
    is_made = "seed" in row or name == record.get("method")  # by a function of the user's, or polished
    return "soup" if is_made and name not in (TRAINED, *PEFT_MERGES) else "reference"


def _name(row: ResultRow, ingredients: int) -> str:
    """Return the name of a row in the tables, which state a model batch that is smaller than the number of ingredients."""
    size = row.get("model_batch", ingredients)
    name: str = row["model_name"]
    return name if size >= ingredients else f"{name}-m{size}"


@contextmanager
def finished_files(out: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Have run.json and other small files of a finished soup in a local folder, for as long as the context lasts.

    Args:
        out: the folder or URI of the soup.
        names: the other files, which are checked against their digests in run.json.

    Raises RecipeError if `out` is not a finished soup, or if a file is not as it was written.
    """
    if not storage.is_remote(str(out)):
        folder = local_folder(out)
        check_files(folder, finished_record(folder), names)
        yield folder
        return
    uri = str(out).rstrip("/")
    with tempfile.TemporaryDirectory(prefix="ray_soup") as temporary:
        folder = Path(temporary)
        for name in ("run.json", *names):
            with suppress(FileNotFoundError):  # reported below
                (folder / name).write_bytes(storage.read_bytes(storage.join(uri, name)))
        try:
            check_files(folder, finished_record(folder), names)
        except RecipeError as error:
            raise RecipeError(str(error).replace(temporary, uri)) from error
        yield folder


def read_finished(out: str | Path) -> tuple[RunRecord, list[ResultRow]]:
    """Return run.json of a finished soup, a folder or URI, and its rows `with_kinds`. Raises RecipeError."""
    with finished_files(out, [RESULTS]) as folder:
        record = finished_record(folder)
        return record, with_kinds(read_results(folder), record)


def load_results(out: str | Path) -> pd.DataFrame:
    """Return the results of a finished run, the rows of results.jsonl, as a table of pandas.

    >>> results = ray_soup.load_results("soup")
    >>> results.loc[results.kind == "soup", ["name", "ingredients_used"]]
          name  ingredients_used
    0  uniform                 4

    The columns are `kind`, `name` and the keys of the rows, such as test_nll; what a row lacks is NaN. The kinds of rows are

    - ingredient: an ingredient,
    - single: the ingredient that a method chose, as best_single,
    - ensemble: the ensemble of all ingredients,
    - soup: a soup, of one seed,
    - reference: a model that is no soup of ray_soup, for comparison, as the row `trained`,
    - mean: a row of the table of `compare`, the mean over `seeds` seeds, with standard deviations in columns KEY_sd,
    - dropped and counted: a soup without the `dropped` best ingredients, or of `count` ingredients.

    Accuracies are shares from 0 to 1, losses are in nats, `seconds` are seconds, and memory is in bytes.

    Args:
        out: the folder or URI of a finished soup, of any version of ray_soup.

    Raises RecipeError if `out` is not a finished soup.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise RecipeError(
            f"load_results needs pandas, which cannot be imported ({error}). Run pip install pandas."
        ) from error
    return pd.DataFrame(read_finished(out)[1])

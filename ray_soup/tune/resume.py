"""Rerun the command that an output folder was begun with, as its own records say."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.claims import state_of
from ray_soup.io.disk import write_bytes
from ray_soup.io.lease import state_folder
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.redact import redact_uris
from ray_soup.recipe import Recipe, dump_recipe, is_function, parse_overrides, with_changes
from ray_soup.recipe.plain import texts_in
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy
from ray_soup.soups.identity import begun_zoo, check_same, command_of, recipe_of
from ray_soup.soups.output import Soup
from ray_soup.soups.place import local_folder
from ray_soup.soups.records import BegunRecord, RunRecord, read_begun, read_results, read_run_record
from ray_soup.soups.run import run
from ray_soup.tune.finetune import finetune
from ray_soup.tune.records import ManifestEntry, read_manifest
from ray_soup.tune.search import search


@dataclass(frozen=True)
class Resumed:
    """What an output folder holds at the end: a soup, or fine-tuned checkpoints."""

    command: str
    """The command that the folder was begun with: learn (which stands for all that make one soup), compare, search,
    finetune or bake."""
    soup: Soup | None = None
    """The soup; None for finetune."""
    entries: Sequence[ManifestEntry] = ()
    """The checkpoints of finetune."""
    was_complete: bool = False
    """True if nothing was run."""


def resume(out: str | Path, overrides: Sequence[str] = (), progress: ProgressCallback = no_progress) -> Resumed:
    """Finish the run in the folder or URI `out`; a finished run is returned without running anything.

    Args:
        out: the folder or URI.
        overrides: keys of the recipe to change, as in "actors.cpus=2"; only those that do not change the result.
        progress: called with what is being done, the units done so far, and the units in total.

    Raises RecipeError if no run was begun in `out`, and what the command itself raises.
    """
    place = str(out) if storage.is_remote(str(out)) else str(local_folder(out))
    begun, record, rows = _records_in(place)
    command = "bake" if "source" in begun else command_of(begun)
    if command == "finetune" and storage.isfile(storage.join(place, "manifest.json")):
        return Resumed(command, entries=read_manifest(storage.join(place, "manifest.json")), was_complete=True)
    if record is not None and record["exit"] == 0 and record.get("compare", begun.get("compare")) == begun.get("compare"):
        at: Path | str = place if storage.is_remote(place) else Path(place)
        return Resumed(command, Soup(at, rows, record, record.get("notes", []), was_complete=True), was_complete=True)
    recipe = with_changes(recipe_of(storage.join(place, "state", "begun.json"), begun), parse_overrides(overrides))
    text = begun_zoo(recipe)["recipe"] if command == "finetune" else redact_uris(dump_recipe(recipe))
    check_same(Path(place), begun, {**begun, "recipe": text})
    _enter(begun, place)
    if command == "finetune":
        return Resumed(command, entries=finetune(recipe, place, progress))
    return Resumed(command, _make(command, recipe, begun, place, progress))


def _enter(begun: BegunRecord, out: str) -> None:
    """Enter the folder that a run was begun in, where the recipe's modules are. Raises RecipeError if they need it."""
    folder = begun.get("folder", "")
    if os.path.isdir(folder):
        os.chdir(folder)
    elif functions := [one for one in texts_in(yaml.safe_load(begun["recipe"])) if is_function(one)]:
        raise RecipeError(
            f"{out} was begun in the folder {folder or '?'}, which does not exist here, and {functions[0]} may be a module "
            "there. Run the command itself, where the module is."
        )


def _make(command: str, recipe: Recipe, begun: BegunRecord, out: str, progress: ProgressCallback) -> Soup:
    if command == "bake":
        return bake_copy(begun["source"], out, progress)
    if command == "search":
        return search(recipe, out, progress)
    if command == "compare":
        seeds, dropped, counted, *flags = begun["compare"]
        return compare(recipe, out, CompareOptions(seeds, tuple(dropped), tuple(counted), not flags), progress)
    return run(recipe, out, progress)


def _records_in(out: str) -> tuple[BegunRecord, RunRecord | None, list[dict[str, Any]]]:
    """Return begun.json, run.json and the rows of a folder or URI; of an unfinished run there are no rows.

    Raises RecipeError if no run was begun there.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out)
        if storage.is_remote(out):
            folder = Path(temporary)
            (folder / "state").mkdir()
            places = {name: storage.join(out, name) for name in ("run.json", "results.jsonl")}
            places["state/begun.json"] = storage.join(state_folder(out), "begun.json")
            for name, place in places.items():
                if storage.exists(place):
                    write_bytes(folder / name, storage.read_bytes(place))
        file = state_of(folder) / "begun.json"
        if not os.path.lexists(file):
            raise RecipeError(
                f"{out} has no run to resume: state/begun.json does not exist. Check the folder, or run the command itself."
            )
        record = read_run_record(folder)
        finished = record is not None and record["exit"] == 0
        return read_begun(file), record, read_results(folder) if finished else []

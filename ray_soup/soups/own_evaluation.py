"""The recipe's function `evaluate`: figures of a finished model that it computes from the model's folder.

The function runs in this process, once the actors have ended, so that it may use their memory and GPUs. Its values are
reported, and no choice depends on them. They are kept under the identity of the function's code and of the model, so that a
rerun calls it only for the models that are missing, and for all of them after a change of the code.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.disk import writing
from ray_soup.io.hashing import sha256_file
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe, own_function
from ray_soup.recipe.plain import shown
from ray_soup.soups.evaluated import read_evaluated, write_evaluated
from ray_soup.soups.output import Output
from ray_soup.soups.records import FunctionRecord
from ray_soup.soups.report.tables import EVALUATE
from ray_soup.soups.write import bake_model, write_library_files
from ray_soup.task import identity
from ray_soup.task.functions import call, import_function

LONGEST_NAME = 100
"""Maximum number of characters in the name of a figure."""
CLOCK_TICK_S = 0.05
"""Files that are written within this time may have the same modification time."""

Figures = dict[str, float]
"""Values by the keys of results.jsonl."""
Files = dict[str, tuple[int, int]]
"""Size in bytes and modification time in ns of files, by their paths in a folder."""


def recorded_function(recipe: Recipe) -> dict[str, FunctionRecord]:
    """Return what run.json says about the function: its name and the SHA-256 of its file; empty if there is none."""
    return {} if recipe.evaluate is None else {"evaluate": function_record(recipe.evaluate, "evaluate")}


def recorded_method(recipe: Recipe, linear: bool) -> dict[str, FunctionRecord]:
    """Return what run.json says about a method of the user's; empty for a built-in one.

    `linear` is False if it returned a model that is no weighted sum of the ingredients.
    """
    spec = own_function(recipe.method)
    if spec is None:
        return {}
    return {"own_method": {**function_record(spec, "method"), "returned": "coefficients" if linear else "model"}}


def function_record(spec: str, key: str) -> FunctionRecord:
    """Return the name of a function and the SHA-256 of its file."""
    function = inspect.unwrap(import_function(spec, key))
    found: FunctionRecord = {"function": spec}
    try:
        file = inspect.getsourcefile(function) or ""
    except TypeError:  # an object with __call__
        file = inspect.getsourcefile(type(function)) or ""
    if os.path.isfile(file):
        found["sha256"] = sha256_file(file)
    return found


@contextmanager
def folder_of_soup(
    staging: Path,
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    progress: ProgressCallback,
) -> Iterator[Path]:
    """Write a soup's model and its library's files into a folder below `staging`, which is removed afterwards."""
    folder = staging / "evaluated"
    with writing(folder):
        folder.mkdir()
    try:
        bake_model(folder, recipe, coefficients, ingredients, progress)
        write_library_files(folder, recipe.model)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def figures_of_soup(
    recipe: Recipe,
    output: Output,
    name: str,
    coefficients: Coefficients | str,
    in_folder: Callable[[], AbstractContextManager[Path]],
) -> Figures:
    """Return the figures that the function computes for a soup, from an earlier attempt if that got so far.

    Args:
        recipe: the recipe; without a function, there are no figures.
        output: the output folder, whose state keeps them.
        name: the soup's name in that state.
        coefficients: the coefficients of the soup, or the digest of a model that has none.
        in_folder: makes the folder with the soup's model and the files that its library needs.

    Raises RecipeError as `figures_of_folder` does.
    """
    if recipe.evaluate is None:
        return {}
    identity.in_run(output.token())
    which = identity.identify([import_function(recipe.evaluate, "evaluate"), coefficients])
    file = output.state("evaluate", f"{name}.json")
    kept = read_evaluated(file, which)
    if kept is None:
        with in_folder() as folder:
            kept = figures_of_folder(recipe.evaluate, folder)
        write_evaluated({"identity": which, "values": kept}, file)
    return kept


def figures_of_folder(spec: str, folder: Path) -> Figures:
    """Call the function `spec` with the folder of a model.

    Raises RecipeError if it fails, changes the folder, or returns anything but names and finite numbers.
    """
    function = import_function(spec, "evaluate")
    time.sleep(CLOCK_TICK_S)
    before = _files(folder)
    with _keeping_current_folder():
        found = call("evaluate", spec, function, str(folder))
    _check_unchanged(spec, folder, before)
    return _checked(spec, found)


def check_same_names(spec: str, found: Iterable[tuple[str, Figures]]) -> None:
    """Check that the function returned the same names for each model: a mean over others would be of fewer values.

    Raises RecipeError.
    """
    first: tuple[str, Figures] | None = None
    for model, figures in found:
        first = first or (model, figures)
        different = sorted(first[1].keys() ^ figures.keys())
        if different:
            name = different[0]
            has, lacks = (model, first[0]) if name in figures else (first[0], model)
            raise RecipeError(
                f"evaluate: {spec} returned {name.removeprefix(EVALUATE)!r} for {has} and not for {lacks}; expected the "
                "same names for each model. Fix the function."
            )


@contextmanager
def _keeping_current_folder() -> Iterator[None]:
    try:
        place = os.getcwd()
    except OSError:  # it was removed
        place = ""
    try:
        yield
    finally:
        with suppress(OSError):
            os.chdir(place)


def _files(folder: Path) -> Files:
    return {
        str(file.relative_to(folder)): ((seen := file.stat()).st_size, seen.st_mtime_ns)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _check_unchanged(spec: str, folder: Path, before: Files) -> None:
    now = _files(folder)
    for name in sorted(now.keys() | before.keys()):
        if now.get(name) != before.get(name):
            what = "deleted" if name not in now else "changed" if name in before else "added"
            raise RecipeError(
                f"evaluate: {spec} {what} {folder / name}; expected it to leave the model's folder unchanged. Let it write "
                "to another folder, such as one of tempfile.TemporaryDirectory()."
            )


def _checked(spec: str, found: Any) -> Figures:
    """Return the function's values by the keys of rows. Raises RecipeError."""
    cure = "Change what the function returns."
    if not isinstance(found, Mapping) or not found:
        what = "nothing" if found is None or isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise RecipeError(
            f"evaluate: {spec} returned {what}; expected a dictionary of names and finite numbers, as in {{'f1': 0.9}}. "
            f"{cure}"
        )
    figures: Figures = {}
    for name, value in found.items():
        if not _is_name(name):
            raise RecipeError(
                f"evaluate: {spec} returned a value named {shown(name)}; expected 1 to {LONGEST_NAME} printable characters, "
                f"no space at either end, and no _sd at the end, which marks standard deviations. {cure}"
            )
        if not _is_finite(value):
            raise RecipeError(
                f"evaluate: {spec} returned {shown(value)} ({type(value).__name__}) for {name!r}; expected a finite number. "
                f"{cure}"
            )
        figures[f"{EVALUATE}{name}"] = float(value)
    return figures


def _is_name(name: object) -> bool:
    """Return whether this can be the name of a figure: a heading of tables, and part of a key."""
    fits = isinstance(name, str) and 1 <= len(name) <= LONGEST_NAME and name.isprintable() and name == name.strip()
    return fits and not str(name).endswith("_sd")


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False

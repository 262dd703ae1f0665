"""Make one soup, from the recipe to the output folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ray_soup.io.disk import write_bytes
from ray_soup.io.hashing import hash_ingredients, sha256_file
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import BEST_SINGLE, Data, Recipe, with_changes
from ray_soup.soups.clock import Clock
from ray_soup.soups.identity import begun
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.live import LiveTrackers, check_loggers, live_trackers
from ray_soup.soups.mixture import mean_coefficients
from ray_soup.soups.output import MODEL, Output, Soup, open_output
from ray_soup.soups.own_evaluation import (
    Figures,
    check_same_names,
    figures_of_soup,
    folder_of_soup,
    recorded_function,
    recorded_method,
)
from ray_soup.soups.records import ResultRow, RunRecord, versions
from ray_soup.soups.report.measures import measures_of, recorded
from ray_soup.soups.report.page import Report, html
from ray_soup.soups.results import with_kinds
from ray_soup.soups.trajectory import recorded_weights
from ray_soup.soups.write import (
    listed,
    remarks,
    stale_statistics,
    write_descriptions,
    write_library_files,
)
from ray_soup.soups.written import WrittenSoup, make_without_actors
from ray_soup.task.adapters import about_base
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.preprocess_key import model_of
from ray_soup.task.preprocessing import completed


@shown_in_notebooks
def run(
    recipe: Recipe,
    out: str | Path,
    progress: ProgressCallback = no_progress,
    state: Path | None = None,
    overwrite: bool = False,
) -> Soup:
    """Make the soup that `recipe` describes in the folder or URI `out`.

    Resumes an interrupted run, or one whose learning state is the file `state`; returns a finished run without changes, or
    replaces any earlier run if it is to `overwrite` it.

    Raises SoupError.
    """
    recipe = resolved_recipe(recipe)
    check_loggers(recipe)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe)
    with open_output(out, progress, recipe.ingredients, overwrite) as output:
        soup = output.begin(begun(recipe, inputs.ingredients, **inputs.started))
        recipe = completed(recipe, inputs.adopted)
        if soup is None:
            with output.recording_failures():
                if state is not None:
                    write_bytes(output.state("learn.pt"), state.read_bytes())
                soup = make_soup_in(recipe, inputs, output, progress)
    return soup.at(out)


def make_soup_in(
    recipe: Recipe, inputs: Inputs, output: Output, progress: ProgressCallback, more: dict[str, Any] | None = None
) -> Soup:
    """Make the soup in an output folder after `Output.begin`.

    Args:
        recipe: the recipe of the soup.
        inputs: its ingredients.
        output: the output folder.
        progress: called with what is being done, the units done so far, and the units in total.
        more: extra keys for run.json and the report.
    """
    with live_trackers(recipe, output) as trackers:
        return _make_soup_in(recipe, inputs, output, progress, more or {}, trackers)


def _make_soup_in(
    recipe: Recipe,
    inputs: Inputs,
    output: Output,
    progress: ProgressCallback,
    more: dict[str, Any],
    trackers: LiveTrackers,
) -> Soup:
    clock, staging = Clock(), output.staging()
    if recipe.data == Data():
        made = make_without_actors(recipe, inputs, output, staging, progress)
        clock.lap("mixing")
    else:
        from ray_soup.soups.session import open_session
        from ray_soup.soups.with_actors import make_with_actors

        with open_session(recipe, inputs, output, recipe.info.learns or recipe.info.is_own, progress) as session:
            made = make_with_actors(session, output, staging, clock, trackers)
        clock.lap("stop")
    sha256 = made.sha256 or hash_ingredients(inputs.ingredients, progress)
    clock.lap("hashing")
    progress("writing", 0, 1)
    write_library_files(staging, recipe.model)
    ours, single = _own_figures(recipe, inputs, output, staging, made, progress)
    if recipe.evaluate is not None:
        clock.lap("evaluate")
    coefficients = made.coefficients
    used = len(inputs.names) if coefficients is None else len(coefficients.used())
    notes = made.mixture.notes + remarks(recipe, inputs, sha256)
    if used > 1:
        notes += stale_statistics(recipe, inputs)
    record: RunRecord = {
        "method": recipe.method,
        **recorded(measures_of(recipe)),  # type: ignore[typeddict-item]
        **recorded_function(recipe),
        **recorded_method(recipe, coefficients is not None),
        "seed": recipe.learn.seed,
        "exit": 0,
        "parameters": inputs.layout.numel,
        "blocks": 0 if coefficients is None else len(coefficients.blocks),
        "wall_s": clock.total(),
        "seconds": clock.laps,
        "versions": versions(),
        "ingredients": listed(inputs.ingredients, sha256),
        "preprocessing": inputs.preprocessing,
        **about_base(inputs.ingredients),
        "notes": notes,
    }
    weights = {} if coefficients is None else recorded_weights(recipe, inputs.ingredients, coefficients.shares())
    record.update({**made.record, **weights, **more})  # type: ignore[typeddict-item]
    costs = {"ingredients_used": used, "seconds": clock.total()}
    rows: list[ResultRow] = [{"model_name": recipe.method, **made.row, **ours, **costs}]
    if made.baseline:
        rows.append(made.baseline.row | single)
    rows = with_kinds(rows, record)
    write_descriptions(staging, recipe, coefficients, rows, record, model_of(recipe))
    write_bytes(staging / "report.html", html(_report(recipe, inputs, rows, record, made)).encode())
    output.publish(recipe, rows, record, staging)
    return Soup(output.folder, rows, record, notes)


def _own_figures(
    recipe: Recipe, inputs: Inputs, output: Output, staging: Path, made: WrittenSoup, progress: ProgressCallback
) -> tuple[Figures, Figures]:
    """Return what the recipe's function `evaluate` computes for the soup in `staging` and for the best single ingredient."""
    if recipe.evaluate is None:
        return {}, {}
    progress(f"evaluate {recipe.method}", 0, 1)
    ours = figures_of_soup(
        recipe, output, recipe.method, made.coefficients or sha256_file(str(staging / MODEL)), lambda: nullcontext(staging)
    )
    if made.baseline is None:
        return ours, {}
    progress(f"evaluate {BEST_SINGLE}", 0, 1)
    best = mean_coefficients(recipe, inputs, [inputs.names.index(made.baseline.name)])
    exact = with_changes(recipe, {"adapter.rank": None})  # its other figures are those of the ingredient itself
    single = figures_of_soup(
        recipe, output, BEST_SINGLE, best, lambda: folder_of_soup(staging, exact, best, inputs.ingredients, progress)
    )
    check_same_names(recipe.evaluate, [(recipe.method, ours), (BEST_SINGLE, single)])
    return ours, single


def _report(recipe: Recipe, inputs: Inputs, rows: list[ResultRow], record: RunRecord, made: WrittenSoup) -> Report:
    found = {} if made.coefficients is None else {recipe.method: made.coefficients}
    coefficients = found if recipe.info.learns or recipe.info.is_own else {}
    curves = {recipe.method: made.mixture.figures["curve"]} if recipe.info.learns else {}
    title = f"{recipe.method} soup of {len(record['ingredients'])} ingredients"
    weighted = {} if recipe.info.is_reference else found
    return Report(
        title, recipe, rows, record, coefficients, curves, made.shown, made.similarity, inputs.steps, weighted,
        inputs.unit_of_steps,
    )  # fmt: skip

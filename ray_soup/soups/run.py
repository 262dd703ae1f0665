"""Make one soup, from the recipe to the output folder."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.io.disk import write_bytes
from ray_soup.io.hashing import hash_ingredients, sha256_file
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import BEST_SINGLE, Data, Recipe, with_changes
from ray_soup.soups.baking import bakers
from ray_soup.soups.baseline import NOTHING_TO_COMPARE_WITH, Baseline, compare_with_best_single
from ray_soup.soups.clock import Clock
from ray_soup.soups.evaluations import cosines, figures_of, reported
from ray_soup.soups.identity import begun
from ray_soup.soups.make import make, make_without_data
from ray_soup.soups.methods.results import Model
from ray_soup.soups.mixture import Mixture, mean_coefficients
from ray_soup.soups.output import BOARD, MODEL, MODEL_FILES, Output, Soup, open_output, versions
from ray_soup.soups.own_evaluation import (
    Figures,
    check_same_names,
    figures_of_soup,
    folder_of_soup,
    recorded_function,
    recorded_method,
)
from ray_soup.soups.polish import polish, together
from ray_soup.soups.polish_checks import check_place_of_training
from ray_soup.soups.records import ResultRow, RunRecord
from ray_soup.soups.report.measures import measures_of, recorded
from ray_soup.soups.report.page import Report, html
from ray_soup.soups.report.tables import refitted
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.results import with_kinds
from ray_soup.soups.session import CALIBRATION, Inputs, Session, open_inputs, open_session
from ray_soup.soups.trajectory import recorded_weights
from ray_soup.soups.write import (
    bake_and_evaluate,
    bake_model,
    evaluate_model,
    listed,
    mesh_record,
    remarks,
    stale_statistics,
    write_descriptions,
    write_library_files,
)
from ray_soup.task.adapters import about_base
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.outcomes import Outcome, judged
from ray_soup.task.preprocess_key import model_of


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
    check_place_of_training(recipe, out)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe)
    with open_output(out, progress, recipe.ingredients, overwrite) as output:
        soup = output.begin(begun(recipe, inputs.ingredients, **inputs.started))
        if soup is None:
            with output.recording_failures():
                if state is not None:
                    write_bytes(output.state("learn.pt"), state.read_bytes())
                soup = make_soup_in(recipe, inputs, output, progress)
    return soup.at(out)


@dataclass
class _Made:
    """A soup whose model is in the staging folder, with its results."""

    mixture: Mixture | Model
    row: dict[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    record: dict[str, Any] = field(default_factory=dict)
    sha256: list[str] = field(default_factory=list)
    shown: dict[str, Outcome] = field(default_factory=dict)
    """Outcomes for the reliability diagram, by method."""
    similarity: np.ndarray | None = None
    """Cosines of the directions, float64 [K, K]."""

    @property
    def coefficients(self) -> Coefficients | None:
        """The coefficients; None if the model is no weighted sum of the ingredients."""
        return self.mixture.coefficients if isinstance(self.mixture, Mixture) else None


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
    clock, staging = Clock(), output.staging()
    if recipe.data == Data():
        made = _without_data(recipe, inputs, output, staging, progress)
        clock.lap("mixing")
    else:
        with open_session(recipe, inputs, output, recipe.info.learns or recipe.info.is_own, progress) as session:
            made = _with_actors(session, output, staging, clock)
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
    record.update({**made.record, **weights, **(more or {})})  # type: ignore[typeddict-item]
    costs = {"ingredients_used": used, "seconds": clock.total()}
    rows: list[ResultRow] = [{"model_name": recipe.method, **made.row, **ours, **costs}]
    if made.baseline:
        rows.append(made.baseline.row | single)
    rows = with_kinds(rows, record)
    write_descriptions(staging, recipe, coefficients, rows, record, model_of(recipe))
    write_bytes(staging / "report.html", html(_report(recipe, inputs, rows, record, made)).encode())
    output.publish(recipe, rows, record, staging)
    return Soup(output.folder, rows, record, notes)


def _without_data(recipe: Recipe, inputs: Inputs, output: Output, staging: Path, progress: ProgressCallback) -> _Made:
    """Make the soup of a recipe without data: no actor builds the model, and nothing is evaluated."""
    mixture, sha256 = make_without_data(recipe, inputs, progress), list[str]()
    if isinstance(mixture, Model):
        mixture.write(staging / MODEL)
    else:
        with bakers(recipe, inputs.ingredients, output, progress) as pool:
            mixture.notes += bake_model(staging, recipe, mixture.coefficients, inputs.ingredients, progress, pool)
            sha256 = [] if pool is None else pool.hash(progress)
    done = "not evaluated" if recipe.evaluate is None else f"evaluated by {recipe.evaluate} alone"
    note = f"The recipe has no data: this soup was {done}. {NOTHING_TO_COMPARE_WITH}"
    mixture.notes.insert(0, note)
    return _Made(mixture, sha256=sha256)


def _with_actors(session: Session, output: Output, staging: Path, clock: Clock) -> _Made:
    """Make, bake and evaluate the soup."""
    recipe, learning = session.recipe, session.recipe.info.learns
    session = session.with_soup(
        splits=session.cut(recipe.learn.seed),
        state_file=output.state("learn.pt"),
        after_epoch=scalars(output.folder / BOARD / recipe.method),
    )
    if learning:
        session.open_store(session.subset, session.blocks)
    clock.lap("start")
    session.progress(f"preparing {recipe.method}", 0, 1)
    mixture = make(session)
    mixture.notes += session.setup.notes
    clock.lap(recipe.method)
    peak = max(session.pool.peak_memory())
    similarity = cosines(session.pool.gram()) if learning else None
    if isinstance(mixture, Model):
        outcomes = evaluate_model(session, output, mixture, staging / MODEL, reported(session.splits))
    else:
        outcomes = bake_and_evaluate(
            session, output, mixture, staging / MODEL_FILES[recipe.out_format], reported(session.splits),
            session.calibration(CALIBRATION), recipe.shard_size,
        )  # fmt: skip
    clock.lap("mixing and evaluation")
    polished: dict[str, Any] = {}
    if recipe.polish is not None and isinstance(mixture, Mixture):
        outcomes, polished = polish(session, output, mixture, staging, outcomes, recipe.shard_size)
        clock.lap("polish")
    baseline = compare_with_best_single(session, outcomes)
    clock.lap("best single ingredient")
    if baseline:
        mixture.notes += baseline.notes
    elif "select" not in outcomes:
        mixture.notes.append(f"The recipe has no data.fit. {NOTHING_TO_COMPARE_WITH}")
    figures = mixture.figures
    if session.mesh.shards > 1 and learning:  # the shards of a replica gather parameters and scatter gradients
        shards = session.mesh.shards
        figures["wire_bytes_per_step"] += 8 * session.inputs.layout.numel * (shards - 1) // shards
    record = {
        "mesh": mesh_record(session),
        "model_batch": session.model_batch if learning else None,
        "examples": {name: len(split) for name, split in session.splits.items()},
        "preprocessing": session.preprocessing,
        "peak_memory_bytes": peak,
        **figures,
        **(baseline.record if baseline else {}),
        **({"polish": polished} if polished else {}),
    }
    costs = {key: together(figures, polished, key) for key in ("steps", "image_passes")} | {"peak_memory_bytes": peak}
    models = {BEST_SINGLE: baseline.outcomes} if baseline else {}
    shown = {name: found[judged(found)[0]] for name, found in {**models, recipe.method: outcomes}.items() if found}
    row = figures_of(outcomes) | refitted(figures) | costs
    return _Made(mixture, row, baseline, record, list(session.facts.sha256), shown, similarity)


def _own_figures(
    recipe: Recipe, inputs: Inputs, output: Output, staging: Path, made: _Made, progress: ProgressCallback
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


def _report(recipe: Recipe, inputs: Inputs, rows: list[ResultRow], record: RunRecord, made: _Made) -> Report:
    found = {} if made.coefficients is None else {recipe.method: made.coefficients}
    coefficients = found if recipe.info.learns or recipe.info.is_own else {}
    curves = {recipe.method: made.mixture.figures["curve"]} if recipe.info.learns else {}
    title = f"{recipe.method} soup of {len(record['ingredients'])} ingredients"
    weighted = {} if recipe.info.is_reference else found
    return Report(
        title, recipe, rows, record, coefficients, curves, made.shown, made.similarity, inputs.steps, weighted,
        inputs.unit_of_steps,
    )  # fmt: skip

"""Write a soup: the model first, then the files that describe it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_soup.io.adapters import open_adapter
from ray_soup.io.check import left_out_notes
from ray_soup.io.disk import write_text
from ray_soup.io.distributed import is_metadata
from ray_soup.io.find import find_sweeps
from ray_soup.io.hugging_face import notes_of
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lifting import AdapterSet, group_of
from ray_soup.io.progress import CountCallback, ProgressCallback
from ray_soup.mixing.adapter_bake import Form, bake_adapter, is_adapter_folder, relative_error
from ray_soup.mixing.bake import overwrite_tensors
from ray_soup.mixing.coefficients import Coefficients, save_coefficients, save_table
from ray_soup.mixing.distributed_bake import bake_distributed
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.recipe import Recipe
from ray_soup.soups.baking import Writers, bake_whole
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.methods.results import Model
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import COEFFICIENTS, MODEL_FILES, TABLE, Output
from ray_soup.soups.records import IngredientRecord, ResultRow, RunRecord
from ray_soup.soups.report.card import model_card
from ray_soup.task.companions import adapter_lines, loading_lines, write_companions, write_tokenizer
from ray_soup.task.data import Split
from ray_soup.task.evidence_files import settings_in_files
from ray_soup.task.outcomes import Outcome

if TYPE_CHECKING:
    from ray_soup.soups.session import Session

WORTH_A_NOTE = 0.001
"""Relative error of a merged model's changes from which on a note states it."""


def bake_and_evaluate(
    session: Session,
    output: Output,
    mixture: Mixture,
    path: Path,
    splits: dict[str, Split],
    calibration: list[Split],
    shard_size: int | None = None,
) -> dict[str, Outcome]:
    """Write the soup's model to `path`, re-estimate its running statistics, and evaluate that file.

    A soup of one ingredient keeps that ingredient's running statistics. Adds the statistics to `mixture.coefficients`. If
    the soup was refitted on select, the outcome there is that of the soup before the refit, which is written and evaluated
    first.

    Args:
        session: the actors, and the subset of ingredients that the coefficients refer to.
        output: the output folder, which contains `path`.
        mixture: the coefficients.
        path: the model file.
        splits: the splits to evaluate on.
        calibration: batches to estimate running statistics on; empty: the statistics are averaged.
        shard_size: largest model file in bytes; None: one file.
    """
    held_out: dict[str, Outcome] = {}
    if mixture.before is not None:
        first = {name: split for name, split in splits.items() if name == "select"}
        held_out = bake_and_evaluate(session, output, Mixture(mixture.before), path, first, calibration, shard_size)
        splits = {name: split for name, split in splits.items() if name not in first}
    inputs, pool, progress = session.inputs, session.pool, session.progress
    chosen = [inputs.ingredients[k] for k in session.subset]
    writers = Writers(pool, session.subset, output)
    file, notes = bake_any(session.recipe, mixture.coefficients, chosen, path, progress, shard_size, writers)
    mixture.notes += notes
    if calibration and len(mixture.coefficients.used()) > 1:
        found = statistics_of(session, output, file, calibration)
        mixture.coefficients = replace(mixture.coefficients, statistics=mixture.coefficients.statistics | found)
        baked = output.mirror is not None and output.mirror.baked  # of such files, only the headers are here
        if baked or is_metadata(str(file)):  # whose archives have checksums
            bake_any(session.recipe, mixture.coefficients, chosen, path, progress, shard_size, writers)
        else:
            overwrite_tensors(found, file)
        mixture.notes.append(
            f"The running statistics of {len(inputs.recalibrated(session.recipe))} BatchNorm layers were re-estimated on "
            f"{sum(map(len, calibration)):,} examples of fit."
        )
    outcomes = pool.evaluate_file(output.visible_to_actors(file), list(splits.values()), progress)
    return held_out | dict(zip(splits, outcomes, strict=True))


def evaluate_model(
    session: Session, output: Output, model: Model, path: Path, splits: dict[str, Split]
) -> dict[str, Outcome]:
    """Write a model that is no weighted sum of the ingredients to `path`, and evaluate that file on splits."""
    model.write(path)
    outcomes = session.pool.evaluate_file(output.visible_to_actors(path), list(splits.values()), session.progress)
    return dict(zip(splits, outcomes, strict=True))


def statistics_of(session: Session, output: Output, file: Path, calibration: list[Split]) -> Statistics:
    """Re-estimate the running statistics of the model that is loaded from `file`, on batches of fit."""
    found = session.pool.statistics_of_file(output.visible_to_actors(file), calibration, session.progress)
    return {name: values for name, values in found.items() if name in session.inputs.layout.buffers}


def bake_model(
    folder: Path,
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    progress: ProgressCallback,
    writers: Writers | None = None,
) -> list[str]:
    """Write the soup's model into `folder`, with the dtype and the file sizes that the recipe requests; return notes.

    If there are `writers` with all ingredients, they may write the files.
    """
    path = folder / MODEL_FILES[recipe.out_format]
    return bake_any(recipe, coefficients, ingredients, path, progress, recipe.shard_size, writers)[1]


def bake_any(
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    path: Path,
    progress: ProgressCallback,
    shard_size: int | None,
    writers: Writers | None = None,
) -> tuple[Path, list[str]]:
    """Write the soup's model to `path`, or, if the ingredients are adapters, an adapter into its folder.

    A `path` that ends in `.metadata` stands for a distributed checkpoint in its folder.

    Returns the file to load it from, and notes for the user. PEFT must make of the adapter what it is meant to be.
    Arguments as for `bake_whole`.
    """
    group = group_of(ingredients)

    def count(done: int, total: int) -> None:
        progress("mixing" if group is None or is_metadata(str(path)) else "mixing adapters", done, total)

    if is_metadata(str(path)):
        settings = (recipe.out_dtype, shard_size)
        return bake_distributed(coefficients, ingredients, path.parent, None, count, *settings), []
    if group is None:
        return bake_whole(recipe, coefficients, list(ingredients), path, count, shard_size, writers), []
    if recipe.adapter.merge:
        return _bake_merged(recipe, coefficients, ingredients, group, path, count, shard_size)
    from ray_soup.task.peft_models import check_with_peft

    form = Form(recipe.out_dtype, recipe.adapter.rank)
    file = bake_adapter(coefficients, ingredients, group, path.parent, count, form)
    check_with_peft(recipe.model, [open_adapter(str(file))])
    error = relative_error(coefficients, ingredients, group, form)
    if error is None:
        return file, []
    return file, [
        f"{recipe.method}: truncated to rank {form.rank}, the changes of weights differ by {error:.2%} (Frobenius norm) "
        "from those of the exact soup. All figures are those of the truncated adapter."
    ]


def _bake_merged(
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    group: AdapterSet,
    path: Path,
    count: CountCallback,
    shard_size: int | None,
) -> tuple[Path, list[str]]:
    """Write a soup of adapters as a whole model. Arguments and value as for `bake_any`."""
    from ray_soup.mixing.adapter_merge import bake_merged
    from ray_soup.task.merged_models import merged_soup

    soup = merged_soup(recipe.model, coefficients, ingredients, group, recipe.out_dtype)
    file, error = bake_merged(soup, path, count, shard_size)
    if error is None or error < WORTH_A_NOTE:
        return file, []
    return file, [
        f"{recipe.method}: merged and rounded to the dtype of the model, the changes of weights differ by {error:.2%} "
        "(Frobenius norm) from those of the exact soup. All figures are those of the merged model. out_dtype: float32 "
        "rounds less."
    ]


def write_library_files(folder: Path, model: str) -> None:
    """Write the files that the model's library needs beside the model in `folder`.

    Args:
        folder: the folder, which already contains the model.
        model: where the files come from, as in the recipe's `model`.
    """
    if is_adapter_folder(folder):
        write_tokenizer(model, folder)
        return
    tensors = open_ingredient(str(folder)).tensors
    dtypes = Counter(info.dtype_name for info in tensors.values() if info.is_float)
    write_companions(model, folder, dtypes.most_common(1)[0][0], tensors)


def write_descriptions(
    folder: Path,
    recipe: Recipe,
    coefficients: Coefficients | None,
    rows: Sequence[ResultRow],
    record: RunRecord,
    model: str,
) -> None:
    """Write the files that describe the model in `folder`: its coefficients and the model card.

    Args:
        folder: the folder, which already contains the model and the files that its library needs.
        recipe: the recipe as run.
        coefficients: the soup's coefficients; None: the model is no weighted sum.
        rows: for the table of the model card.
        record: run.json, for the model card; gets the line of Python that loads the model.
        model: where the library's files came from, as in the recipe's `model`.
    """
    if coefficients is not None:
        save_coefficients(coefficients, folder / COEFFICIENTS)
        save_table(coefficients, folder / TABLE)
    if is_adapter_folder(folder):
        lines = adapter_lines(recipe.model, recipe.base_model)
    else:
        lines = loading_lines(model, [file.name for file in folder.iterdir()])
    record["load"] = lines
    write_text(folder / "README.md", model_card(recipe, coefficients, rows, record, lines))


# What run.json says about the ingredients


def listed(ingredients: Sequence[Ingredient], sha256: Sequence[str]) -> list[IngredientRecord]:
    """Return the ingredients for run.json, with hyperparameters from a sweep or the files, and metrics from a sweep."""
    stated = settings_in_files(ingredients)
    records: list[IngredientRecord] = []
    for ingredient, digest, settings in zip(ingredients, sha256, stated, strict=True):
        record: IngredientRecord = {"name": ingredient.name, "path": ingredient.path, "sha256": digest}
        if ingredient.trial:
            record |= {"hyperparameters": ingredient.trial.config, "metrics": ingredient.trial.metrics}
        elif settings:
            record["hyperparameters"] = settings
        records.append(record)
    return records


def remarks(recipe: Recipe, inputs: Inputs, sha256: Sequence[str]) -> list[str]:
    """Return notes for the user about the ingredients: trials and tensors left out, and duplicates."""
    notes = [note for sweep in find_sweeps(recipe.ingredients) if (note := sweep.note())]
    notes += [*notes_of(recipe), *left_out_notes(inputs.ingredients), *inputs.notes]
    first: dict[str, str] = {}
    for ingredient, digest in zip(inputs.ingredients, sha256, strict=True):
        if digest in first:
            notes.append(f"{ingredient.name} and {first[digest]} are identical files: this model counts twice.")
        first.setdefault(digest, ingredient.name)
    return notes


def stale_statistics(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Return a warning if running statistics that differ between ingredients are averaged."""
    if inputs.recalibrated(recipe) or not inputs.differing_layers:
        return []
    cure = "set buffers: recalibrate" if recipe.data.fit is not None else "add data.fit"
    return [
        f"{len(inputs.differing_layers)} BatchNorm layers of this model have running statistics that are averages over the "
        f"ingredients. They do not match the soup's activations, so it may be much worse than it could be: {cure}."
    ]


def mesh_record(session: Session) -> dict[str, Any]:
    """Return the mesh for run.json."""
    return {"replicas": session.mesh.replicas, "shards": session.mesh.shards, "cpus": session.cpus}

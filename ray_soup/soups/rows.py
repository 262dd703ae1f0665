"""Rows of a comparison for model files that another program made, as the recipe section `compare` names them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.adapters import AdapterIngredient, open_checkpoint
from ray_soup.io.binding import Ignored
from ray_soup.io.check import check_fits
from ray_soup.io.hugging_face import pinned
from ray_soup.io.ingredient import Ingredient
from ray_soup.recipe import Recipe
from ray_soup.soups.comparison import SoupResult
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.output import Output
from ray_soup.soups.records import read_entry, write_entry
from ray_soup.soups.session import Session
from ray_soup.task.adapters import lift_one
from ray_soup.task.loader_names import with_old_names
from ray_soup.task.other_models import advice_for
from ray_soup.task.outcomes import load_outcomes, save_outcomes
from ray_soup.task.preprocessing import completed, examine


def open_rows(recipe: Recipe, inputs: Inputs) -> dict[str, Ingredient]:
    """Open the model files of the rows, and check that they fit the model; reads headers only.

    The recipe is the one that `inputs` were opened with, without what was adopted. Raises RecipeError for a name that
    another row has or a model that was trained otherwise, IngredientError for a file that does not fit; both name the row.
    """
    found: dict[str, Ingredient] = {}
    for name, path in recipe.compare.rows.items():
        key = f"compare.rows.{name}"
        if name in inputs.names or name == recipe.method:
            what = "an ingredient" if name in inputs.names else "the method"
            raise RecipeError(f"{key}: {what} has this name. Choose another name for the row.")
        try:
            opened = open_checkpoint(pinned(path))
            is_adapter = isinstance(opened, AdapterIngredient)
            if is_adapter != bool(inputs.frozen):
                kinds = ("a LoRA adapter", "whole models") if is_adapter else ("a whole model", "LoRA adapters")
                raise RecipeError(f"{path} is {kinds[0]}, and the ingredients are {kinds[1]}. Remove the row.")
            if isinstance(opened, AdapterIngredient):
                lift_one(recipe.model, opened, recipe.ignore)
                found[name] = opened
            else:
                ignore: Ignored = (*recipe.ignore, *inputs.layout.in_files.unsaved)
                layout = with_old_names(inputs.layout, [opened], ignore)
                shapes, names = layout.state_shapes, layout.known_names
                found[name] = check_fits(opened, shapes, names, ignore, advise=advice_for(recipe.model))
                found[name].check_copies()
                _check_training(recipe, inputs, found[name])
        except SoupError as error:
            raise type(error)(f"{key}: {error}") from error
    return found


def _check_training(recipe: Recipe, inputs: Inputs, row: Ingredient) -> None:
    """Check that nothing says that a model was trained otherwise than it would be evaluated. Raises RecipeError."""
    adopted = examine(recipe, [*inputs.ingredients, row]).adopted  # which refuses what contradicts the ingredients
    more = {option: value for option, value in adopted.items() if option not in inputs.adopted}
    if more:
        said = ", ".join(f"{option} {value}" for option, value in more.items())
        raise RecipeError(
            f"{row.path} was trained with {said}, which neither the recipe nor the ingredients state. State the values to "
            f"use for all, as in\n    model: {completed(recipe, adopted).model}"
        )


def row_results(session: Session, output: Output, rows: Mapping[str, Ingredient]) -> dict[str, SoupResult]:
    """Evaluate the model files of the rows on every source, unless an earlier attempt did so."""
    found: dict[str, SoupResult] = {}
    splits = {source: session.whole(source) for source in session.setup.sizes}
    for name, opened in rows.items():
        file = output.state("soups", f"row_{hashlib.sha256(name.encode()).hexdigest()[:12]}.json")
        outcomes = file.with_suffix(".npz")
        if not file.exists():
            start = time.monotonic()

            def progress(what: str, done: int, total: int, name: str = name) -> None:
                session.progress(f"{what} {name}", done, total)

            measured = session.pool.evaluate_file(opened.path, list(splits.values()), progress)
            opened.check_unchanged()
            save_outcomes(dict(zip(splits, measured, strict=True)), outcomes)
            write_entry({"figures": {"seconds": round(time.monotonic() - start, 3)}, "notes": []}, file)
        found[name] = SoupResult(load_outcomes(outcomes), read_entry(file)["figures"])
    return found

"""Operations on finished soups: evaluate, bake, verify."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import connect, resolve_mesh
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.check import check_together
from ray_soup.io.hashing import hash_ingredients, sha256_file
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.bake import mix_range, soup_buffer
from ray_soup.mixing.coefficients import Coefficients, load_coefficients
from ray_soup.recipe import Recipe, load_recipe
from ray_soup.soups.evaluations import figures_of
from ray_soup.soups.output import COEFFICIENTS, Soup, begun, open_output
from ray_soup.soups.records import RunRecord, finished_record, read_results, write_begun
from ray_soup.soups.write import bake_model, write_descriptions
from ray_soup.task.data import cut_splits
from ray_soup.task.models import describe
from ray_soup.task.outcomes import test_sets


def evaluate(recipe: Recipe, model: str, split: str, progress: ProgressCallback = no_progress) -> dict[str, Any]:
    """Evaluate a checkpoint, or the folder of a soup, on one split; `test` means all test sets.

    Returns a row as in results.jsonl, with `examples`, and with `temperature` if the recipe has select data to fit it on.

    Raises RecipeError if the recipe has no such split.
    """
    open_ingredient(model)
    layout = describe(recipe.model)
    with connect():
        mesh, cpus = resolve_mesh(recipe, layout.numel, 0, progress)
        pool = RayPool(recipe, [], Mesh(mesh.size, 1), cpus)
        try:
            setup = pool.setup(progress)
            splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
            chosen = [split] if split in splits else test_sets(splits) if split == "test" else []
            if not chosen:
                raise RecipeError(
                    f"The recipe has no data.{split}; it has {', '.join(splits) or 'no data'}. Choose another split."
                )
            wanted = {name: splits[name] for name in dict.fromkeys((*chosen, "select")) if name in splits}
            outcomes = dict(zip(wanted, pool.evaluate_file(model, list(wanted.values()), progress), strict=True))
        finally:
            pool.close()
    prefixes = tuple(f"{s}_" for s in chosen)
    kept = {key: value for key, value in figures_of(outcomes).items() if key.startswith(prefixes) or key == "temperature"}
    counts = [len(splits[s]) for s in chosen]
    examples = counts[0] if len(counts) == 1 else dict(zip(chosen, counts, strict=True))
    return {"model_name": model, **kept, "examples": examples}


def bake_copy(out: str | Path, new_out: str | Path, progress: ProgressCallback = no_progress) -> Soup:
    """Rebuild the soup in `out` from its coefficients and ingredients alone, in the new folder `new_out`.

    Raises IngredientError if an ingredient has changed, RecipeError if `out` is not a finished soup or `new_out` is not
    empty.
    """
    source = _local_folder(out, progress)
    recipe, record, coefficients, ingredients = _open_finished(source)
    with open_output(new_out, progress) as output:
        if any(f.name != "state" for f in output.folder.iterdir()):
            raise RecipeError(f"{new_out} is not empty. Choose a new folder.")
        _check_digests(record, ingredients, hash_ingredients(ingredients, progress))
        staging = output.staging()
        bake_model(staging, recipe, coefficients, ingredients, progress)
        rows = read_results(source)
        write_begun(begun(recipe, ingredients), output.state("begun.json"))
        beside = f"transformers:{source}" if recipe.model.startswith("transformers:") else recipe.model
        write_descriptions(staging, recipe, coefficients, rows, record, beside)
        shutil.copyfile(source / "report.html", staging / "report.html")
        output.publish(recipe, rows, record, staging)
        soup = Soup(output.folder, rows, record)
    return soup.at(new_out)


def verify(out: str | Path, progress: ProgressCallback = no_progress) -> list[str]:
    """Check a finished soup: digests of its files and ingredients, column sums, and the model bit for bit.

    Returns one line per check. Raises SoupError for the first check that fails.
    """
    out = _local_folder(out, progress)
    record = finished_record(out)
    for name, digest in record["files"].items():
        found = sha256_file(str(out / name)) if (out / name).exists() else "missing"
        if found != digest:
            raise SoupError(
                f"{out / name} was changed: its SHA-256 is {found[:16]}, but run.json has {digest[:16]}. Restore the file, "
                "or rerun the command in a new folder."
            )
    _, _, coefficients, ingredients = _open_finished(out)
    off = float(np.abs(coefficients.values.sum(axis=0) - 1).max())
    if off > 1e-12:
        raise SoupError(
            f"{out / COEFFICIENTS}: the coefficients of a block sum to 1 only within {off:.1e}; expected 1e-12. Rerun the "
            "command in a new folder."
        )
    _check_digests(record, ingredients, hash_ingredients(ingredients, progress))
    total = _compare_tensors(out, coefficients, ingredients, progress)
    return [
        f"{len(record['files'])} files have the digests in run.json",
        f"{coefficients.values.shape[1]} columns sum to 1 within {off:.0e}",
        f"{len(ingredients)} ingredients have the digests in run.json",
        f"{total} tensors are bit-identical to those computed from coefficients and ingredients",
    ]


def _compare_tensors(
    out: Path, coefficients: Coefficients, ingredients: list[Ingredient], progress: ProgressCallback
) -> int:
    """Recompute every tensor and compare it with the model's; return the number of tensors. Raises SoupError."""
    used = [ingredients[k] for k in coefficients.used()]
    model = open_ingredient(str(out))
    total = len(model.tensors)
    for done, (name, info) in enumerate(model.tensors.items()):
        if name in coefficients.block_of:
            again = mix_range(ingredients, name, coefficients.of(name), 0, info.numel, info.dtype)
        else:
            again = soup_buffer(coefficients, used, name).to(info.dtype)
        if not torch.equal(again.view(torch.uint8), model.read(name).view(torch.uint8)):
            raise SoupError(
                f"{model.files[info.file]}: the tensor {name} differs from the one computed from coefficients and "
                "ingredients. Rebuild the model with ray-soup bake."
            )
        progress("comparing", done + 1, total)
    return total


def _open_finished(out: Path) -> tuple[Recipe, RunRecord, Coefficients, list[Ingredient]]:
    """Open the recipe, run.json, coefficients and ingredients of a finished soup."""
    record = finished_record(out)
    recipe = load_recipe(out / "recipe.yaml")
    coefficients = load_coefficients(out / COEFFICIENTS)
    ingredients = [open_ingredient(i["path"], i["name"]) for i in record["ingredients"]]
    if tuple(i.name for i in ingredients) != coefficients.ingredients:
        raise RecipeError(
            f"{out}: run.json and {COEFFICIENTS} name different ingredients. Restore both files from the same run."
        )
    names = open_ingredient(str(out)).tensors
    shapes = {name: info.shape for name, info in names.items()}
    return recipe, record, coefficients, check_together(ingredients, shapes, coefficients.tied)


def _local_folder(out: str | Path, progress: ProgressCallback) -> Path:
    """Return the local folder of a finished soup; a remote one is copied into the cache. Raises RecipeError."""
    work = storage.local_copy(str(out))
    try:
        while True:
            progress("fetching", *next(work))
    except StopIteration as stop:
        return Path(stop.value).absolute()
    except FileNotFoundError:
        raise RecipeError(f"{out} does not exist; expected the folder or URI of a finished soup. Check it.") from None


def _check_digests(record: RunRecord, ingredients: list[Ingredient], sha256: list[str]) -> None:
    for known, ingredient, digest in zip(record["ingredients"], ingredients, sha256, strict=True):
        if known["sha256"] != digest:
            raise IngredientError(
                f"{ingredient.path} has changed since the soup was made: its SHA-256 is {digest[:16]}..., and was "
                f"{known['sha256'][:16]}.... Restore the original file."
            )

"""Operations on finished soups: evaluate, bake, verify."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import resolve_mesh
from ray_soup.actors.ray_session import connect
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.adapters import AdapterIngredient, adapters_among, open_checkpoint
from ray_soup.io.check import check_together, left_out_notes
from ray_soup.io.checkpoint_files import ADAPTER_CONFIG, ADAPTER_FILES, is_checkpoint, shards_of, split_key
from ray_soup.io.disk import write_bytes
from ray_soup.io.distributed import METADATA
from ray_soup.io.formats import DISTRIBUTED_SUFFIX, SAFETENSORS_SUFFIX
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.hugging_face import pinned
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.adapter_bake import is_adapter_folder
from ray_soup.mixing.bake import as_tensor, soup_buffer, soup_range
from ray_soup.mixing.coefficients import Coefficients, check_covers, load_coefficients
from ray_soup.mixing.running_statistics import KEYS
from ray_soup.recipe import Recipe, load_recipe
from ray_soup.soups.baking import all_of, bakers
from ray_soup.soups.evaluations import figures_of
from ray_soup.soups.finished_adapters import about_digest, compare_products, compare_tensors, lifted_ingredients
from ray_soup.soups.finished_merged import compare_merged, compare_merged_sample, with_own_config
from ray_soup.soups.finished_own import bake_own, has_no_coefficients, verify_own
from ray_soup.soups.finished_polished import difference_in, of_model, rebuild
from ray_soup.soups.identity import begun
from ray_soup.soups.output import COEFFICIENTS, DIFFERENCE, MODEL, TABLE, Soup, open_output
from ray_soup.soups.own_evaluation import figures_of_folder
from ray_soup.soups.place import check_new, local_folder
from ray_soup.soups.proof import compare_sample
from ray_soup.soups.records import RunRecord, check_files, finished_record, not_listed, read_results, read_run_record
from ray_soup.soups.report.measures import measures_of, recorded
from ray_soup.soups.results import with_kinds
from ray_soup.soups.write import bake_model, write_descriptions, write_library_files
from ray_soup.task.adapters import lift_one
from ray_soup.task.data import cut_splits
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.models import describe, fit
from ray_soup.task.outcomes import test_sets
from ray_soup.task.own_functions import check_functions
from ray_soup.task.preprocess_key import model_of
from ray_soup.task.preprocessing import completed, examine, with_cut

DESCRIPTIONS = ("recipe.yaml", "results.jsonl", "report.html", "README.md", COEFFICIENTS, TABLE)
"""The files that a finished soup has beside its model."""


@shown_in_notebooks
def evaluate(recipe: Recipe, model: str, split: str, progress: ProgressCallback = no_progress) -> dict[str, Any]:
    """Evaluate a checkpoint, or the folder of a soup, on one split; `test` means all test sets.

    Returns a row as in results.jsonl, with `objective`, `unit` and `examples`, with `preprocessing` and `notes` as in
    run.json, with `temperature` if the recipe has select data to fit it on, and with what the recipe's function `evaluate`
    returns if `model` is a folder.

    Raises RecipeError if the recipe has no such split, SoupError if a soup's folder is not as it was written.
    """
    recipe, named, model = resolved_recipe(recipe), model, pinned(model)
    path, key = split_key(model)
    if not storage.is_remote(path):
        path = os.path.abspath(os.path.expanduser(path))  # for actors in other folders
        model = f"{path}?key={key}" if key else path
    recipe, opened = _open_to_evaluate(recipe, model, path)
    function, notes = recipe.evaluate, []
    if function is not None and not _is_whole_folder(path, key):
        notes.append(f"evaluate: {function} was not called: it takes the folder of a model, and {named} is not one.")
        function = None
    if function is not None:
        check_functions(recipe)
    examined = examine(recipe, [opened])
    recipe = completed(recipe, examined.adopted)
    layout, notes = examined.layout, [*notes, *examined.notes, *_about_refit(Path(path))]
    ingredients: list[Ingredient] = []
    if isinstance(opened, AdapterIngredient):
        ingredients, _ = lift_one(recipe.model, opened, recipe.ignore)
    else:
        notes += left_out_notes([fit(layout, opened, recipe.ignore)])
    from ray_soup.actors.on_ray import RayPool

    progress("connecting to Ray", 0, 1)
    with connect():
        mesh, cpus = resolve_mesh(recipe, layout.numel, 0, progress, now=True)
        pool = RayPool(recipe, ingredients, Mesh(mesh.size, 1), cpus)
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
    if function is not None:
        progress("evaluate", 0, 1)
        kept |= figures_of_folder(function, _local_folder(path, progress))
    counts = [len(splits[s]) for s in chosen]
    examples = counts[0] if len(counts) == 1 else dict(zip(chosen, counts, strict=True))
    objective = {key: value for key, value in recorded(measures_of(recipe)).items() if key in ("objective", "unit", "dtype")}
    done = with_cut(examined.preprocessing, setup.cut)
    row = {"model_name": named, **kept, **objective, "examples": examples, "preprocessing": done}
    return {**row, **({"notes": notes} if notes else {})}


def _open_to_evaluate(recipe: Recipe, model: str, path: str) -> tuple[Recipe, Ingredient]:
    """Open a model to evaluate, at `path`; return it with the recipe of its evaluation. A soup's files are checked."""
    if storage.is_remote(path) or not os.path.lexists(os.path.join(path, "run.json")):
        return recipe, open_checkpoint(model)
    record = finished_record(Path(path))
    _check_present(Path(path), record)
    opened = open_checkpoint(model)
    whole = not isinstance(opened, AdapterIngredient) and len(opened.files) > 1
    index = [f"{MODEL}.index.json"] if whole and opened.files[0].endswith(SAFETENSORS_SUFFIX) else []
    check_files(Path(path), record, [*map(os.path.basename, opened.files), *index])
    return with_own_config(recipe, path, record, opened), opened


def _about_refit(out: Path) -> list[str]:
    """Return a note if the soup in a folder has learned on select, too."""
    record: Mapping[str, Any] = (read_run_record(out) if out.is_dir() else None) or {}
    if not record.get("refit", {}).get("steps"):
        return []
    return [
        f"{out} was refitted on fit and select together (learn.refit): its figures on select, and the temperature that is "
        "fitted there, are not those of held-out data."
    ]


def _is_whole_folder(path: str, key: str) -> bool:
    """Return whether a model is all that is in a folder, and not a file or one of the models in it."""
    return not key and (not storage.isfile(path) if storage.is_remote(path) else os.path.isdir(path))


@shown_in_notebooks
def bake_copy(
    out: str | Path, new_out: str | Path, progress: ProgressCallback = no_progress, overwrite: bool = False
) -> Soup:
    """Rebuild the soup in `out` from its coefficients and ingredients alone, in the new folder `new_out`.

    Raises IngredientError if an ingredient has changed, RecipeError if `out` is not a finished soup or `new_out` is not
    empty, unless it is to `overwrite` an earlier run.
    """
    source = _local_folder(out, progress)
    check_new(new_out, source, overwrite)
    record = finished_record(source)
    if has_no_coefficients(record):
        check_files(source, record)
        return bake_own(source, record, new_out, progress, overwrite)
    recipe, record, coefficients, ingredients = _open_finished(source)
    rows = with_kinds(read_results(source), record)
    with open_output(new_out, progress, overwrite=overwrite) as output:
        at = str(out) if storage.is_remote(str(out)) else str(source)
        soup = output.begin(begun(recipe, ingredients, source=at))
        if soup is not None:
            raise RecipeError(f"{new_out} is not empty. Choose a new folder.")
        try:
            staging = output.staging()
            with bakers(recipe, ingredients, output, progress) as pool:
                sha256 = hash_ingredients(ingredients, progress) if pool is None else pool.hash(progress)
                _check_digests(source, record, ingredients, sha256)
                difference = _difference(source, record, coefficients)
                writers = all_of(pool, ingredients, output) if difference is None else None
                bake_model(staging, recipe, coefficients, ingredients, progress, writers)
            rebuild(difference, staging)
            beside = f"transformers:{source}" if recipe.model.startswith("transformers:") else model_of(recipe)
            write_library_files(staging, beside)
            write_descriptions(staging, recipe, coefficients, record.get("table", rows), record, beside)
            write_bytes(staging / "report.html", (source / "report.html").read_bytes())
            output.publish(recipe, rows, record, staging)
            soup = Soup(output.folder, rows, record)
        except BaseException:
            output.discard()
            raise
    return soup.at(new_out)


@shown_in_notebooks
def verify(out: str | Path, progress: ProgressCallback = no_progress) -> list[str]:
    """Check a finished soup: digests of its files and ingredients, column sums, and the model bit for bit.

    Returns one line per check. Raises SoupError for the first check that fails.
    """
    out = _local_folder(out, progress)
    record = finished_record(out)
    _check_listed(out, record)
    check_files(out, record, error=SoupError)
    if has_no_coefficients(record):
        return [f"{len(record['files'])} files have the digests in run.json", *verify_own(out, record, progress)]
    recipe, _, coefficients, ingredients = _open_finished(out)
    off = float(np.abs(coefficients.values.sum(axis=0) - 1).max(initial=0))
    _check_digests(out, record, ingredients, hash_ingredients(ingredients, progress, reread=True))
    of_adapters, more = is_adapter_folder(out), []
    equal = "are bit-identical to those computed from coefficients and ingredients"
    if recipe.adapter.merge:
        total = compare_merged(out, recipe, coefficients, ingredients, progress)
        sampled = compare_merged_sample(out, recipe, coefficients, ingredients)
        more, equal = [about_digest(record)], "equal those computed from coefficients, ingredients and base, rounded once"
    elif of_adapters:
        total = compare_tensors(out, recipe, coefficients, ingredients, progress)
        sampled = compare_products(out, recipe, coefficients, ingredients)
        if recipe.adapter.rank is not None:
            more = [f"products of a larger rank than {recipe.adapter.rank} are truncated as near as that rank allows"]
        more += [about_digest(record)]
    else:
        difference = _difference(out, record, coefficients)
        total = _compare_tensors(out, coefficients, ingredients, progress, difference)
        sampled = compare_sample(coefficients, ingredients, _open_model(out, coefficients), difference)
        if difference is not None:
            equal = f"are bit-identical to those computed from coefficients, ingredients and {DIFFERENCE}"
    what = "products B A" if of_adapters else "tensors"
    proof = f"{sampled} sampled {what} equal those computed from the ingredients as their own libraries load them"
    if sampled is None:
        proof = f"no {what} were sampled for their own libraries, because the ingredients are in remote storage"
    return [
        f"{len(record['files'])} files have the digests in run.json",
        f"{coefficients.values.shape[1]} columns sum to 1 within {off:.0e}",
        f"{len(ingredients)} ingredients have the digests in run.json",
        *more,
        f"{total} tensors {equal}",
        proof,
    ]


def _check_present(out: Path, record: RunRecord) -> None:
    """Check that the files that run.json lists exist. Raises RecipeError."""
    missing = next((name for name in record["files"] if not (out / name).is_file()), None)
    if missing is not None:
        raise RecipeError(
            f"{out / missing} is missing, but run.json lists it. Restore it, or rerun the command that creates it."
        )


def _check_listed(out: Path, record: RunRecord) -> None:
    """Check that run.json lists every file of a finished soup, and no other model is in the folder. Raises RecipeError."""
    listed = record["files"]
    index = f"{MODEL}.index.json"
    differs = [DIFFERENCE] if record.get("polish", {}).get("best_epoch") else []
    descriptions = [n for n in DESCRIPTIONS if n not in (COEFFICIENTS, TABLE) or not has_no_coefficients(record)]
    expected = [*descriptions, *differs, index if index in listed or (out / index).exists() else MODEL]
    if is_adapter_folder(out) or ADAPTER_CONFIG in listed:
        expected[-1:] = [ADAPTER_CONFIG, ADAPTER_FILES[0]]
    if METADATA in listed or (out / METADATA).exists():
        expected[-1:] = [METADATA, *map(os.path.basename, open_ingredient(str(out)).files[1:])]
    if expected[-1] == index:
        expected += [os.path.basename(shard) for shard in shards_of(str(out / index))]
    missing = next((name for name in expected if name not in listed), None)
    if missing is not None:
        raise not_listed(out, missing)
    models = (f for f in sorted(out.iterdir()) if is_checkpoint(f.name) or f.name.endswith(DISTRIBUTED_SUFFIX))
    stranger = next((f for f in models if f.name not in listed), None)
    if stranger is not None:
        raise RecipeError(f"{stranger} is not among the files in run.json. Remove it, or move it elsewhere.")


def _compare_tensors(
    out: Path,
    coefficients: Coefficients,
    ingredients: list[Ingredient],
    progress: ProgressCallback,
    difference: Ingredient | None,
) -> int:
    """Recompute every tensor and compare it with the model's; return the number of tensors. Raises SoupError."""
    used = [ingredients[k] for k in coefficients.used()]
    model = _open_model(out, coefficients)
    total = len(model.tensors)
    for done, (name, info) in enumerate(model.tensors.items()):
        if name in coefficients.block_of:
            soup = as_tensor(soup_range(coefficients, ingredients, name, 0, info.numel, info.dtype_name))
            again = of_model(soup, name, difference)
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
    check_files(out, record, DESCRIPTIONS)
    recipe = load_recipe(out / "recipe.yaml")
    coefficients = load_coefficients(out / COEFFICIENTS)
    try:
        ingredients = [open_checkpoint(i["path"], i["name"]) for i in record["ingredients"]]
    except SoupError as error:
        raise type(error)(f"{error} {out / 'run.json'} lists it as an ingredient.") from error
    if tuple(i.name for i in ingredients) != coefficients.ingredients:
        raise RecipeError(
            f"{out}: run.json and {COEFFICIENTS} name different ingredients. Restore both files from the same run."
        )
    _check_present(out, record)
    adapters = adapters_among(ingredients)
    if adapters:
        lifted = lifted_ingredients(out, recipe, record, coefficients, adapters, out / COEFFICIENTS)
        return recipe, record, coefficients, lifted
    names = _open_model(out, coefficients).tensors
    shapes = {name: info.shape for name, info in names.items()}
    check_covers(coefficients, shapes, out / COEFFICIENTS)
    _check_buffers(recipe, coefficients, shapes, out)
    return recipe, record, coefficients, check_together(ingredients, shapes, coefficients.tied, recipe.ignore, strict=False)


def _difference(out: Path, record: RunRecord, coefficients: Coefficients) -> Ingredient | None:
    """Open the differences of a finished soup, as `difference_in` does."""
    if "polish" not in record:
        return None
    shapes = {name: tuple(info.shape) for name, info in _open_model(out, coefficients).tensors.items()}
    return difference_in(out, record, coefficients, shapes)


def _open_model(out: Path, coefficients: Coefficients) -> Ingredient:
    """Open the model of a finished soup, without the second names of tied tensors, which a distributed checkpoint has."""
    model, tied = open_ingredient(str(out)), coefficients.tied or {}
    return replace(model, tensors={name: info for name, info in model.tensors.items() if name not in tied})


def _check_buffers(recipe: Recipe, coefficients: Coefficients, names: Iterable[str], out: Path) -> None:
    """Check that what the coefficients take for buffers are no parameters of the model. Raises RecipeError."""
    known = coefficients.block_of.keys() | coefficients.statistics.keys()
    buffers = [name for name in names if name not in known and not name.endswith(KEYS)]
    parameters: Iterable[str] = ()
    if buffers:
        with suppress(RecipeError):  # the model's library may be missing where a soup is only rebuilt
            parameters = describe(model_of(recipe)).names
    wrong = next((name for name in buffers if name in set(parameters)), None)
    if wrong is not None:
        raise RecipeError(
            f"{out / COEFFICIENTS} is for another model: it has no coefficients for the parameter {wrong}. Restore the file "
            "of the same run."
        )


def _local_folder(out: str | Path, progress: ProgressCallback) -> Path:
    """Return the local folder of a finished soup; a remote one is copied into the cache. Raises RecipeError."""
    if not storage.is_remote(str(out)):
        folder = local_folder(out)
        if not folder.is_dir():
            there = "is not a folder" if os.path.lexists(folder) else "does not exist"
            raise RecipeError(f"{out} {there}; expected the folder or URI of a finished soup. Check it.")
        return folder
    work = storage.local_copy(str(out))
    try:
        while True:
            progress("fetching", *next(work))
    except StopIteration as stop:
        return Path(stop.value).absolute()
    except FileNotFoundError:
        raise RecipeError(f"{out} does not exist; expected the folder or URI of a finished soup. Check it.") from None


def _check_digests(out: Path, record: RunRecord, ingredients: list[Ingredient], sha256: list[str]) -> None:
    for known, ingredient, digest in zip(record["ingredients"], ingredients, sha256, strict=True):
        if known["sha256"] != digest:
            raise IngredientError(
                f"{ingredient.path} has changed since the soup was made: its SHA-256 is {digest[:16]}..., and was "
                f"{known['sha256'][:16]}... by {out / 'run.json'}. Restore the original file."
            )

"""Verify and rebuild a finished model that a method of the user's made, and that is no weighted sum of the ingredients.

The function is called again on the same ingredients, and must return the same bits. One that evaluates models needs the
data and the actors of its run: then the file is compared with its digest alone, and the answer says so.
"""

from __future__ import annotations

from pathlib import Path

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.disk import write_bytes
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.progress import ProgressCallback
from ray_soup.recipe import load_recipe
from ray_soup.soups.identity import begun
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.make import make_without_data
from ray_soup.soups.methods.interface import NeedsDataError
from ray_soup.soups.methods.results import Model
from ray_soup.soups.output import COEFFICIENTS, MODEL, Soup, open_output
from ray_soup.soups.records import RunRecord, read_results
from ray_soup.soups.write import write_descriptions, write_library_files
from ray_soup.task.preprocess_key import model_of


def has_no_coefficients(record: RunRecord) -> bool:
    """Return whether run.json is that of a model that is no weighted sum of its ingredients."""
    return record.get("own_method", {}).get("returned") == "model" and COEFFICIENTS not in record["files"]


def verify_own(out: Path, record: RunRecord, progress: ProgressCallback) -> list[str]:
    """Check the ingredients and the model of a finished run, whose files have the digests in run.json.

    Returns one line per check. Raises SoupError for the first check that fails.
    """
    model, inputs = _again(out, record, progress)
    lines = [f"{len(inputs.names)} ingredients have the digests in run.json"]
    if model is None:
        return [*lines, _not_called(record)]
    _compare(out, record, model)
    function = record["own_method"]["function"]
    return [*lines, f"{len(model.tensors)} tensors are bit-identical to those that {function} returns for these ingredients"]


def bake_own(
    source: Path, record: RunRecord, new_out: str | Path, progress: ProgressCallback, overwrite: bool = False
) -> Soup:
    """Rebuild the model in `source` by its function, in the new folder `new_out`; copy it if the function needs data."""
    recipe, rows = load_recipe(source / "recipe.yaml"), read_results(source)
    model, inputs = _again(source, record, progress)
    with open_output(new_out, progress, overwrite=overwrite) as output:
        if output.begin(begun(recipe, inputs.ingredients, source=str(source))) is not None:
            raise RecipeError(f"{new_out} is not empty. Choose a new folder.")
        try:
            staging = output.staging()
            if model is None:
                write_bytes(staging / MODEL, (source / MODEL).read_bytes())
                record["notes"] = [*record["notes"], f"This is a copy of a finished model: {_not_called(record)}."]
            else:
                _compare(source, record, model)
                model.write(staging / MODEL)
            write_library_files(
                staging, f"transformers:{source}" if recipe.model.startswith("transformers:") else model_of(recipe)
            )
            write_descriptions(staging, recipe, None, rows, record, model_of(recipe))
            write_bytes(staging / "report.html", (source / "report.html").read_bytes())
            output.publish(recipe, rows, record, staging)
            return Soup(output.folder, rows, record, record["notes"]).at(new_out)
        except BaseException:
            output.discard()
            raise


def _again(out: Path, record: RunRecord, progress: ProgressCallback) -> tuple[Model | None, Inputs]:
    """Call the function again, after checking the ingredients; no model if it needs data.

    Raises IngredientError if an ingredient has changed, SoupError if the function now returns coefficients.
    """
    recipe = load_recipe(out / "recipe.yaml")
    inputs = open_inputs(recipe)
    found = dict(zip(inputs.names, hash_ingredients(inputs.ingredients, progress, reread=True), strict=True))
    known = {ingredient["name"]: ingredient["sha256"] for ingredient in record["ingredients"]}
    changed = next((name for name in {**known, **found} if known.get(name) != found.get(name)), None)
    if changed is not None:
        raise IngredientError(
            f"The ingredient {changed} is not the one that the model was made of, by {out / 'run.json'}. Restore the "
            "original file."
        )
    try:
        model = make_without_data(recipe, inputs, progress)
    except NeedsDataError:
        return None, inputs
    if not isinstance(model, Model):
        raise SoupError(f"{recipe.method} returned coefficients, and a model when {out} was made. Restore the function.")
    return model, inputs


def _not_called(record: RunRecord) -> str:
    function = record["own_method"]["function"]
    return f"{function} was not called again, because it evaluates models: {MODEL} has the digest in run.json"


def _compare(out: Path, record: RunRecord, model: Model) -> None:
    """Compare a model that was made again with the one in `out`, bit for bit. Raises SoupError."""
    written = open_ingredient(str(out))
    for name, tensor in model.tensors.items():
        have = written.read(name) if name in written.tensors else None
        if have is None or have.dtype != tensor.dtype or not torch.equal(_bits(have), _bits(tensor.flatten())):
            raise SoupError(
                f"{written.files[0]}: the tensor {name} differs from the one that {record['own_method']['function']} "
                "returns now. The function has changed, or is not deterministic: draw its random numbers from session.seed."
            )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)

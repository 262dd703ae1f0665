"""What is particular to a finished soup all of whose weights were trained after mixing: its file of differences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ray_soup.io import storage
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.difference import apply_difference, open_difference, trained
from ray_soup.soups.output import DIFFERENCE, MODEL
from ray_soup.soups.records import RunRecord, check_files, not_listed


def difference_in(
    out: Path, record: RunRecord, coefficients: Coefficients, shapes: Mapping[str, tuple[int, ...]]
) -> Ingredient | None:
    """Open the differences of a finished soup; None if its model is the soup.

    Raises RecipeError if the file was changed, or does not fit the model with the tensors `shapes`.
    """
    if not record.get("polish", {}).get("best_epoch"):
        return None
    if DIFFERENCE not in record["files"]:
        raise not_listed(out, DIFFERENCE)
    check_files(out, record, (DIFFERENCE,))
    return open_difference(str(out / DIFFERENCE), {name: shapes[name] for name in coefficients.block_of if name in shapes})


def rebuild(difference: Ingredient | None, staging: Path) -> None:
    """Turn the soup in `staging` into the trained model, and write the differences beside it."""
    if difference is not None:
        from ray_soup.soups.polish import file_of

        storage.download(difference.files[0], staging / DIFFERENCE)
        apply_difference(difference, file_of(staging / MODEL))


def of_model(soup: torch.Tensor, name: str, difference: Ingredient | None) -> torch.Tensor:
    """Return a parameter tensor of the model, given that of the written soup."""
    return soup if difference is None else trained(soup, difference.read(name), soup.dtype)

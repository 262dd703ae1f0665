"""What `ray-soup inspect` shows: do checkpoints fit together, and what is in them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.adapters import adapters_among
from ray_soup.io.check import check_together, common_shapes, left_out_notes
from ray_soup.io.find import find_sweeps, open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.recipe import RESERVED_NAMES


def inspect(ingredients: Sequence[str], model: str | None = None) -> dict[str, Any]:
    """Check that checkpoints fit together, reading headers only.

    Args:
        ingredients: globs, folders and checkpoints.
        model: check that they match this model, too.

    Returns:
        Name, path and bytes of each ingredient, dtype and shape of each tensor, the number of elements of one ingredient,
        the bytes of all, and notes for the user.

    Raises RecipeError if there are none, IngredientError if one is broken or does not fit.
    """
    if model is not None:
        from ray_soup.task.adapters import bound_to  # which imports torch
        from ray_soup.task.preprocessing import as_trained
    spec = list(ingredients) if len(ingredients) > 1 else ingredients[0]
    notes: list[str] = []
    opened = open_ingredients(spec, RESERVED_NAMES, notes)
    notes += [note for sweep in find_sweeps(spec) if (note := sweep.note())]
    if model is not None and not adapters_among(opened):
        model, of_files = as_trained(model, opened)
        notes += of_files
    bound, names = _bound(opened) if model is None else bound_to(opened, model)
    tensors = {name: bound[0].tensors[name] for name in names}
    return {
        "ingredients": [{"name": i.name, "path": i.path, "bytes": i.nbytes} for i in bound],
        "tensors": {name: [t.dtype_name, list(t.shape)] for name, t in tensors.items()},
        "numbers": sum(tensor.numel for tensor in tensors.values()),
        "bytes": sum(ingredient.nbytes for ingredient in bound),
        "notes": [*notes, *left_out_notes(bound)],
    }


def _bound(ingredients: Sequence[Ingredient]) -> tuple[list[Ingredient], list[str]]:
    """Check that checkpoints fit together; return them bound to their common names, and these names."""
    adapters = adapters_among(ingredients)
    if adapters:
        raise RecipeError(
            f"{adapters[0].path} is a LoRA adapter, which says little without its base. Name the base, as in --model "
            f"transformers:{adapters[0].config.base or 'FOLDER'}"
        )
    return check_together(ingredients), [*common_shapes(ingredients)[0]]

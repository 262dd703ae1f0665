"""Buffers of a soup: averaged over ingredients, or copied from the first one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ray_soup.errors import IngredientError
from ray_soup.io.ingredient import Ingredient


def mixed_buffer(ingredients: Sequence[Ingredient], name: str, policy: str) -> torch.Tensor:
    """Return the soup's buffer `name`, flattened to one dimension.

    Args:
        ingredients: the ingredients that the soup uses.
        name: name of the buffer in the state dict.
        policy: `first` copies the buffer of the first ingredient. Any other value averages: floats become their mean in
            float64 [elements], integers must agree, and a batch counter is copied from the first ingredient.

    Raises IngredientError if an integer buffer differs between ingredients and must be averaged.
    """
    first = ingredients[0].read(name)
    if policy == "first" or name.endswith("num_batches_tracked"):
        return first.clone()
    if first.dtype.is_floating_point:
        total = torch.zeros(first.shape, dtype=torch.float64)
        for ingredient in ingredients:
            total += ingredient.read(name)
        return total / len(ingredients)
    for ingredient in ingredients[1:]:
        if not torch.equal(ingredient.read(name), first):
            raise IngredientError(
                f"{ingredient.path}: the integer buffer {name} differs from that of {ingredients[0].path}; integers "
                "cannot be averaged. Set buffers: first to take it from the first ingredient."
            )
    return first.clone()

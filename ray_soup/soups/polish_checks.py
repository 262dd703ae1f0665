"""Whether all weights of a soup can be trained, as the recipe section `polish` says."""

from __future__ import annotations

from collections.abc import Sequence

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe


def check_polish(recipe: Recipe, adapters: Sequence[str]) -> None:
    """Check that all weights of a soup can be trained, if the recipe says so. Raises RecipeError."""
    if recipe.polish is None:
        return
    why = None
    if recipe.data.fit is None:
        why = "the recipe has no data.fit, the held-out data to train on. Add it"
    elif adapters:
        why = f"the ingredients are LoRA adapters, such as {adapters[0]}. Remove polish"
    elif recipe.actors.by_layer:
        why = "actors.by_layer is true. Remove one of the two"
    elif recipe.learn.refit:
        why = "learn.refit is true: training stops on select, which a refit learns on. Remove one of the two"
    elif recipe.out_format != "safetensors":
        why = f"out_format is {recipe.out_format}; expected safetensors. Change it, or remove polish"
    if why is not None:
        raise RecipeError(f"polish trains all weights of a whole model held by each actor, but {why}.")

"""How finely coefficients are learned: blocks: auto, which depends on how much data there is to learn from.

Where `auto` cuts tensors into groups of their rows, whole tensors are learned first, and their rows apart only from there
on, as far as that is better on select. Groups learned from the start win on some zoos and overfit on others.
"""

from __future__ import annotations

from ray_soup.mixing.blocks import Blocks, Layout, partition
from ray_soup.recipe import Recipe

FINER: tuple[Blocks, ...] = ("tensor", {"tensor": 2}, {"tensor": 4})
"""What `auto` chooses from, the finest last."""


def stages(recipe: Recipe, blocks: Blocks) -> int:
    """Return how many times all turns are taken, given what the recipe's blocks resolve to: twice with whole tensors first.

    The soup that `start` names has been learned already.
    """
    cut = recipe.blocks == "auto" and isinstance(blocks, dict)
    return 2 if cut and recipe.start is None and recipe.info.kind == "hyperplane" else 1


def resolved_blocks(blocks: Blocks, layout: Layout, ingredients: int, examples: int, cuttable: bool = True) -> Blocks:
    """Resolve `auto`: as many groups of the rows of each tensor, at most four, as there are examples for each coefficient.

    Args:
        blocks: the recipe key.
        layout: the layout of the model.
        ingredients: number of ingredients.
        examples: number of examples in fit.
        cuttable: False if rows cannot have coefficients of their own.
    """
    if blocks != "auto":
        return blocks
    per_coefficient = examples // max(1, ingredients * partition(layout, "tensor").count)
    return FINER[0] if not cuttable or per_coefficient < 2 else FINER[1] if per_coefficient < 4 else FINER[2]

"""How finely coefficients are learned: blocks: auto, which depends on how much data there is to learn from."""

from __future__ import annotations

from ray_soup.mixing.blocks import Blocks, Layout, partition

FINER: tuple[Blocks, ...] = ("tensor", {"tensor": 2}, {"tensor": 4})
"""What `auto` chooses from, the finest last."""


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

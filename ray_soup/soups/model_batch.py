"""How many ingredients move at a time: the recipe key `learn.model_batch`, with `auto` resolved."""

from __future__ import annotations

from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import actor_bytes, memory_of_each
from ray_soup.recipe import Recipe


def fitting_model_batch(recipe: Recipe, parameters: int, count: int, mesh: Mesh) -> int:
    """Return the model batch on this mesh; `auto`: all ingredients, or equal parts of them if memory does not hold all."""
    requested, room = requested_model_batch(recipe, count), memory_of_each(recipe, mesh)
    if recipe.learn.model_batch != "auto" or recipe.info.kind == "softmax":
        return requested
    parts = (-(-count // n) for n in range(1, count + 1))
    return next((m for m in parts if actor_bytes(recipe, parameters, m, mesh.shards) <= room), 1)


def requested_model_batch(recipe: Recipe, count: int) -> int:
    """Return how many of `count` ingredients move at a time, apart from memory limits; a softmax needs all of them."""
    requested = recipe.learn.model_batch
    return count if requested == "auto" or recipe.info.kind == "softmax" else min(requested, count)

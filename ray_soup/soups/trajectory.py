"""Ingredients that are the steps of one training run: what methods for them need, and the penalty on rough coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.steps import asks_for_steps, fault_of
from ray_soup.mixing.schedules import average, schedule
from ray_soup.recipe import Recipe

SHAPED = "schedule:"
"""Begins the names of methods that follow a shape of mixing.schedules; the method without it is the moving average."""


def steps_of(ingredients: Sequence[Ingredient]) -> tuple[int, ...] | None:
    """Return the step of each ingredient; None if they are not different steps of one run."""
    steps = [ingredient.step.number for ingredient in ingredients if ingredient.step is not None]
    fault = fault_of([(ingredient.path, ingredient.step) for ingredient in ingredients])
    return None if fault is not None else tuple(steps)


def order_of(ingredients: Sequence[Ingredient]) -> list[int]:
    """Return the positions of the steps of one run, ordered by step; `check_trajectory` has checked that they are such."""
    steps = steps_of(ingredients)
    assert steps is not None
    return sorted(range(len(steps)), key=lambda k: steps[k])


def check_trajectory(recipe: Recipe, ingredients: Sequence[Ingredient]) -> None:
    """Check that the ingredients are steps of one training run if the recipe needs such. Raises RecipeError."""
    fault = fault_of([(ingredient.path, ingredient.step) for ingredient in ingredients])
    if fault is not None:
        if recipe.info.needs_steps or recipe.learn.smoothness:
            key, cure = f"method: {recipe.method}", "choose another method"
            if not recipe.info.needs_steps:
                key, cure = f"learn.smoothness: {recipe.learn.smoothness:g}", "remove this key"
            raise RecipeError(
                f"{key} is for the steps of one training run, but {fault}. Name the folder of one run, as in `ingredients: "
                f"RUN?per_trial=all`, or {cure}."
            )
        return
    window = recipe.schedule.window
    if window != "auto" and window > len(ingredients):
        raise RecipeError(
            f"schedule.window is {window:,}, but the recipe names {len(ingredients):,} steps of the run. Lower it, or use "
            "more steps."
        )
    if recipe.data.fit is None and is_chosen(recipe):
        what = "window" if is_shaped(recipe) else "decay"
        raise RecipeError(
            f"schedule.{what} is auto, which is chosen on held-out data, but the recipe has no data.fit. Add it, or write a "
            f"number, as in schedule.{what}={'0.9' if what == 'decay' else '4'}."
        )


def is_shaped(recipe: Recipe) -> bool:
    """Return whether the recipe's method follows the shape of a decay, and is not the moving average."""
    return recipe.method.startswith(SHAPED)


def is_chosen(recipe: Recipe) -> bool:
    """Return whether a window or a decay is to be chosen on select."""
    if recipe.info.kind != "schedule":
        return False
    return (recipe.schedule.window if is_shaped(recipe) else recipe.schedule.decay) == "auto"


def weights(recipe: Recipe, ingredients: Sequence[Ingredient], window: int, decay: float | None) -> NDArray[np.float64]:
    """Return the weights of a schedule, float64 [K], zero before the window.

    Args:
        recipe: the recipe, for the method.
        ingredients: K steps of one run, in any order.
        window: number of last steps to mix.
        decay: the decay of the moving average; None for the schedules.
    """
    last = order_of(ingredients)[-window:]
    values = np.zeros(len(ingredients))
    if decay is not None:
        values[last] = average(decay, window)
    else:
        steps = steps_of(ingredients) or ()
        values[last] = schedule(recipe.method.removeprefix(SHAPED), [steps[k] for k in last])
    return values


def fixed_weights(recipe: Recipe, ingredients: Sequence[Ingredient]) -> NDArray[np.float64]:
    """Return the weights, float64 [K], of a method that needs no data: a schedule with numbers for window and decay."""
    window, decay = recipe.schedule.window, recipe.schedule.decay
    assert not is_chosen(recipe)
    count = len(ingredients) if window == "auto" else window
    return weights(recipe, ingredients, count, None if is_shaped(recipe) or decay == "auto" else decay)


def recorded_weights(recipe: Recipe, ingredients: Sequence[Ingredient], shares: NDArray[np.float64]) -> dict[str, Any]:
    """Return the key of run.json that says which step has which weight, if the recipe asks for the steps of a run.

    Args:
        recipe: the recipe as run.
        ingredients: the K ingredients.
        shares: their mean coefficients over the blocks, float64 [K].
    """
    steps, first = steps_of(ingredients), ingredients[0].step
    asked = recipe.info.needs_steps or asks_for_steps(recipe.ingredients)
    if steps is None or first is None or recipe.info.is_reference or not asked:
        return {}
    order = order_of(ingredients)
    return {"trajectory": {
        "unit": first.unit, "steps": [steps[k] for k in order], "weights": [float(shares[k]) for k in order]
    }}  # fmt: skip


def roughness(coefficients: NDArray[np.float64], order: Sequence[int]) -> tuple[float, NDArray[np.float64]]:
    """Compute the mean square change of a coefficient from a step to the next, in units of 1/K, and its gradient.

        P = 1 / (B (K - 1)) sum_b sum_k (K c[k+1, b] - K c[k, b])^2

    As a mean in units of the uniform soup's coefficient 1/K, it does not grow with the number of steps or blocks: the same
    `learn.smoothness` suits any of them. Coefficients that alternate between 0 and 2/K have P = 4.

    Args:
        coefficients: float64 [K, B].
        order: the positions of the K steps, ordered by step.

    Returns:
        P, and dP/dc float64 [K, B].
    """
    count, blocks = coefficients.shape
    change = np.diff(coefficients[order], axis=0) * count
    scale = 1 / (blocks * max(1, count - 1))
    gradient = np.zeros_like(coefficients)
    in_order = np.zeros_like(coefficients)
    in_order[1:] += change
    in_order[:-1] -= change
    gradient[order] = 2 * count * scale * in_order
    return float((change**2).sum() * scale), gradient

"""Best single, uniform and greedy soups; accuracy of models spread over the actors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ray_soup.actors import Actors
from ray_soup.checkpoints import Ingredient
from ray_soup.shard import Score


def individual_scores(
    actors: Actors,
    ingredients: list[Ingredient],
    examples: dict[str, int],
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Each ingredient's score on the held-out set, fit and select together. `watch` is told (models done, in all)."""
    splits = [split for split in ("fit", "select") if split in examples]
    totals = [Score()] * len(ingredients)
    paths = [ingredient.path for ingredient in ingredients]
    for s, split in enumerate(splits):
        for k, score in enumerate(actors.evaluate_files(paths, split, examples[split])):
            totals[k] += score
            watch(s * len(paths) + k + 1, len(splits) * len(paths))
    return totals


def best_single(scores: list[Score]) -> int:
    """The ingredient with the highest accuracy; among equals the one with the lowest NLL, then the first."""
    return min(range(len(scores)), key=lambda k: (-scores[k].correct, scores[k].loss, k))


def one_hot(chosen: int, ingredients: int) -> np.ndarray:
    """Coefficients float64 [K, 1] of a soup of one ingredient."""
    return np.eye(ingredients)[:, [chosen]]


def uniform(ingredients: int) -> np.ndarray:
    """Coefficients float64 [K, 1] of the plain mean."""
    return np.full((ingredients, 1), 1 / ingredients)

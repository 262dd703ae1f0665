"""Where learning begins: at the uniform soup, at a finished soup that `start` names, or at the mean of the best ingredients.

An ingredient that has diverged, or was never trained, spoils the uniform soup, and the steps of a few epochs do not lead out
of there. With learn.screen, the means of the best ..., 4, 2, 1 ingredients on select are tried first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ray_soup.actors.messages import StoreInfo
from ray_soup.recipe import Recipe
from ray_soup.soups.session import Session
from ray_soup.soups.start import Beginning, beginning, matches
from ray_soup.task.choices import cost


def screens(recipe: Recipe) -> bool:
    """Return whether the means of the best ingredients are tried."""
    return recipe.learn.screen and recipe.start is None and recipe.info.kind == "hyperplane"


def beginnings(session: Session, store: StoreInfo) -> list[Beginning]:
    """List where learning with the directions in `store` may begin, apart from the uniform soup.

    Part of the ingredients may have none of those of the soup that `start` names; all of them must have one. Raises
    RecipeError.
    """
    start, names = session.inputs.start, [session.inputs.names[k] for k in session.subset]
    if start is None or session.recipe.start is None:
        return means_of_the_best(_best_first(session), names, store.norms) if screens(session.recipe) else []
    if len(names) < len(session.inputs.names) and set(matches(start, names, store.sha256)) == {None}:
        return []
    return [beginning(start, names, store.sha256, session.inputs.layout, store.partition, store.norms)]


def _best_first(session: Session) -> list[int]:
    """Return positions in the subset, from the best ingredient to the worst on every second example of select.

    On the other ones it turns out whether the best are better: on the same ones, chance would favour them twice.
    """
    individual = session.on(session.splits["select"])
    rows = np.arange(0, len(session.splits["select"]), 2)
    costs = [cost(individual[k].at(rows), session.recipe.select_by) for k in session.subset]
    return sorted(range(len(costs)), key=lambda n: (np.isnan(costs[n]), costs[n]))


def means_of_the_best(order: Sequence[int], names: Sequence[str], norms: NDArray[np.float64]) -> list[Beginning]:
    """Return the means of the best ..., 4, 2, 1 ingredients, without that of all.

    Args:
        order: positions of the K ingredients, from the best to the worst.
        names: their names.
        norms: float64 [K, B], norms of the directions.
    """
    found, count = [], 1
    while count < len(order):
        best = list(order[:count])
        c = np.zeros((len(order), 1))
        c[best] = 1 / count
        which = f"the mean of the best {count} of {len(order)} ingredients on select"
        if count == 1:
            which = f"the best ingredient on select, {names[best[0]]}"
        about = {"ingredients": count, "mean_of": [names[n] for n in best]}
        found.append(Beginning((c - 1 / len(order)) * norms, which, about, asked=False))
        count *= 2
    return found[::-1]

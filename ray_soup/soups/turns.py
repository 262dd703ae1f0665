"""What the learning loop goes over: the model batches of its turns, and the batches of a refit."""

from __future__ import annotations

import numpy as np

from ray_soup.task.data import Split, batch_positions


def model_batches(ingredients: int, size: int, seed: int, models_epochs: int) -> list[np.ndarray]:
    """Return the ingredients of each turn, sorted int64 [m]: shuffled in every models_epoch and cut into model batches."""
    turns = []
    for models_epoch in range(models_epochs):
        order = np.random.default_rng([seed, 1, models_epoch]).permutation(ingredients)
        turns += [np.sort(order[first : first + size]) for first in range(0, ingredients, size)]
    return turns


def joint_batches(fit: Split, select: Split, batch_size: int, *seeds: int) -> list[list[Split]]:
    """Cut one pass over fit and select together into batches, each of one part per source of data.

    `seeds` determine the order.
    """
    rows = np.concatenate([fit.rows, select.rows])
    of_select = np.arange(len(rows)) >= len(fit)
    found = []
    for positions in batch_positions(len(rows), batch_size, *seeds):
        if fit.source == select.source:
            parts = [Split(fit.source, rows[positions])]
        else:
            mine = of_select[positions]
            parts = [Split(fit.source, rows[positions[~mine]]), Split(select.source, rows[positions[mine]])]
        found.append([part for part in parts if len(part)])
    return found

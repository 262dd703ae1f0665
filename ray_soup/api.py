"""The commands as Python functions.

A recipe is a Recipe, a mapping of its keys, or the path of a YAML file. Keyword arguments in `changes` override its keys, as
in learn={"lr": 0.02} or **{"learn.lr": 0.02}. Every function resumes an interrupted run and raises SoupError on failure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import DEFAULT_METHOD, Recipe, as_recipe, with_changes
from ray_soup.soups.compare import compare as run_compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run

AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def learn(
    recipe: AnyRecipe,
    out: str | Path,
    method: str | None = None,
    *,
    progress: ProgressCallback = no_progress,
    **changes: Any,
) -> Soup:
    """Learn the coefficients of a soup and write the soup to the folder or URI `out`.

    If `method` is None, the method is that of the recipe if it learns coefficients or is yours, otherwise mehl+.
    """
    loaded = as_recipe(recipe)
    chosen = method or (loaded.method if loaded.info.learns or loaded.info.is_own else DEFAULT_METHOD)
    return run(with_changes(loaded, {"method": chosen, **changes}), out, progress)


def greedy(recipe: AnyRecipe, out: str | Path, *, progress: ProgressCallback = no_progress, **changes: Any) -> Soup:
    """Write the greedy soup to the folder or URI `out`."""
    return learn(recipe, out, "greedy", progress=progress, **changes)


def uniform(recipe: AnyRecipe, out: str | Path, *, progress: ProgressCallback = no_progress, **changes: Any) -> Soup:
    """Write the uniform soup to the folder or URI `out`."""
    return learn(recipe, out, "uniform", progress=progress, **changes)


def compare(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    seeds: int = 1,
    drop_top: Sequence[int] = (),
    by_count: Sequence[int] = (),
    trained: bool = True,
    progress: ProgressCallback = no_progress,
    **changes: Any,
) -> Soup:
    """Make every soup and write the one that is best on select to the folder or URI `out`.

    `record["table"]` of the returned soup contains the results of all soups.

    Args:
        recipe: a Recipe, its keys, or the path of a YAML file.
        out: the output folder or URI.
        seeds: number of seeds; each redraws the split into fit and select and the order of batches.
        drop_top: repeat without the N best ingredients, for each of these N.
        by_count: repeat with only N ingredients, for each of these N.
        trained: also train all weights on the same data, as a reference.
        progress: called with what is being done, the units done so far, and the units in total.
        **changes: recipe keys to override.
    """
    options = CompareOptions(seeds, tuple(drop_top), tuple(by_count), trained)
    return run_compare(with_changes(as_recipe(recipe), changes), out, options, progress)


def search(recipe: AnyRecipe, out: str | Path, *, progress: ProgressCallback = no_progress, **changes: Any) -> Soup:
    """Search over the keys in the recipe's section `search` with Ray Tune, and write the best soup to `out`."""
    from ray_soup.tune.search import search as run_search

    return run_search(with_changes(as_recipe(recipe), changes), out, progress)


def bake(out: str | Path, new_out: str | Path, *, progress: ProgressCallback = no_progress) -> Soup:
    """Rebuild the soup in `out` from its coefficients and ingredients alone, and write it to `new_out`."""
    return bake_copy(out, new_out, progress)

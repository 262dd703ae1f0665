"""The commands as functions. A recipe is a Recipe, a dict of its keys, or a YAML file; `changes` are keys of it with other
values, as in learn={"lr": 0.02}, or {"learn.lr": 0.02}. All go on where a run before was stopped, and raise SoupError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_soup import compare, pipeline
from ray_soup.actors import Watch, quiet
from ray_soup.folder import Soup
from ray_soup.recipe import Method, Recipe, as_recipe, changed

AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def learn_soup(
    recipe: AnyRecipe, out: str | Path, method: Method | None = None, *, watch: Watch = quiet, **changes: Any
) -> Soup:
    """A soup with learned coefficients in the folder `out`; default: the recipe's method if it learns, else mehl+."""
    found = as_recipe(recipe)
    chosen = method or (found.method if found.method in pipeline.LEARNED else "mehl+")
    return pipeline.run(changed(found, {"method": chosen, **changes}), out, watch)


def greedy_soup(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """The greedy soup in the folder `out`."""
    return learn_soup(recipe, out, "greedy", watch=watch, **changes)


def uniform_soup(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """The uniform soup in the folder `out`."""
    return learn_soup(recipe, out, "uniform", watch=watch, **changes)


def compare_soups(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    seeds: int = 1,
    drop_top: Sequence[int] = (),
    by_count: Sequence[int] = (),
    watch: Watch = quiet,
    **changes: Any,
) -> Soup:
    """Every soup in one table, `record["table"]`; the best on select is written to the folder `out`."""
    options = compare.Options(seeds, tuple(drop_top), tuple(by_count))
    return compare.compare(changed(as_recipe(recipe), changes), out, options, watch)


def search_soup(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """Ray Tune over the recipe's `search`; the best soup is written to the folder `out`."""
    from ray_soup.search import search

    return search(changed(as_recipe(recipe), changes), out, watch)


def bake_soup(out: str | Path, new_out: str | Path, *, watch: Watch = quiet) -> Soup:
    """The soup in `out` again, from its coefficients and the ingredients alone."""
    return pipeline.bake_again(out, new_out, watch)

"""The commands as functions. A recipe is a Recipe, a dict of its keys, or a YAML file; `changes` are keys of it with other
values, as in learn={"lr": 0.02}, or {"learn.lr": 0.02}. All go on where a run before was stopped, and raise SoupError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_soup.actors import Watch, quiet
from ray_soup.compare import Options
from ray_soup.compare import compare as compare_all
from ray_soup.folder import Soup
from ray_soup.pipeline import LEARNED, bake_again, run
from ray_soup.recipe import Method, Recipe, as_recipe, changed

AnyRecipe = Recipe | Mapping[str, Any] | str | Path


def learn(recipe: AnyRecipe, out: str | Path, method: Method | None = None, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """A soup with learned coefficients in the folder `out`; default: the recipe's method if it learns, else mehl+."""
    found = as_recipe(recipe)
    chosen = method or (found.method if found.method in LEARNED else "mehl+")
    return run(changed(found, {"method": chosen, **changes}), out, watch)


def greedy(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """The greedy soup in the folder `out`."""
    return learn(recipe, out, "greedy", watch=watch, **changes)


def uniform(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """The uniform soup in the folder `out`."""
    return learn(recipe, out, "uniform", watch=watch, **changes)


def compare(
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
    options = Options(seeds, tuple(drop_top), tuple(by_count))
    return compare_all(changed(as_recipe(recipe), changes), out, options, watch)


def search(recipe: AnyRecipe, out: str | Path, *, watch: Watch = quiet, **changes: Any) -> Soup:
    """Ray Tune over the recipe's `search`; the best soup is written to the folder `out`."""
    from ray_soup.search import search as search_all

    return search_all(changed(as_recipe(recipe), changes), out, watch)


def bake(out: str | Path, new_out: str | Path, *, watch: Watch = quiet) -> Soup:
    """The soup in `out` again, from its coefficients and the ingredients alone."""
    return bake_again(out, new_out, watch)

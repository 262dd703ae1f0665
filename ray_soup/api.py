"""The commands as Python functions.

A recipe is a Recipe, a mapping of its keys, or the path of a YAML file. Keyword arguments in `changes` override its keys, as
in learn={"lr": 0.02} or **{"learn.lr": 0.02}. Every function that writes an output folder resumes an interrupted run; with
overwrite=True, it replaces an earlier one. All of them raise SoupError on failure. They connect to the Ray that the caller
has started with `ray.init`, and leave it running; otherwise to the cluster at RAY_ADDRESS, or they start a local Ray for as
long as the call lasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import BEST_SINGLE, DEFAULT_METHOD, Recipe, as_recipe, with_changes
from ray_soup.soups import finished
from ray_soup.soups.compare import compare as run_compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run

AnyRecipe = Recipe | Mapping[str, Any] | str | Path


# Soups


def learn(
    recipe: AnyRecipe,
    out: str | Path,
    method: str | None = None,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> Soup:
    """Learn the coefficients of a soup and write the soup to the folder or URI `out`.

    >>> soup = ray_soup.learn("recipe.yaml", "learned", learn={"epochs": 1})
    >>> soup.record["method"], [row["name"] for row in soup.rows]
    ('mehl+', ['mehl+', 'best_single'])

    If `method` is None, the method is that of the recipe if it learns coefficients or is yours, otherwise mehl+.
    """
    loaded = as_recipe(recipe)
    chosen = method or (loaded.method if loaded.info.learns or loaded.info.is_own else DEFAULT_METHOD)
    return run(with_changes(loaded, {"method": chosen, **changes}), out, progress, overwrite=overwrite)


def greedy(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> Soup:
    """Write the greedy soup to the folder or URI `out`."""
    return learn(recipe, out, "greedy", progress=progress, overwrite=overwrite, **changes)


def uniform(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> Soup:
    """Write the uniform soup to the folder or URI `out`.

    >>> soup = ray_soup.uniform("recipe.yaml", "soup", data={"test": "test.npz"})
    >>> round(soup.rows[0]["test_accuracy"], 1)
    0.8
    """
    return learn(recipe, out, "uniform", progress=progress, overwrite=overwrite, **changes)


def best_single(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> Soup:
    """Write the best single ingredient, chosen on held-out data, to the folder or URI `out` as if it were a soup."""
    return learn(recipe, out, BEST_SINGLE, progress=progress, overwrite=overwrite, **changes)


def compare(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    seeds: int = 1,
    drop_top: Sequence[int] = (),
    by_count: Sequence[int] = (),
    trained: bool = True,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
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
        overwrite: replace an earlier run in `out`.
        **changes: recipe keys to override.
    """
    options = CompareOptions(seeds, tuple(drop_top), tuple(by_count), trained)
    return run_compare(with_changes(as_recipe(recipe), changes), out, options, progress, overwrite)


def search(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> Soup:
    """Search over the keys in the recipe's section `search` with Ray Tune, and write the best soup to `out`."""
    from ray_soup.tune.search import search as run_search

    return run_search(with_changes(as_recipe(recipe), changes), out, progress, overwrite)


# Ingredients


def finetune(
    recipe: AnyRecipe,
    out: str | Path,
    *,
    progress: ProgressCallback = no_progress,
    overwrite: bool = False,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Fine-tune checkpoints by random search into the folder `out`, as the recipe's section `finetune` says.

    Returns the entries of manifest.json: file name, hyperparameters, metrics and SHA-256 of each checkpoint.
    """
    from ray_soup.tune.finetune import finetune as run_finetune

    entries = run_finetune(with_changes(as_recipe(recipe), changes), out, progress, overwrite)
    return [dict(entry) for entry in entries]


def inspect(ingredients: str | Path | Sequence[str | Path], model: str | None = None) -> dict[str, Any]:
    """Check that checkpoints fit together, reading headers only.

    >>> found = ray_soup.inspect("zoo/*.safetensors")
    >>> [ingredient["name"] for ingredient in found["ingredients"]]
    ['model_0', 'model_1', 'model_2', 'model_3']
    >>> found["tensors"]["head.weight"]
    ['float32', [10, 23]]

    Args:
        ingredients: a glob, a folder or a list of checkpoints, as under the recipe key `ingredients`.
        model: check that they match this model, too; same syntax as the recipe key `model`.

    Returns:
        What `ray-soup inspect --json` prints: name, path and bytes of each ingredient, dtype and shape of each tensor, the
        number of elements of one ingredient, and the bytes of all; with `notes` for the user.

    Raises RecipeError if there are none, IngredientError if one is broken or does not fit.
    """
    from ray_soup.task.inspection import inspect as run_inspect

    return run_inspect([str(one) for one in ([ingredients] if isinstance(ingredients, (str, Path)) else ingredients)], model)


def plan(
    recipe: AnyRecipe,
    *,
    cluster: str | None = None,
    nodes: Sequence[int] = (1,),
    price: float | None = None,
    ingredient_count: int | None = None,
    example_count: int | None = None,
    progress: ProgressCallback = no_progress,
    **changes: Any,
) -> dict[str, Any]:
    """Estimate the memory, traffic and time of `learn`: what `ray-soup plan --json` prints, in bytes and seconds.

    Args:
        recipe: a Recipe, its keys, or the path of a YAML file.
        cluster: a node of a cluster that need not exist, as in "8 x H100-80GB, 100 Gbit"; None: measure on this cluster.
        nodes: numbers of nodes of that cluster.
        price: of one of its nodes, per hour.
        ingredient_count: number of ingredients, to plan without checkpoints. Needs `cluster`.
        example_count: number of examples of each source, to plan without data. Needs `cluster`.
        progress: called with what is being done, the units done so far, and the units in total.
        **changes: recipe keys to override.
    """
    changed = with_changes(as_recipe(recipe), changes)
    if cluster is not None:
        from ray_soup.soups.cluster_plan.predict import plan_cluster

        return plan_cluster(changed, cluster, nodes, price, ingredient_count, example_count, progress)
    from ray_soup.soups.plan import plan as run_plan

    return run_plan(changed, progress)


# Finished soups


def evaluate(
    recipe: AnyRecipe,
    model: str | Path,
    split: str = "test",
    *,
    progress: ProgressCallback = no_progress,
    **changes: Any,
) -> dict[str, Any]:
    """Evaluate a checkpoint, or the folder of a soup, on a split of the recipe's data.

    >>> row = ray_soup.evaluate("recipe.yaml", "soup")
    >>> row["examples"], round(row["test_accuracy"], 1)
    (600, 0.8)

    Args:
        recipe: a Recipe, its keys, or the path of a YAML file.
        model: the checkpoint or the folder.
        split: fit, select, test (all test sets), or test_NAME.
        progress: called with what is being done, the units done so far, and the units in total.
        **changes: recipe keys to override.

    Returns:
        The figures by their keys in results.jsonl: accuracies as shares from 0 to 1, losses in nats.
    """
    return finished.evaluate(with_changes(as_recipe(recipe), changes), str(model), split, progress)


def bake(out: str | Path, new_out: str | Path, *, progress: ProgressCallback = no_progress, overwrite: bool = False) -> Soup:
    """Rebuild the soup in `out` from its coefficients and ingredients alone, and write it to `new_out`.

    >>> again = ray_soup.bake("soup", "again")
    >>> again.rows[0]["name"]
    'uniform'
    """
    return finished.bake_copy(out, new_out, progress, overwrite)


def verify(out: str | Path, *, progress: ProgressCallback = no_progress) -> list[str]:
    """Check a finished soup: digests of its files and ingredients, column sums, and the model bit for bit.

    >>> for line in ray_soup.verify("soup")[1:3]:
    ...     print(line)
    1 columns sum to 1 within 0e+00
    4 ingredients have the digests in run.json

    Returns one line per check. Raises SoupError for the first check that fails.
    """
    return finished.verify(out, progress)

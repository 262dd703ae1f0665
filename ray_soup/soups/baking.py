"""Baking on several nodes, if the cluster has several and the model has several files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray_soup.actors.messages import ModelFiles
from ray_soup.actors.on_ray import BakingPool
from ray_soup.actors.pool import ActorPool
from ray_soup.actors.ray_session import connect, has_cluster
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import CountCallback, ProgressCallback
from ray_soup.mixing.bake import bake, check_copies, plan_baking, read_bytes
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe
from ray_soup.soups.output import Output


@contextmanager
def bakers(
    recipe: Recipe, ingredients: Sequence[Ingredient], output: Output, progress: ProgressCallback
) -> Iterator[BakingPool | None]:
    """Start an actor on each node of the cluster to bake the soup, or none if one process can do it as well.

    That is so without a cluster, on a cluster of one node, for a model in one file, and for an OUT in remote storage, which
    is finished on the driver's node and then uploaded.
    """
    if recipe.shard_size is None or output.mirror is not None or not has_cluster():
        yield None
        return
    with connect():
        pool = BakingPool(recipe, ingredients)
        try:
            if pool.mesh.size > 1:
                pool.setup(progress, (str(output.state("begun.json")),))
            yield pool if pool.mesh.size > 1 else None
        finally:
            pool.close()


def bake_whole(
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    path: Path,
    progress: CountCallback,
    shard_size: int | None,
    pool: tuple[ActorPool, tuple[int, ...]] | None,
) -> Path:
    """Write the soup's model, as `bake` does; by actors if they are on several nodes and it has several files.

    Args:
        recipe: for the dtype of the model.
        coefficients: the coefficients of the soup.
        ingredients: the ingredients that they refer to.
        path: the file to write.
        progress: called with the bytes read so far and in total.
        shard_size: maximum bytes of tensors per file; None: one file.
        pool: actors that see the folder of `path`, and the numbers of the ingredients among those that they have; None: this
            process writes the model.
    """
    files = plan_baking(coefficients, ingredients, path, recipe.out_dtype, shard_size)
    if pool is None or pool[0].nodes < 2 or len(files.files) < 2:
        return bake(coefficients, ingredients, path, None, progress, recipe.out_dtype, shard_size)
    check_copies(ingredients)
    total = read_bytes(coefficients, ingredients, files)
    actors, subset = pool
    model = ModelFiles(subset, coefficients, str(path), recipe.out_dtype, shard_size)
    with files.removed_on_error():
        actors.bake(model, files, lambda done: progress(min(done, total), total))
        return files.write_index()

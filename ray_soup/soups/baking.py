"""Baking on several nodes, if the cluster has several and the model has several files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ray_soup.actors.messages import ModelFiles
from ray_soup.actors.ray_session import connect, has_cluster
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import CountCallback, ProgressCallback
from ray_soup.mixing.bake import bake, check_copies, plan_baking, read_bytes
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.shard_files import ShardFiles
from ray_soup.recipe import Recipe
from ray_soup.soups.output import Output

if TYPE_CHECKING:
    from ray_soup.actors.on_ray import BakingPool
    from ray_soup.actors.pool import ActorPool


class Writers(NamedTuple):
    """Actors that may write a model's files."""

    pool: ActorPool
    subset: tuple[int, ...]
    """The numbers of the soup's ingredients among those that the actors have."""
    output: Output
    """Where the model goes."""

    def are_needed(self, recipe: Recipe, files: ShardFiles) -> bool:
        """Return whether they write these files: several files, on several nodes, which nothing changes on this one."""
        changed_here = self.output.mirror is not None and (recipe.polish, recipe.evaluate) != (None, None)
        return self.pool.nodes > 1 and len(files.files) > 1 and not changed_here


@contextmanager
def bakers(
    recipe: Recipe, ingredients: Sequence[Ingredient], output: Output, progress: ProgressCallback
) -> Iterator[BakingPool | None]:
    """Start an actor on each node of the cluster to bake the soup, or none if one process can do it as well.

    That is so without a cluster, on a cluster of one node, and for a model in one file.
    """
    if recipe.shard_size is None or not has_cluster():
        yield None
        return
    from ray_soup.actors.on_ray import BakingPool

    with connect():
        pool = BakingPool(recipe, ingredients)
        try:
            if pool.mesh.size > 1:
                pool.setup(progress, (str(output.state("begun.json")),) if output.mirror is None else ())
            yield pool if pool.mesh.size > 1 else None
        finally:
            pool.close()


def all_of(pool: ActorPool | None, ingredients: Sequence[Ingredient], output: Output) -> Writers | None:
    """Return the actors of a pool that has exactly these ingredients; None without a pool."""
    return None if pool is None else Writers(pool, tuple(range(len(ingredients))), output)


def bake_whole(
    recipe: Recipe,
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    path: Path,
    progress: CountCallback,
    shard_size: int | None,
    writers: Writers | None,
) -> Path:
    """Write the soup's model, as `bake` does; by actors if they are on several nodes and it has several files.

    Args:
        recipe: for the dtype of the model.
        coefficients: the coefficients of the soup.
        ingredients: the ingredients that they refer to.
        path: the file to write. For a remote OUT, actors upload the files, and here are only their headers.
        progress: called with the bytes read so far and in total.
        shard_size: maximum bytes of tensors per file; None: one file.
        writers: actors that see the folder of `path` or the URI; None: this process writes the model.
    """
    files = plan_baking(coefficients, ingredients, path, recipe.out_dtype, shard_size)
    if writers is None or not writers.are_needed(recipe, files):
        return bake(coefficients, ingredients, path, None, progress, recipe.out_dtype, shard_size)
    check_copies(ingredients)
    total = read_bytes(coefficients, ingredients, files)
    mirror = writers.output.mirror
    files = replace(files, uri="" if mirror is None else mirror.baked_uri)
    model = ModelFiles(writers.subset, coefficients, str(path), recipe.out_dtype, shard_size, uri=files.uri)
    with files.removed_on_error():
        writers.pool.bake(model, files, lambda done: progress(min(done, total), total))
        if mirror is not None:
            mirror.baked |= files.write_stand_ins()
        return files.write_index()

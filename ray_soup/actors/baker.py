"""Baking on several nodes: actors that write some of a model's files each, and need neither the model nor the data.

The files of a model are divided among the actors, so every byte of the ingredients is read by one of them. A lost actor is
re-created and writes its files again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from ray_soup.actors.messages import ModelFiles, SetupInfo, Stream
from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.bake import bake_files, plan_baking

HEARTBEAT_S = 0.5
"""Seconds between two reports of an actor."""


class Baker:
    """An actor that writes files of a soup's model; public methods are the calls that the driver may make."""

    def __init__(self, ingredients: Sequence[Ingredient], threads: int | None) -> None:
        self.ingredients, self.threads = ingredients, threads

    def setup(self, seen: tuple[str, ...] = ()) -> Stream[SetupInfo]:
        """Check that this node sees the ingredients and the local files `seen` by the driver. Raises RecipeError."""
        check_paths(self.ingredients, seen)
        yield SetupInfo({}, None, {}, "", socket.gethostname())

    def bake(self, model: ModelFiles) -> Stream[int]:
        """Write files of a model, as `bake` in this module does."""
        yield from bake(self.ingredients, model, self.threads)

    def hash(self, chosen: Sequence[int]) -> list[str]:
        """Return the SHA-256 of the ingredients with these numbers."""
        return hash_ingredients([self.ingredients[k] for k in chosen])


def bake(ingredients: Sequence[Ingredient], model: ModelFiles, threads: int | None) -> Stream[int]:
    """Write files of a soup's model.

    The heartbeats have the bytes of ingredients read so far; the answer is how many were read in all.
    Raises SoupError as `bake_files` does.

    Args:
        ingredients: all ingredients of the run.
        model: the files to write.
        threads: number of threads that read and mix; None: as many as CPUs and memory allow.
    """
    chosen = [ingredients[k] for k in model.subset]
    planned = plan_baking(model.coefficients, chosen, Path(model.path), model.out_dtype, model.shard_size)
    files = planned.part(model.first, model.stop)
    read, at = 0, time.monotonic()
    for nbytes in bake_files(model.coefficients, chosen, files, threads):
        read += nbytes
        if time.monotonic() - at >= HEARTBEAT_S:
            yield "mixing", read, 0
            at = time.monotonic()
    yield "mixing", read, 0
    yield read


def check_paths(ingredients: Sequence[Ingredient], seen: tuple[str, ...]) -> None:
    """Check that this node sees the files of the ingredients, and local files `seen` by the driver. Raises RecipeError."""
    files = [(f, size) for i in ingredients for f, size in zip(i.files, i.sizes, strict=True)]
    for path, size in [*((path, None) for path in seen), *files]:
        if storage.is_remote(path):
            continue
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found is None or size not in (None, found):
            what = "does not exist" if found is None else f"has {found:,} bytes instead of {size:,} (on the driver)"
            raise RecipeError(
                f"{path} {what} on the node {socket.gethostname()}. Put ingredients, data and OUT where every node sees "
                "them: a shared disk, or a URI such as s3://BUCKET/...."
            )

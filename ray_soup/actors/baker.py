"""Baking on several nodes: actors that write some of a model's files each, and need neither the model nor the data.

The files of a model are divided among the actors, so every byte of the ingredients is read by one of them. A lost actor is
re-created and writes its files again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_soup.actors.messages import ModelFiles, SetupInfo, Stream
from ray_soup.actors.versions import own_versions
from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.cache import scratch
from ray_soup.io.hashing import hash_ingredients, sha256_written
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.bake import bake_files, plan_baking
from ray_soup.mixing.shard_files import ShardFiles

HEARTBEAT_S = 0.5
"""Seconds between two reports of an actor."""


class Baker:
    """An actor that writes files of a soup's model; public methods are the calls that the driver may make."""

    def __init__(self, ingredients: Sequence[Ingredient], threads: int | None) -> None:
        self.ingredients, self.threads = ingredients, threads

    def setup(self, seen: tuple[str, ...] = ()) -> Stream[SetupInfo]:
        """Check that this node sees the ingredients and the local files `seen` by the driver. Raises RecipeError."""
        check_paths(self.ingredients, seen)
        yield SetupInfo({}, None, {}, "", socket.gethostname(), versions=own_versions())

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
    read, at = 0, time.monotonic()
    for nbytes in _written(ingredients, model, threads):
        read += nbytes
        if time.monotonic() - at >= HEARTBEAT_S:
            yield "mixing", read, 0
            at = time.monotonic()
    yield "mixing", read, 0
    yield read


def _written(ingredients: Sequence[Ingredient], model: ModelFiles, threads: int | None) -> Iterator[int]:
    """Write the files, and upload them if they go to a URI; yield the bytes read since the last time."""
    chosen = [ingredients[k] for k in model.subset]

    def planned(path: Path) -> ShardFiles:
        return plan_baking(model.coefficients, chosen, path, model.out_dtype, model.shard_size)

    if not model.uri:
        yield from bake_files(model.coefficients, chosen, planned(Path(model.path)).part(model.first, model.stop), threads)
        return
    with scratch() as folder:
        files = planned(folder / Path(model.path).name)
        for number in range(model.first, model.stop):  # one at a time: the disk need not hold more
            part = files.part(number, number + 1)
            yield from bake_files(model.coefficients, chosen, part, threads)
            for file in part.files:
                target = storage.join(model.uri, file.name)
                storage.upload(file, target)
                storage.write_bytes(sha256_written(file).encode(), f"{target}.sha256")
            part.remove()
            yield 0


def check_paths(ingredients: Sequence[Ingredient], seen: tuple[str, ...]) -> None:
    """Check that this node sees the files of the ingredients, and local files `seen` by the driver. Raises RecipeError."""
    files = [(f, size) for i in ingredients for f, size in zip(i.files, i.sizes, strict=True)]
    for path, size in [*((path, None) for path in seen), *files]:
        if storage.is_remote(path):
            continue
        found = os.path.getsize(path) if os.path.exists(path) else None
        if found is None or size not in (None, found):
            what = "does not exist" if found is None else f"has {found:,} bytes instead of {size:,} (on the driver)"
            raise not_seen(path, what, socket.gethostname())


def not_seen(path: str, what: str, host: str) -> RecipeError:
    """Return the error for a file of the driver that another node does not see."""
    return RecipeError(
        f"{path} {what} on the node {host}. Put ingredients, data and OUT where every node sees them: a shared disk, or a "
        "URI such as s3://BUCKET/...."
    )

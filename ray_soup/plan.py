"""What a run will take, before it starts: mesh, memory, traffic and time, from the recipe, the headers and a calibration.

The calibration is one actor of the mesh on the cluster, with the model and the data of the recipe: about two seconds, after
the data is decoded, which the run to come finds in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_soup.actors import Actors, Watch, actor_bytes, connect, quiet, resolve_mesh
from ray_soup.blocks import partition
from ray_soup.data import cut
from ray_soup.directions import has_store
from ray_soup.errors import RecipeError
from ray_soup.hyperplane import ITEMSIZE
from ray_soup.learn import model_batches
from ray_soup.outcomes import test_sets
from ray_soup.pipeline import CALIBRATION, CALIBRATION_WHILE_CHOOSING, LEARNED, model_batch_in, prepare, recalibrates
from ray_soup.recipe import Recipe
from ray_soup.shard import Calibration, Mesh

CALL_S = 0.002  # a round trip to an actor, and the driver's own step
START_S = 9.0  # actors that import, compile, load and choose a precision; and the report


def plan(recipe: Recipe, watch: Watch = quiet) -> dict[str, Any]:
    """Figures of a run of `recipe` on this cluster: counts, bytes and seconds, by names. Raises SoupError."""
    ingredients, layout = prepare(recipe)
    if recipe.method not in LEARNED:
        raise RecipeError(f"plan: {recipe.method} learns nothing; it is over when each ingredient was evaluated once.")
    count = len(ingredients)
    with connect():
        mesh, cpus = resolve_mesh(recipe, layout.numel, count, watch)
        model_batch = model_batch_in(recipe, layout.numel, count, mesh)
        actors = Actors(recipe, ingredients, Mesh(1, 1), cpus)
        try:
            ready = actors.setup(watch)
            seen = actors.calibrate(model_batch, -(-recipe.learn.batch_size // mesh.size), watch)
        finally:
            actors.close()
    sizes = {name: len(s) for name, s in cut(recipe.data, ready.sizes, ready.fit_digests, recipe.learn.seed).items()}
    blocks = partition(layout, recipe.blocks).count
    options = recipe.learn
    turns = len(model_batches(count, model_batch, options.seed, options.models_epochs))
    per_epoch = -(-sizes["fit"] // options.batch_size)
    last = sizes["fit"] - (per_epoch - 1) * options.batch_size
    slice_ = -(-layout.numel // mesh.shards)
    row_bytes = slice_ * ITEMSIZE[recipe.directions.dtype]
    combine, project = (model_batch * row_bytes * s for s in (seen.combine_s, seen.project_s))

    def step_s(examples: int) -> float:
        """Of a batch: what every shard does whole, and its part of the examples."""
        return combine + project + _passes(seen, seen.step_s, -(-examples // mesh.size)) + CALL_S * mesh.size

    def look_s(examples: int) -> float:
        return combine + _passes(seen, seen.forward_s, -(-examples // mesh.size)) + CALL_S * mesh.size

    full, short = step_s(options.batch_size), step_s(last)
    epoch_s = (per_epoch - 1) * full + short + look_s(sizes["select"])
    learning = turns * options.epochs * epoch_s + look_s(sizes["select"])
    anew = recalibrates(recipe, layout, ingredients)  # at every beginning and after every epoch
    if anew:
        learning += turns * (options.epochs + 1) * look_s(min(sizes["fit"], CALIBRATION_WHILE_CHOOSING))
    read = sum(i.nbytes for i in ingredients)
    stored = has_store(ingredients, layout, recipe.directions.dtype)
    store_s = 0.0 if stored else read * max(1.5 * seen.hash_s / max(1, int(cpus)), seen.read_s)
    looked = (
        sizes["select"] + sum(sizes[name] for name in test_sets(sizes)) + (min(sizes["fit"], CALIBRATION) if anew else 0)
    )
    final = look_s(looked) + read * max(0.1 * seen.hash_s, seen.read_s)
    memory = actor_bytes(recipe, layout.numel, model_batch, mesh.shards, seen.peak_bytes - 8 * layout.numel)
    vector = 8 * layout.numel * (mesh.shards - 1) // mesh.shards
    return {
        "method": recipe.method,
        "ingredients": count,
        "parameters": layout.numel,
        "blocks": blocks,
        "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus, "gpus": recipe.actors.gpus},
        "model_batch": model_batch,
        "examples": sizes,
        "memory_bytes_per_actor": int(memory),
        "store_bytes_per_node": int(layout.numel * (4 + count * ITEMSIZE[recipe.directions.dtype])),
        "store_is_there": stored,
        "bytes_read": read,
        "steps": turns * options.epochs * per_epoch,
        "image_passes": turns * options.epochs * sizes["fit"],
        "step_s": full,
        "step_parts_s": {"combine": combine, "passes": full - combine - project - CALL_S * mesh.size, "project": project},
        "traffic_bytes_per_step_and_actor": int(12 * model_batch * blocks + 4 * options.batch_size // mesh.size + vector),
        "seconds": {"start": START_S, "store": store_s, "learning": learning, "mixing and evaluation": final},
        "wall_s": START_S + store_s + learning + final,
    }  # fmt: skip


def _passes(seen: Calibration, seconds: float, examples: int) -> float:
    return seconds * examples / seen.images


def lines(found: dict[str, Any]) -> list[list[str]]:
    """The plan as a table of two columns."""
    mesh, count, m = found["mesh"], found["ingredients"], found["model_batch"]
    each = f"{mesh['cpus']:g} CPUs" + (f", {mesh['gpus']:g} GPUs" if mesh["gpus"] else "")
    memory, there = found["memory_bytes_per_actor"], ", already made" if found["store_is_there"] else ""
    step, whole = (", ".join(f"{name} {_time(s)}" for name, s in found[key].items()) for key in ("step_parts_s", "seconds"))
    return [
        ["ingredients", f"{count} of {found['parameters'] / 1e6:,.1f} M parameters, {_size(found['bytes_read'])}"],
        ["coefficients", f"{count} x {found['blocks']} blocks, {m} ingredients move at a time"],
        ["actors", f"{_many(mesh['replicas'], 'replica')} x {_many(mesh['shards'], 'shard')}, {each} each"],
        ["memory", f"{_size(memory)} an actor"],
        ["disk", f"{_size(found['store_bytes_per_node'])} on each node{there}"],
        ["traffic", f"{_size(found['traffic_bytes_per_step_and_actor'])} a step and actor"],
        ["steps", f"{found['steps']:,}, {found['image_passes']:,} images"],
        ["a step", f"{_time(found['step_s'])}: {step}"],
        ["time", f"{_time(found['wall_s'])}: {whole}"],
        ["for a manifest", f"{mesh['replicas'] * mesh['shards']} workers of {each}, {_gib(memory)} memory"],
    ]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _size(nbytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def _gib(nbytes: float) -> str:
    return f"{int(np.ceil(nbytes * 1.2 / 2**30))}Gi"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

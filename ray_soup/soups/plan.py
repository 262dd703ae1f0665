"""Estimate what a run will cost before it starts: mesh, memory, traffic and time.

The figures come from the recipe, the headers and a short measurement: some actors of the mesh on the cluster, with the model
and the data of the recipe, for about two seconds after the data is decoded. The run that follows finds the decoded data in
the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_soup.actors.messages import Mesh, StepTimings
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import actor_bytes, resolve_mesh
from ray_soup.actors.ray_session import connect
from ray_soup.errors import RecipeError
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import partition
from ray_soup.mixing.stores import has_store
from ray_soup.recipe import Recipe
from ray_soup.soups.costs import Costs, Workload, measured_speeds, run_seconds
from ray_soup.soups.granularity import resolved_blocks, stages
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.report.measures import measures_in, measures_of, recorded
from ray_soup.soups.report.text import duration, size_in_bytes
from ray_soup.soups.session import planned_model_batch
from ray_soup.task.data import cut_splits
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.preprocessing import completed

TOGETHER = 4  # actors at most that measure at the same time: without GPUs, those of a node share the bandwidth of its memory


@shown_in_notebooks
def plan(recipe: Recipe, progress: ProgressCallback = no_progress) -> dict[str, Any]:
    """Return what a run of `recipe` on this cluster will cost: counts, bytes and seconds by name. Raises SoupError."""
    recipe = resolved_recipe(recipe)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe)
    recipe = completed(recipe, inputs.adopted)
    if not recipe.info.learns:
        raise RecipeError(
            f"plan: the method {recipe.method} learns nothing; expected a method that learns coefficients. Choose one, as "
            "in method=mehl+."
        )
    numel, count = inputs.held
    progress("connecting to Ray", 0, 1)
    with connect():
        mesh, cpus = resolve_mesh(recipe, numel, count, progress)
        model_batch = planned_model_batch(recipe, inputs, mesh)
        pool = RayPool(recipe, inputs.ingredients, Mesh(1 if recipe.actors.gpus else min(mesh.size, TOGETHER), 1), cpus)
        try:
            setup = pool.setup(progress)
            timings = pool.time_step(model_batch, -(-recipe.learn.batch_size // mesh.size), progress)
        finally:
            pool.close()
    splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
    sizes = {name: len(split) for name, split in splits.items()}
    kind = resolved_blocks(recipe.blocks, inputs.layout, len(inputs.ingredients), sizes["fit"], not inputs.frozen)
    work = Workload(
        recipe, len(inputs.ingredients), inputs.layout.numel, partition(inputs.layout, kind).count, model_batch, sizes,
        sum(i.nbytes for i in inputs.ingredients), bool(inputs.recalibrated(recipe)), bool(inputs.frozen),
        has_store(list(inputs.ingredients), inputs.layout, recipe.directions.dtype), stages(recipe, kind),
    )  # fmt: skip
    return _figures(work, inputs, mesh, cpus, timings)


def _figures(work: Workload, inputs: Inputs, mesh: Mesh, cpus: float, timings: StepTimings) -> dict[str, Any]:
    recipe, options, numel = work.recipe, work.recipe.learn, work.parameters
    costs = Costs(work, measured_speeds(timings, recipe.actors.gpus), mesh, mesh.size)
    seconds = run_seconds(costs, cpus)
    moving = 0 if inputs.frozen else work.model_batch
    fixed = timings.peak_bytes - (1 if recipe.actors.by_layer else 8) * numel
    memory = actor_bytes(recipe, numel, moving, mesh.shards, fixed)
    if inputs.frozen:
        memory += 4 * numel // mesh.shards
    vector = 8 * numel * (mesh.shards - 1) // mesh.shards
    return {
        "method": recipe.method,
        **recorded(measures_of(recipe)),
        "ingredients": work.ingredients,
        "parameters": numel,
        "blocks": work.blocks,
        "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus, "gpus": recipe.actors.gpus},
        "model_batch": work.model_batch,
        "examples": work.sizes,
        "memory_bytes_per_actor": int(memory),
        "store_bytes_per_node": int(numel * work.stored),
        "store_is_there": work.has_store,
        "bytes_read": work.nbytes,
        "steps": work.steps,
        "image_passes": work.turns * options.epochs * work.sizes["fit"] * (1 + options.refit),
        "baseline_image_passes": work.baseline_passes,
        "step_s": costs.step_s(options.batch_size),
        "step_parts_s": {name: s for name, s in costs.step_parts(options.batch_size).items() if s},
        "traffic_bytes_per_step_and_actor": int(
            12 * work.model_batch * work.blocks + 4 * options.batch_size // mesh.size + vector
        ),
        "seconds": seconds,
        "wall_s": sum(seconds.values()),
    }


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the plan as rows of name and text."""
    mesh, count, m = found["mesh"], found["ingredients"], found["model_batch"]
    each = f"{mesh['cpus']:g} CPUs" + (f", {mesh['gpus']:g} GPUs" if mesh["gpus"] else "")
    memory, there = found["memory_bytes_per_actor"], ", already built" if found["store_is_there"] else ""
    step, whole = (
        ", ".join(f"{name} {duration(s)}" for name, s in found[key].items()) for key in ("step_parts_s", "seconds")
    )
    return [
        ["ingredients", f"{count} of {found['parameters'] / 1e6:,.1f} M parameters, {size_in_bytes(found['bytes_read'])}"],
        ["coefficients", f"{count} x {found['blocks']} blocks, {m} ingredients move at a time"],
        ["actors", f"{_many(mesh['replicas'], 'replica')} x {_many(mesh['shards'], 'shard')}, {each} each"],
        ["memory", f"{size_in_bytes(memory)} per actor"],
        ["disk", f"{size_in_bytes(found['store_bytes_per_node'])} per node{there}"],
        ["traffic", f"{size_in_bytes(found['traffic_bytes_per_step_and_actor'])} per step and actor"],
        ["steps", f"{found['steps']:,}, {found['image_passes']:,} {measures_in(found).examples}"],
        ["per step", f"{duration(found['step_s'])}: {step}"],
        ["time", f"{duration(found['wall_s'])}: {whole}"],
        ["for a manifest", f"{mesh['replicas'] * mesh['shards']} workers of {each}, {_gib(memory)} memory"],
    ]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _gib(nbytes: float) -> str:
    return f"{int(np.ceil(nbytes * 1.2 / 2**30))}Gi"

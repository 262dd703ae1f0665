"""Estimate what a run will cost before it starts: mesh, memory, traffic and time.

The figures come from the recipe, the headers and a short measurement: one actor of the mesh on the cluster, with the model
and the data of the recipe, for about two seconds after the data is decoded. The run that follows finds the decoded data in
the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from ray_soup.mixing.hyperplane import ITEMSIZE
from ray_soup.mixing.stores import has_store
from ray_soup.recipe import Recipe
from ray_soup.soups.beginnings import screens
from ray_soup.soups.granularity import resolved_blocks
from ray_soup.soups.report.measures import measures_in, measures_of, recorded
from ray_soup.soups.session import (
    CALIBRATION,
    CALIBRATION_WHILE_CHOOSING,
    Inputs,
    open_inputs,
    planned_model_batch,
)
from ray_soup.soups.turns import model_batches
from ray_soup.task.data import cut_splits
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.outcomes import test_sets

CALL_S = 0.002  # a round trip to an actor, and the driver's own work in a step
START_S = 9.0  # actors that import, compile, load and choose a precision; and the report


@dataclass(frozen=True)
class _Costs:
    """Seconds of the parts of a step on the planned mesh, computed from measurements."""

    timings: StepTimings
    mesh: Mesh
    combine_s: float
    project_s: float
    by_layer: bool = False
    """Whether every pass mixes and projects again."""

    def _passes_s(self, seconds: float, examples: int) -> float:
        return seconds * -(-examples // self.mesh.size) / self.timings.images

    def _times(self, examples: int) -> int:
        """Return how often an actor mixes the parameters for a forward pass over its part of the examples."""
        return -(-examples // (self.mesh.size * self.timings.images)) if self.by_layer else 1

    def step_s(self, examples: int) -> float:
        """Estimate a step on a batch: every shard combines and projects, and the actors share the examples."""
        passes, mixed = self._passes_s(self.timings.step_s, examples), self._times(examples)
        combines = 2 * mixed if self.by_layer else 1  # a layer runs again in the backward pass
        return combines * self.combine_s + mixed * self.project_s + passes + CALL_S * self.mesh.size

    def evaluation_s(self, examples: int) -> float:
        """Estimate a forward pass over the examples."""
        mixing = self._times(examples) * self.combine_s
        return mixing + self._passes_s(self.timings.forward_s, examples) + CALL_S * self.mesh.size


@shown_in_notebooks
def plan(recipe: Recipe, progress: ProgressCallback = no_progress) -> dict[str, Any]:
    """Return what a run of `recipe` on this cluster will cost: counts, bytes and seconds by name. Raises SoupError."""
    recipe = resolved_recipe(recipe)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe)
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
        pool = RayPool(recipe, inputs.ingredients, Mesh(1, 1), cpus)
        try:
            setup = pool.setup(progress)
            timings = pool.time_step(model_batch, -(-recipe.learn.batch_size // mesh.size), progress)
        finally:
            pool.close()
    splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
    sizes = {name: len(split) for name, split in splits.items()}
    return _figures(recipe, inputs, mesh, cpus, model_batch, sizes, timings)


def _figures(
    recipe: Recipe,
    inputs: Inputs,
    mesh: Mesh,
    cpus: float,
    model_batch: int,
    sizes: dict[str, int],
    timings: StepTimings,
) -> dict[str, Any]:
    options, numel, count = recipe.learn, inputs.layout.numel, len(inputs.ingredients)
    itemsize = ITEMSIZE[recipe.directions.dtype]
    stored, passed = count * itemsize, model_batch * itemsize  # bytes per parameter, on a node and in a step
    if inputs.frozen:  # the values of all adapters, once
        stored = passed = 4
    kind = resolved_blocks(recipe.blocks, inputs.layout, count, sizes["fit"], not inputs.frozen)
    blocks = partition(inputs.layout, kind).count
    turns = len(model_batches(count, model_batch, options.seed, options.models_epochs))
    per_epoch = -(-sizes["fit"] // options.batch_size)
    row_bytes = -(-numel // mesh.shards) * passed
    combine, project = (row_bytes * s for s in (timings.combine_s, timings.project_s))
    by_layer = recipe.actors.by_layer
    costs = _Costs(timings, mesh, combine, project, by_layer)
    seconds = _seconds(recipe, inputs, sizes, costs, turns, cpus)
    full = costs.step_s(options.batch_size)
    moving = 0 if inputs.frozen else model_batch
    memory = actor_bytes(recipe, numel, moving, mesh.shards, timings.peak_bytes - (1 if by_layer else 8) * numel)
    if inputs.frozen:
        memory += 4 * numel // mesh.shards
    vector = 8 * numel * (mesh.shards - 1) // mesh.shards
    return {
        "method": recipe.method,
        **recorded(measures_of(recipe)),
        "ingredients": count,
        "parameters": numel,
        "blocks": blocks,
        "mesh": {"replicas": mesh.replicas, "shards": mesh.shards, "cpus": cpus, "gpus": recipe.actors.gpus},
        "model_batch": model_batch,
        "examples": sizes,
        "memory_bytes_per_actor": int(memory),
        "store_bytes_per_node": int(numel * (4 + stored)),
        "store_is_there": seconds["store"] == 0.0,
        "bytes_read": sum(i.nbytes for i in inputs.ingredients),
        "steps": turns * options.epochs * per_epoch * (1 + options.refit),  # a refit takes at most as many
        "image_passes": turns * options.epochs * sizes["fit"] * (1 + options.refit),
        "baseline_image_passes": _baseline_passes(recipe, count, sizes),
        "step_s": full,
        "step_parts_s": {"combine": combine, "passes": full - combine - project - CALL_S * mesh.size, "project": project},
        "traffic_bytes_per_step_and_actor": int(12 * model_batch * blocks + 4 * options.batch_size // mesh.size + vector),
        "seconds": seconds,
        "wall_s": sum(seconds.values()),
    }  # fmt: skip


def _seconds(
    recipe: Recipe, inputs: Inputs, sizes: dict[str, int], costs: _Costs, turns: int, cpus: float
) -> dict[str, float]:
    """Return the seconds of each part of the run."""
    options, timings = recipe.learn, costs.timings
    fit, select = sizes["fit"], sizes["select"]
    per_epoch = -(-fit // options.batch_size)
    last = fit - (per_epoch - 1) * options.batch_size
    epoch_s = (per_epoch - 1) * costs.step_s(options.batch_size) + costs.step_s(last) + costs.evaluation_s(select)
    learning = turns * options.epochs * epoch_s + costs.evaluation_s(select)
    learning += options.refit * turns * options.epochs * (epoch_s - costs.evaluation_s(select))
    recalibrates, starts = bool(inputs.recalibrated(recipe)), _starts(recipe, len(inputs.ingredients))
    learning += starts * costs.evaluation_s(select)
    if recalibrates:  # at every start, that of every turn, and after every epoch, for its mean once more before the next one
        times = starts + turns * (options.epochs + 1 + options.average * (options.epochs - 1))
        learning += times * costs.evaluation_s(min(fit, CALIBRATION_WHILE_CHOOSING))
    read = sum(i.nbytes for i in inputs.ingredients)
    store = 0.0
    if not has_store(list(inputs.ingredients), inputs.layout, recipe.directions.dtype):
        store = read * max(1.5 * timings.hash_s / max(1, int(cpus)), timings.read_s)
    evaluated = select + sum(sizes[name] for name in test_sets(sizes)) + (min(fit, CALIBRATION) if recalibrates else 0)
    final = costs.evaluation_s(evaluated) + read * max(0.1 * timings.hash_s, timings.read_s)
    seconds = {"start": START_S, "store": store, "learning": learning, "mixing and evaluation": final}
    if recipe.polish is not None:
        parts, polish = costs.mesh.size * timings.images, recipe.polish
        epoch_s = timings.step_s * -(-fit // parts) + timings.forward_s * -(-select // parts)
        seconds["polish"] = len(polish.rates) * polish.epochs * epoch_s
    passes = _baseline_passes(recipe, len(inputs.ingredients), sizes)
    return seconds | ({"best single ingredient": costs.evaluation_s(passes) + read * timings.read_s} if passes else {})


def _starts(recipe: Recipe, count: int) -> int:
    """Count the soups of `count` ingredients that are evaluated on select before learning begins at one of them."""
    return 2 if recipe.start is not None else 1 + (count - 1).bit_length() if screens(recipe) else 0


def _baseline_passes(recipe: Recipe, count: int, sizes: dict[str, int]) -> int:
    """Count the forward passes for the best single ingredient: of all on select, then of the best on what is reported.

    Without this baseline, those that rank the ingredients for learn.screen.
    """
    if recipe.baseline == "none":
        return count * sizes["select"] * screens(recipe)
    return (count + 1) * sizes["select"] + sum(sizes[name] for name in test_sets(sizes))


def lines(found: dict[str, Any]) -> list[list[str]]:
    """Return the plan as rows of name and text."""
    mesh, count, m = found["mesh"], found["ingredients"], found["model_batch"]
    each = f"{mesh['cpus']:g} CPUs" + (f", {mesh['gpus']:g} GPUs" if mesh["gpus"] else "")
    memory, there = found["memory_bytes_per_actor"], ", already built" if found["store_is_there"] else ""
    step, whole = (", ".join(f"{name} {_time(s)}" for name, s in found[key].items()) for key in ("step_parts_s", "seconds"))
    return [
        ["ingredients", f"{count} of {found['parameters'] / 1e6:,.1f} M parameters, {_size(found['bytes_read'])}"],
        ["coefficients", f"{count} x {found['blocks']} blocks, {m} ingredients move at a time"],
        ["actors", f"{_many(mesh['replicas'], 'replica')} x {_many(mesh['shards'], 'shard')}, {each} each"],
        ["memory", f"{_size(memory)} per actor"],
        ["disk", f"{_size(found['store_bytes_per_node'])} per node{there}"],
        ["traffic", f"{_size(found['traffic_bytes_per_step_and_actor'])} per step and actor"],
        ["steps", f"{found['steps']:,}, {found['image_passes']:,} {measures_in(found).examples}"],
        ["per step", f"{_time(found['step_s'])}: {step}"],
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

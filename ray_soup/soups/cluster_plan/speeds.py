"""The speeds of an actor on a device: from its published figures and the work of a pass, or measured on this machine.

On a GPU, a pass takes

    max((FLOP / rate + bytes / bandwidth) * factor, operations * LAUNCH_S)

where the bytes are those of the inputs and outputs of every operation. The factors were fitted to published measurements:
see tests/benchmarks/devices.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ray_soup.actors.evaluation import FLOAT32
from ray_soup.actors.precision import autocast, choose_precision, micro_batch_size
from ray_soup.actors.timing import SYNTHETIC_BYTES, median_seconds
from ray_soup.mixing.hyperplane import synthetic_plane
from ray_soup.mixing.store_format import CHUNK, ITEMSIZE
from ray_soup.recipe import Recipe
from ray_soup.soups.cluster_plan.devices import Cluster, Device
from ray_soup.soups.cluster_plan.shapes import Work, example_of, repeated
from ray_soup.soups.costs import LINK_S, LOOPBACK_S, Line, Speeds
from ray_soup.task.attention import FastAttention
from ray_soup.task.functions import as_in_workers
from ray_soup.task.model_spec import in_bfloat16
from ray_soup.task.models import call_as
from ray_soup.task.own_functions import objective_of
from ray_soup.task.preprocess_key import build_for

STEP, FORWARD = 1.16, 0.77
"""Seconds of a forward and backward pass, and of a forward pass alone, for each second of arithmetic and of memory traffic
at the published rates; without gradients, several operations are fused into one."""
LAUNCH_S = 8e-6  # to launch one operation from Python: assumed
BUSY = 0.7  # share of a GPU's memory bandwidth that combine and project reach: assumed
DRIVER_S = 1.6e-4  # of the driver's main thread, or of a relay's, for one call in a step: tests/benchmarks/driver.py
ROUND_TRIP_S = 1e-3  # of a call to another node
HASH_S = 1 / 1.8e9  # to hash a byte on one core, as measured on a server CPU
READ_S = 1e-9  # to read a byte from shared storage: assumed, 1 GB/s of a node


def speeds_on(device: Device, work: Work, recipe: Recipe, network: float) -> Speeds:
    """Return the speeds of an actor that has a GPU to itself, in a cluster with `network` Gbit/s."""
    weights, chosen = in_bfloat16(recipe.model), uses_bfloat16(device, recipe)

    def line(low: bool, factor: float, flops: float, nbytes: tuple[float, float], operations: int) -> Line:
        rate = device.bfloat16 if (low or weights) and device.bfloat16 else device.float32
        size = 0.5 if low and not weights else 1.0  # of an activation, compared with those that were counted
        fixed, each = (factor * n / device.bandwidth for n in nbytes)
        return Line(fixed, factor * flops / rate + size * each, operations * LAUNCH_S)

    pass_s = 1 / (BUSY * device.bandwidth)
    forward, exact = (line(low, FORWARD, work.flops, work.forward_bytes, work.operations[0]) for low in (chosen, False))
    return Speeds(
        micro_batch_size(recipe, work.layout.numel), line(chosen, STEP, 3 * work.flops, work.step_bytes, work.operations[1]),
        forward, exact, pass_s, pass_s, HASH_S, READ_S, DRIVER_S, ROUND_TRIP_S, 8e-9 / network, LINK_S,
    )  # fmt: skip


def sharing(speeds: Speeds, share: float) -> Speeds:
    """Return the speeds of an actor that has a share of a device, above 0 and at most 1, and other actors the rest.

    To launch operations takes each process as long as before.
    """
    step, forward, exact = (
        replace(line, fixed=line.fixed / share, each=line.each / share)
        for line in (speeds.step, speeds.forward, speeds.exact)
    )
    return replace(
        speeds, step=step, forward=forward, exact=exact,
        combine_s=speeds.combine_s / share, project_s=speeds.project_s / share,
    )  # fmt: skip


def uses_bfloat16(device: Device, recipe: Recipe) -> bool:
    """Return whether passes run in bfloat16: where the GPU has it, unless the recipe says otherwise."""
    if recipe.precision == "bfloat16" or in_bfloat16(recipe.model):
        return True
    return recipe.precision == "auto" and device.bfloat16 is not None


def measure_here(recipe: Recipe, work: Work, cluster: Cluster, threads: int, model_batch: int) -> Speeds:
    """Measure the speeds of an actor with `threads` threads on this machine, for a few seconds. Raises RecipeError."""
    with _threads(threads), as_in_workers():
        built = build_for(recipe)
        model, example = built.model.eval(), example_of(recipe, built)
        micro = micro_batch_size(recipe, work.layout.numel)
        few = max(1, micro // 4)
        objective = objective_of(recipe, built.objective)
        call_as(objective, model)
        run = partial(objective.outputs, model)
        precision = choose_precision(recipe, run, repeated(example, few, "cpu"))
        context = autocast(precision, torch.device("cpu"))

        def passes(count: int, backward: bool, exact: bool) -> None:
            with FastAttention():
                with torch.set_grad_enabled(backward), FLOAT32 if exact else context:
                    outputs = run(repeated(example, count, "cpu"))
                if backward:
                    torch.autograd.backward(outputs.float().sum())

        step, forward, exact = (
            _line(few, micro, *(median_seconds(partial(passes, count, *kind)) for count in (few, micro)))
            for kind in ((True, False), (False, False), (False, True))
        )
        dtype = recipe.directions.dtype
        elements = max(CHUNK, int(SYNTHETIC_BYTES / (model_batch * ITEMSIZE[dtype])))
        plane = synthetic_plane(dtype, model_batch, elements, torch.device("cpu"), threads)
        theta, base = torch.zeros(elements), torch.zeros(elements)
        x = np.full((model_batch, 1), 1e-3, np.float32)
        combine_s, project_s = (
            median_seconds(lambda: plane.combine(theta, base, x)) / plane.store.rows.nbytes,
            median_seconds(lambda: plane.project(theta)) / plane.store.rows.nbytes,
        )
        some = bytes(1 << 24)
        hash_s = median_seconds(lambda: hashlib.sha256(some).digest()) / len(some)
    wire_s = 8e-9 / cluster.network
    return Speeds(micro, step, forward, exact, combine_s, project_s, hash_s, READ_S, wire_s=wire_s, link_s=LOOPBACK_S)


def _line(few: int, many: int, few_s: float, many_s: float) -> Line:
    """Return the line through two measurements, if more examples take longer; otherwise through zero and the second one."""
    each = (many_s - few_s) / (many - few) if many > few else 0.0
    fixed = many_s - each * many
    return Line(fixed, each) if each > 0 and fixed > 0 else Line(0.0, many_s / many)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use this many threads, as in an actor."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

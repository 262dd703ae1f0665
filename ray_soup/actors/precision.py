"""Precision and size of forward and backward passes: float32 or bfloat16, and examples per micro-batch.

A model in float32 computes in bfloat16 under autocast, which converts its weights in every pass. A model with weights in
bfloat16 computes without autocast, so that its figures are those of its library.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from ray_soup.recipe import Recipe
from ray_soup.task.attention import FastAttention
from ray_soup.task.logits import MOST_OUTPUTS
from ray_soup.task.model_spec import in_bfloat16
from ray_soup.task.objective import Inputs

IN_WEIGHTS = "weights in bfloat16"
"""The precision of a model that has such weights, which needs no autocast."""
LARGE_MODEL = 5_000_000  # parameters
MICRO_BATCH_LARGE = 16
MICRO_BATCH_SMALL = 128


def micro_batch_size(recipe: Recipe, parameters: int, outputs: int = 1) -> int:
    """Choose the number of examples in one forward and backward pass.

    On a CPU, larger micro-batches need more memory for activations but are not faster.

    Args:
        recipe: the recipe.
        parameters: number of parameters of the model.
        outputs: how many numbers the model returns for one example at most.
    """
    if recipe.learn.micro_batch != "auto":
        return recipe.learn.micro_batch
    usual = MICRO_BATCH_LARGE if parameters > LARGE_MODEL else MICRO_BATCH_SMALL
    return max(1, min(recipe.learn.batch_size if recipe.actors.gpus else usual, MOST_OUTPUTS // outputs))


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware has instructions for bfloat16 matrix products."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        with open("/proc/cpuinfo") as info:
            flags = info.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(precision: str, device: torch.device, keeps: bool = True) -> AbstractContextManager[object]:
    """Return the context for forward passes: autocast for bfloat16, otherwise none. It may be entered more than once.

    If it `keeps` them, the parameters in bfloat16 stay until the context ends.
    """
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=keeps)
    return contextlib.nullcontext()


def choose_precision(recipe: Recipe, model: Callable[[Inputs], torch.Tensor], images: Inputs) -> str:
    """Choose between float32 and bfloat16, as the recipe's `precision` says; IN_WEIGHTS if the model has such weights.

    With `auto`, a GPU that supports bfloat16 uses it. A CPU that supports it uses it only if forward and backward passes of
    these inputs take at least a tenth less time: some CPUs have the instructions but are slower with them.

    Args:
        recipe: the recipe of the run.
        model: returns the outputs of the model to time, which is on the device of `images`.
        images: a batch of the model's inputs, any dtype [n, ...].
    """
    device = next(iter(images.values())).device if isinstance(images, dict) else images.device
    if in_bfloat16(recipe.model):
        return IN_WEIGHTS
    if recipe.precision != "auto":
        return recipe.precision
    if not has_bfloat16(device):
        return "float32"
    if device.type == "cuda":
        return "bfloat16"

    best = {"float32": float("inf"), "bfloat16": float("inf")}
    begun = time.perf_counter()
    for turn in range(5):  # alternating, so that a disturbance affects both; the first turn also warms up
        for precision in ("float32", "bfloat16"):
            start = time.perf_counter()
            with FastAttention():
                with autocast(precision, device):
                    logits = model(images)
                torch.autograd.backward(logits.float().sum())
            best[precision] = min(best[precision], time.perf_counter() - start)
        if turn and time.perf_counter() - begun > 0.3:
            break
    return "bfloat16" if best["bfloat16"] < 0.9 * best["float32"] else "float32"

"""Precision and size of forward and backward passes: float32 or bfloat16, and examples per micro-batch."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager

import torch

from ray_soup.recipe import Recipe
from ray_soup.task.logits import MOST_OUTPUTS
from ray_soup.task.objective import Inputs

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
    """Return the context for forward passes in float32 or bfloat16. It may be entered more than once.

    If it `keeps` them, the parameters in bfloat16 stay until the context ends.
    """
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=keeps)
    return contextlib.nullcontext()


def choose_precision(recipe: Recipe, model: torch.nn.Module, images: Inputs) -> str:
    """Choose between float32 and bfloat16, as the recipe's `precision` says.

    With `auto`, a GPU that supports bfloat16 uses it. A CPU that supports it uses it only if forward and backward passes of
    these inputs take at least a tenth less time: some CPUs have the instructions but are slower with them.

    Args:
        recipe: the recipe of the run.
        model: the model to time, on the device of `images`.
        images: a batch of the model's inputs, any dtype [n, ...].
    """
    device = next(iter(images.values())).device if isinstance(images, dict) else images.device
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
            with autocast(precision, device):
                logits = model(images)
            logits.float().sum().backward()
            best[precision] = min(best[precision], time.perf_counter() - start)
        if turn and time.perf_counter() - begun > 0.3:
            break
    return "bfloat16" if best["bfloat16"] < 0.9 * best["float32"] else "float32"

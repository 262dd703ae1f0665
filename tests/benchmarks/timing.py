"""Timing functions that all benchmarks share."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch


def seconds(work: Callable[[], Any], rounds: int = 5, of: Callable[[Sequence[float]], float] = min) -> float:
    """Time `work` after one warm-up call: the fastest round, or whatever `of` makes of the rounds."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return of(times)


def typical(work: Callable[[], Any], rounds: int = 3) -> float:
    """Time `work` after one warm-up call: the median of the rounds."""
    return seconds(work, rounds, median)


def product_rate(dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large matrix product on torch's current number of threads."""
    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.float32).to(dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def pass_flops(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Count the FLOP of one forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    return counter.get_total_flops()

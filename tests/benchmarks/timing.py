"""The one stopwatch of the benchmarks."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any


def seconds(work: Callable[[], Any], rounds: int = 5, of: Callable[[Sequence[float]], float] = min) -> float:
    """Of the rounds, one before them left out: the least, or what `of` makes of them."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return of(times)


def typical(work: Callable[[], Any], rounds: int = 3) -> float:
    """The median of the rounds, one before them left out."""
    return seconds(work, rounds, median)

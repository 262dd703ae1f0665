"""Measurements of one actor: the time of each part of a step, and peak memory."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ray_soup.actors.evaluation import score
from ray_soup.actors.messages import Heartbeat, StepTimings
from ray_soup.actors.precision import autocast, choose_precision
from ray_soup.actors.replica import Replica
from ray_soup.io import storage
from ray_soup.io.disk import reading_threads
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lifting import group_of
from ray_soup.mixing.hyperplane import Hyperplane, synthetic_plane
from ray_soup.mixing.store_format import CHUNK, ITEMSIZE
from ray_soup.task.attention import FastAttention
from ray_soup.task.data import Split

SYNTHETIC_BYTES = 1 << 28  # of synthetic directions: more than a processor's cache holds


def time_step(
    replica: Replica, ingredients: Sequence[Ingredient], model_batch: int, most: int, threads: int
) -> Generator[Heartbeat, None, StepTimings]:
    """Time the parts of a step for about two seconds, with synthetic directions.

    The value of the generator is the StepTimings.

    Args:
        replica: the replica whose model and data are used.
        ingredients: ingredients whose files are read to time the storage.
        model_batch: number of ingredients that move at a time.
        most: maximum number of examples in a pass.
        threads: number of threads that combine and project.
    """
    yield "calibrating", 0, 3
    device, dtype = replica.device, replica.recipe.directions.dtype
    source, examples = next(iter(replica.examples.items()))
    rows = np.arange(min(replica.micro_batch, most, len(examples)), dtype=np.int32)
    images, labels = examples.batch(rows, device)
    precision = autocast(choose_precision(replica.recipe, replica.outputs, images), device)

    def forward_and_backward() -> None:
        with FastAttention():
            with precision:
                logits = replica.outputs(images)
            torch.autograd.backward(replica.loss(logits.float(), labels, 0.0))

    def plane_of(elements: int) -> tuple[Hyperplane, torch.Tensor, torch.Tensor, np.ndarray]:
        synthetic = synthetic_plane(dtype, model_batch, elements, device, threads)
        theta, base = (torch.zeros(elements, device=device) for _ in range(2))
        return synthetic, theta, base, np.full((model_batch, 1), 1e-3, np.float32)

    if group_of(ingredients) is None:  # adapters need no compiled loops, which take memory once they are loaded
        plane, theta, base, x = plane_of(CHUNK)
        plane.combine(theta, base, x)
        plane.project(theta)
    reset_peak(device)
    step_s = median_seconds(forward_and_backward)
    peak = peak_memory(device)

    def forward() -> None:
        score(replica, Split(source, rows))

    exact_s = median_seconds(forward)
    with precision:
        forward_s = median_seconds(forward)
    yield "calibrating", 1, 3
    plane, theta, base, x = plane_of(max(CHUNK, int(SYNTHETIC_BYTES / (model_batch * ITEMSIZE[dtype]))))
    nbytes = plane.store.rows.nbytes
    combine_s, project_s = (
        median_seconds(lambda: plane.combine(theta, base, x)),
        median_seconds(lambda: plane.project(theta)),
    )
    yield "calibrating", 2, 3
    data = bytes(1 << 24)
    hash_s = median_seconds(lambda: hashlib.sha256(data).digest()) / len(data)
    read_s = seconds_to_read(ingredients)
    rates = combine_s / nbytes, project_s / nbytes
    return StepTimings(len(rows), forward_s, exact_s, step_s, *rates, hash_s, read_s, peak)


class Laps:
    """The seconds between marks in the work of a device; marks on a GPU do not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._start = time.perf_counter()
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """End a lap."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self, lap: int) -> float:
        """Return the seconds of a lap, whose work must be done."""
        begin, end = self._marks[lap : lap + 2]
        if not self._cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def total(self) -> float:
        """Return the seconds since the beginning, on this process's clock."""
        return time.perf_counter() - self._start


def median_seconds(work: Callable[[], object], at_least: float = 0.3) -> float:
    """Return the median seconds of `work`, run at least three times and for `at_least` seconds after a warm-up run."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def seconds_to_read(ingredients: Sequence[Ingredient], places: int = 16, size: int = 1 << 23) -> float:
    """Return the seconds per byte for reading the ingredients' files, measured on `places` random ranges of `size` bytes."""
    files = [found for i in ingredients for found in zip(i.files, i.sizes, strict=True)]
    random = np.random.default_rng()  # different ranges each time: the earlier ones are now in memory
    chosen = [files[k] for k in random.integers(len(files), size=places)]
    offsets = [int(random.integers(max(1, total - size))) for _, total in chosen]

    def read(file: tuple[str, int], offset: int) -> int:
        return len(bytes(storage.open_file(*file).read(offset, min(size, file[1] - offset))))

    start = time.perf_counter()
    with ThreadPoolExecutor(reading_threads()) as pool:
        nbytes = sum(pool.map(read, chosen, offsets))
    return (time.perf_counter() - start) / nbytes


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of this process's peak memory."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes since `reset_peak`: resident memory plus GPU memory."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        host = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), host)
    return host + (torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)

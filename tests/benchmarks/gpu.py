"""Everything that needs a GPU, in under ten minutes: `python -m tests.benchmarks gpu`, which also writes gpu.md.

    kernels    combine and project for each dtype of directions: share of the memory bandwidth, and errors relative to torch
    step       of ViT-B/32 with a model batch of 18, in bfloat16 and float32: time, share of the rate of products, bits
    published  the same step by the published procedure
    large      72 x ViT-B/32 in one model batch: time, and memory compared with what `plan --cluster` says
    shards     the same step on two GPUs, whose slices NCCL gathers; only with two GPUs
    soup       a whole soup of a small model, compared with the same on the CPU

`gpu --dry` runs the same code on a tiny model, on the CPU that stands in for a GPU (tests/gpu_on_cpu.py): its times mean
nothing. A part that fails is a row of the table, and the other parts are run.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.timing import pass_flops

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
TABLE = Path("gpu.md")
COUNT, ALL = (4, 6) if DRY else (18, 72)
MODEL = "tests.benchmarks.gpu:small_model" if DRY else "open_clip:ViT-B-32?classes=1000"
BATCHES = (8, 16) if DRY else (32, 128)
BYTES = 1 << 12 if DRY else 1 << 31  # of an array that no cache holds
SIZE = 64 if DRY else 8192  # of a large matrix product
GPU = torch.device("cuda")
Rows = dict[str, float | str]


def seconds(work: Callable[[], object], at_least: float = 0.0 if DRY else 0.3) -> float:
    """Return the median seconds of `work` on the GPU, whose work is done before the clock is read."""
    from ray_soup.actors.timing import median_seconds

    return median_seconds(work, at_least)


@dataclass(frozen=True)
class Limits:
    """What this GPU can do, as measured."""

    bandwidth: float
    """Bytes per second, of a copy: read and written."""
    products: dict[str, float]
    """FLOP per second of a large matrix product, by precision."""


def measure_limits() -> Limits:
    """Measure the limits of the first GPU."""
    source = torch.zeros(BYTES // 4, device=GPU)
    target = torch.empty(BYTES // 4, device=GPU)
    bandwidth = 2 * 4 * len(source) / seconds(lambda: target.copy_(source))
    rates = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.ones(SIZE, SIZE, device=GPU).to(dtype)
        rates[name] = 2 * SIZE**3 / seconds(lambda a=a: a @ a)
    return Limits(bandwidth, rates)


def machine(limits: Limits) -> Rows:
    """Name the machine and its limits."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}",
        "its memory (GB)": properties.total_memory / 1e9,
        "torch": torch.__version__,
        "memory bandwidth, measured (GB/s)": limits.bandwidth / 1e9,
        **{f"matrix product, {name}, measured (TFLOP/s)": rate / 1e12 for name, rate in limits.products.items()},
    }


def kernels(limits: Limits) -> Rows:
    """Measure combine and project, and compare what they return with the same in torch."""
    from ray_soup.mixing.hyperplane import combine_in_torch, project_in_torch, synthetic_plane
    from ray_soup.mixing.store_format import DTYPES
    from ray_soup.task.models import describe

    numel, rows = describe(MODEL).numel, Rows()
    for dtype in DTYPES:
        plane = synthetic_plane(dtype, COUNT, numel, GPU, 1)
        out, base = torch.zeros(numel, device=GPU), torch.linspace(0.5, 1, numel, device=GPU)
        x = np.linspace(-1e-3, 1e-3, COUNT, dtype=np.float32)[:, None]
        nbytes = plane.store.rows.nbytes
        times = {
            "combine": (seconds(lambda p=plane, o=out, b=base, x=x: p.combine(o, b, x)), nbytes + 8 * numel),
            "project": (seconds(lambda p=plane, b=base: p.project(b)), nbytes + 4 * numel),
        }
        for name, (took, moved) in times.items():
            rows[f"{name}, {COUNT} directions in {dtype} (ms)"] = 1000 * took
            rows[f"{name}, {dtype}: share of the bandwidth"] = moved / took / limits.bandwidth
        expected, sent = torch.zeros(numel, device=GPU), plane.rows().to(GPU)
        combine_in_torch(plane, sent, expected, base, x)
        rows[f"combine, {dtype}: largest error, relative to torch"] = relative(out, expected)
        in_torch = project_in_torch(plane, sent, base)
        rows[f"project, {dtype}: largest error, relative to torch"] = relative(plane.project(base), in_torch)
        plane.release()
    return rows


def recipe_of(folder: Path, count: int, precision: str, **changes: Any) -> Any:
    """Return a recipe for the first `count` ingredients in a folder, on a GPU."""
    from ray_soup.recipe import make_recipe

    return make_recipe(
        {
            "model": MODEL,
            "ingredients": [str(folder / f"model_{k}.safetensors") for k in range(count)],
            "data": {"fit": str(folder / "data.npz")},
            "precision": precision,
            "learn": {"batch_size": BATCHES[-1], "model_batch": count},
            "actors": {"gpus": 1},
            **changes,
        }
    )


def opened(recipe: Any) -> tuple[Any, np.ndarray]:
    """Return a shard whose model batch is all ingredients, and coordinates for it."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.shard import Shard
    from ray_soup.soups.inputs import open_inputs

    ingredients = open_inputs(recipe).ingredients
    shard = Shard(recipe, ingredients, Mesh(1, 1), 0, os.cpu_count() or 1)
    list(shard.setup())
    everything = np.arange(len(ingredients))
    blocks = list(shard.open_store(tuple(everything.tolist()), "tensor"))[-1].partition.count
    x = np.full((len(ingredients), blocks), 1e-3, np.float32)
    shard.begin(everything, np.zeros_like(x), shard.choose_precision())
    return shard, x


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Measure the peak of GPU memory, in bytes, in this context; it is in the list afterwards."""
    found: list[int] = []
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield found
    found.append(torch.cuda.max_memory_allocated())


def batch_of(size: int) -> Any:
    """Return the first examples of fit."""
    from ray_soup.task.data import Split

    return Split("fit", np.arange(size, dtype=np.int32))


def step(folder: Path, limits: Limits) -> Rows:
    """Measure a step in both precisions."""
    rows = Rows()
    for precision, rate in limits.products.items():
        with peak() as memory:
            shard, x = opened(recipe_of(folder, COUNT, precision))
            for size in BATCHES:
                took = seconds(lambda s=shard, x=x, b=batch_of(size): s.step(x, 1.0, b))
                part = shard.step(x, 1.0, batch_of(size))
                again = shard.step(x, 1.0, batch_of(size))
                name = f"step, {precision}, batch {size}"
                rows[f"{name} (ms)"] = 1000 * took
                rows[f"{name}: share of combine"] = part.combine_s / part.seconds
                rows[f"{name}: share of project"] = part.project_s / part.seconds
                rows[f"{name}: share of the rate of a matrix product"] = flops_of(shard, size) / took / rate
                rows[f"{name}: the same bits when repeated"] = (
                    "yes" if np.array_equal(part.gradient, again.gradient) else "no"
                )
        rows[f"step, {precision}: GPU memory (GB)"] = memory[0] / 1e9
        del shard
    return rows


def flops_of(shard: Any, size: int) -> float:
    """Count the FLOP of a forward and backward pass over some examples."""
    images, _ = shard.replica.examples["fit"].batch(np.arange(1), shard.device)
    return size * pass_flops(shard.replica.model, images)


def published(folder: Path, before: Rows) -> Rows:
    """Measure a step of the published procedure, which is in float32, on the GPU."""
    rows = Rows()
    with peak() as memory:
        for size, took in published_seconds(folder).items():
            rows[f"published procedure, batch {size} (ms)"] = 1000 * took
            for precision in ("bfloat16", "float32"):
                own = float(before.get(f"step, {precision}, batch {size} (ms)", np.nan))
                rows[f"published procedure / step in {precision}, batch {size}"] = 1000 * took / own
    rows["published procedure: GPU memory (GB)"] = memory[0] / 1e9
    return rows


def published_seconds(folder: Path) -> dict[int, float]:
    """Measure a step of the published procedure on the GPU, by batch."""
    from ray_soup.io.find import open_ingredients
    from ray_soup.task.models import build
    from tests.benchmarks.reference import Reference

    model = build(MODEL).model.eval().to(GPU)
    names = [name for name, _ in model.named_parameters()]
    found = open_ingredients([str(folder / f"model_{k}.safetensors") for k in range(COUNT)])
    zoo = torch.stack([torch.cat([i.read(n).float().flatten() for n in names]).to(GPU) for i in found])
    side = Reference(model, zoo)
    side.begin(list(range(COUNT)), zoo.mean(dim=0), 0.01, 1000)
    images, labels = (torch.from_numpy(array).to(GPU) for array in np.load(folder / "data.npz").values())
    return {size: seconds(lambda s=size: side.step(images[:s], labels[:s])) for size in BATCHES}


def large(folder: Path, limits: Limits) -> Rows:
    """Measure a step that moves all ingredients, and its memory, which is compared with the plan's."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.io.progress import no_progress
    from ray_soup.soups.cluster_plan.devices import parse_cluster
    from ray_soup.soups.cluster_plan.predict import CONTEXT_BYTES, open_case

    count = len(list(folder.glob("model_*.safetensors")))
    recipe = recipe_of(folder, count, "bfloat16")
    with peak() as found:
        start = time.perf_counter()
        shard, x = opened(recipe)
        ready = time.perf_counter() - start
        took = seconds(lambda: shard.step(x, 1.0, batch_of(BATCHES[-1])))
    case = open_case(recipe, parse_cluster("1 x H100-80GB"), count, None, no_progress)
    planned = case.memory(count, Mesh(1, 1)) - CONTEXT_BYTES  # which torch does not count
    name = f"{count} in one model batch, {BATCHES[-1]} examples"
    return {
        f"{name}: step (ms)": 1000 * took,
        f"{name}: ready to learn (s)": ready,
        f"{name}: GPU memory (GB)": found[0] / 1e9,
        f"{name}: planned / measured memory, without the CUDA context": planned / found[0],
        f"{name}: bytes of directions / step, share of the bandwidth": 2 * shard.store.rows.nbytes / took / limits.bandwidth,
    }


def shards(folder: Path) -> Rows:
    """Measure a step of two shards, on a GPU each, and compare its gradient with that of one."""
    if not DRY and torch.cuda.device_count() < 2:
        return {"two shards through NCCL": "not measured: there is one GPU"}
    whole, x = opened(recipe_of(folder, COUNT, "float32"))
    expected = whole.step(x, 1.0, batch_of(BATCHES[-1])).gradient
    context = multiprocessing.get_context("spawn")
    ports, answers = context.Queue(), context.Queue()
    workers = [context.Process(target=one_shard, args=(folder, number, ports, answers)) for number in range(2)]
    for worker in workers:
        worker.start()
    try:
        found = [answers.get(timeout=120) for _ in workers]
    finally:
        for worker in workers:
            worker.join(20)
            worker.kill()
    gradient = sum(part for part, _ in found)
    return {
        f"two shards through NCCL, float32, batch {BATCHES[-1]} (ms)": 1000 * max(took for _, took in found),
        "two shards: largest error of the gradient, relative to one": relative(gradient, expected),
    }


def one_shard(folder: Path, number: int, ports: Any, answers: Any) -> None:
    """Be one of two shards, each with its own GPU and half of the batch."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
    with device():
        from ray_soup.actors.messages import Mesh
        from ray_soup.actors.rendezvous import share_secret
        from ray_soup.actors.shard import Shard
        from ray_soup.soups.inputs import open_inputs

        share_secret(b"of a benchmark")
        recipe = recipe_of(folder, COUNT, "float32")
        shard = Shard(recipe, open_inputs(recipe).ingredients, Mesh(1, 2), number, 2)
        list(shard.setup())
        if number == 0:
            port = shard.open_group("127.0.0.1")
            for _ in range(2):
                ports.put(port)
        shard.join("127.0.0.1", ports.get(timeout=60))
        blocks = list(shard.open_store(tuple(range(COUNT)), "tensor"))[-1].partition.count
        x = np.full((COUNT, blocks), 1e-3, np.float32)
        shard.begin(np.arange(COUNT), np.zeros_like(x), "float32")
        batch, times = batch_of(BATCHES[-1]).parts(2)[number], []
        for _ in range(6):  # as often on both
            start = time.perf_counter()
            part = shard.step(x, 1.0, batch)
            times.append(time.perf_counter() - start)
        answers.put((part.gradient, float(np.median(times[1:]))))
        shard.group.leave()


def small_model() -> torch.nn.Module:
    """Build a model of four tensors."""
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def soup() -> Rows:
    """Learn a soup of a small model on the GPU, twice, and on the CPU."""
    import ray_soup

    torch.manual_seed(0)
    images, means = torch.randn(600, 8), torch.randn(4, 8)
    fit = [(images, (images @ means.T + torch.randn(600, 4)).argmax(dim=1))]
    states = [small_model().state_dict() for _ in range(4)]
    found = []
    for place in ("cpu", "cuda", "cuda"):
        learn = {"epochs": 1 if DRY else 5, "batch_size": 128}
        learned = ray_soup.mix_state_dicts(small_model().to(place), states, fit, precision="float32", learn=learn)
        found.append(learned.coefficients.values)
    return {
        "coefficients of a whole soup: largest difference between GPU and CPU": float(np.abs(found[0] - found[1]).max()),
        "coefficients of a whole soup: the same bits when repeated": "yes" if np.array_equal(*found[1:]) else "no",
    }


def relative(found: Any, expected: Any) -> float:
    """Return the largest error, relative to the largest expected value."""
    return float(abs(found - expected).max() / abs(expected).max())


def write_inputs(folder: Path) -> None:
    """Write as many ingredients as the disk has room for with their store, at most ALL, and random data."""
    from ray_soup.task.models import build, describe
    from tests.benchmarks.ingredients import write_zoo

    room = int(shutil.disk_usage(folder).free * 0.9 / (5 * describe(MODEL).numel))
    write_zoo(folder, MODEL, min(ALL, room))
    random, shape = np.random.default_rng(0), (8,) if DRY else (3, 224, 224)
    images = random.standard_normal((BATCHES[-1], *shape)).astype(np.float32)
    classes = build(MODEL).model(torch.from_numpy(images[:1])).shape[1]
    np.savez(folder / "data.npz", images=images, labels=random.integers(0, classes, len(images)))


def device() -> contextlib.AbstractContextManager[object]:
    """Return the context in which this process has a GPU: its own, or with --dry the CPU that stands in for it."""
    if not DRY:
        return contextlib.nullcontext()
    from tests.gpu_on_cpu import gpu

    return gpu()


def write_table(rows: Rows, began: float) -> None:
    """Write the rows that there are so far."""
    title = "Dry run on a CPU: times and memory mean nothing" if DRY else "Measured on a GPU"
    lines = [f"{title}; {time.perf_counter() - began:.0f} s so far.", "", "| what | value |", "|---|---:|"]
    lines += [f"| {name} | {value if isinstance(value, str) else f'{value:,.4g}'} |" for name, value in rows.items()]
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> dict[str, float]:
    """Run every part, whether or not the others fail; write the table after each."""
    if not DRY and not torch.cuda.is_available():
        sys.exit("gpu: torch finds no GPU here. --dry runs the same code on the CPU, at a tiny size.")
    began, rows = time.perf_counter(), Rows()
    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made, device():
        folder = Path(made)
        os.environ["RAY_SOUP_CACHE"] = str(folder / "cache")
        limits = measure_limits()
        rows |= machine(limits)
        parts: dict[str, Callable[[], Rows]] = {
            "kernels": lambda: kernels(limits),
            "inputs": lambda: write_inputs(folder) or {},
            "step": lambda: step(folder, limits),
            "published": lambda: published(folder, rows),
            "large": lambda: large(folder, limits),
            "shards": lambda: shards(folder),
            "soup": soup,
        }
        for name, part in parts.items():
            start = time.perf_counter()
            try:
                rows |= part()
            except Exception as error:
                traceback.print_exc()
                rows[f"{name}: failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            rows[f"{name}: took (s)"] = time.perf_counter() - start
            write_table(rows, began)
    failed = [name for name in rows if name.endswith(": failed")]
    if failed:
        sys.exit(f"gpu: {', '.join(failed)}; see above, and {TABLE.resolve()}.")
    print(f"The table is in {TABLE.resolve()}.")
    return {name: value for name, value in rows.items() if not isinstance(value, str)}

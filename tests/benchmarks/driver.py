"""The driver's overhead in a step of 1 to 256 actors: stubs that answer payloads of true size and compute nothing.

A stub answers as an actor of ViT-B/32 does: m x 154 coordinates in, as many projected gradients out. As 256 processes do not
fit into the memory of a small machine, the stubs share at most PROCESSES of them; the driver still makes one call, and reads
one answer, for every rank. *wall* is the whole step: on a machine with few cores the stubs take most of it. *main thread* is
the time that the driver's own thread is busy, the lower bound on a cluster, where the stubs run on other machines and Ray's
threads on other cores; *process* includes these threads.

The overhead is compared with a step of ViT-B/32 on 128 images per GPU at the rate that timm publishes for training on an
RTX 3090 with mixed precision (results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import psutil

SIZES = (1, 16, 64, 256)
PROCESSES = 16
MODEL_BATCHES = (18, 72)
BLOCKS = 154  # tensors of ViT-B/32 and its head
IMAGES = 128  # of each GPU in a step
RATE = 1703.57  # images per second, forward and backward passes and optimizer, as published
ROUNDS = 20


class Stub:
    """Answers like a Shard, at once; it is several ranks' actor."""

    def __init__(self, versions: dict[str, str]) -> None:
        self.versions = versions

    def setup(self, seen: tuple[str, ...]) -> Any:
        """Report a set-up actor."""
        from ray_soup.actors.messages import SetupInfo

        yield SetupInfo({"fit": 1}, None, {}, "", "stub", versions=self.versions)

    def compare_examples(self) -> Any:
        """Report no examples."""
        yield from self.setup(())

    def packed_step(self, head: bytes, rows: bytes) -> bytes:
        """Return a gradient of the size of x."""
        from ray_soup.actors.messages import Partial
        from ray_soup.actors.relays import unpacked

        x, *_, batch = unpacked(head, rows)
        return Partial(x.astype(np.float64), 0.0, 0.0, float(len(batch)), 0.0).packed()


def stub_pool(size: int) -> Any:
    """Return a RayPool of `size` ranks that are served by stubs."""
    import ray

    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.on_ray import RayPool
    from ray_soup.actors.versions import own_versions
    from ray_soup.recipe import make_recipe

    stubs = [ray.remote(Stub).options(num_cpus=0).remote(own_versions()) for _ in range(min(size, PROCESSES))]

    class Pool(RayPool):
        def _create(self, team: Any) -> None:
            team.actors.append(stubs[team.number % len(stubs)])

    return Pool(make_recipe({"model": "tests.tiny:build", "data": {"fit": "none.npz"}}), (), Mesh(size, 1), 0)


def overhead(size: int) -> dict[str, float]:
    """Measure steps of `size` stubs, with the sum of their gradients, in milliseconds."""
    from ray_soup.actors.relays import GROUP
    from ray_soup.io.progress import no_progress
    from ray_soup.task.data import Split

    pool, process, results = stub_pool(size), psutil.Process(), dict[str, float]()
    pool.setup(no_progress)
    batch = Split("fit", np.arange(IMAGES * size, dtype=np.int32))
    for m in MODEL_BATCHES:
        x = np.full((m, BLOCKS), 1e-4, np.float32)
        until = time.monotonic() + 60
        while size > GROUP and pool._relays.started < size // GROUP:
            assert time.monotonic() < until, "the relays did not start"
            pool.step(x, 1.0, batch)
        pool.step(x, 1.0, batch)
        walls, mains, before = [], [], process.cpu_times()
        for _ in range(ROUNDS):
            wall, main = time.perf_counter(), time.thread_time()
            total = np.zeros((m, BLOCKS))
            for partial in pool.step(x, 1.0, batch):
                total += partial.gradient
            walls.append(time.perf_counter() - wall)
            mains.append(time.thread_time() - main)
        after = process.cpu_times()
        assert np.allclose(total, size * 1e-4)
        spent = after.user + after.system - before.user - before.system
        results |= {
            f"{size} actors, m = {m}: wall (ms)": 1000 * float(np.median(walls)),
            f"{size} actors, m = {m}: process (ms)": 1000 * spent / ROUNDS,
            f"{size} actors, m = {m}: main thread (ms)": 1000 * float(np.median(mains)),
            f"{size} actors, m = {m}: main thread / step of ViT-B/32": float(np.median(mains)) * RATE / IMAGES,
        }
    pool.close()
    return results


def main() -> dict[str, float]:
    """Measure every size."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        results = {"assumed step of ViT-B/32, 128 images per GPU (ms)": 1000 * IMAGES / RATE}
        for size in SIZES:
            results |= overhead(size)
        return results
    finally:
        ray.shutdown()

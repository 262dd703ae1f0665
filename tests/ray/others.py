"""Other programs on the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray


class Holder:
    """An actor of another program."""

    def hold(self) -> None: ...


@contextmanager
def held(cpus: float) -> Iterator[None]:
    """Let another program hold this many CPUs of the cluster."""
    holder = ray.remote(Holder).options(num_cpus=cpus).remote()
    ray.get(holder.hold.remote())
    try:
        yield
    finally:
        ray.kill(holder)


def all_cpus() -> float:
    """Return the CPUs of the cluster."""
    return ray.cluster_resources()["CPU"]

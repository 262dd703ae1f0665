"""The shards of one replica: their slices of the parameter vector, and the collectives among them.

Replicas that train one model together form a group of the same kind.

Each shard owns one slice for every direction. Before a forward pass the shards gather the whole vector; after the backward
pass they reduce-scatter the gradient, so that each gets its slice of the sum.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

T = TypeVar("T")

DEADLINE = timedelta(minutes=10)  # of one collective


class GroupLost(Exception):
    """Another shard of the replica is lost or does not answer; the replica must be re-created."""


@contextlib.contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupLost(str(error).partition("\n")[0]) from error


class ShardGroup:
    """Shard number `shard` of a replica of `shards` shards, for a parameter vector of `parameters` elements.

    The vector is padded to slices of equal length. This shard's slice is [low, high), without the padding.
    """

    def __init__(self, shard: int, shards: int, parameters: int, device: torch.device) -> None:
        self.shard, self.shards, self.device = shard, shards, device
        self._parameters = parameters
        self._slice = -(-parameters // shards)
        self.padded = self._slice * shards
        self.low = min(shard * self._slice, parameters)
        self.high = min(self.low + self._slice, parameters)
        self._meeting: Any = None

    def open(self, host: str) -> int:
        """Open the rendezvous of the group on shard 0, at its node `host`, and return the port."""
        self._meeting = _store_at(host, 0, self.shards, is_master=True, wait_for_workers=False)
        return int(self._meeting.port)

    def join(self, host: str, port: int) -> None:
        """Form the group with the other shards of this replica.

        Raises GroupLost if one of them does not arrive in time.
        """
        name = interface_towards(host, port)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # otherwise gloo may choose 127.0.0.1
        with _group_errors():
            store = self._meeting if self.shard == 0 else _store_at(host, port, self.shards)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.shard, world_size=self.shards, timeout=DEADLINE)

    def gather(self, vector: torch.Tensor) -> None:
        """Fill in the whole vector, in place, from the slices of all shards.

        Args:
            vector: float32 [padded]; this shard's slice is up to date.

        Raises GroupLost.
        """
        if self.shards > 1:
            with _group_errors():
                mine = vector[self.shard * self._slice : (self.shard + 1) * self._slice]
                dist.all_gather_into_tensor(vector, mine)

    def scatter(self, vector: torch.Tensor) -> torch.Tensor:
        """Return this shard's slice of the sum over the shards' vectors, float32 [high - low].

        Args:
            vector: float32 [padded].

        Raises GroupLost.
        """
        if self.shards == 1:
            return vector[: self._parameters]
        mine = torch.empty(self._slice, device=self.device)
        with _group_errors():
            dist.reduce_scatter_tensor(mine, vector)
        return mine[: self.high - self.low]

    # Replicas that train together

    def sum(self, values: torch.Tensor) -> None:
        """Replace values by their sum over the group, in place. Raises GroupLost."""
        if self.shards > 1:
            with _group_errors():
                dist.all_reduce(values)

    def share(self, values: torch.Tensor) -> None:
        """Replace values by those of the first member, in place. Raises GroupLost."""
        if self.shards > 1:
            with _group_errors():
                dist.broadcast(values, 0)

    def collect(self, value: T) -> list[T]:
        """Return the values of all members, in their order. Raises GroupLost."""
        found: list[Any] = [value] * self.shards
        if self.shards > 1:
            with _group_errors():
                dist.all_gather_object(found, value)
        return found

    def leave(self) -> None:
        """End the group."""
        if self.shards > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _store_at(host: str, port: int, shards: int, **options: bool) -> Any:
    """Return the rendezvous store of the shards of a replica."""
    return dist.TCPStore(host, port, shards, timeout=DEADLINE, **options)  # type: ignore[attr-defined]


def interface_towards(host: str, port: int) -> str | None:
    """Find the network interface whose address this machine uses to reach `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route and sends nothing
        mine = probe.getsockname()[0]
    for name, owned in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == mine for a in owned):
            return str(name)
    return None

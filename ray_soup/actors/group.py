"""The shards of one replica: their slices of the parameter vector, and the collectives among them.

Replicas that train one model together form a group of the same kind.

Each shard owns one slice for every direction. Before a forward pass the shards gather the whole vector; after the backward
pass they reduce-scatter the gradient, so that each gets its slice of the sum.

Members meet at a rendezvous of the first one, which admits only processes of the same run and closes when all have joined.
The connections that gloo or NCCL then opens between the members are neither authenticated nor encrypted.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from ray_soup.actors import rendezvous
from ray_soup.actors.rendezvous import Member, Rendezvous

T = TypeVar("T")

DEADLINE = timedelta(minutes=10)  # of one collective


class GroupLost(Exception):
    """Another shard of the replica is lost or does not answer; the replica must be re-created."""


@contextlib.contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, OSError) as error:
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
        self._meeting: Rendezvous | None = None
        self._member: Member | None = None

    def open(self, host: str) -> int:
        """Open the rendezvous of the group on shard 0, at its node `host`, and return the port."""
        self._meeting = Rendezvous(host, rendezvous.SECRET)
        return self._meeting.port

    def join(self, host: str, port: int) -> None:
        """Form the group with the other members.

        Raises GroupLost if one of them does not arrive in time; this process has then left the group, and may join another.
        """
        name = interface_towards(host, port)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # otherwise gloo may choose 127.0.0.1
        on_gpu = self.device.type == "cuda"
        try:
            with _group_errors():
                self._member = Member(host, port, rendezvous.SECRET, DEADLINE)
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=self._member, rank=self.shard, world_size=self.shards, timeout=DEADLINE,
                )  # fmt: skip
                dist.all_reduce(torch.zeros(1))  # returns after everyone has joined
        except BaseException:
            self.leave()
            raise
        finally:
            if not on_gpu:  # NCCL connects at the first collective, and asks the store as long as the group lives
                self._close_meeting()

    def _close_meeting(self) -> None:
        if self._member is not None:
            self._member.close()
        if self._meeting is not None:
            self._meeting.close()
        self._member = self._meeting = None

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
        """Replace values by their sum over the group, in place, in any order. Raises GroupLost."""
        if self.shards > 1:
            with _group_errors():
                dist.all_reduce(values)

    def add_in_order(self, total: torch.Tensor | None, vector: torch.Tensor, count: int) -> torch.Tensor:
        """Add the vectors of the first `count` members, one after another, to this member's slice of a total.

            total + v[0] + v[1] + ...      from left to right, whatever the size of the group

        Args:
            total: what was summed before; None: nothing.
            vector: float32 [n], of this member; of equal length on all members.
            count: how many members have something to add.

        Returns the new total, float32; for a group of one, all of it. Raises GroupLost.
        """
        pieces: Sequence[torch.Tensor] = [vector]
        if self.shards > 1:
            slices = vector.tensor_split(self.shards)
            mine = len(slices[self.shard])
            found = vector.new_empty(mine * self.shards)
            with _group_errors():
                dist.all_to_all_single(found, vector, [mine] * self.shards, [len(one) for one in slices])
            pieces = found.view(self.shards, mine).unbind()
        for piece in pieces[:count]:
            total = piece.clone() if total is None else total.add_(piece)
        assert total is not None
        return total

    def gather_slices(self, total: torch.Tensor, vector: torch.Tensor) -> None:
        """Fill in a vector from the members' slices of a total, as `add_in_order` returns them. Raises GroupLost."""
        vector.tensor_split(self.shards)[self.shard].copy_(total)
        if self.shards > 1:
            with _group_errors():
                for member, piece in enumerate(vector.tensor_split(self.shards)):
                    dist.broadcast(piece, member)

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
        if dist.is_initialized():
            dist.destroy_process_group()
        self._close_meeting()


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

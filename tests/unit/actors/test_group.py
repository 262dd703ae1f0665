"""Slices of the parameter vector, and the collectives among the shards of a replica."""

from __future__ import annotations

import multiprocessing
import queue
import socket
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ray_soup.actors.group import GroupLost, ShardGroup, interface_towards
from ray_soup.actors.rendezvous import share_secret
from tests.gpu_on_cpu import gpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(("parameters", "shards"), [(10, 1), (10, 2), (10, 3), (10, 4), (3, 5)])
def test_slices_cover_every_parameter_once(parameters: int, shards: int) -> None:
    groups = [ShardGroup(shard, shards, parameters, CPU) for shard in range(shards)]
    covered = [element for group in groups for element in range(group.low, group.high)]
    assert covered == list(range(parameters))
    assert {group.padded for group in groups} == {groups[0].padded}
    assert groups[0].padded % shards == 0
    assert groups[0].padded >= parameters


def test_a_single_shard_gathers_and_scatters_in_place() -> None:
    group, vector = ShardGroup(0, 1, 5, CPU), torch.arange(5.0)
    group.gather(vector)
    assert torch.equal(vector, torch.arange(5.0))
    assert group.scatter(vector).data_ptr() == vector.data_ptr()


def collective(shard: int, on_gpu: bool, addresses: Any, answers: Any) -> None:
    """Shard `shard` of 2, for 5 parameters: padded to 6."""
    with gpu() if on_gpu else nullcontext():
        on_device(shard, torch.device("cuda" if on_gpu else "cpu"), addresses, answers)


def on_device(shard: int, device: torch.device, addresses: Any, answers: Any) -> None:
    share_secret(b"of both")
    group = ShardGroup(shard, 2, 5, device)
    if shard == 0:
        addresses.put(group.open("127.0.0.1"))
        port = addresses.get(timeout=60)  # put back for itself
        addresses.put(port)
    else:
        port = addresses.get(timeout=60)
        addresses.put(port)
    group.join("127.0.0.1", port)
    vector = torch.zeros(6, device=device)
    vector[group.low : group.high] = torch.arange(5.0)[group.low : group.high] + 1
    group.gather(vector)  # for which shard 0 has returned from `join`, too
    if device.type == "cpu":
        with pytest.raises(ConnectionRefusedError):  # nobody can join any more
            socket.create_connection(("127.0.0.1", port)).close()
    mine = group.scatter((shard + 1) * torch.arange(6.0, device=device))
    total = group.add_in_order(None, (shard + 1) * torch.ones(6, device=device), 2)
    group.gather_slices(total, summed := torch.zeros(6, device=device))
    assert summed.tolist() == [3] * 6
    assert group.collect(shard) == [0, 1]
    answers.put((shard, vector.cpu().numpy(), mine.cpu().numpy()))
    group.leave()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_two_shards_gather_the_whole_vector_and_scatter_the_sum(on_gpu: bool) -> None:
    context = multiprocessing.get_context("spawn")
    addresses, answers = context.Queue(), context.Queue()
    workers = [context.Process(target=collective, args=(shard, on_gpu, addresses, answers)) for shard in range(2)]
    for worker in workers:
        worker.start()
    try:
        found = {shard: (vector, mine) for shard, vector, mine in (answers.get(timeout=60) for _ in workers)}
    except queue.Empty:
        pytest.fail("the shards did not meet")
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()
    for vector, _ in found.values():
        np.testing.assert_array_equal(vector[:5], np.arange(5) + 1)
    np.testing.assert_array_equal(np.concatenate([found[0][1], found[1][1]]), 3.0 * np.arange(5))


def test_a_process_whose_group_was_lost_while_it_formed_can_join_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(values: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer")

    try:
        group = ShardGroup(0, 1, 5, CPU)
        port = group.open("127.0.0.1")
        with monkeypatch.context() as patch:
            patch.setattr(dist, "all_reduce", lost)
            with pytest.raises(GroupLost, match="Connection closed by peer"):
                group.join("127.0.0.1", port)
        assert not dist.is_initialized()
        group = ShardGroup(0, 1, 5, CPU)
        group.join("127.0.0.1", group.open("127.0.0.1"))
        assert dist.get_world_size() == 1
    finally:
        group.leave()
    assert not dist.is_initialized()


def test_the_interface_towards_this_machine_is_the_loopback() -> None:
    assert interface_towards("127.0.0.1", 1) == "lo"

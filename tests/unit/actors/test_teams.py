"""Teams that leave, are slow, or cannot be started, in this process: who serves what, what is counted, what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_soup.actors import recovery
from ray_soup.actors.in_process import HandleKilled
from ray_soup.actors.messages import Mesh
from ray_soup.actors.teams import ATTEMPTS, Team
from ray_soup.errors import RecipeError, SoupError
from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split
from tests.conftest import InProcess, values

FIT = Split("fit", np.arange(61, dtype=np.int32))
HOST = r"\S+"


@pytest.fixture
def pool(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """Three teams that have begun a model batch, and look at the cluster before every call."""
    monkeypatch.setattr(recovery, "LOOK_EVERY_S", -1.0)
    monkeypatch.setattr(recovery, "DRAINS_EVERY_S", -1.0)
    pool = InProcess(make_recipe(values(zoo)), 3)
    pool.said = []
    pool._progress = lambda what, done, total: pool.said.append(what.removeprefix("note: "))
    for team in pool._teams:
        team.infos = [replace(info, node="host", node_id=f"node{team.number}") for info in team.infos]
    pool.x = (0.1 * np.random.default_rng(0).standard_normal((8, pool.open_all("layer").partition.count))).astype(np.float32)
    pool.begin(np.arange(8), pool.x, "float32")
    return pool


def gradients(pool: InProcess) -> np.ndarray:
    return np.stack([partial.gradient for partial in pool.step(pool.x, 1.0, FIT)])


def serving(pool: InProcess) -> list[int]:
    return [team.number for team in pool._team_of]


def test_ranks_move_before_their_node_leaves(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(pool)
    create = pool._create
    monkeypatch.setattr(pool, "_missing", lambda: 0)
    monkeypatch.setattr(pool, "_leaving_nodes", lambda: frozenset({"node1"}))
    np.testing.assert_array_equal(gradients(pool), expected)
    assert 1 not in serving(pool)
    assert (pool.counts.drained, pool.counts.lost, pool.counts.moved, pool.counts.actors) == (1, 0, 1, 2)
    assert pool.said == ["The cluster will lose the node of actor 1 on host: replica 1 moved to actor 0 on host."]
    monkeypatch.setattr(pool, "_leaving_nodes", lambda: frozenset({"node0", "node2"}))
    np.testing.assert_array_equal(gradients(pool), expected)
    assert set(serving(pool)) == {0, 2}  # nobody else can serve
    assert pool.said[1:] == [
        "The cluster will lose the node of actor 0 on host and actor 2 on host: they serve until others are ready."
    ]
    assert pool._create == create
    monkeypatch.undo()
    pool._begin()
    pool._looked = 0.0
    np.testing.assert_array_equal(gradients(pool), expected)
    assert set(serving(pool)) == {3}
    assert (pool.counts.drained, pool.counts.created, pool.counts.actors) == (3, 1, 1)


def test_a_slow_team_gets_fewer_replicas_and_its_share_again_later(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(pool)
    pool._compare_paces([1.0, 1.0, 1.0])  # whatever the real step took
    for _ in range(recovery.SLOW_STEPS):
        assert serving(pool) == [0, 1, 2]
        pool._compare_paces([1.0, 3.5, 1.1])
    assert serving(pool) == [0, 0, 2]
    assert (pool.counts.slowed, pool.counts.moved) == (1, 1)
    assert pool.said == [
        "Actor 1 on host takes 3.3 times as long for a replica as the others: replica 1 moved to actor 0 on host."
    ]
    np.testing.assert_array_equal(gradients(pool), expected)
    monkeypatch.setattr(recovery, "FORGIVEN_S", -1.0)
    np.testing.assert_array_equal(gradients(pool), expected)
    assert sorted(serving(pool)) == [0, 1, 2]
    assert pool.counts.created == 0


def test_a_team_that_is_slow_now_and_then_keeps_its_replica(pool: InProcess) -> None:
    for step in range(20):
        pool._compare_paces([1.0, 9.0 if step % recovery.SLOW_STEPS else 1.0, 1.0])
        pool._compare_paces([0.001, 0.02, 0.001])  # nobody waits for that
    assert serving(pool) == [0, 1, 2]


def test_a_replacement_that_cannot_be_started_does_not_end_the_run(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, create, tried = gradients(pool), pool._create, list[int]()

    class Broken:
        def remote(self, *_: Any) -> Any:
            def run(rank: int, hear: Any) -> None:
                raise RecipeError("zoo does not exist on the node host2.")

            return run

    def create_broken(team: Team) -> None:
        create(team)
        tried.append(team.number)
        team.actors[0].setup = Broken()

    monkeypatch.setattr(pool, "_create", create_broken)
    monkeypatch.setattr(recovery, "time", SimpleNamespace(monotonic=lambda: 1e6))  # however long the steps take
    pool.handles[2].kill()
    for _ in range(5):
        np.testing.assert_array_equal(gradients(pool), expected)
    assert tried == [3]  # the next one after a pause
    assert pool.said == [
        "Lost actor 2 on host (the shard was killed): replica 2 moved to actor 0 on host. Another one starts when the "
        "cluster has room.",
        "An actor could not be started, and the run continues without it: zoo does not exist on the node host2.",
    ]
    pool._begin_at = 0.0
    monkeypatch.setattr(pool, "_create", create)
    np.testing.assert_array_equal(gradients(pool), expected)
    np.testing.assert_array_equal(gradients(pool), expected)
    assert pool.counts.actors == 3
    assert pool.said[2].startswith("Actor 4 on ")
    assert pool.said[2].endswith(" has joined the run and serves replica 2.")


def test_training_that_advances_between_losses_goes_on(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever units another phase has counted; without progress, it is given up."""
    calls, advancing = 0, True

    def call(*_: Any) -> Any:
        def run(rank: int, hear: Any) -> str:
            nonlocal calls
            calls += 1
            hear(rank, "evaluating", 5000, 5000)
            hear(rank, "training", 100 * calls if advancing else 100, 10_000)
            if calls == 2 * ATTEMPTS and advancing:
                return "trained"
            raise HandleKilled("its node is gone")

        return run

    monkeypatch.setattr(pool, "_team_of", pool._teams[:1] * 3)
    monkeypatch.setattr(pool, "_lose", lambda teams, count, reason: None)
    assert pool._ask_together("train", call, lambda *_: None) == "trained"
    assert calls == 2 * ATTEMPTS
    advancing = False
    with pytest.raises(SoupError, match=f"'train' failed: gave up after {ATTEMPTS} attempts"):
        pool._ask_together("train", call, lambda *_: None)


def test_teams_that_start_on_a_node_that_ends_are_started_again(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though they are more than the attempts that a run without any team makes."""
    expected, create, ending = gradients(pool), pool._create, 2 * ATTEMPTS
    pool.mesh = Mesh(ending, 1)

    def create_on_that_node(team: Team) -> None:
        create(team)
        if team.number < 3 + ending:
            team.actors[0].kill()

    monkeypatch.setattr(pool, "_create", create_on_that_node)
    pool._drop_all()
    for _ in range(ending):
        pool._begin()
    pool._await(1, pool._progress, "waiting for an actor")
    assert {team.number for team in pool._serving()} <= set(range(3 + ending, 3 + 2 * ending))
    pool.mesh = Mesh(3, 1)
    pool._reassign()
    np.testing.assert_array_equal(gradients(pool), expected)


def test_a_slow_team_without_a_replica_leaves_and_nothing_moves(pool: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(recovery.SLOW_STEPS):
        pool._compare_paces([1.0, 3.5, 1.1])
    monkeypatch.setattr(pool, "_missing", lambda: 0)
    monkeypatch.setattr(pool, "_leaving_nodes", lambda: frozenset({"node1"}))
    gradients(pool)
    assert pool.said[1:] == ["The cluster will lose the node of actor 1 on host: no replica has to move."]
    assert (pool.counts.drained, pool.counts.actors) == (1, 2)

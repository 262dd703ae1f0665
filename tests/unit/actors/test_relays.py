"""Sums of groups of ranks, messages of a step, and what a relay answers when its actors do not."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_soup.actors.messages import Partial
from ray_soup.actors.recovery import median_without
from ray_soup.actors.relays import GROUP, TIMES, PackedStep, Relay, Relays, bounds_of, group_of, total, unpacked
from ray_soup.recipe import make_recipe
from ray_soup.soups.state import LearnState
from ray_soup.soups.step import count_step
from ray_soup.task.data import Split
from tests.conftest import InProcess, values

SIZE = 40
X = np.arange(12, dtype=np.float32).reshape(3, 4)
ROWS = np.arange(1000, 1061, dtype=np.int32)
STEP = PackedStep.of(X, 1.5, "fit", ROWS, SIZE)


def test_a_step_reaches_each_rank_as_the_split_is_cut() -> None:
    for rank, part in enumerate(Split("fit", ROWS).parts(SIZE)):
        x, factor, source, rows = unpacked(STEP.head, STEP.part(rank, rank + 1))
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(rows, part.rows)
        assert (x.dtype, rows.dtype, factor, source) == (np.float32, np.int32, 1.5, "fit")


def test_an_answer_is_packed_without_loss() -> None:
    partial = Partial(np.random.default_rng(0).standard_normal((3, 4)), 0.1, -0.2, 7.0, 0.5, 0.25, 0.125)
    found = Partial.unpacked(np.frombuffer(partial.packed()), (3, 4))
    np.testing.assert_array_equal(found.gradient, partial.gradient)
    assert found.gradient.dtype == np.float64
    assert {**vars(found), "gradient": 0} == {**vars(partial), "gradient": 0}


@given(st.integers(0, 100), st.integers(1, 50))
def test_rows_are_cut_as_numpy_cuts_them(count: int, size: int) -> None:
    lengths = [len(part) for part in np.array_split(np.arange(count), size)]
    assert list(np.diff(bounds_of(count, size, 4))) == [4 * length for length in lengths]


@given(st.lists(st.floats(0, 1e3), min_size=2), st.data())
def test_the_median_of_the_others(numbers: list[float], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(numbers) - 1))
    expected = median(numbers[:place] + numbers[place + 1 :])
    assert median_without(sorted(numbers), numbers[place]) == expected


def test_a_large_mesh_adds_up_each_group_of_ranks_in_their_order(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InProcess, "_room_for", lambda pool: 1)
    monkeypatch.setattr(InProcess, "_missing", lambda pool: 0)
    pool, small = InProcess(make_recipe(values(zoo)), SIZE), InProcess(make_recipe(values(zoo)), 1)
    x = (0.1 * np.random.default_rng(0).standard_normal((8, pool.open_all("layer").partition.count))).astype(np.float32)
    small.open_all("layer")
    for one in (pool, small):
        one.begin(np.arange(8), x, "float32")
    alone = [small.shards[0].step(x, 1.0, part) for part in Split("fit", ROWS - 1000).parts(SIZE)]
    found = pool.step(x, 1.0, Split("fit", ROWS - 1000))
    assert len(found) == 3
    for group, partial in enumerate(found):
        members = [part for rank, part in enumerate(alone) if group_of(rank, SIZE) == group]
        assert len(members) == (GROUP, GROUP, 8)[group]
        np.testing.assert_array_equal(partial.gradient, total([part.gradient for part in members]))
        for name in ("loss", "weight", "by_factor"):
            assert getattr(partial, name) == sum(getattr(part, name) for part in members)
    assert found[0].seconds < found[1].seconds < found[2].seconds  # one actor took all parts, one after another
    state = LearnState(torch.zeros(x.shape, dtype=torch.float64), task="")
    count_step(state, [found], len(ROWS), x, 1.0)
    assert state.wire_bytes == x.nbytes + 2 * x.nbytes + 4 * len(ROWS) // SIZE  # of each rank


class Actor:
    """Answers a step with numbers that depend on its rows; `faults` are ranks that fail or never answer."""

    def __init__(self, faults: dict[int, str]) -> None:
        self.faults, self.called = faults, list[int]()
        self.packed_step = self

    def remote(self, head: bytes, rows: bytes) -> tuple[str, Any]:
        x, factor, _, numbers = unpacked(head, rows)
        self.called.append(int(numbers[0]))
        gradient = x * np.float64(0.1) * numbers.sum()
        answer = Partial(gradient, factor, 0.1, len(numbers), 0.5).packed()
        return (self.faults.get(int(numbers[0]), "answers"), answer)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stand in for Ray's calls; the value is how long was waited for each turn."""
    found: list[float] = []

    def wait(calls: list[Any], num_returns: int, timeout: float) -> Any:
        found.append(timeout)
        return [call for call in calls if call[0] != "never"], [call for call in calls if call[0] == "never"]

    def get(call: Any) -> Any:
        if isinstance(call, list):
            return [get(one) for one in call]
        if call[0] == "fails":
            raise RuntimeError
        return call[1]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)
    return found


SEATS = [0, 1, 0, 1, 0, 1, 1, 0]  # of the last group, which has eight ranks


def relay_step(faults: dict[int, str]) -> tuple[Any, list[Actor], list[bytes]]:
    """The answer of the relay of ranks 32 to 39, its actors, and each rank's own answer; `faults` by rank of the group."""
    bounds = [bound // 4 for bound in STEP.bounds]
    by_row = {int(ROWS[bounds[32 + n]]): fault for n, fault in faults.items()}
    actors, alone = [Actor(by_row), Actor(by_row)], Actor({})
    relay = Relay(32)
    relay.serve(actors, SEATS, 3.0)
    own = [alone.remote(STEP.head, STEP.part(32 + n, 33 + n))[1] for n in range(8)]
    return relay.step(STEP.head, STEP.part(32, 40)), actors, own


def test_a_relay_adds_up_its_ranks_in_their_order(waits: list[float]) -> None:
    answer, actors, own = relay_step({})
    numbers, parts = np.frombuffer(answer), [np.frombuffer(part) for part in own]
    np.testing.assert_array_equal(numbers[: -TIMES * 8], total([part[:-TIMES] for part in parts]))
    np.testing.assert_array_equal(numbers[-TIMES * 8 :], np.concatenate([part[-TIMES:] for part in parts]))
    assert [len(actor.called) for actor in actors] == [4, 4]
    assert waits == [3.0] * 4


def test_a_relay_hands_back_what_failed_and_names_what_is_late(waits: list[float]) -> None:
    """Rank 3 never answers, nor do later ranks of its actor; rank 4 of the other actor fails."""
    (known, failed, late), _, own = relay_step({3: "never", 4: "fails"})
    assert known == {n: own[n] for n in (0, 1, 2, 7)}
    assert {n: call for n, (call,) in failed.items()} == {4: ("fails", own[4])}
    assert late == [3, 5, 6]


def test_an_actor_that_other_groups_call_too_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Handle:
        class serve:
            remote = staticmethod(lambda *arguments: told.append(arguments))

        class step:
            remote = staticmethod(lambda head, rows: len(rows))

    found = Relays(SIZE)
    monkeypatch.setattr(found, "_ready", lambda group, node: found.known[group])
    for group in (0, 2):
        found.known[group] = type("Known", (), {"handle": Handle, "wait_s": None})()
    for _ in range(2):
        found.use([*"a" * 20, *"b" * 20])
        assert found.call(0, STEP, "", 2.0) == len(STEP.part(0, 16))
        assert found.call(2, STEP, "", 2.0) == len(STEP.part(32, 40))
    found.use([*"a" * 36, *"c" * 4])
    found.call(2, STEP, "", 2.0)
    assert told == [
        (["a"], [0] * 16, 2.0 * (1 + 4)),
        (["b"], [0] * 8, 2.0 * (1 + 12)),
        (["a", "c"], [0] * 4 + [1] * 4, 2.0 * (1 + 32)),
    ]

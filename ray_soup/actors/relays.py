"""Relays: light actors through which a step reaches many ranks, so that the driver calls one of them for each GROUP ranks.

In a mesh of more than GROUP ranks, the gradients of each run of GROUP ranks are added up first, then these sums, whether a
relay or the driver adds them: the result does not depend on where relays are. A relay interprets nothing. It hands back the
calls that it has no answer to, and the driver treats them as its own; a relay that is lost is replaced, and its ranks are
called directly meanwhile.

The shards of a replica must all be called in one order, so they are called directly. What passes through a relay is bytes of
numbers: it imports neither torch nor the rest of the package.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

GROUP = 16
"""Ranks whose gradients are added up before all others; a relay calls as many."""
TIMES = 3
"""The last numbers of a rank's answer: the seconds of a Partial, and those of combining and projecting."""
MARGIN_S = 10.0  # for a relay to say which of its ranks have not answered
AGAIN_S = 5.0  # between two attempts at starting a relay

Found = tuple[dict[int, bytes], dict[int, list[Any]], list[int]]
"""The answers of a relay's ranks, by their place in the group; the calls that failed, as [reference]; those not answered."""


def group_of(rank: int, size: int) -> int:
    """Return the group that a rank of a mesh of `size` ranks is added up in; in a small mesh each rank is one."""
    return rank // GROUP if size > GROUP else rank


def total(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Add arrays of float64 in their order."""
    found = np.zeros_like(parts[0])
    for part in parts:
        found += part
    return found


@dataclass(frozen=True)
class PackedStep:
    """A step on one batch, packed once for all ranks."""

    head: bytes
    """What is the same for all ranks: `unpacked`."""
    rows: bytes
    """The row numbers of the whole batch."""
    bounds: tuple[int, ...]
    """Where the bytes of each rank's rows begin, and the end."""

    @staticmethod
    def of(x: np.ndarray, factor: float, source: str, rows: np.ndarray, size: int) -> PackedStep:
        """Pack a step at x, float32 [m, B], on the rows, int [n], of a source, for a mesh of `size` ranks."""
        head = pickle.dumps((x, factor, source, rows.dtype.str, len(rows), size), pickle.HIGHEST_PROTOCOL)
        return PackedStep(head, rows.tobytes(), bounds_of(len(rows), size, rows.itemsize))

    def part(self, first: int, stop: int) -> bytes:
        """Return the rows of the ranks `first` to `stop` (excluded)."""
        return self.rows[self.bounds[first] : self.bounds[stop]]


def bounds_of(count: int, size: int, itemsize: int) -> tuple[int, ...]:
    """Cut `count` rows into parts of nearly equal length, as Split.parts does; return the bytes where they begin and end."""
    each, longer = divmod(count, size)
    lengths = ((each + (rank < longer)) * itemsize for rank in range(size))
    return tuple(accumulate(lengths, initial=0))


def unpacked(head: bytes, rows: bytes) -> tuple[np.ndarray, float, str, np.ndarray]:
    """Return x, the factor on the logits, the source, and row numbers of it."""
    x, factor, source, dtype, _, _ = pickle.loads(head)
    return x, factor, source, np.frombuffer(rows, dtype)


class Relay:
    """Forwards steps to the actors of one group, and adds up their answers."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.actors: list[Any] = []
        self.seats: list[int] = []
        self.patience_s = 0.0

    def serve(self, actors: list[Any], seats: list[int], patience_s: float) -> None:
        """Call these actors from now on.

        Args:
            actors: their handles.
            seats: the place in `actors` of the one that serves each rank of the group.
            patience_s: seconds that an actor may take for an answer.
        """
        self.actors, self.seats, self.patience_s = actors, seats, patience_s

    def step(self, head: bytes, rows: bytes) -> bytes | Found:
        """Let each rank of the group take its part of a step.

        Returns the sums of the answers without their times, then the times of each rank; if an answer is missing, what is
        known of each rank.
        """
        import ray

        *_, dtype, count, size = pickle.loads(head)
        bounds = bounds_of(count, size, np.dtype(dtype).itemsize)
        low = bounds[self.first]
        calls = []
        for n, seat in enumerate(self.seats, self.first):
            calls.append(self.actors[seat].packed_step.remote(head, rows[bounds[n] - low : bounds[n + 1] - low]))
        late = self._await(calls)
        try:
            answers = None if late else [np.frombuffer(answer) for answer in ray.get(calls)]
        except Exception:  # an actor is lost, or its code has failed: the driver finds out which
            answers = None
        if answers is not None:
            return np.concatenate([total([a[:-TIMES] for a in answers]), *(a[-TIMES:] for a in answers)]).tobytes()
        known, failed = dict[int, bytes](), dict[int, list[Any]]()
        for n, call in enumerate(calls):
            if n not in late:
                try:
                    known[n] = ray.get(call)
                except Exception:
                    failed[n] = [call]
        return known, failed, sorted(late)

    def _await(self, calls: list[Any]) -> set[int]:
        """Wait for the first call of each actor, for the second, ...; return those that were not answered in time."""
        import ray

        late, silent, turns = set[int](), set[int](), list[list[int]]()
        seen = Counter[int]()
        for n, seat in enumerate(self.seats):
            turns += [[]] if seen[seat] == len(turns) else []
            turns[seen[seat]].append(n)
            seen[seat] += 1
        for turn in turns:
            waiting = {calls[n]: n for n in turn if self.seats[n] not in silent}
            if waiting:
                _, slow = ray.wait(list(waiting), num_returns=len(waiting), timeout=self.patience_s)
                silent |= {self.seats[waiting[call]] for call in slow}
            late |= {n for n in turn if self.seats[n] in silent}
        return late


@dataclass
class _Known:
    """A relay, as the driver knows it."""

    handle: Any
    starting: Any
    """The call that it answers once it has started; None afterwards."""
    wait_s: float | None = None
    """The longest that a step may take; None: it has to be told whom to call."""


@dataclass
class Relays:
    """The relays of a mesh of `size` ranks of one shard each, by group: created when they are first wanted."""

    size: int
    actors: list[Any] = field(default_factory=list)
    load: Counter[Any] = field(default_factory=Counter)
    known: dict[int, _Known] = field(default_factory=dict)
    begin_at: dict[int, float] = field(default_factory=dict)

    @property
    def started(self) -> int:
        """The number of relays that can be called."""
        return sum(relay.starting is None for relay in self.known.values())

    def ranks_of(self, group: int) -> range:
        """Return the ranks of a group."""
        return range(group * GROUP, min((group + 1) * GROUP, self.size))

    def use(self, actors: list[Any]) -> None:
        """Let relays call these actors, one for each rank of the mesh, from now on."""
        if actors != self.actors:
            self.actors, self.load = actors, Counter(actors)
            for relay in self.known.values():
                relay.wait_s = None

    def call(self, group: int, step: PackedStep, node: str, deadline: float) -> Any:
        """Return a pending call of the group's relay; None if it has not started yet.

        Args:
            group: the number of the group.
            step: the step.
            node: Ray's identifier of the node that a new relay is to run on; empty: any.
            deadline: seconds that an actor may take for an answer.
        """
        relay = self._ready(group, node)
        if relay is None:
            return None
        ranks = self.ranks_of(group)
        if relay.wait_s is None:
            mine = self.actors[ranks.start : ranks.stop]
            turns = Counter(mine)
            patience = deadline * (1 + max(self.load[actor] - turns[actor] for actor in turns))  # others may call it before
            places = {actor: place for place, actor in enumerate(turns)}
            relay.handle.serve.remote(list(turns), [places[actor] for actor in mine], patience)
            relay.wait_s = patience * max(turns.values()) + MARGIN_S
        return relay.handle.step.remote(step.head, step.part(ranks.start, ranks.stop))

    def _ready(self, group: int, node: str) -> _Known | None:
        """Return the relay of a group once it has started, and begin to start it."""
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        relay = self.known.get(group)
        if relay is None:
            if time.monotonic() >= self.begin_at.get(group, 0.0):
                self.begin_at[group] = time.monotonic() + AGAIN_S
                options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0}
                if node:
                    options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
                handle: Any = ray.remote(Relay).options(**options).remote(group * GROUP)
                self.known[group] = _Known(handle, handle.serve.remote([], [], 0.0))
            return None
        if relay.starting is not None:
            if not ray.wait([relay.starting], timeout=0)[0]:
                return None
            try:
                ray.get(relay.starting)
            except RayError:
                self.drop(group)
                return None
            relay.starting = None
        return relay

    def collect(
        self, calls: dict[int, Any], failed: Callable[[dict[int, Any]], None]
    ) -> tuple[dict[int, Any], list[int], list[int]]:
        """Wait for the answers of relays, by group.

        `failed` is called with the calls, by rank, that an actor has failed to answer.

        Returns the answers by rank, which are all numbers of a rank, or the sums of its group for the first rank and only
        times for the others; the ranks whose actors have not answered in time; and the ranks whose relays are lost.
        """
        import ray
        from ray.exceptions import RayError

        answers, late, unheard = dict[int, Any](), list[int](), list[int]()
        wait_s = max((self.known[group].wait_s or 0.0 for group in calls), default=0.0)
        until = time.monotonic() + wait_s
        together = dict[int, bytes | Found]()
        with suppress(RayError):  # then each is asked for by itself
            together = dict(zip(calls, ray.get(list(calls.values()), timeout=max(1.0, wait_s)), strict=True))
        for group, call in calls.items():
            ranks = self.ranks_of(group)
            try:
                found = together[group] if together else ray.get(call, timeout=max(1.0, until - time.monotonic()))
            except RayError:  # whatever it is: its actors are called directly
                self.drop(group)
                unheard += ranks
                continue
            if isinstance(found, bytes):
                numbers = np.frombuffer(found)
                first = len(numbers) - TIMES * (len(ranks) - 1)
                answers[ranks.start] = numbers[:first]
                answers |= dict(zip(ranks[1:], numbers[first:].reshape(-1, TIMES), strict=True))
            else:
                known, lost, slow = found
                answers |= {ranks[n]: answer for n, answer in known.items()}
                late += [ranks[n] for n in slow]
                failed({ranks[n]: call for n, (call,) in lost.items()})
        return answers, late, unheard

    def drop(self, group: int) -> None:
        """Kill the relay of a group and forget it."""
        import ray

        with suppress(Exception):
            ray.kill(self.known.pop(group).handle)

    def close(self) -> None:
        """Kill all relays."""
        for group in list(self.known):
            self.drop(group)

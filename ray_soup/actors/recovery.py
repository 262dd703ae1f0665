"""Calls to a mesh of actors that survive the loss of actors.

Lost actors are re-created and their calls retried; errors in the code are raised. A replica that loses an actor is
re-created as a whole and brought to the state of the others: `open_store`, `begin`, `use`. An actor's answer depends only on
these and on the call itself, so the answer to a retried call is bit-identical.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_soup.actors.messages import Mesh, SetupInfo
from ray_soup.errors import SoupError
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import Blocks
from ray_soup.mixing.running_statistics import Statistics

ATTEMPTS = 5  # at one call, before a run that keeps losing its actors gives up
RESUME = "Rerun the same command to resume"

Call = Callable[[Any, int], Any]
"""Maps (handle, rank) to a pending call of an actor's method, as in `lambda actor, rank: actor.step.remote(...)`."""
Hear = Callable[[int, str, int, int], None]
"""Called with the rank of an actor and its heartbeat: what it does, the units done so far, and the units in total."""


def of_each(progress: ProgressCallback) -> Hear:
    """Report the heartbeats of actors that all do the same work: those of the first one heard of."""
    first = math.inf

    def hear(rank: int, what: str, done: int, total: int) -> None:
        nonlocal first
        first = min(first, rank)
        if rank == first:
            progress(what, done, total)

    return hear


def of_all(progress: ProgressCallback, total: int) -> Hear:
    """Report the heartbeats of actors that share work of `total` units, as the sum of what they have done."""
    done_by: dict[int, int] = {}

    def hear(rank: int, what: str, done: int, its_total: int) -> None:
        done_by[rank] = done
        progress(what, min(sum(done_by.values()), total), total)

    return hear


def unheard(rank: int, what: str, done: int, total: int) -> None:
    """Ignore a heartbeat."""


@dataclass(frozen=True)
class Loss:
    """The actors that were lost during a call."""

    ranks: frozenset[int]
    """The lost ranks."""
    reason: str
    """What the transport reported."""
    silent: bool = False
    """True if the actors did not answer within the deadline, False if they died."""


class LostAgain(Exception):
    """An actor was lost while it was started or brought to the state of the others."""


class RecoveringMesh(ABC):
    """The actors of a mesh, on a transport that subclasses provide.

    `handles` are the actors by rank, None before `setup`.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.handles: list[Any] = [None] * mesh.size
        self._seen: tuple[str, ...] = ()
        self._opened: tuple[tuple[int, ...], Blocks] | None = None
        self._begun: tuple[np.ndarray, np.ndarray, str] | None = None
        self._used: Statistics = {}
        self._lost: set[int] = set()  # replicas that must be re-created before the next call
        self._nodes: dict[int, str] = {}
        self._held = 0

    # The transport

    @abstractmethod
    def _create(self, ranks: list[int]) -> None:
        """Put new actors into `handles`."""

    @abstractmethod
    def _kill(self, rank: int) -> None:
        """Kill the actor of a rank, if it has one."""

    @abstractmethod
    def _collect(self, calls: dict[int, Any], answers: dict[int, Any], hear: Hear | None = None) -> Loss | None:
        """Wait for pending calls, by rank, and fill in their answers; return the actors that were lost, if any.

        If `hear` is given, the calls are streams, and it is called with their heartbeats. An error in an actor's code is
        raised here.
        """

    def _check_room(self, ranks: list[int], progress: ProgressCallback) -> None:  # noqa: B027
        """Wait until the cluster has room for these actors. Raises SoupError if it does not get any."""

    def _room(self) -> str:
        """Describe the free resources, in a sentence for messages."""
        return ""

    # Calls

    def _ask(self, what: str, call: Call, ranks: Iterable[int] | None = None, hear: Hear | None = None) -> list[Any]:
        """Call actors and return their answers in the order of ranks.

        Raises SoupError if actors are lost at every attempt.

        Args:
            what: the name of the call, for messages.
            call: makes the call for a rank.
            ranks: the actors to call; None: all of them.
            hear: if given, the calls are streams, and it is called with their heartbeats.
        """
        wanted = list(range(self.mesh.size)) if ranks is None else list(ranks)
        missing, answers, reason = wanted, dict[int, Any](), ""
        for _ in range(ATTEMPTS):
            try:
                self._restore()
            except LostAgain as error:
                reason = str(error)
                continue
            loss = self._collect({rank: call(self.handles[rank], rank) for rank in missing}, answers, hear)
            if loss is None:
                return [answers[rank] for rank in wanted]
            reason = f"lost {self._described(loss.ranks)}: {loss.reason}"
            lost = {rank // self.mesh.shards for rank in loss.ranks}
            self._lost |= lost
            missing = [rank for rank in wanted if rank // self.mesh.shards in lost]
        raise SoupError(f"'{what}' failed: gave up after {ATTEMPTS} attempts ({reason}). {RESUME}.")

    def _meeting_place(self) -> tuple[str, int] | None:
        """Open a rendezvous for all actors; None if they cannot form a group. Raises LostAgain."""
        return None

    def _ask_together(
        self, what: str, call: Callable[[Any, tuple[str, int] | None], Any], progress: ProgressCallback
    ) -> Any:
        """Call all actors, which work in one group, and return the answer of the first one.

        If one is lost, all of them are re-created and called again. Without a rendezvous, only the shards of the first
        replica are called, which form a group anyway.

        Raises SoupError as `_ask` does. `call` maps (handle, rendezvous) to a pending call, a stream.
        """
        reason, everything = "", set(range(self.mesh.replicas))
        for _ in range(ATTEMPTS):
            answers: dict[int, Any] = {}
            try:
                self._restore()
                place = self._meeting_place()
            except LostAgain as error:
                self._lost, reason = set(everything), str(error)
                continue
            ranks = range(self.mesh.shards if place is None else self.mesh.size)
            loss = self._collect({rank: call(self.handles[rank], place) for rank in ranks}, answers, of_each(progress))
            if loss is None:
                return answers[0]
            self._lost, reason = set(everything), f"lost {self._described(loss.ranks)}: {loss.reason}"
        raise SoupError(f"'{what}' failed: gave up after {ATTEMPTS} attempts ({reason}). {RESUME}.")

    def _ask_once(self, ranks: list[int], when: str, call: Call, hear: Hear | None = None) -> list[Any]:
        """Call actors without a retry. Raises LostAgain if one dies, SoupError if one does not answer."""
        answers: dict[int, Any] = {}
        loss = self._collect({rank: call(self.handles[rank], rank) for rank in ranks}, answers, hear)
        if loss is None:
            return [answers[rank] for rank in ranks]
        if loss.silent:
            raise SoupError(
                f"{self._described(loss.ranks)}: {loss.reason} while {when}. Is the cluster busy, or has it lost a node? "
                f"{self._room()} {RESUME}, with fewer actors if there is less room."
            )
        raise LostAgain(f"lost {self._described(loss.ranks)} while {when}: {loss.reason}")

    def _described(self, ranks: Iterable[int]) -> str:
        """Name actors with their nodes and the size of the directions that they held."""
        named = [f"actor {r} on {self._nodes.get(r, 'no node yet')}" for r in sorted(ranks)]
        return f"{', '.join(named)} (holding {self._held / 1e6:,.0f} MB of directions)"

    # Starting and recovering

    def _start_all(self, progress: ProgressCallback) -> SetupInfo:
        """Start all actors, up to ATTEMPTS times."""
        self._opened, self._begun, self._used = None, None, {}
        reason = ""
        for _ in range(ATTEMPTS):
            try:
                info = self._start(list(range(self.mesh.size)), progress)
            except LostAgain as error:
                reason = str(error)
            else:
                self._lost.clear()
                return info
        raise SoupError(f"The actors could not be started: gave up after {ATTEMPTS} attempts ({reason}). {RESUME}.")

    def _restore(self) -> None:
        """Re-create lost replicas and bring them to the state of the others. Raises LostAgain."""
        if not self._lost:
            return
        shards = self.mesh.shards
        ranks = [replica * shards + shard for replica in sorted(self._lost) for shard in range(shards)]
        self._start(ranks, no_progress)
        when = "being replaced"
        if self._opened is not None:
            subset, blocks = self._opened
            self._ask_once(ranks, when, lambda actor, rank: actor.open_store.remote(subset, blocks), unheard)
        if self._begun is not None:
            chosen, x, precision = self._begun
            self._ask_once(ranks, when, lambda actor, rank: actor.begin.remote(chosen, x, precision))
        if self._used:
            statistics = self._used
            self._ask_once(ranks, when, lambda actor, rank: actor.use.remote(statistics))
        self._lost.clear()

    def _start(self, ranks: list[int], progress: ProgressCallback) -> SetupInfo:
        """Create these actors, replacing existing ones, and set them up. Raises LostAgain."""
        for rank in ranks:
            self._kill(rank)
        self._check_room(ranks, progress)
        self._create(ranks)
        progress("starting actors", 0, len(ranks))
        infos = self._ask_once(ranks, "starting", lambda actor, rank: actor.setup.remote(self._seen), of_each(progress))
        progress("starting actors", len(ranks), len(ranks))
        self._nodes |= {rank: info.node for rank, info in zip(ranks, infos, strict=True)}
        if self.mesh.shards > 1:
            self._join(ranks)
        first: SetupInfo = infos[0]
        return first

    def _join(self, ranks: list[int]) -> None:
        """Let the shards of each replica form a group, with the rendezvous on the replica's first shard."""
        shards = self.mesh.shards
        firsts = [rank for rank in ranks if rank % shards == 0]
        places = self._ask_once(firsts, "opening a group", lambda actor, rank: actor.serve_group.remote())
        place_of = dict(zip(firsts, places, strict=True))
        self._ask_once(ranks, "joining", lambda actor, rank: actor.join.remote(*place_of[rank - rank % shards]))

"""The teams of a mesh: how they start, and which of them serves what.

The replicas of a mesh are logical. A team of actors, one per shard, serves one or more of them, one after another, each as
if it were alone, so the answers do not depend on how many teams there are. There are at most as many teams as replicas.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ray_soup.actors.assignment import assigned
from ray_soup.actors.calls import Hear, Loss, LostAgain, unheard
from ray_soup.actors.messages import Mesh, MeshCounts, SetupInfo
from ray_soup.actors.versions import check_examples, compare_versions
from ray_soup.errors import SoupError
from ray_soup.io.environment import deadline_s
from ray_soup.io.progress import ProgressCallback, no_progress, tell
from ray_soup.mixing.blocks import Blocks
from ray_soup.mixing.running_statistics import Statistics

ATTEMPTS = 5  # at starting an actor, or at one call without any answer, before a run gives up
RESUME = "Rerun the same command to resume"
GRACE_S = 60.0  # of silence, before a run begins without the teams that are missing

Stage = tuple[dict[int, Any], bool]
"""Pending calls to the actors of a team, by shard, and whether their replies are streams."""


@dataclass(eq=False)
class Team:
    """The actors, one per shard, that together hold a model."""

    number: int
    actors: list[Any] = field(default_factory=list)
    """Their handles, by shard."""
    reserved: Any = None
    """What the transport has reserved for them."""
    infos: list[SetupInfo] = field(default_factory=list)
    """Their reports after setup."""
    starting: Generator[Stage, list[Any], None] | None = None
    """The stages of its start, to be sent the answers of each; None once it can serve."""
    calls: dict[int, Any] = field(default_factory=dict)
    """The pending calls of this stage."""
    streams: bool = False
    answers: dict[int, Any] = field(default_factory=dict)
    heard: float | None = None
    """When it was last heard of, by the monotonic clock."""
    joined: bool = False
    """Whether it has been among those that share the replicas."""
    leaving: bool = False
    """Whether a node that it runs on will leave the cluster."""
    pace: float = 1.0
    """Its seconds for a replica, relative to the others, if it is much slower."""
    behind: int = 0
    """Steps in a row in which it was much slower."""
    slow_since: float = 0.0

    @property
    def serves(self) -> bool:
        """Whether it is up to date and can be called."""
        return self.starting is None

    def __str__(self) -> str:
        shards = len(self.actors)
        first, hosts = self.number * shards, dict.fromkeys(info.node for info in self.infos)
        named = f"actor {first}" if shards == 1 else f"actors {first} to {first + shards - 1}"
        return f"{named} on {' and '.join(hosts) or 'no node yet'}"


class TeamMesh(ABC):
    """The teams of a mesh, on a transport that subclasses provide."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.counts = MeshCounts()
        self._teams: list[Team] = []
        self._team_of: list[Team] = []  # by replica
        self._numbered = 0
        self._progress: ProgressCallback = no_progress
        self._seen: tuple[str, ...] = ()
        self._first: SetupInfo | None = None  # the report of the first actor that was ready
        self._opened: tuple[tuple[int, ...], Blocks] | None = None
        self._begun: tuple[np.ndarray, np.ndarray, str] | None = None
        self._used: Statistics | None = None

    # The transport

    @abstractmethod
    def _create(self, team: Team) -> None:
        """Create the actors of a team, which start when the cluster has room for them."""

    @abstractmethod
    def _kill(self, team: Team) -> None:
        """Kill the actors of a team, and free what is reserved for them."""

    @abstractmethod
    def _collect(
        self, calls: dict[int, Any], answers: dict[int, Any], hear: Hear | None = None, wait: bool = True
    ) -> Loss | None:
        """Fill in the answers to pending calls, by key, where they are missing; return the lost calls, if any.

        If `hear` is given, the calls are streams, and it is called with their heartbeats. An error in an actor's code is
        raised here. Without `wait`, only what has come so far is collected.
        """

    def _room_for(self) -> int:
        """Return for how many teams the cluster has room now."""
        return self.mesh.replicas

    def _patience_s(self) -> float:
        """Return how many seconds a run without any actor waits for one."""
        return deadline_s()

    def _room(self) -> str:
        """Describe the free resources, in a sentence for messages."""
        return ""

    def _leaving_nodes(self) -> frozenset[str]:
        """Return the identifiers of the nodes that will leave the cluster."""
        return frozenset()

    # Who serves what

    @property
    def handles(self) -> list[Any]:
        """The actors by rank; before the start is over, those that start; None for a replica without a team."""
        teams: Sequence[Team] = self._team_of or self._teams
        found = [actor for team in teams for actor in team.actors]
        return found + [None] * (self.mesh.size - len(found))

    def _serving(self) -> list[Team]:
        """Return the teams that can be called; those that are leaving only if there are no others."""
        ready = [team for team in self._teams if team.serves]
        return [team for team in ready if not team.leaving] or ready

    def _starting(self) -> list[Team]:
        """Return the teams that cannot be called yet."""
        return [team for team in self._teams if not team.serves]

    def _missing(self) -> int:
        """Return how many teams there could be besides those that serve and start."""
        return self.mesh.replicas - sum(not team.leaving for team in self._teams)

    def _reassign(self) -> list[int]:
        """Let the teams that can be called share the replicas; return the replicas that moved from one to another."""
        serving, before = {team.number: team for team in self._serving()}, self._team_of
        if not serving:
            return []
        known = {replica: team.number for replica, team in enumerate(before)}
        numbers = assigned(self.mesh.replicas, {n: team.pace for n, team in serving.items()}, known)
        self._team_of = [serving[number] for number in numbers]
        moved = [replica for replica, number in enumerate(numbers) if known.get(replica, number) != number]
        gone = [team for team in self._teams if team.leaving and team.serves and team not in self._team_of]
        for team in gone:
            self._drop(team)
        self._count(
            moved=len(moved) * self.mesh.shards, drained=len(gone) * self.mesh.shards,
            actors=len(serving) * self.mesh.shards,
        )  # fmt: skip
        return moved

    def _count(self, actors: int | None = None, **more: int) -> None:
        """Add to the counts, and set the number of actors that serve."""
        now = {name: getattr(self.counts, name) + count for name, count in more.items()}
        self.counts = replace(self.counts, **now, actors=self.counts.actors if actors is None else actors)

    def _where(self, moved: Sequence[int]) -> str:
        """Say to which actors replicas have moved."""
        to = list(dict.fromkeys(str(self._team_of[replica]) for replica in moved))
        return f"{listed(moved)} moved to {joined(to) if len(to) < 4 else f'{len(to)} other actors'}"

    # Starting

    def _start_all(self, progress: ProgressCallback) -> SetupInfo:
        """Start as many teams as there is room for, and wait for them; the others follow in the background.

        Raises SoupError if none of them can be started, and what the code of an actor raises.
        """
        self._drop_all()
        self._opened, self._begun, self._used, self._progress = None, None, None, progress
        count = max(1, min(self.mesh.replicas, self._room_for()))
        for _ in range(count):
            self._begin()
        progress("starting actors", 0, count)
        self._await(count, progress)
        progress("starting actors", count, count)
        self._reassign()
        found = self._serving()
        for team in found:
            team.joined = True
        self.counts = MeshCounts(actors=len(found) * self.mesh.shards)
        if len(found) < self.mesh.replicas:
            actors, more = self.counts.actors, (self.mesh.replicas - len(found)) * self.mesh.shards
            tell(
                progress,
                f"{actors} {'actor serves' if actors == 1 else 'actors serve'} all {self.mesh.replicas} replicas, one after "
                f"another: the cluster has no room for {more} more now. They start when it has; the result does not change.",
            )
        first, infos = found[0].infos[0], [info for team in found for info in team.infos]
        return replace(first, notes=first.notes + compare_versions(infos))

    def _begin(self) -> Team:
        """Begin to start a team."""
        team = Team(self._numbered)
        self._numbered += 1
        self._teams.append(team)
        self._create(team)
        team.starting = self._stages(team)
        team.calls, team.streams = next(team.starting)
        return team

    def _stages(self, team: Team) -> Generator[Stage, list[Any], None]:
        """Bring a team to the state of the others: `setup`, then `open_store`, `begin` and `use` as they were last called.

        The state may change meanwhile.
        """
        actors = team.actors
        team.infos = yield _by_shard([actor.setup.remote(self._seen) for actor in actors]), True
        compare_versions(team.infos)
        self._first = self._first or team.infos[0]
        check_examples(self._first, team.infos)
        if len(actors) > 1:
            (place,) = yield {0: actors[0].serve_group.remote()}, False
            yield _by_shard([actor.join.remote(*place) for actor in actors]), False
        opened, begun, used = None, None, None
        while True:
            if self._opened is not None and opened is not self._opened:
                opened, begun, used = self._opened, None, None
                yield _by_shard([actor.open_store.remote(*opened) for actor in actors]), True
            elif self._begun is not None and begun is not self._begun:
                begun = self._begun
                yield _by_shard([actor.begin.remote(*begun) for actor in actors]), False
            elif self._used is not None and used is not self._used:
                used = self._used
                yield _by_shard([actor.use.remote(used) for actor in actors]), False
            else:
                return

    def _advance(self, team: Team, hear: Hear = unheard) -> None:
        """Take the stages of a team's start that its actors have answered.

        Raises LostAgain if one is lost, and what the code of an actor raises.
        """

        def listen(shard: int, *heartbeat: Any) -> None:
            team.heard = time.monotonic()
            hear(team.number, *heartbeat)

        while team.starting is not None:
            before = len(team.answers)
            loss = self._collect(team.calls, team.answers, listen if team.streams else None, wait=False)
            if loss is not None:
                raise LostAgain(f"lost {team} while it started: {loss.reason}")
            if len(team.answers) > before:
                team.heard = time.monotonic()
            if len(team.answers) < len(team.calls):
                if team.heard is not None and time.monotonic() - team.heard > deadline_s():
                    raise LostAgain(f"{team}: no answer within {deadline_s():g} s while it started")
                return
            answers, team.answers = [team.answers[shard] for shard in sorted(team.answers)], {}
            try:
                team.calls, team.streams = team.starting.send(answers)
            except StopIteration:
                team.starting = None

    def _await(self, count: int, progress: ProgressCallback, waiting: str = "") -> None:
        """Wait until `count` teams serve, or fewer after some silence. Raises SoupError if none can be started."""
        began, failures, most = time.monotonic(), 0, ATTEMPTS * max(count, len(self._starting()))

        def hear(key: int, what: str, done: int, total: int) -> None:
            if not waiting and key == min(team.number for team in self._teams if team.heard is not None):
                progress(what, done, total)

        while len(self._serving()) < count:
            for team in self._starting():
                try:
                    self._advance(team, hear)
                except LostAgain as error:
                    self._drop(team)
                    failures += 1
                    if failures == most:
                        raise SoupError(
                            f"The actors could not be started: gave up after {ATTEMPTS} attempts ({error}). {RESUME}."
                        ) from error
                    self._begin()
            silent = time.monotonic() - max([began, *(team.heard for team in self._teams if team.heard is not None)])
            if silent > GRACE_S and self._serving():
                return
            if silent > self._patience_s():
                raise SoupError(
                    f"No actor could be started within {self._patience_s():g} s. Has the cluster room for one? "
                    f"{self._room()} {RESUME} when there is room, or set actors.wait_s to wait longer."
                )
            if waiting:
                progress(waiting, int(silent), int(self._patience_s()))
            time.sleep(0.02)

    def _drop(self, team: Team) -> None:
        """Kill a team and forget it."""
        self._teams.remove(team)
        self._kill(team)

    def _drop_all(self) -> None:
        for team in list(self._teams):
            self._drop(team)
        self._team_of = []


def _by_shard(pending: list[Any]) -> dict[int, Any]:
    return dict(enumerate(pending))


def listed(replicas: Sequence[int]) -> str:
    """Name replicas, as in `replicas 4 and 5`, or say how many there are."""
    if len(replicas) > 4:
        return f"{len(replicas)} replicas"
    return f"replica{'s' if len(replicas) > 1 else ''} {joined([str(replica) for replica in replicas])}"


def joined(names: Sequence[str]) -> str:
    """Join names, as in `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

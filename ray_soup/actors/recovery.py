"""Calls to a mesh of actors whose number changes during a run.

The replicas of lost actors move to the others in the same call; errors in the code are raised. An actor that starts is
brought to the state of the others in the background and takes its replicas between two calls. An answer depends only on
this state, on the rank and on the call itself, so it is bit-identical whichever actor gives it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ray_soup.actors.calls import Call, Hear, Loss, LostAgain, of_each
from ray_soup.actors.messages import Mesh
from ray_soup.actors.teams import ATTEMPTS, RESUME, Team, TeamMesh, joined, listed
from ray_soup.actors.versions import compare_versions
from ray_soup.errors import SoupError
from ray_soup.io.progress import ProgressCallback, tell

LOOK_EVERY_S = 0.1  # between two looks at the actors that start
DRAINS_EVERY_S = 1.0  # between two looks at the nodes that will leave
LONGEST_PAUSE_S = 60.0  # before an actor is started again that could not be started
SLOW = 3.0  # times the median of the others: the pace of a team that gets fewer replicas
SLOW_STEPS = 5  # in a row
LEAST_DELAY_S = 0.05  # behind the others in a step, below which a slow team costs nothing
FORGIVEN_S = 600.0  # until a slow team gets its share again


class RecoveringMesh(TeamMesh):
    """The calls to the actors of a mesh, by rank, and what happens between calls."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._looked = self._drains_looked = 0.0
        self._begin_at = 0.0  # when teams that are missing may be started
        self._failures, self._told = 0, ""

    # Calls

    def _ask(
        self,
        what: str,
        call: Call,
        ranks: Iterable[int] | None = None,
        hear: Hear | None = None,
        through: Callable[[Sequence[int], Call, dict[int, Any]], Loss | None] | None = None,
    ) -> list[Any]:
        """Call the actors that serve these ranks and return the answers in the order of ranks.

        An actor that serves several ranks answers one after another. Raises SoupError after ATTEMPTS
        attempts without any answer.

        Args:
            what: the name of the call, for messages.
            call: makes the call for a rank.
            ranks: the ranks to call; None: all of them.
            hear: if given, the calls are streams, and it is called with their heartbeats.
            through: if given, it makes and collects the calls for these ranks, as `_in_turns` does.
        """
        wanted, answers, attempts = list(range(self.mesh.size) if ranks is None else ranks), dict[int, Any](), 0
        shards = self.mesh.shards
        while True:
            self._prepare()
            left = {rank // shards for rank in wanted if rank not in answers}
            missing = [rank for rank in wanted if rank // shards in left]  # the shards of a replica answer together
            for rank in missing:
                answers.pop(rank, None)
            known, asked = len(answers), list(self._team_of)
            loss = self._in_turns(missing, call, answers, hear) if through is None else through(missing, call, answers)
            if loss is None:
                return [answers[rank] for rank in wanted]
            attempts = 1 if len(answers) > known else attempts + 1
            self._lose_or_give_up(what, attempts, loss, {asked[rank // shards] for rank in loss.keys})

    def _in_turns(self, ranks: Sequence[int], call: Call, answers: dict[int, Any], hear: Hear | None = None) -> Loss | None:
        """Call the actors of these ranks at once, and collect the answers to the first call of each, to the second, ...

        So an actor has the same time for each of its answers, however many it gives.
        """
        shards, turns = self.mesh.shards, list[dict[int, Any]]()
        replicas: dict[Team, list[int]] = {}
        for rank in ranks:
            replica, shard = divmod(rank, shards)
            team = self._team_of[replica]
            mine = replicas.setdefault(team, [])
            if replica not in mine:
                mine.append(replica)
            turns += [{} for _ in range(len(mine) - len(turns))]
            turns[len(mine) - 1][rank] = call(team.actors[shard], rank)
        lost: set[int] = set()
        reason, alone = "", set[int]()
        for turn in turns:
            gone = {self._team_of[rank // shards] for rank in lost}
            calls = {rank: pending for rank, pending in turn.items() if self._team_of[rank // shards] not in gone}
            loss = self._collect(calls, answers, hear)
            if loss is not None:
                lost |= loss.keys
                alone |= loss.alone
                reason = reason or loss.reason
        return Loss(frozenset(lost), reason, frozenset(alone)) if lost else None

    def _ask_each(self, what: str, call: Callable[[Any], Any], hear: Hear | None = None) -> list[Any]:
        """Call every actor once, whatever it serves, and return the answers; those of lost actors are missing.

        Raises SoupError as `_ask` does.
        """
        answers: dict[tuple[int, int], Any] = {}
        attempts, shards = 0, self.mesh.shards
        while True:
            self._prepare()
            teams = {team.number: team for team in self._teams if team.serves}
            answers = {key: answer for key, answer in answers.items() if key[0] in teams}
            keys = [(number, shard) for number in teams for shard in range(shards) if (number, shard) not in answers]
            found: dict[int, Any] = {}
            loss = self._collect(
                {number * shards + shard: call(teams[number].actors[shard]) for number, shard in keys}, found, hear
            )
            answers |= {divmod(key, shards): answer for key, answer in found.items()}
            if loss is not None:
                attempts = 1 if found else attempts + 1
                self._lose_or_give_up(what, attempts, loss, {teams[key // shards] for key in loss.keys})
            elif {team.number for team in self._teams if team.serves} <= {number for number, _ in answers}:
                return [answers[key] for key in sorted(answers)]

    def _lose_or_give_up(self, what: str, attempts: int, loss: Loss, teams: Iterable[Team]) -> None:
        """Replace lost teams. Raises SoupError after ATTEMPTS attempts at a call."""
        named = joined(sorted(str(team) for team in teams))
        if attempts == ATTEMPTS:
            raise SoupError(f"'{what}' failed: gave up after {ATTEMPTS} attempts (lost {named}: {loss.reason}). {RESUME}.")
        self._lose(teams, len(loss.keys - loss.alone) or len(loss.keys), loss.reason)

    # Training together

    def _meeting_place(self, team: Team, count: int) -> tuple[str, int]:
        """Open a rendezvous for `count` actors on the actor of a team. Raises LostAgain."""
        raise NotImplementedError

    def _ask_together(
        self, what: str, call: Callable[[Any, tuple[str, int] | None, int, int], Any], progress: ProgressCallback
    ) -> Any:
        """Call actors that work in one group, and return the answer of the first one.

        These are all actors; if replicas have several shards, those of one team, which form a group anyway. If one is lost,
        the others are called again.

        Raises SoupError as `_ask` does. `call` maps (handle, rendezvous, place in the group, size of the group) to a pending
        call, a stream.
        """
        attempts, shards, furthest = 0, self.mesh.shards, dict[str, int]()

        def hear(what: str, done: int, total: int) -> None:
            nonlocal attempts
            if done > furthest.get(what, -1):
                attempts, furthest[what] = 0, done
            progress(what, done, total)

        while True:
            self._prepare()
            teams = list(dict.fromkeys(self._team_of))[: None if shards == 1 else 1]
            members = [(team, actor) for team in teams for actor in team.actors]
            answers: dict[int, Any] = {}
            try:
                place = self._meeting_place(teams[0], len(teams)) if len(teams) > 1 else None
            except LostAgain as error:
                loss = Loss(frozenset({0}), str(error))
            else:
                calls = {n: call(actor, place, n, len(members)) for n, (_, actor) in enumerate(members)}
                found = self._collect(calls, answers, of_each(hear))
                if found is None:
                    return answers[0]
                loss = found
            attempts += 1
            dead = loss.keys if shards > 1 else loss.keys - loss.alone or loss.keys
            self._lose_or_give_up(what, attempts, loss, {members[n][0] for n in dead})

    # Changes during a run

    def _prepare(self) -> None:
        """Adapt to what has changed since the last call; if no actor is left, wait for one."""
        if not self._serving():
            if not self._teams:
                self._begin()
            self._await(1, self._progress, "waiting for an actor")
            self._welcome()
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        self._retire(now)
        self._forgive(now)
        for team in self._starting():
            try:
                self._advance(team)
            except Exception as error:  # the run continues without it
                self._postpone(team, error)
        if now >= self._begin_at:
            for _ in range(self._missing()):
                self._begin()
        self._welcome()

    def _welcome(self) -> None:
        """Let teams that have become ready take replicas."""
        new = [team for team in self._teams if team.serves and not team.joined]
        if not new:
            return
        self._failures, self._told = 0, ""
        self._count(created=len(new) * self.mesh.shards)
        self._reassign()
        for team in new:
            team.joined = True
            mine = [replica for replica, other in enumerate(self._team_of) if other is team]
            tell(self._progress, f"{team} has joined the run{f' and serves {listed(mine)}' if mine else ''}.")
            for note in compare_versions(team.infos):
                tell(self._progress, note)

    def _postpone(self, team: Team, error: Exception) -> None:
        """Give up the start of a team, and begin another one after a while."""
        self._drop(team)
        self._failures += 1
        pause = min(LONGEST_PAUSE_S, 2.0**self._failures)
        self._begin_at = time.monotonic() + pause
        if str(error) != self._told:
            self._told = str(error)
            tell(self._progress, f"An actor could not be started, and the run continues without it: {error}")

    def _lose(self, teams: Iterable[Team], count: int, reason: str) -> None:
        """Give the replicas of lost teams, of which `count` actors were lost, to others, and begin to start others."""
        lost = list(teams)
        mine = {replica for replica, team in enumerate(self._team_of) if team in lost}
        for team in lost:
            self._drop(team)
        self._count(lost=count, actors=len(self._serving()) * self.mesh.shards)
        if time.monotonic() >= self._begin_at or not self._teams:
            for _ in range(self._missing()):
                self._begin()
        moved = mine.intersection(self._reassign())
        where = f": {self._where(sorted(moved))}" if moved else "" if self._serving() else ": no other is left"
        names = joined([str(team) for team in lost])
        tell(self._progress, f"Lost {names} ({reason}){where}. Another one starts when the cluster has room.")

    def _retire(self, now: float) -> None:
        """Let teams on nodes that will leave give their replicas away; those of the last ones move when others are ready."""
        if now - self._drains_looked < DRAINS_EVERY_S:
            return
        self._drains_looked = now
        nodes = self._leaving_nodes()
        new = [t for t in self._serving() if not t.leaving and nodes.intersection(info.node_id for info in t.infos)]
        for team in new:
            team.leaving = True
        mine = {replica for replica, team in enumerate(self._team_of) if team in new}
        moved = mine.intersection(self._reassign()) if new else ()
        if new:
            kept = "they serve until others are ready" if mine else "no replica has to move"
            where = self._where(sorted(moved)) if moved else kept
            tell(self._progress, f"The cluster will lose the node of {joined([str(team) for team in new])}: {where}.")

    def _forgive(self, now: float) -> None:
        """Give slow teams their share again after a while."""
        slow = [team for team in self._teams if team.pace != 1.0 and now - team.slow_since > FORGIVEN_S]
        for team in slow:
            team.pace = 1.0
        if slow:
            self._reassign()

    def _compare_paces(self, seconds: Sequence[float]) -> None:
        """Note how long each replica took in a step; a team that is much slower than the others gets fewer of them."""
        taken: dict[Team, list[float]] = {}
        for replica, team in enumerate(self._team_of):
            taken.setdefault(team, []).append(max(seconds[replica * self.mesh.shards : (replica + 1) * self.mesh.shards]))
        means = {team: sum(values) / len(values) for team, values in taken.items()}
        ordered = sorted(means.values())
        for team, mean in means.items() if len(means) > 1 else ():
            usual = median_without(ordered, mean)
            behind = mean > SLOW * usual and mean > usual + LEAST_DELAY_S and team.pace == 1.0
            team.behind = team.behind + 1 if behind else 0
            if team.behind == SLOW_STEPS:
                team.pace, team.slow_since, team.behind = mean / usual, time.monotonic(), 0
                moved = self._reassign()
                if moved:
                    self._count(slowed=1)
                    tell(
                        self._progress,
                        f"{team} takes {team.pace:.1f} times as long for a replica as the others: {self._where(moved)}.",
                    )


def median_without(ordered: Sequence[float], value: float) -> float:
    """Return the median of at least two ordered numbers without `value`, which is one of them."""
    place, count = bisect_left(ordered, value), len(ordered) - 1
    middle = [ordered[n + (n >= place)] for n in ((count - 1) // 2, count // 2)]
    return (middle[0] + middle[1]) / 2

"""Which team of actors serves which replicas: balanced, and with few moves. Knows nothing of actors or of Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping


def shares(replicas: int, pace: Mapping[int, float], held: Mapping[int, int]) -> dict[int, int]:
    """Return how many of the replicas each team serves, so that the last team to finish a step finishes early.

    Args:
        replicas: the number of replicas.
        pace: how long each team takes for one replica, by its number, relative to the others. At least one team.
        held: how many replicas a team serves so far; among equals, one that serves more keeps more.
    """
    found = dict.fromkeys(pace, 0)
    for _ in range(replicas):
        next_team = min(found, key=lambda team: ((found[team] + 1) * pace[team], -held.get(team, 0), team))
        found[next_team] += 1
    return found


def assigned(replicas: int, pace: Mapping[int, float], before: Mapping[int, int]) -> list[int]:
    """Return the number of the team that serves each replica.

    A replica stays with its team unless the team is not among `pace` or serves more than its share.

    Args:
        replicas: the number of replicas.
        pace: as for `shares`.
        before: the team that has served each replica so far; replicas and teams may be missing.
    """
    room = shares(replicas, pace, Counter(before.values()))
    found: dict[int, int] = {}
    for replica in range(replicas):
        team = before.get(replica)
        if team is not None and room.get(team, 0):
            found[replica] = team
            room[team] -= 1
    free = iter([team for team, count in room.items() for _ in range(count)])
    return [found[replica] if replica in found else next(free) for replica in range(replicas)]

"""Which team serves which replicas: everything once, balanced, stable, and with as few moves as possible."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_soup.actors.assignment import assigned, shares

TEAMS = st.sets(st.integers(0, 20), min_size=1, max_size=6)


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, set[int], dict[int, int]]:
    """A number of replicas, the teams that live now, and who served what before."""
    replicas, now, then = draw(st.integers(1, 12)), draw(TEAMS), draw(TEAMS)
    before = draw(st.dictionaries(st.integers(0, replicas - 1), st.sampled_from(sorted(then))))
    return replicas, now, before


def moves(found: list[int], before: dict[int, int]) -> int:
    """The replicas that a team has not served before."""
    return sum(before.get(replica) != team for replica, team in enumerate(found))


def fewest_moves(replicas: int, teams: set[int], before: dict[int, int]) -> int:
    """By trying every choice of the teams that serve one replica more than the others."""
    held, (each, more) = Counter(before.values()), divmod(replicas, len(teams))
    kept = (sum(min(held[t], each + (t in some)) for t in teams) for some in combinations(sorted(teams), more))
    return replicas - max(kept)


@given(changes())
def test_teams_are_balanced_with_the_fewest_moves_and_nothing_moves_again(change: tuple[int, set[int], dict]) -> None:
    replicas, teams, before = change
    pace = dict.fromkeys(sorted(teams), 1.0)
    found = assigned(replicas, pace, before)
    count = Counter(found)
    assert len(found) == replicas
    assert set(found) <= teams
    assert max(count[t] for t in teams) - min(count[t] for t in teams) <= 1
    assert moves(found, before) == fewest_moves(replicas, teams, before)
    assert assigned(replicas, pace, dict(enumerate(found))) == found


@given(changes(), st.data())
def test_no_other_shares_finish_earlier(change: tuple[int, set[int], dict], data: st.DataObject) -> None:
    """Moving one replica from the team that finishes last to any other does not help."""
    replicas, teams, before = change
    pace = {team: data.draw(st.sampled_from([1.0, 3.5, 7.0])) for team in sorted(teams)}
    found = shares(replicas, pace, Counter(before.values()))
    last = max(found[team] * pace[team] for team in teams)
    assert sum(found.values()) == replicas
    assert all((found[team] + 1) * pace[team] >= last for team in teams)
    assert Counter(assigned(replicas, pace, before)) == {team: count for team, count in found.items() if count}


@pytest.mark.parametrize(
    ("pace", "before", "expected"),
    [
        ({0: 1, 1: 1, 2: 1, 3: 1}, {}, [0, 1, 2, 3]),
        ({0: 1, 1: 1}, {}, [0, 0, 1, 1]),
        ({0: 1, 2: 1, 3: 1}, {0: 0, 1: 1, 2: 2, 3: 3}, [0, 0, 2, 3]),  # team 1 is lost
        ({0: 1, 2: 1, 3: 1, 4: 1}, {0: 0, 1: 0, 2: 2, 3: 3}, [0, 4, 2, 3]),  # its replacement is ready
        ({0: 1, 1: 4, 2: 1, 3: 1}, {0: 0, 1: 1, 2: 2, 3: 3}, [0, 0, 2, 3]),  # team 1 has become slow
    ],
)
def test_who_serves_what(pace: dict[int, float], before: dict[int, int], expected: list[int]) -> None:
    assert assigned(4, pace, before) == expected

"""A process that was suspended, and whose folder another run has taken over, writes not one byte over the other's work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_soup.io import storage
from ray_soup.soups.finished import verify
from tests.stopped import Starter, starter

pytestmark = pytest.mark.slow
SAMPLES = 4
"""How many of the writes of a run are tried, at even distances."""


@pytest.fixture(scope="module")
def runs(zoo: Path, endpoint: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in endpoint.items():
            patch.setenv(name, value)
        with starter(zoo, tmp_path_factory.mktemp("stopped")) as found:
            yield found


def content(out: str) -> dict[str, bytes]:
    """Return every file of an output folder or URI."""
    return {name: storage.read_bytes(storage.join(out, name)) for name in storage.walk(out)}


def check_fenced(runs: Starter, command: str, out: str, at: int) -> bool:
    """Suspend a run before a write, let a successor finish, and wake the first; return whether it had published before."""
    first = runs.start(command, out, at)
    assert first.wait(), f"write {at} was not reached: {first.end()}"
    second = runs.start(command, out).end()
    assert (second["code"], second["said"]) == (0, ""), at
    before = content(out)
    first.wake()
    ended = first.end()
    assert content(out) == before, at
    verify(out)
    if second["complete"] and ended["code"] == 0:
        return True
    assert ended["code"] == 1, (at, ended)
    assert f"took over {out}. This run writes nothing more there." in ended["said"], at
    return False


@pytest.mark.parametrize("command", ["uniform", "learn"])
@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_a_run_that_was_suspended_before_any_write_changes_nothing_of_its_successor(
    runs: Starter, tmp_path: Path, request: pytest.FixtureRequest, place: str, command: str
) -> None:
    base = str(tmp_path) if place == "disk" else request.getfixturevalue("s3")
    whole = runs.start(command, f"{base}/whole").end()
    assert whole["code"] == 0, whole
    step = max(1, whole["writes"] // SAMPLES)  # heartbeats add writes now and then: the last four may be missing
    published = [check_fenced(runs, command, f"{base}/at_{at}", at) for at in range(step, whole["writes"] - 4, step)]
    assert published.count(False) >= SAMPLES // 2


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_of_two_runs_that_start_at_the_same_time_exactly_one_gets_the_folder(
    runs: Starter, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    base = str(tmp_path) if place == "disk" else request.getfixturevalue("s3")
    for number in range(3):
        both = [runs.start("learn", f"{base}/{number}", lease_s=30) for _ in range(2)]
        ends = [one.end() for one in both]
        refused = [end for end in ends if end["code"] == 2]
        made = [end for end in ends if end["code"] == 0 and not end["complete"]]
        assert len(made) == 1, ends
        assert all("Another run is using" in end["said"] for end in refused)
        assert len(refused) + sum(end["complete"] for end in ends) == 1, ends
        verify(f"{base}/{number}")

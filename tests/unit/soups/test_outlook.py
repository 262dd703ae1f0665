"""The time left of a comparison."""

from __future__ import annotations

import time

import pytest

from ray_soup.io.progress import WHOLE_RUN
from ray_soup.soups.outlook import Outlook, Work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[-1])
    return seconds


def test_a_run_that_keeps_its_pace_takes_as_long_as_was_estimated(clock: list[float]) -> None:
    """Evaluating takes 0.1 s per example, mixing 5 s per soup, and learning 0.2 s per pass."""
    heard: list[tuple[str, int, int]] = []
    outlook = Outlook(lambda *news: heard.append(news))
    outlook.expect([Work(400), Work(50), Work(50, 300), Work(50, 300)])
    for done in range(0, 401, 40):
        clock.append(0.1 * done)
        outlook("evaluating ingredients", done, 400)
    now = 40.0
    for part in (1, 2, 3):
        for share in range(0, 11) if part > 1 else ():
            clock.append(now + 6 * share)
            outlook(f"{part}/3 learning mehl", share, 10)
        now += 60 if part > 1 else 0
        for at, what in ((0.01, "mixing"), (5, "evaluating"), (10, "evaluating")):
            clock.append(now + at)
            outlook(f"{part}/3 {what}", 0, 1)
        now += 10
    assert next(news for news in heard if news[0] != WHOLE_RUN) == ("evaluating ingredients", 0, 400)
    assert now == 190
    assert heard[-1] == (WHOLE_RUN, 190, 190)
    after_first = [total for name, done, total in heard if name == WHOLE_RUN and done > 60]
    assert after_first
    assert all(abs(total - 190) <= 6 for total in after_first)


def test_parts_of_an_interrupted_comparison_that_are_done_take_no_time(clock: list[float]) -> None:
    heard: list[tuple[str, int, int]] = []
    outlook = Outlook(lambda *news: heard.append(news))
    outlook.expect([Work(400), Work(50), Work(50, 300), Work(0, 300)])
    for second in range(0, 31):
        clock.append(float(second))
        outlook("2/3 learning mehl", second, 60)
    assert heard[-1][0] == WHOLE_RUN
    assert heard[-1][2] == pytest.approx(60 + 10 + 60, abs=1)  # learning, evaluating its 50 examples, and the last part

"""The pace of a phase, and its line in a notebook."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.pace import Pace, duration, size, unit_of
from ray_soup.io.progress import ProgressCallback, no_progress


@pytest.mark.parametrize(
    ("what", "unit"),
    [
        ("evaluating ingredients", "examples"),
        ("3/12 refitting mehl+", "steps"),
        ("polishing, lr 0.001", "steps"),
        ("mixing", "bytes"),
        ("mixing adapters", "tensors"),
        ("starting", ""),
        ("waiting for CPUs", "seconds"),
        ("evaluate greedy", ""),
    ],
)
def test_the_unit_of_a_phase_follows_from_its_name(what: str, unit: str) -> None:
    assert unit_of(what) == unit


def test_the_pace_is_measured_from_the_first_report_on() -> None:
    """A resumed phase begins with what was done before, and what is left goes down between two reports."""
    pace = Pace("learning mehl", 100.0)
    pace.count(600, 1000, 110.0)
    assert (pace.rate(), pace.left(111.0), pace.seconds(111.0)) == (None, None, 11.0)
    pace.count(650, 1000, 115.0)
    assert pace.rate() == 10.0
    assert pace.left(115.0) == 35.0
    assert pace.left(120.0) == 30.0
    assert pace.speed() == "10/s"
    slow = Pace("trying ema", 0.0)
    slow.count(0, 8, 0.0)
    slow.count(1, 8, 90.0)
    assert slow.speed() == "1 min 30 s each"
    waiting = Pace("waiting for CPUs", 0.0)
    waiting.count(20, 300, 20.0)
    assert (waiting.left(25.0), waiting.counted()) == (275.0, "20 of at most 300 s")


def test_times_and_sizes_are_formatted_for_people() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600, 7380)] == [
        "0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 3 min",
    ]  # fmt: skip
    assert [size(n) for n in (10, 2_500, 3e6, 1.25e9)] == ["10 bytes", "2.5 KB", "3.0 MB", "1.2 GB"]


class Shown:
    """The part of IPython that shows output in a cell; what it was given is kept."""

    def __init__(self) -> None:
        self.bundles: list[dict[str, str]] = []

    def display(self, bundle: dict[str, str], **options: Any) -> Shown:
        assert options == {"raw": True, "display_id": True}
        self.update(bundle, raw=True)
        return self

    def update(self, bundle: dict[str, str], raw: bool) -> None:
        self.bundles.append(bundle)


@shown_in_notebooks
def work(count: int, progress: ProgressCallback = no_progress) -> int:
    for done in range(count):
        progress("learning <b>", done + 1, count)
    return count


def test_a_notebook_shows_progress_unless_a_callback_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(2) == 2  # in no notebook
    shown, kernel = Shown(), SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    module = ModuleType("IPython.display")
    module.display = shown.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    seen: list[tuple[str, int, int]] = []
    assert work(2, lambda *news: seen.append(news)) == 2
    assert (len(seen), shown.bundles) == (2, [])
    assert work(4) == 4
    assert shown.bundles[0]["text/plain"].startswith("learning <b>: 1 of 4 steps, ")
    assert "<progress" in shown.bundles[0]["text/html"]
    assert "learning &lt;b&gt;: 1 of 4 steps" in shown.bundles[0]["text/html"]
    assert shown.bundles[-1]["text/plain"] == "Done after 0 s."
    with pytest.raises(TypeError):
        work("x")  # type: ignore[arg-type]
    assert shown.bundles[-1]["text/plain"] == "Stopped after 0 s."

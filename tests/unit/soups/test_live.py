"""Trackers that a run reports to while it runs, with trackers of the test's own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups import live, trackers
from ray_soup.soups.output import Output, open_output
from ray_soup.soups.state import LearnState, ignore_state
from tests.conftest import ROOT, values


class Kept:
    """A tracker that keeps what it is sent, over several openings, and fails where `fails` says so."""

    known = False

    def __init__(self, about: trackers.Tracked, opened: list[Any], fails: str = "") -> None:
        self.opened, self.fails = opened, fails
        self.check("open")
        opened.append(("open", about.identity, about.name))

    def check(self, what: str) -> None:
        if self.fails == what:
            raise ConnectionError(f"no {what}")

    def log(self, line: Mapping[str, float | None], label: str = "") -> None:
        self.check("log")
        self.opened.append((label, line["steps"]))

    def finish(self, soup: trackers.Finished) -> None:
        self.opened.append(("finish", soup.figures["test_nll"]))

    def close(self, failed: bool = False) -> str:
        self.opened.append(("close", failed))
        return ""


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Output]:
    with open_output(tmp_path / "out") as opened:
        opened.state("begun.json").write_text("{}")
        yield opened


@pytest.fixture(autouse=True)
def _no_failure_outlives_its_test() -> Iterator[None]:
    yield
    trackers.given_up.clear()


def finish(output: Output) -> None:
    row = {"model_name": "mehl+", "kind": "soup", "name": "mehl+", "test_nll": 0.5}
    (output.folder / "results.jsonl").write_text(json.dumps(row) + "\n")
    record = {"version": 2, "exit": 0, "method": "mehl+", "files": {}, "ingredients": []}
    (output.folder / "run.json").write_text(json.dumps(record))


def learned(*steps: int) -> LearnState:
    return LearnState(torch.zeros(1, 1), curve=[{"steps": n, "select_nll": 1 / (n + 1)} for n in steps])


def test_a_resumed_run_sends_every_point_once_to_the_same_run(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setitem(live.TRACKERS, "wandb", lambda about: Kept(about, opened))
    recipe = make_recipe(values(tmp_path, loggers=["wandb"]))
    with suppress(KeyboardInterrupt), live.live_trackers(recipe, output) as first:
        first.curve(ignore_state, "mehl")(3, 3, learned(0, 3))
        first.curve(ignore_state, "mehl+")(1, 3, learned(0, 1))
        raise KeyboardInterrupt
    with live.live_trackers(recipe, output) as second:
        second.curve(ignore_state, "mehl+")(2, 3, learned(0, 1, 2))
        second.curve(ignore_state, "mehl+")(3, 3, learned(0, 1, 2, 3))
        finish(output)
    start = ("open", output.token()[:16], "out")
    assert opened == [
        start, ("mehl", 0), ("mehl", 3), ("mehl+", 0), ("mehl+", 1), ("close", True),
        start, ("mehl+", 2), ("mehl+", 3), ("finish", 0.5), ("close", False),
    ]  # fmt: skip


def test_a_resumed_run_sends_the_points_that_a_tracker_did_not_take(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, kept = list[Any](), list[Any]()
    recipe = make_recipe(values(tmp_path, loggers=["wandb", "mlflow"]))
    monkeypatch.setitem(live.TRACKERS, "wandb", lambda about: Kept(about, failed, "log"))
    monkeypatch.setitem(live.TRACKERS, "mlflow", lambda about: Kept(about, kept))
    with suppress(KeyboardInterrupt), live.live_trackers(recipe, output) as first:
        first.curve(ignore_state)(1, 2, learned(0, 1))
        raise KeyboardInterrupt
    monkeypatch.setitem(live.TRACKERS, "wandb", lambda about: Kept(about, failed))
    with live.live_trackers(recipe, output) as second:
        second.curve(ignore_state)(2, 2, learned(0, 1, 2))
        finish(output)
    points = [("", 0), ("", 1), ("", 2)]
    assert [one for one in failed if one in points] == points
    assert [one for one in kept if one in points] == points


@pytest.mark.parametrize("fails", ["open", "log"])
def test_a_tracker_that_fails_gets_one_warning_and_the_others_go_on(
    fails: str, output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Any] = []
    monkeypatch.setitem(live.TRACKERS, "wandb", lambda about: Kept(about, [], fails))
    monkeypatch.setitem(live.TRACKERS, "mlflow", lambda about: Kept(about, kept))
    with (
        caplog.at_level(logging.WARNING),
        live.live_trackers(make_recipe(values(tmp_path, loggers=["wandb", "mlflow"])), output) as opened,
    ):
        opened.curve(ignore_state)(1, 2, learned(0, 1))
        opened.curve(ignore_state)(2, 2, learned(0, 1, 2))
        finish(output)
    assert [one.getMessage() for one in caplog.records] == [
        f"wandb failed: no {fails}. The run continues without it; `ray-soup export` sends the finished soup."
    ]
    assert kept[1:] == [("", 0), ("", 1), ("", 2), ("finish", 0.5), ("close", False)]
    assert trackers.given_up == {"wandb"}


def test_a_tracker_that_hangs_does_not_hold_up_the_end(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(live, "CLOSE_S", 0.1)
    release = threading.Event()
    monkeypatch.setitem(live.TRACKERS, "mlflow", lambda about: release.wait() and Kept(about, []))
    with live.live_trackers(make_recipe(values(tmp_path, loggers=["mlflow"])), output):
        finish(output)
    release.set()
    assert "mlflow failed: no answer within 0.1 s." in caplog.text
    assert trackers.given_up == {"mlflow"}


HANGS_AT_EXIT = """
import atexit, sys, time
import click
from ray_soup import exits
from ray_soup.soups import trackers

@click.group(cls=exits.Shell)
def shell(): ...

@shell.command()
@exits.common_options
def make(as_json):
    atexit.register(time.sleep, 60)
    trackers.given_up.add("wandb")
    print("made")
    click.get_current_context().exit(4)

shell.main(["make"])
"""


def test_a_command_whose_tracker_failed_does_not_wait_for_its_library() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS_AT_EXIT], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert (done.returncode, done.stdout) == (4, "made\n")


def test_a_tracker_without_its_key_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(trackers, "_has_key", lambda wandb, key: False)
    with pytest.raises(RecipeError, match=r"^loggers: wandb has no key\. Set WANDB_API_KEY, or WANDB_MODE=offline\.$"):
        live.check_loggers(make_recipe(values(tmp_path, loggers=["wandb"])))


def test_a_run_starts_while_the_server_of_wandb_is_unavailable() -> None:
    def login(prompt: bool = True, verify: bool = True) -> bool:
        if verify:
            raise ConnectionError("no server")
        return not prompt

    assert trackers._has_key(SimpleNamespace(login=login), "loggers")


def test_what_wandb_raises_about_its_key_is_an_error_of_the_recipe() -> None:
    def login(**options: bool) -> bool:
        raise ValueError("the key is too short")

    with pytest.raises(
        RecipeError, match=r"^loggers: wandb cannot read its key: the key is too short\. Set WANDB_API_KEY, or"
    ):
        trackers._has_key(SimpleNamespace(login=login), "loggers")

"""A run as Weights & Biases and MLflow show it while it is running.

A thread of its own talks to the trackers: neither their servers nor their faults hold up or end the run. A resumed run
continues the same run of a tracker, without repeating points of its learning curves.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import yaml

from ray_soup.errors import first_line
from ray_soup.io.disk import read_json, write_json
from ray_soup.io.redact import redact_uris
from ray_soup.recipe import Recipe, dump_recipe
from ray_soup.soups.output import Output
from ray_soup.soups.trackers import TRACKERS, Tracked, Tracker, check_tracker, finished_soup, given_up

if TYPE_CHECKING:
    from ray_soup.soups.state import LearnState, StateCallback

SENT = "trackers.json"
"""The file in state/ with the number of points of each learning curve that each tracker has."""
CLOSE_S = 60.0
"""Seconds that a finished run waits for its trackers."""
CLOSE_FAILED_S = 10.0
"""Seconds that a failed run waits for them."""
CLOSE_STOPPED_S = 1.0
"""Seconds that a run waits for them which a signal ended."""


def check_loggers(recipe: Recipe) -> None:
    """Raise RecipeError if a tracker of the recipe is not installed or lacks its key."""
    for name in recipe.loggers:
        check_tracker(name, "loggers")


class LiveTrackers:
    """The trackers of a run. One that fails is named in a warning, and is not called again."""

    def __init__(self, recipe: Recipe, output: Output) -> None:
        self._file, self._folder = output.state(SENT), output.folder
        self._names = list(recipe.loggers)
        config = yaml.safe_load(redact_uris(dump_recipe(recipe)))
        self._about = Tracked(Path(output.uri_of()).name, output.token()[:16], config, output.folder / "wandb", CLOSE_S)
        self._sent: dict[str, dict[str, int]] = read_json(self._file) if self._file.exists() else {}
        self._open: dict[str, Tracker] = {}
        self._ended = False
        self._todo: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        if self._names:
            self._thread.start()
            for name in self._names:
                self._todo.put(lambda name=name: self._begin(name))  # type: ignore[misc]

    def curve(self, after_epoch: StateCallback, label: str = "") -> StateCallback:
        """Return a callback for the end of every epoch that does what `after_epoch` does, and sends the new points.

        `label` names the soup, if the run makes several.
        """

        def send(step: int, steps: int, state: LearnState) -> None:
            after_epoch(step, steps, state)
            if self._names:
                curve = [dict(line) for line in state.curve]
                self._each(lambda name, tracker: self._extend(name, tracker, label, curve))

        return send

    def _extend(self, name: str, tracker: Tracker, label: str, curve: list[dict[str, float]]) -> None:
        """Send a tracker the points of a curve that it does not have, and keep their number once it has taken them."""
        sent = self._sent.setdefault(name, {})
        for line in curve[sent.get(label, 0) :]:
            tracker.log(line, label)
            sent[label] = sent.get(label, 0) + 1
            if not self._ended:
                write_json(self._file, self._sent)

    def finish(self) -> None:
        """Send the finished soup, and end the trackers' runs."""
        if self._names:
            soup, _ = finished_soup(self._folder)
            self._each(lambda _, tracker: tracker.finish(soup))
            self._close(False, CLOSE_S)
            with suppress(OSError):
                self._file.unlink()  # as all of the state of a finished run

    def fail(self, seconds: float) -> None:
        """End the trackers' runs as failed, and wait for them at most `seconds`."""
        if self._names:
            self._close(True, seconds)

    def _close(self, failed: bool, seconds: float) -> None:
        self._each(lambda _, tracker: tracker.close(failed))
        self._todo.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            given_up.update(self._open or self._names)
            if not failed:
                self._warn(" and ".join(self._open or self._names), f"no answer within {seconds:g} s")
        self._ended = True

    def _begin(self, name: str) -> None:
        try:
            if name == "wandb" and self._about.files is not None:
                self._about.files.mkdir(exist_ok=True)
            self._open[name] = TRACKERS[name](self._about)
        except Exception as error:
            given_up.add(name)
            self._warn(name, first_line(error))

    def _each(self, act: Callable[[str, Tracker], object]) -> None:
        """Let the thread call every tracker that has not failed."""

        def call() -> None:
            for name, tracker in list(self._open.items()):
                try:
                    act(name, tracker)
                except Exception as error:
                    del self._open[name]
                    given_up.add(name)
                    if not self._ended:
                        self._warn(name, first_line(error))

        self._todo.put(call)

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            todo()

    @staticmethod
    def _warn(name: str, reason: str) -> None:
        logging.getLogger("ray_soup").warning(
            "%s failed: %s. The run continues without it; `ray-soup export` sends the finished soup.", name, reason
        )


@contextmanager
def live_trackers(recipe: Recipe, output: Output) -> Iterator[LiveTrackers]:
    """Report to the trackers in `loggers` for as long as the context lasts; at its end, OUT has the finished soup."""
    trackers = LiveTrackers(recipe, output)
    try:
        yield trackers
    except BaseException as error:
        trackers.fail(CLOSE_STOPPED_S if isinstance(error, KeyboardInterrupt) else CLOSE_FAILED_S)
        raise
    trackers.finish()

"""The progress of a command on stderr: a bar on a terminal, lines of text elsewhere, or JSON objects.

Does not import torch.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from ray_soup.io.pace import Display, Pace, duration
from ray_soup.io.redact import printable, redact
from ray_soup.soups.report.console import log, logs_json, make_console, name_of, say

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LOG_INTERVAL_S = 10
"""Seconds between two lines without a terminal."""
LONGEST_PHASE = 40
"""Terminal columns of the longest name of a phase beside its bar."""
KEPT_S = 1
"""Seconds of the shortest phase whose bar stays on the terminal."""


class ProgressBar(Display):
    """A Display on stderr.

    On a terminal, each phase has a bar, whose line stays there if the phase took a second or longer. Elsewhere, there is a
    line every ten seconds, also while nothing is reported; in JSON, also one at the beginning and at the end of each phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = make_console(stderr=True)
        self._draws = self._console.is_terminal and not logs_json()
        self._bars: Progress | None = None
        self._printed = time.monotonic()
        self._announced: Pace | None = None

    def show(self, phase: Pace, now: float) -> None:
        """Show the current phase; a terminal that is gone does not end the run."""
        if self._draws:
            with suppress(OSError, ValueError):
                self._draw(phase)
        elif now - self._printed >= LOG_INTERVAL_S - self.tick_s or (logs_json() and phase is not self._announced):
            self._print(phase, now)

    def end(self, phase: Pace, now: float) -> None:
        """Leave the bar of a phase on the terminal, or print a JSON object about it."""
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.live.transient = phase.seconds(now) < KEPT_S
            with suppress(OSError, ValueError):
                bars.stop()
        elif logs_json():
            self._print(phase, now)

    def tell(self, sentence: str) -> None:
        """Print a sentence, on a terminal above the bar."""
        if self._bars is None:
            say(sentence)
        else:
            with suppress(OSError, ValueError):
                self._console.print(printable(redact(sentence)), markup=False, highlight=False)

    def _print(self, phase: Pace, now: float) -> None:
        self._printed, self._announced = now, phase
        if logs_json():
            in_all = self.left_in_all(now)
            log(phase.record(now) | ({} if in_all is None else {"left_in_all": round(in_all, 1)}))
        else:
            say(f"{name_of(phase.what)}: {self.text(phase, now)}")

    def _draw(self, phase: Pace) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        display = self

        class Figures(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(display.figures(phase, time.monotonic()), no_wrap=True, overflow="ellipsis")

        if self._bars is None:
            columns = (TextColumn("{task.description:<24}", markup=False), BarColumn(10), Figures())
            self._bars = Progress(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
            self._task: TaskID = self._bars.add_task(name_of(phase.what, longest=LONGEST_PHASE), total=None)
        counted = phase.share() is not None
        self._bars.update(self._task, completed=phase.done, total=phase.total if counted else None)

    def figures(self, phase: Pace, now: float) -> str:
        """Return what stands right of the bar, in few columns."""
        share, left, in_all = phase.share(), phase.left(now), self.left_in_all(now)
        to_go = [] if left is None else [f"{duration(left)} left"]
        to_go += [] if in_all is None else [f"{duration(in_all)} {'in all' if to_go else 'left in all'}"]
        percent = "" if share is None else f"{share:4.0%}".replace("%", " %")
        return "  ".join(filter(None, (percent, duration(phase.seconds(now)), phase.speed(), ", ".join(to_go))))

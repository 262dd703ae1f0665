"""The pace of work that reports its progress: what is counted, how fast it goes, and how long it will take."""

from __future__ import annotations

import re
import threading
import time
from types import TracebackType
from typing import Any, TypeVar

from ray_soup.io.progress import NOTE, WHOLE_RUN

D = TypeVar("D", bound="Display")

UNITS = {
    "comparing": "tensors",
    "comparing examples": "examples",
    "decoding": "examples",
    "downloading": "bytes",
    "evaluating": "examples",
    "fetching": "bytes",
    "fine-tuning": "models",
    "greedy": "examples",
    "hashing": "bytes",
    "learning": "steps",
    "mixing": "bytes",
    "mixing adapters": "tensors",
    "polishing": "steps",
    "reading adapters": "tensors",
    "reading": "bytes",
    "recalibrating": "batches",
    "refitting": "steps",
    "searching": "trials",
    "starting actors": "actors",
    "training": "steps",
    "trying": "mixtures",
    "uploading": "bytes",
    "waiting": "seconds",
    WHOLE_RUN: "seconds",
}
"""What is counted in a phase, by its first words."""
LEAST_S = 1.0
"""Seconds that are measured before a rate is given."""
NEXT = "preparing the next step"
"""What is shown when a phase has been complete for NEXT_S seconds, and nothing else is reported."""
NEXT_S = 1.0

_NUMBER = re.compile(r"^\d+/\d+ ")
"""The number of a part of the run before the name of its phase, as in `3/12 learning mehl`."""


def unit_of(what: str) -> str:
    """Return what is counted in a phase; empty if that is not known."""
    words = phase_of(what).replace(",", "").split(" ")
    names = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((UNITS[name] for name in names if name in UNITS), "")


def phase_of(what: str) -> str:
    """Return the name of a phase without the number of the part of the run."""
    return _NUMBER.sub("", what)


def duration(seconds: float) -> str:
    """Format seconds, as in `2 min 10 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(nbytes: float) -> str:
    """Format a number of bytes, as in `1.2 GB`."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= least:
            return f"{nbytes / least:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


class Pace:
    """A phase of the work, which began at `now` seconds of a monotonic clock."""

    def __init__(self, what: str, now: float) -> None:
        self.what, self.unit, self.began = what, unit_of(what), now
        self.done = self.total = 0
        self._first: tuple[int, float] | None = None
        self._at = now

    def count(self, done: int, total: int, now: float) -> None:
        """Note that `done` of `total` units are done. The pace is measured from the first report on."""
        if done != self.done or self._first is None:
            self._at = now
        self._first = self._first or (done, now)
        self.done, self.total = done, total

    def seconds(self, now: float) -> float:
        """Return the seconds since the phase began."""
        return max(0.0, now - self.began)

    def rate(self) -> float | None:
        """Return the units done per second; None if too little was measured."""
        if self._first is None or self.unit == "seconds":
            return None
        done, seconds = self.done - self._first[0], self._at - self._first[1]
        return done / seconds if done > 0 and seconds >= LEAST_S else None

    def left(self, now: float) -> float | None:
        """Return the seconds left at the pace so far; None if they are not known, or if the phase takes longer."""
        rate = 1.0 if self.unit == "seconds" else self.rate()
        if rate is None:
            return None
        if self.done >= self.total:
            return 0.0
        left = (self.total - self.done) / rate - (now - self._at)
        return left if left > 0 else None

    def is_over(self, now: float) -> bool:
        """Return whether the phase is complete, and nothing was reported for a while."""
        return self.share() == 1 and now - self._at >= NEXT_S

    def share(self) -> float | None:
        """Return the share that is done, from 0 to 1; None if the phase is not counted in units."""
        return min(1.0, self.done / self.total) if self.total > 1 else None

    def record(self, now: float) -> dict[str, Any]:
        """Return the phase as a JSON object."""
        left = self.left(now)
        return {
            "phase": self.what,
            "done": self.done,
            "total": self.total,
            "unit": self.unit,
            "seconds": round(self.seconds(now), 1),
            "left": None if left is None else round(left, 1),
        }

    def counted(self) -> str:
        """Return the units that are done, as in `120 of 600 steps`; empty if the phase is not counted in units."""
        if self.share() is None:
            return ""
        if self.unit == "bytes":
            return f"{size(self.done)} of {size(self.total)}"
        if self.unit == "seconds":
            return f"{self.done} of at most {self.total} s"
        return f"{self.done:,} of {self.total:,} {self.unit}".rstrip()

    def speed(self) -> str:
        """Return the rate, as in `83/s`; empty if too little was measured."""
        rate = self.rate()
        if rate is None:
            return ""
        if self.unit == "bytes":
            return f"{size(rate)}/s"
        if rate < 1:
            return f"{duration(1 / rate)} each" if rate <= 0.1 else f"{1 / rate:.1f} s each"
        return f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s"


class Display:
    """A ProgressCallback that shows the current phase, from its first moment on.

    As a context manager: inside of it, a thread calls `show` every `tick_s` seconds, also while nothing is reported.
    Subclasses say how a phase is shown.
    """

    tick_s = 0.5

    def __init__(self) -> None:
        self.phase: Pace | None = None
        self.whole: Pace | None = None
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self: D) -> D:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(self.tick_s)
        self.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of the work `what` are done."""
        now = time.monotonic()
        with self._lock:
            if what.startswith(NOTE):
                self.tell(what.removeprefix(NOTE))
                return
            if what == WHOLE_RUN:
                self.whole = self.whole or Pace(what, now)
                self.whole.count(done, total, now)
                return
            if self.phase is None or what != self.phase.what:
                self.stop()
                self.phase = Pace(what, now)
            self.phase.count(done, total, now)
            self.show(self.phase, now)

    def stop(self) -> None:
        """End the current phase."""
        with self._lock:
            phase, self.phase = self.phase, None
            if phase is not None:
                self.end(phase, time.monotonic())

    def _tick(self) -> None:
        while not self._ended.wait(self.tick_s):
            with self._lock:
                now = time.monotonic()
                if self.phase is not None and self.phase.is_over(now):
                    self(NEXT, 0, 1)
                elif self.phase is not None:
                    self.show(self.phase, now)

    def show(self, phase: Pace, now: float) -> None:
        """Show the current phase, `now`."""
        raise NotImplementedError

    def end(self, phase: Pace, now: float) -> None:
        """Show that a phase has ended."""

    def tell(self, sentence: str) -> None:
        """Show a sentence once."""

    def left_in_all(self, now: float) -> float | None:
        """Return the seconds left of the whole run; None if nothing has estimated them."""
        return None if self.whole is None else self.whole.left(now) or None

    def text(self, phase: Pace, now: float) -> str:
        """Return the line about a phase, without its name."""
        left, in_all = phase.left(now), self.left_in_all(now)
        parts = [phase.counted(), phase.speed(), f"{duration(phase.seconds(now))} so far"]
        parts.append("" if left is None or phase.unit == "seconds" else f"{duration(left)} left")
        parts.append("" if in_all is None else f"about {duration(in_all)} left in all")
        return ", ".join(filter(None, parts))

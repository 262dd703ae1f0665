"""How long the parts of a run take."""

from __future__ import annotations

import time


class Clock:
    """A stopwatch for the parts of a run, in seconds."""

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> float:
        """Add the seconds since the last lap to `name`, and return them."""
        now = time.monotonic()
        self.laps[name] = round(self.laps.get(name, 0) + now - self._last, 3)
        passed, self._last = now - self._last, now
        return passed

    def total(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self._start, 3)

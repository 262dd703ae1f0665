"""Metrics of a run for Prometheus, which the driver hands to Ray's metrics agent.

Ray puts `ray_` in front of every name: `soup_steps_total` is scraped as `ray_soup_steps_total`. A process has one run at a
time, so what happens deep inside of it is counted by the functions of this module; they do nothing outside of `recording`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict

from ray_soup.actors.messages import Partial
from ray_soup.actors.pool import ActorPool
from ray_soup.io.pace import phase_of, unit_of
from ray_soup.io.progress import WHOLE_RUN, ProgressCallback
from ray_soup.io.redact import redact
from ray_soup.task import identity

REFRESH_S = 5.0
"""Seconds between two refreshes of the gauges: Ray drops one that nobody has set for 20 s."""
RUN = 8
"""Characters of a run's id that identify it."""

COUNTERS = {
    "steps_total": "Steps of the optimizer",
    "examples_total": "Examples (images, texts) in the forward and backward passes of steps",
    "step_seconds_total": "Seconds of steps by part: combine, passes and project of the slowest actor, driver: the rest",
    "wire_bytes_total": "Bytes between the driver and the actors in steps",
    "storage_bytes_total": "Bytes of checkpoints that were read, hashed, mixed, downloaded or uploaded, by phase",
    "actors_lost_total": "Actors that died or did not answer in time",
    "actors_created_total": "Actors that began to serve after the start: replacements, and those on nodes that joined",
    "ranks_moved_total": "Ranks that moved to another actor",
    "actors_drained_total": "Actors that ranks left because their node was about to leave",
    "actors_slowed_total": "Times that an actor was found to be much slower than the others",
}
GAUGES = {
    "actors": "Actors that serve the run",
    "select_nll": "Negative log-likelihood on select at the end of the last epoch, in nats",
    "phase_done": "Units of the current phase that are done",
    "phase_units": "Units of the current phase in total",
    "run_info": "1 for as long as a run is running; tells its output folder",
}
TAGS = {
    **dict.fromkeys(("steps_total", "examples_total", "wire_bytes_total", "storage_bytes_total"), ("phase",)),
    **dict.fromkeys(("phase_done", "phase_units"), ("phase", "unit")),
    "step_seconds_total": ("phase", "part"),
    "run_info": ("out",),
}
"""The tags of a metric in addition to `run`, the start of the run's id, and `method`, that of the soup being made."""
OF_COUNTS = {
    "lost": "actors_lost_total", "created": "actors_created_total", "moved": "ranks_moved_total",
    "drained": "actors_drained_total", "slowed": "actors_slowed_total",
}  # fmt: skip
"""The metrics of the counters of a pool."""


def about_run(method: str, out: str) -> dict[str, str]:
    """Return what Ray shows about the job of this process: its run, as the metrics name it, its method and its folder."""
    return {"ray_soup": identity.RUN[:RUN], "method": method, "out": redact(out)}


class Metrics:
    """The metrics of one run; nothing that goes wrong with them ends it."""

    def __init__(self, pool: ActorPool | None, method: str, out: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self.method = method
        self._pool, self._out, self._run = pool, redact(out), identity.RUN[:RUN]
        self._lock = threading.RLock()
        self._counters = {name: Counter(f"soup_{name}", text, _tags(name)) for name, text in COUNTERS.items()}
        self._gauges = {name: Gauge(f"soup_{name}", text, _tags(name)) for name, text in GAUGES.items()}
        self._nll = math.nan
        self._phase: tuple[str, int, int] | None = None
        self._whole: tuple[str, int, int] | None = None
        self._counted: dict[str, int] = {} if pool is None else asdict(pool.counts)  # of an earlier trial with this pool

    def count(self, name: str, amount: float, **tags: str) -> None:
        """Add to a counter."""
        if amount > 0:
            with self._lock, suppress(Exception):
                self._counters[name].inc(amount, {"run": self._run, "method": self.method, **tags})

    def progress(self, what: str, done: int, total: int) -> None:
        """Note that `done` of `total` units of the phase `what` are done."""
        with self._lock:
            if what == WHOLE_RUN:
                self._whole = (what, done, total)
                return
            phase = phase_of(what)
            before = self._phase[1] if self._phase is not None and self._phase[0] == phase else None
            begins = before is None or done < before
            if unit_of(what) == "bytes":
                self.count("storage_bytes_total", done - (0 if before is None or begins else before), phase=phase)
            self._phase = (phase, done, total)
        if begins:
            self.refresh()

    def select(self, nll: float) -> None:
        """Note the NLL on select at the end of an epoch."""
        self._nll = nll
        self.refresh()

    def refresh(self) -> None:
        """Set all gauges, and count what has happened to the pool since the last time."""
        with self._lock:
            if self._pool is not None:
                counts = asdict(self._pool.counts)
                for key, name in OF_COUNTS.items():
                    self.count(name, counts[key] - self._counted.get(key, 0))
                self._counted = counts
                self._set("actors", counts["actors"])
            self._set("run_info", 1, out=self._out)
            if math.isfinite(self._nll):
                self._set("select_nll", self._nll)
            for what, done, total in filter(None, (self._phase, self._whole)):
                self._set("phase_done", done, phase=what, unit=unit_of(what))
                self._set("phase_units", total, phase=what, unit=unit_of(what))

    def _set(self, name: str, value: float, **tags: str) -> None:
        with suppress(Exception):
            self._gauges[name].set(value, {"run": self._run, "method": self.method, **tags})


_current: Metrics | None = None


@contextmanager
def recording(pool: ActorPool | None, method: str, out: str = "") -> Iterator[None]:
    """Record the metrics of this process's run for as long as the context lasts.

    Args:
        pool: the actors, on Ray; None: a search, whose trials have them.
        method: the recipe's method.
        out: the output folder; empty: none, as in a trial.
    """
    global _current  # noqa: PLW0603 - one run per process
    ended = threading.Event()
    before, _current = _current, Metrics(pool, method, out)

    def refresh(metrics: Metrics) -> None:
        while not ended.wait(REFRESH_S):
            metrics.refresh()

    thread = threading.Thread(target=refresh, args=(_current,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(REFRESH_S)
        _current.refresh()
        _current = before


def observed(progress: ProgressCallback) -> ProgressCallback:
    """Return a callback that passes on what it is called with, and records it."""

    def report(what: str, done: int, total: int) -> None:
        progress(what, done, total)
        if _current is not None:
            _current.progress(what, done, total)

    return report


def begin_soup(method: str) -> None:
    """Tag what follows with the method of a soup."""
    if _current is not None:
        _current.method = method


def count_step(answers: Sequence[Sequence[Partial]], phase: str, examples: int, nbytes: int, seconds: float) -> None:
    """Count a step.

    Args:
        answers: the actors' answers to each part of its batch.
        phase: learning or refitting.
        examples: the number of examples in its batch.
        nbytes: bytes between the driver and the actors.
        seconds: its duration.
    """
    if _current is None:
        return
    for part, spent in seconds_by_part(answers, seconds).items():
        _current.count("step_seconds_total", spent, phase=phase, part=part)
    for name, amount in (("steps_total", 1), ("examples_total", examples), ("wire_bytes_total", nbytes)):
        _current.count(name, amount, phase=phase)


def count_epoch(select_nll: float) -> None:
    """Note the NLL on select at the end of an epoch."""
    if _current is not None:
        _current.select(select_nll)


def seconds_by_part(answers: Sequence[Sequence[Partial]], seconds: float) -> dict[str, float]:
    """Return the seconds of a step by part; they sum to `seconds`, the duration on the driver."""
    slowest = [max(answer, key=lambda partial: partial.seconds) for answer in answers]
    combine, project = sum(p.combine_s for p in slowest), sum(p.project_s for p in slowest)
    actors = sum(p.seconds for p in slowest)
    return {"combine": combine, "passes": actors - combine - project, "project": project, "driver": seconds - actors}


def _tags(name: str) -> tuple[str, ...]:
    return ("run", "method", *TAGS.get(name, ()))

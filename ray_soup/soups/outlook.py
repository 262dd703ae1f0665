"""How long the rest of a comparison will take, estimated from how long its parts have taken so far."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_soup.io.progress import WHOLE_RUN, ProgressCallback
from ray_soup.recipe import DEFAULT_METHOD, TRAINED, for_method
from ray_soup.soups.comparison import SEEDLESS, CompareOptions, SoupEntry, methods_for, methods_on, table_entries
from ray_soup.soups.granularity import stages
from ray_soup.soups.inputs import CALIBRATION
from ray_soup.soups.session import Session
from ray_soup.soups.trained import RATES
from ray_soup.task.outcomes import test_sets

STEP = 3
"""Forward passes that take as long as a step of learning on as many examples."""
LOOKED = 0.5
"""Share of the held-out examples that a greedy search looks at for a candidate."""
TRIED = 8
"""Mixtures that a schedule tries."""
REPORT_S = 1.0
"""Seconds between two reports on the whole run."""

_NUMBER = re.compile(r"^(\d+)/\d+ ")


@dataclass(frozen=True)
class Work:
    """The work on one part of a comparison, in forward passes of examples."""

    evaluated: float
    """Passes without gradients."""
    learned: float = 0.0
    """Passes of steps, each of which counts as STEP passes for each of its examples."""


def expected_work(session: Session, options: CompareOptions) -> list[Work]:
    """Return the work on each part of a comparison in order: on all ingredients, on each soup, on training all weights."""
    learn, count = session.recipe.learn, len(session.inputs.ingredients)
    model_batch = -(-count // 4) if learn.model_batch == "auto" else min(learn.model_batch, count)
    methods = methods_for(session.inputs.steps, session.recipe)
    entries = [e for n in range(options.seeds) for e in table_entries(count, model_batch, learn.seed + n, methods)]
    for series, sizes in (("dropped", [count - n for n in options.drop_top]), ("counted", options.by_count)):
        entries += [SoupEntry(m, tuple(range(n)), learn.seed, n) for n in sizes for m in methods_on(series)]
    entries = list(dict.fromkeys(replace(e, seed=learn.seed) if e.method in SEEDLESS else e for e in entries))
    splits = {name: len(split) for name, split in session.cut(learn.seed).items()}
    splits["recalibrated"] = min(splits["fit"], CALIBRATION) if session.inputs.recalibrated(session.recipe) else 0
    works = [Work(count * sum(session.setup.sizes.values()))]
    works += [_work_on(session, entry, splits) for entry in entries]
    if options.trained:
        epochs, epoch = for_method(session.recipe, DEFAULT_METHOD).learn.epochs, STEP * splits["fit"] + splits["select"]
        works.append(Work(0, options.seeds * len(RATES) * epochs * epoch))
    return works


def _work_on(session: Session, entry: SoupEntry, splits: Mapping[str, int]) -> Work:
    recipe, count = for_method(session.recipe, entry.method), len(entry.subset)
    fit, select = splits["fit"], splits["select"]
    shown = select + sum(splits[name] for name in test_sets(dict(splits))) + splits["recalibrated"]
    if recipe.info.learns:
        blocks = replace(session, recipe=recipe, subset=entry.subset, splits=session.cut(entry.seed)).blocks
        turns = stages(recipe, blocks) * -(-count // entry.model_batch) * recipe.learn.models_epochs
        return Work(shown, turns * recipe.learn.epochs * (STEP * fit + select) * (1 + recipe.learn.refit))
    if recipe.info.kind == "schedule":
        return Work(shown + TRIED * select)
    return Work(shown + (LOOKED * (count - 1) * (fit + select) if entry.method == "greedy" else 0))


class Outlook:
    """A ProgressCallback that passes on what it is called with, and also reports on the whole run.

    Parts are known by what is being done: `evaluating ingredients`, `3/12 learning mehl`, `training trained`. A part takes
    the seconds of its passes, and an overhead that all parts share, such as that of mixing a soup.
    """

    def __init__(self, progress: ProgressCallback) -> None:
        self._progress = progress
        self._works: list[Work] = []
        self._part = -1
        self._began = self._part_began = self._phase_began = self._reported = time.monotonic()
        self._phase, self._share, self._first_share = "", 0.0, 0.0
        self._pass_s: float | None = None
        self._learn_s: float | None = None
        self._overhead_s: float | None = None

    def expect(self, works: list[Work]) -> None:
        """Report on the whole run from now on, which consists of these parts."""
        self._works = works

    def __call__(self, what: str, done: int, total: int) -> None:
        """Pass on that `done` of `total` units of the work `what` are done; report on the whole run once a second."""
        self._progress(what, done, total)
        now, part = time.monotonic(), self._part_of(what)
        if not self._works or part is None:
            return
        if part != self._part:
            self._end_part(now - self._part_began)
            self._part, self._part_began = part, now
        share = done / total if total > 1 else 0.0
        if what != self._phase:
            self._phase, self._phase_began, self._first_share = what, now, share
        self._share = share
        self._measure(now)
        left = self.left(now)
        if left is not None and now - self._reported >= REPORT_S:
            self._reported, so_far = now, now - self._began
            self._progress(WHOLE_RUN, round(so_far), round(so_far + left))

    def _part_of(self, what: str) -> int | None:
        """Return the number of a part; None if it is none."""
        if what == "evaluating ingredients":
            return 0
        found = _NUMBER.match(what)
        if found is not None:
            return min(int(found[1]), len(self._works) - 1)
        return len(self._works) - 1 if what.startswith(f"training {TRAINED}") else None

    @property
    def _learns(self) -> bool:
        """Whether the current phase is the learning of a soup."""
        return self._phase.split(" ")[1:2] == ["learning"]

    def _measure(self, now: float) -> None:
        """Measure the seconds of a pass in the current phase, from its first report on."""
        work, seconds, share = self._works[self._part], now - self._phase_began, self._share - self._first_share
        if share <= 0 or seconds <= 0:
            return
        if self._part == 0:
            self._pass_s = seconds / (share * work.evaluated)
        elif self._learns and work.learned:
            self._learn_s = seconds / (share * work.learned)

    def _end_part(self, seconds: float) -> None:
        """Measure the overhead of a soup that was made; the least, because the first ones also load and compile code."""
        if 0 < self._part < len(self._works):
            over = max(0.0, seconds - self._seconds_of_passes(self._works[self._part]))
            self._overhead_s = over if self._overhead_s is None else min(over, self._overhead_s)

    def _seconds_of_passes(self, work: Work) -> float:
        """Return the seconds of passes; those of a kind that was not measured take as long as those of the other one."""
        pass_s = self._learn_s if self._pass_s is None else self._pass_s
        learn_s = self._pass_s if self._learn_s is None else self._learn_s
        return work.evaluated * (pass_s or 0) + work.learned * (learn_s or 0)

    def left(self, now: float) -> float | None:
        """Return the estimated seconds until the comparison ends; None if nothing was measured so far."""
        if self._part < 0 or (self._pass_s is None and self._learn_s is None):
            return None
        work, overhead = self._works[self._part], self._overhead_s or 0.0
        if self._learns:
            rest = self._seconds_of_passes(Work(work.evaluated, work.learned * (1 - self._share))) + overhead
        else:
            whole = self._seconds_of_passes(work) + (overhead if self._part else 0)
            rest = max(0.0, whole - (now - self._part_began))
        return rest + sum(self._seconds_of_passes(later) + overhead for later in self._works[self._part + 1 :])

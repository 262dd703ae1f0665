"""Steps of a training run: which checkpoints belong to one run, and in which order, as their names say.

run/checkpoint-500, run/checkpoint-1000       steps 500 and 1000 of `run`, both called checkpoint-#
run/step_500.pt, run/step_500_ema.pt          two series of `run`: step_#.pt and step_#_ema.pt
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ray_soup.io.checkpoint_files import is_checkpoint, split_key
from ray_soup.io.runs import NUMBERED

PER_TRIAL = re.compile(r"[?&]per_trial=([^?&]*)")


@dataclass(frozen=True)
class Step:
    """The place of a checkpoint in its training run."""

    run: str
    """Path or URI of the run's folder."""
    series: str
    """What the run calls its checkpoints, with # for the number; numbers are comparable within one series only."""
    number: int
    """The step or the epoch."""

    @property
    def unit(self) -> str:
        """What the number counts, for axes and headings."""
        name = self.series.lower()
        return "epoch" if "epoch" in name and "step" not in name else "step"


def step_in(name: str) -> tuple[str, int] | None:
    """Return series and number of the step that a file or folder is named after; None if its name says none."""
    plain = re.sub(r"(epoch=)\d+(?=.*step=)", r"\1#", name)  # Lightning: the epoch changes along a run, too
    found = NUMBERED.fullmatch(plain)
    return None if found is None else (f"{found[1]}#{found[3]}", int(found[2]))


def named_step(path: str) -> Step | None:
    """Return the step of a checkpoint by its own name, or by that of its folder; None if neither says one."""
    folder, name = os.path.split(split_key(path)[0].rstrip("/"))
    found = step_in(name)
    if found is None and is_checkpoint(name):  # a model in the folder of a step
        above, step = os.path.split(folder)
        inside = step_in(step)
        return None if inside is None else Step(above, f"{inside[0]}/{name}", inside[1])
    return None if found is None else Step(folder, *found)


def split_per_trial(spec: str) -> tuple[str, str | None]:
    """Split `run?per_trial=last:4&key=model` into `run?key=model` and `last:4`; None without ?per_trial=."""
    found = PER_TRIAL.search(spec)
    if found is None:
        return spec, None
    rest = spec[found.end() :]
    if found[0][0] == "?" and rest.startswith("&"):
        rest = "?" + rest[1:]
    return spec[: found.start()] + rest, found[1]


def asks_for_steps(spec: str | Sequence[str] | None) -> bool:
    """Return whether the recipe's ingredients have ?per_trial=."""
    specs = [spec] if isinstance(spec, str) else spec or ()
    return any(PER_TRIAL.search(one) for one in specs)


def fault_of(named: Sequence[tuple[str, Step | None]]) -> str | None:
    """Say why ingredients, given by path and step, are not different steps of one run; None if they are."""
    first: dict[int, str] = {}
    for path, step in named:
        if step is None:
            return f"neither its name nor that of its folder says which step {path} is"
        begun, start = named[0]
        if start is not None and (step.run, step.series) != (start.run, start.series):
            return f"{begun} and {path} are not named as steps of one run"
        if step.number in first:
            return f"{first[step.number]} and {path} are both {step.unit} {step.number}"
        first[step.number] = path
    return None

"""Several steps of a training run as ingredients: what ?per_trial=last:N and ?per_trial=all name.

A run is a folder with a checkpoint for each step, as a file or a folder whose name ends in a number: of Transformers, PEFT
and TRL (checkpoint-N), Lightning (step=N), timm, torchvision, open_clip, and others by names such as step_N or epoch_N; or a
trial of Ray Tune or Train. What is not named after a step (best, last, the model saved at the end) is left out, with a note.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.checkpoint_files import checkpoint_of, is_checkpoint
from ray_soup.io.json_files import read_json
from ray_soup.io.runs import NO_MODELS, STATE, WEIGHTS, has_checkpoints, searched
from ray_soup.io.steps import Step, step_in
from ray_soup.io.sweeps import Sweep, Trial

NOT_A_STEP = {"averaged", "best", "final", "last", "latest", "recovery"}
"""Words in names of checkpoints that are copies or means of steps."""
METRICS = re.compile(r"(?<=step=)(\d+)-[^/]*(?=\.ckpt$)")
"""What Lightning may write between the step and the suffix, such as -val_loss=0.25."""
MOST_NAMED = 4
"""Runs that a note lists one by one."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that the recipe names, and what is known about where it comes from."""

    path: str
    trial: Trial | None = None
    step: Step | None = None
    """Its step, if the recipe asks for steps with ?per_trial=."""

    def with_key(self, key: str) -> Found:
        """Return the same checkpoint with ?key=."""
        return replace(self, path=f"{self.path}?key={key}")


@dataclass(frozen=True)
class Trajectory:
    """The checkpoints of one run, ordered by step."""

    run: str
    """Path or URI of the run's folder."""
    steps: tuple[Found, ...]
    left_out: tuple[str, ...] = ()
    """Names of other checkpoints in the folder."""

    def last(self, spec: str, asked: str) -> Trajectory:
        """Return the steps that ?per_trial= asks for. Raises RecipeError if there are not as many."""
        if asked == "all":
            return self
        count = int(asked.removeprefix("last:"))
        if count > len(self.steps):
            raise RecipeError(
                f"ingredients: {spec} asks for the last {count:,} steps of each run, but {self.run} has {len(self.steps)}. "
                f"Write ?per_trial=last:{len(self.steps)} or ?per_trial=all."
            )
        return replace(self, steps=self.steps[-count:])


def check_per_trial(spec: str, asked: str) -> None:
    """Check the value of ?per_trial=. Raises RecipeError."""
    if asked != "all" and not re.fullmatch(r"last:0*[1-9]\d{0,8}", asked):
        raise RecipeError(
            f"ingredients: found ?per_trial={asked} in {spec}; expected ?per_trial=all, or ?per_trial=last:N with N of 1 or "
            "more. Fix it."
        )


def would_be_step(pattern: str, out: str) -> bool:
    """Return whether a soup in the folder `out` would be found as a step of a run below a folder that matches a pattern."""
    if step_in(os.path.basename(out.rstrip("/"))) is None:
        return False
    if not storage.is_remote(out):
        pattern, out = os.path.abspath(os.path.expanduser(pattern)), os.path.abspath(out)
    above = [out[: slash.start()] or "/" for slash in re.finditer("/", out)]
    return any(folder == pattern.rstrip("/") or storage.matches(folder, pattern.rstrip("/")) for folder in above)


def steps_of_runs(spec: str, folders: Sequence[str], asked: str, notes: list[str]) -> list[Found]:
    """Return the steps of the runs in or below folders, run by run, and add a note about them.

    Args:
        spec: what the recipe says, for messages.
        folders: the folders that it names.
        asked: `all` or `last:N`.
        notes: receives one line.

    Raises RecipeError if there are no runs, a run has fewer steps, or nothing tells its steps.
    """
    runs = [run.last(spec, asked) for folder in folders for run in _runs_below(folder)]
    if not runs:
        raise RecipeError(
            f"ingredients: {spec} names no run: expected folders with checkpoints that are named after steps, such as "
            "checkpoint-500, step_500.pt or epoch_3.pt. Name the folder of a run, or the folder above several runs."
        )
    notes.append(_note(spec, runs))
    return [step for run in runs for step in run.steps]


def steps_of_trials(spec: str, sweeps: Sequence[Sweep], asked: str, notes: list[str]) -> list[Found]:
    """Return the steps of the trials of experiments, as `steps_of_runs` does for runs."""
    runs = [_of_trial(trial).last(spec, asked) for sweep in sweeps for trial in sweep.trials]
    notes.append(_note(spec, runs))
    return [step for run in runs for step in run.steps]


def _of_trial(trial: Trial) -> Trajectory:
    """Return the checkpoints of a trial, numbered as their names say, otherwise in the order of the trial's record."""
    named = [step_in(os.path.basename(path)) for path in trial.checkpoints]
    known = [number for _, number in filter(None, named)]
    numbers = known if len(known) == len(named) and sorted(set(known)) == known else range(1, len(named) + 1)
    folder = os.path.dirname(trial.path)
    return Trajectory(folder, tuple(
        Found(path, replace(trial, name=f"{trial.name}/{os.path.basename(path)}", path=path,
                            metrics=trial.metrics if path == trial.path else {}), Step(folder, "checkpoint_#", number))
        for path, number in zip(trial.checkpoints, numbers, strict=True)
    ))  # fmt: skip


def _runs_below(root: str) -> list[Trajectory]:
    """Return the runs in and below a folder. Raises RecipeError if a folder has checkpoints and no steps."""
    runs: list[Trajectory] = []
    for folder, names in searched(root):
        if any(folder.startswith(f"{run.run.rstrip('/')}/") for run in runs):
            continue  # inside a step
        run = _run_in(folder, names)
        if run is not None:
            runs.append(run)
        elif has_checkpoints(folder, names):
            some = [name for name in names if is_checkpoint(name) and not NO_MODELS.fullmatch(name)]
            raise RecipeError(
                f"ingredients: nothing says which steps of a run the checkpoints in {folder} are: found "
                f"{', '.join(some[:5])}; expected names such as step_500.pt. Rename them, or list the ingredients yourself."
            )
    return runs


def _run_in(folder: str, names: Sequence[str]) -> Trajectory | None:
    """Return the run whose steps are in a folder itself; None if it has none. Raises RecipeError if they contradict."""
    numbered = [(name, found) for name in names if (found := _number_of(name, names)) is not None]
    files = [(n, f) for n, f in numbered if is_checkpoint(n) and not NO_MODELS.fullmatch(n) and not _is_copy(n)]
    folders = [(n, f) for n, f in numbered if not is_checkpoint(n) and not _is_copy(n) and _model_in(folder, n) is not None]
    steps = folders or files
    if not steps:
        return None
    series = sorted({found[0] for _, found in steps})
    mixed = [n for n, _ in files if folders] or [next(n for n, f in steps if f[0] == one) for one in series[1:]]
    if mixed:
        raise RecipeError(
            f"ingredients: {folder} has checkpoints of several kinds, {steps[0][0]} and {mixed[0]}, and nothing says which "
            "of them are the steps of the run. List the ingredients yourself."
        )
    by_number: dict[int, str] = {}
    for name, (_, number) in steps:
        if number in by_number:
            raise RecipeError(
                f"ingredients: {folder} has two models of the same step, {by_number[number]} and {name}. Remove one, or "
                "list the ingredients yourself."
            )
        by_number[number] = name
    _check_recorded(folder, by_number if folders else {})
    used = {name for name, _ in steps}
    unused = [n for n in names if n not in used and not NO_MODELS.fullmatch(n)]
    others = [n for n in unused if is_checkpoint(n) or (folders and n in dict(numbered))]
    _check_others(folder, others, bool(folders))
    return Trajectory(folder, tuple(
        Found(_model_in(folder, name) or storage.join(folder, name), None, Step(folder, series[0], number))
        for number, name in sorted(by_number.items())
    ), tuple(others))  # fmt: skip


def _number_of(name: str, names: Sequence[str]) -> tuple[str, int] | None:
    """Return series and number of the step that a name in a folder with `names` says."""
    of_torchvision = re.fullmatch(r"model_(\d+)\.pth", name) if "checkpoint.pth" in names else None
    return ("model_#.pth", int(of_torchvision[1])) if of_torchvision else step_in(METRICS.sub(r"\1", name))


def _is_copy(name: str) -> bool:
    return bool(NOT_A_STEP & set(re.split(r"[\W_\d]+", name.lower())))


def _model_in(folder: str, name: str) -> str | None:
    """Return the model in the folder of a step: the folder itself or the only checkpoint in it; None if there is none."""
    inside = storage.join(folder, name)
    names = storage.listdir(inside) if storage.isdir(inside) else []
    if WEIGHTS & set(names) or checkpoint_of(inside) is not None:
        return inside
    files = [n for n in names if is_checkpoint(n) and not NO_MODELS.fullmatch(n)]
    if len(files) > 1:
        raise RecipeError(
            f"ingredients: {inside} has {len(files)} checkpoints, and nothing says which one is the model of this step: "
            f"{', '.join(files[:5])}. List the ingredients yourself."
        )
    return storage.join(inside, files[0]) if files else None


def _check_recorded(folder: str, steps: Mapping[int, str]) -> None:
    """Check that the trainer's own record of each step agrees with the step's name. Raises RecipeError."""
    for number, name in steps.items():
        file, state = storage.join(folder, name, STATE), None
        if step_in(name) == ("checkpoint-#", number) and storage.isfile(file):
            with suppress(OSError, SoupError, ValueError):
                state = read_json(file)
        recorded = state.get("global_step") if isinstance(state, dict) else None
        if isinstance(recorded, int) and recorded != number:
            raise RecipeError(
                f"ingredients: {file} says that this is step {recorded}, but its folder is called {name}. Restore the name."
            )


def _check_others(folder: str, names: Sequence[str], of_folders: bool) -> None:
    """Check that what is not used beside the steps is known to be no step. Raises RecipeError."""
    for name in names:
        known = _is_copy(name) or name == "checkpoint.pth" or (of_folders and (name in WEIGHTS or step_in(name) is not None))
        shard = of_folders and re.search(r"-\d{5}-of-\d{5}\.", name) is not None
        if not known and not shard:
            raise RecipeError(
                f"ingredients: nothing says which step of the run {storage.join(folder, name)} is; expected a name such as "
                "step_500.pt. Move it elsewhere, or list the ingredients yourself."
            )


def _note(spec: str, runs: Sequence[Trajectory]) -> str:
    """Return the line that says which steps of which runs are used."""

    def steps(run: Trajectory) -> str:
        numbers = [str(found.step.number) for found in run.steps if found.step is not None]
        return ", ".join(numbers if len(numbers) <= 8 else [*numbers[:3], "...", *numbers[-3:]])

    said = [f"{len(run.steps)} steps of {run.run} ({steps(run)})" for run in runs[:MOST_NAMED]]
    more = f", and of {len(runs) - MOST_NAMED} more runs" if len(runs) > MOST_NAMED else ""
    left = [storage.join(run.run, name) for run in runs for name in run.left_out]
    others = f" {len(left)} other{'s' * (len(left) > 1)} left out, such as {left[0]}." if left else ""
    return f"{spec}: {', '.join(said)}{more}.{others}"

"""The parts of Ray Tune that fine-tuning and search share: distributions, resuming an experiment, progress."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial

from ray_soup.errors import RecipeError
from ray_soup.io.progress import ProgressCallback
from ray_soup.recipe.distributions import fault_of, is_distribution
from ray_soup.recipe.plain import shown


def distribution(key: str, value: Any) -> Any:
    """Return the Ray Tune distribution for the value of the recipe's `key`; a constant is returned unchanged.

    Raises RecipeError if the value is a distribution other than loguniform, uniform, randint and choice, or a wrong one.
    """
    domains: dict[str, Callable[..., Any]] = {
        "loguniform": tune.loguniform, "uniform": tune.uniform, "randint": tune.randint,
    }  # fmt: skip
    fault = fault_of(value, lambda one: "a value" if isinstance(one, (dict, list)) else None, (*domains, "choice"))
    if fault:
        raise RecipeError(f"{key}: found {shown(value)}. {fault}")
    if not is_distribution(value):
        return value
    ((kind, given),) = value.items()
    return tune.choice(given) if kind == "choice" else domains[kind](*given)


def random_state(seed: int) -> np.random.RandomState:
    """Return NumPy's generator for a seed below 2^64; it takes only 32 bits at a time."""
    return np.random.RandomState(seed if seed < 2**32 else [seed % 2**32, seed >> 32])


def draw(space: Mapping[str, Any], random: np.random.RandomState) -> dict[str, Any]:
    """Draw one value from each distribution of `space`; other values are returned unchanged."""
    values = {key: d.sample(random_state=random) if hasattr(d, "sample") else d for key, d in space.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Run Tune without console output and extra log files, and with the experiment's state saved every second.

    A user's own tuner is not affected: the environment is restored on exit.
    """
    ours = {
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would return the trials so far as if they were all
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # by default a kill may lose the last 10 s
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def restored(experiment: Path, trainable: Any) -> tune.Tuner | None:
    """Return the tuner of an interrupted experiment, or None if there is none to resume.

    An experiment that cannot be loaded is deleted: either it was killed while Tune set it up, or an older ray_soup, whose
    classes have moved, wrote it.
    """
    if tune.Tuner.can_restore(experiment):
        with suppress(EOFError, pickle.UnpicklingError, ModuleNotFoundError):
            return tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True, restart_errored=True)
    shutil.rmtree(experiment, ignore_errors=True)
    return None


def results_of(grid: tune.ResultGrid) -> list[tune.Result]:
    """Return the results of all trials."""
    return [grid[n] for n in range(len(grid))]


class TrialProgress(tune.Callback):
    """Report the number of finished trials.

    The callback is stored on the class, because Tune pickles its own callbacks, and a progress bar cannot be pickled.
    """

    what = "fine-tuning"
    progress: ProgressCallback
    total: int

    @classmethod
    def report_to(cls, progress: ProgressCallback, total: int) -> None:
        """Report to `progress` from now on; `total` is the number of trials."""
        cls.progress, cls.total = staticmethod(progress), total

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Report after each finished trial."""
        self.progress(self.what, sum(t.is_finished() for t in trials), self.total)


class PercentProgress(TrialProgress):
    """Report the number of finished trials, counting unfinished ones by the share of their steps that is done."""

    what = "searching"

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Report after each result of a trial."""
        done = sum(100 if t.is_finished() else (t.last_result or {}).get("percent", 0) for t in trials)
        self.progress(self.what, round(done / 100), self.total)

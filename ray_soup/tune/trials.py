"""The parts of Ray Tune that fine-tuning and search share: distributions, room, resuming an experiment, progress."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial

from ray_soup.actors.placement import NoRoom, held_by_others, held_s, room_for, wait_for_nodes
from ray_soup.errors import DiskError, RecipeError
from ray_soup.io.disk import writing
from ray_soup.io.progress import WHOLE_RUN, ProgressCallback
from ray_soup.recipe.distributions import fault_of, is_distribution
from ray_soup.recipe.plain import shown


def distribution(key: str, value: Any) -> Any:
    """Return the Ray Tune distribution for the value of the recipe's `key`; a constant is returned unchanged.

    Raises RecipeError if the value is a distribution other than loguniform, uniform, randint and choice, or a wrong one.
    """
    domains: dict[str, Callable[..., Any]] = {
        "loguniform": tune.loguniform, "uniform": tune.uniform, "randint": tune.randint,
    }  # fmt: skip
    fault = fault_of(
        value, lambda one: "a value" if isinstance(one, list) or is_distribution(one) else None, (*domains, "choice")
    )
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


def wait_for_room(actors: list[dict[str, float]], wait_s: float, progress: ProgressCallback, keys: str) -> None:
    """Wait until a trial can start; Tune would silently wait forever for a trial that never fits.

    Args:
        actors: resources of each actor of the trial, which are all equal.
        wait_s: seconds to wait for the cluster to grow, and for other programs to end.
        progress: called with the seconds waited.
        keys: the keys of the recipe that reduce what a trial needs, for the message.

    Raises RecipeError if the nodes cannot hold the actors, or other programs hold the resources, after `wait_s`.
    """

    def nodes() -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def complaint() -> str:
        if _fit(actors, nodes()):
            return f"A trial needs {_described(actors)}, but {held_by_others(actors)}"
        have = "; ".join(", ".join(f"{k} {n.get(k, 0):g}" for k in ("CPU", "GPU", "memory")) for n in nodes())
        return (
            f"A trial needs {_described(actors)}; the nodes of the cluster have: {have}. Reduce {keys}, or set "
            "actors.wait_s to wait for nodes that are still starting."
        )

    wait_s = max(wait_s, held_s() if _fit(actors, nodes()) else 0)
    wait_for_nodes(lambda: [] if _fit(actors, nodes()) and room_for(actors) else actors, complaint, wait_s, progress)


def _described(actors: list[dict[str, float]]) -> str:
    each = ", ".join(f"{name} {amount:g}" for name, amount in actors[0].items())
    return f"{len(actors)} actors with {each} each" if len(actors) > 1 else f"an actor with {each}"


def _fit(actors: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    """Return whether the nodes have room for all actors, placed by first fit."""
    free = [dict(node) for node in nodes]
    for actor in actors:
        for node in free:
            if all(node.get(key, 0) >= value for key, value in actor.items()):
                for key, value in actor.items():
                    node[key] -= value
                break
        else:
            return False
    return True


def not_started(what: str, actors: list[dict[str, float]], waited_s: float) -> NoRoom:
    """Return the error for `what`, which has waited too long for its actors."""
    return NoRoom(f"{what} needs {_described(actors)} and could not start within {waited_s:g} s: {held_by_others(actors)}")


@contextmanager
def quiet_tune(experiment: Path) -> Iterator[None]:
    """Run Tune without console output and extra log files, and with the state of the `experiment` saved every second.

    A user's own tuner is not affected: the environment is restored on exit. Raises DiskError if Tune cannot write its files.
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
    except OSError as error:
        if error.filename is not None or isinstance(error, ConnectionError):
            raise
        with writing(experiment):  # Tune writes there through Arrow, which does not name the file
            raise
    except (EOFError, pickle.UnpicklingError) as error:
        with writing(experiment):
            raise OSError(errno.EIO, "the files of Ray Tune are incomplete") from error
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
        with suppress(EOFError, ValueError, pickle.UnpicklingError, ModuleNotFoundError):
            return tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True, restart_errored=True)
    shutil.rmtree(experiment, ignore_errors=True)
    return None


def results_of(grid: tune.ResultGrid) -> list[tune.Result]:
    """Return the results of all trials.

    Raises DiskError or NoRoom if a trial could not write its files or start its workers, so that a rerun repeats it.
    """
    results = [grid[n] for n in range(len(grid))]
    for result in results:
        _raise_passing(result.error)
    return results


def _raise_passing(error: BaseException | None) -> None:
    """Raise the error of a trial that is no fault of the trial; Ray passes it on with a traceback for its text."""
    for kind in (DiskError, NoRoom):
        if isinstance(error, kind):
            raise kind(str(getattr(error, "cause", error)))


class TrialProgress(tune.Callback):
    """Report the number of finished trials, and end the experiment if no trial can start for too long.

    What it needs is stored on the class, because Tune pickles its own callbacks, and a progress bar cannot be pickled.
    """

    what = "fine-tuning"
    progress: ProgressCallback
    total: int
    patience_s: float
    idle_since: float | None
    began: float
    share_before: float | None
    passing: DiskError | NoRoom | None

    @classmethod
    def report_to(cls, progress: ProgressCallback, total: int, patience_s: float) -> None:
        """Report to `progress` from now on.

        Args:
            progress: called with the number of finished trials and their total.
            total: the number of trials.
            patience_s: seconds that trials may wait for resources while none runs.
        """
        cls.progress, cls.total = staticmethod(progress), total
        cls.began, cls.share_before = time.monotonic(), None
        cls.patience_s, cls.idle_since, cls.passing = patience_s, None, None

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Raise NoRoom if trials have waited too long and none runs, or the error of a trial that is no fault of it.

        Tune calls this about ten times a second.
        """
        kind, waiting = type(self), [trial for trial in trials if trial.status == Trial.PENDING]
        if self.passing is not None:
            raise self.passing
        if not waiting or any(trial.status == Trial.RUNNING for trial in trials):
            kind.idle_since = None
        elif kind.idle_since is None:
            kind.idle_since = time.monotonic()
        elif time.monotonic() - kind.idle_since > self.patience_s:
            resources = cast(tune.PlacementGroupFactory, waiting[0].placement_group_factory)
            raise not_started("A trial", [bundle for bundle in resources.bundles if bundle], self.patience_s)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Keep an error that is no fault of the trial for `on_step_begin`; Tune would wrap it here."""
        file = trial.pickled_error_file
        if file and os.path.exists(file):
            try:
                _raise_passing(pickle.loads(Path(file).read_bytes()))
            except (DiskError, NoRoom) as error:
                type(self).passing = error

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
        self._report_whole(done / (100 * self.total))

    def _report_whole(self, share: float) -> None:
        """Report the seconds so far and in all, from the share of all trials' steps that is done."""
        kind, now = type(self), time.monotonic()
        if kind.share_before is None:  # what an interrupted search had done before
            kind.began, kind.share_before = now, share
        elif share > kind.share_before:
            so_far = now - kind.began
            self.progress(WHOLE_RUN, round(so_far), round(so_far * (1 - kind.share_before) / (share - kind.share_before)))

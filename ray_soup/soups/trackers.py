"""A soup as a run of Weights & Biases or MLflow: a finished one, or one that is being made. Does not import torch.

Where the run goes is said by the trackers' own environment variables: WANDB_PROJECT (default: ray_soup), WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (default: ray_soup) and others. A soup that is sent again updates its run.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray_soup.errors import RecipeError, first_line

FILES = ("recipe.yaml", "results.jsonl", "report.html", "README.md")
"""The files of a soup that become files of the run."""
MOST_CHARACTERS = 500
"""Length of the longest value of a parameter that every server of MLflow takes."""
MOST_PARAMETERS = 100
"""The number of parameters that MLflow takes in one request."""


@dataclass(frozen=True)
class Tracked:
    """What a tracker's run is opened with."""

    name: str
    """The name of the soup's folder."""
    identity: str
    """The same for the same soup only, also if it is resumed."""
    config: dict[str, Any]
    """The recipe."""
    files: Path | None = None
    """The folder for the tracker's own files; None: its default."""
    wait_s: float | None = None
    """Seconds that W&B waits for its server to open the run, and again to end it; None: its defaults."""


@dataclass(frozen=True)
class Finished:
    """What a finished soup adds to its run."""

    folder: Path
    """Has the FILES and run.json."""
    figures: dict[str, float]
    """The figures of the soup, by the keys of results.jsonl."""
    rows: list[dict[str, Any]]
    """All rows of results.jsonl."""
    curve: list[dict[str, float]]
    """The figures on select, one dictionary for each epoch, with `steps`; empty unless one soup was learned."""


class Tracker(Protocol):
    """An open run of a tracker."""

    known: bool
    """Whether the run had been opened before."""

    def log(self, line: Mapping[str, float | None], label: str = "") -> None:
        """Add an entry of a learning curve, that of the soup `label` if the run has several."""
        ...

    def finish(self, soup: Finished) -> None:
        """Add the figures, the rows and the files of the finished soup."""
        ...

    def close(self, failed: bool = False) -> str:
        """End the run, and return where it is."""
        ...


class WandbRun:
    """A run of Weights & Biases."""

    def __init__(self, about: Tracked) -> None:
        import wandb

        self._wandb, self._labels, self._identity = wandb, set[str](), about.identity
        self._project = os.environ.get("WANDB_PROJECT", "ray_soup")
        self._run: Any = wandb.init(
            project=self._project, name=about.name, id=about.identity, resume="allow", config=about.config, job_type="soup",
            dir=None if about.files is None else str(about.files), settings=_wandb_settings(wandb, about.wait_s),
        )  # fmt: skip
        self.known = bool(self._run.resumed)

    def log(self, line: Mapping[str, float | None], label: str = "") -> None:
        """Add an entry of a learning curve, with `steps` on the x axis."""
        prefix = f"{label}/" if label else ""
        if label not in self._labels:
            self._labels.add(label)
            for key in line.keys() - {"steps"}:
                self._run.define_metric(f"{prefix}{key}", step_metric=f"{prefix}steps")
        self._run.log({f"{prefix}{key}": value for key, value in line.items()})

    def finish(self, soup: Finished) -> None:
        """Add the figures, the rows and the files of the finished soup."""
        columns = list(dict.fromkeys(key for row in soup.rows for key in row))
        data = [[row.get(column) for column in columns] for row in soup.rows]
        self._run.log({"results": self._wandb.Table([*columns], data, allow_mixed_types=True)})
        self._run.summary.update(soup.figures)
        artifact = self._wandb.Artifact(f"soup-{self._identity}", "soup")
        for name in FILES:
            artifact.add_file(str(soup.folder / name))
        self._run.log_artifact(artifact)

    def close(self, failed: bool = False) -> str:
        """End the run, and return where it is."""
        url = None if self._run.offline else self._run.url
        self._run.finish(exit_code=int(failed))
        return f"run {self._identity} of the project {self._project} of Weights & Biases" + (f", {url}" if url else "")


def _wandb_settings(wandb: Any, wait_s: float | None) -> Any:
    settings: dict[str, Any] = {"console": "off", "silent": True}
    if wait_s is not None:
        settings["init_timeout"] = wait_s
        if hasattr(wandb.Settings(), "finish_timeout"):  # earlier versions have none
            settings |= {"finish_timeout": wait_s, "finish_timeout_raises": True}
    return wandb.Settings(**settings)


class MlflowRun:
    """A run of MLflow; other runs of this process are left alone."""

    def __init__(self, about: Tracked) -> None:
        import mlflow
        from mlflow.entities import Param

        self._client: Any = mlflow.MlflowClient()
        self._uri = mlflow.get_tracking_uri()
        self._experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ray_soup")
        found = self._client.get_experiment_by_name(self._experiment)
        number = self._client.create_experiment(self._experiment) if found is None else found.experiment_id
        known = self._client.search_runs([number], f"tags.ray_soup = '{about.identity}'", max_results=1)
        self.known = bool(known)
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(number, run_name=about.name, tags={"ray_soup": about.identity}).info.run_id
        params = [Param(name, str(value)[:MOST_CHARACTERS]) for name, value in _flat(about.config)]
        for first in range(0, len(params), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=params[first : first + MOST_PARAMETERS])

    def log(self, line: Mapping[str, float | None], label: str = "") -> None:
        """Add an entry of a learning curve at its step."""
        prefix = f"curve/{_plain_key(label)}/" if label else "curve/"
        self._log({f"{prefix}{_plain_key(key)}": value for key, value in line.items()}, int(line["steps"] or 0))

    def _log(self, figures: Mapping[str, float | None], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(key, float(value), now, step) for key, value in figures.items() if value is not None]
        self._client.log_batch(self._id, metrics=found)

    def finish(self, soup: Finished) -> None:
        """Add the figures and the files of the finished soup."""
        self._log({_plain_key(key): value for key, value in soup.figures.items()})
        for name in FILES:
            self._client.log_artifact(self._id, str(soup.folder / name))

    def close(self, failed: bool = False) -> str:
        """End the run, and return where it is."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")
        return f"run {self._id} of the experiment {self._experiment} of MLflow at {self._uri}"


TRACKERS: dict[str, Callable[[Tracked], Tracker]] = {"wandb": WandbRun, "mlflow": MlflowRun}
"""The trackers by their names in `loggers` and in options."""
given_up: set[str] = set()
"""The trackers that failed or did not answer in a run of this process; their libraries might wait long at its end."""


def check_tracker(name: str, key: str) -> None:
    """Raise RecipeError if a tracker is not installed, or if W&B would ask for its key; `key` is what named the tracker."""
    try:
        if name == "mlflow":
            import mlflow  # noqa: F401
        else:
            import wandb

            if os.environ.get("WANDB_MODE") not in ("offline", "dryrun", "disabled") and not _has_key(wandb, key):
                raise RecipeError(f"{key}: wandb has no key. Set WANDB_API_KEY, or WANDB_MODE=offline.")
    except ImportError as error:
        raise RecipeError(f"{key}: {name} is not installed. Run pip install 'ray_soup[{name}]'.") from error


def _has_key(wandb: Any, key: str) -> bool:
    """Return whether W&B has a key and need not ask for it; its server may be unavailable. Raises RecipeError."""
    try:
        try:
            return bool(wandb.login(prompt=False, verify=False))
        except TypeError:  # an earlier version
            return wandb.api.api_key is not None
    except Exception as error:
        raise RecipeError(
            f"{key}: wandb cannot read its key: {first_line(error)}. Set WANDB_API_KEY, or WANDB_MODE=offline."
        ) from error


def finished_soup(folder: Path) -> tuple[Finished, Mapping[str, Any]]:
    """Return what trackers show of the finished soup in a local folder, and its record."""
    from ray_soup.soups.records import finished_record, read_results
    from ray_soup.soups.results import with_kinds

    record = finished_record(folder)
    rows = with_kinds(read_results(folder), record)
    made = record.get("chosen", record.get("method"))
    ours = next((row for row in rows if row["name"] == made and row["kind"] in ("soup", "single")), rows[0])
    figures = {key: float(value) for key, value in ours.items() if isinstance(value, (int, float))}
    curve: list[dict[str, float]] = record.get("curve", [])  # type: ignore[assignment]
    return Finished(folder, figures, rows, curve), record


def send(out: str | Path, tracker: str) -> str:
    """Send a finished soup to a tracker, and return where it is now.

    Args:
        out: the folder or URI of the soup.
        tracker: wandb or mlflow, one of TRACKERS.

    Raises RecipeError if `out` is not a finished soup, or if the tracker is not installed or cannot be used.
    """
    from ray_soup.recipe import load_recipe
    from ray_soup.soups.results import finished_files

    with finished_files(out, FILES) as folder:
        soup, record = finished_soup(folder)
        identity = hashlib.sha256(repr(sorted(record["files"].items())).encode()).hexdigest()[:16]
        config = load_recipe(folder / "recipe.yaml").model_dump(mode="json")
        check_tracker(tracker, f"--{tracker}")
        try:
            run = TRACKERS[tracker](Tracked(os.path.basename(str(out).rstrip("/")), identity, config))
            for line in () if run.known else soup.curve:
                run.log(line)
            run.finish(soup)
            return run.close()
        except Exception as error:
            raise RecipeError(
                f"--{tracker}: {tracker} cannot be used: {first_line(error)}. Fix this, and rerun the command."
            ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a recipe with their values: learn.lr."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{_plain_key(key)}.")
        else:
            yield f"{prefix}{_plain_key(key)}", value


def _plain_key(key: str) -> str:
    """Return a name of the characters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", key, flags=re.ASCII)

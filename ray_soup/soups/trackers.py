"""A finished soup as a run of Weights & Biases or MLflow. Does not import torch.

Where the run goes is said by the trackers' own environment variables: WANDB_PROJECT (default: ray_soup), WANDB_MODE,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (default: ray_soup) and others. A soup that is sent again updates its run.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError, first_line
from ray_soup.recipe import load_recipe
from ray_soup.soups.records import finished_record, read_results
from ray_soup.soups.results import RESULTS, finished_files, with_kinds

FILES = ("recipe.yaml", RESULTS, "report.html", "README.md")
"""The files of a soup that become files of the run."""
MOST_CHARACTERS = 500
"""Length of the longest value of a parameter that every server of MLflow takes."""
MOST_PARAMETERS = 100
"""The number of parameters that MLflow takes in one request."""


@dataclass(frozen=True)
class TrackedRun:
    """A finished soup in the form that trackers take."""

    name: str
    """The name of the soup's folder."""
    identity: str
    """The same for the same soup only."""
    folder: Path
    """Has the FILES and run.json."""
    config: dict[str, Any]
    """The recipe."""
    figures: dict[str, float]
    """The figures of the soup, by the keys of results.jsonl."""
    curve: list[dict[str, float]]
    """The figures on select, one dictionary for each epoch, with `steps`; empty unless one soup was learned."""
    rows: list[dict[str, Any]]
    """All rows of results.jsonl."""


def send(out: str | Path, tracker: str) -> str:
    """Send a finished soup to a tracker, and return where it is now.

    Args:
        out: the folder or URI of the soup.
        tracker: wandb or mlflow, one of TRACKERS.

    Raises RecipeError if `out` is not a finished soup, or if the tracker is not installed or cannot be used.
    """
    with finished_files(out, FILES) as folder:
        record = finished_record(folder)
        rows = with_kinds(read_results(folder), record)
        made = record.get("chosen", record.get("method"))
        ours = next((row for row in rows if row["name"] == made and row["kind"] in ("soup", "single")), rows[0])
        figures = {key: float(value) for key, value in ours.items() if isinstance(value, (int, float))}
        identity = hashlib.sha256(repr(sorted(record["files"].items())).encode()).hexdigest()[:16]
        config = load_recipe(folder / "recipe.yaml").model_dump(mode="json")
        curve: list[dict[str, float]] = record.get("curve", [])  # type: ignore[assignment]
        run = TrackedRun(os.path.basename(str(out).rstrip("/")), identity, folder, config, figures, curve, rows)
        try:
            return TRACKERS[tracker](run)
        except ImportError as error:
            raise RecipeError(f"--{tracker}: {tracker} is not installed. Run pip install 'ray_soup[{tracker}]'.") from error
        except Exception as error:
            raise RecipeError(
                f"--{tracker}: {tracker} cannot be used: {first_line(error)}. Fix this, and rerun the command."
            ) from error


def _to_wandb(run: TrackedRun) -> str:
    import wandb

    project = os.environ.get("WANDB_PROJECT", "ray_soup")
    with wandb.init(
        project=project, name=run.name, id=run.identity, resume="allow", config=run.config, job_type="soup"
    ) as session:
        for line in run.curve:
            session.log(line)
        columns = list(dict.fromkeys(key for row in run.rows for key in row))
        data = [[row.get(column) for column in columns] for row in run.rows]
        session.log({"results": wandb.Table([*columns], data, allow_mixed_types=True)})
        session.summary.update(run.figures)
        artifact = wandb.Artifact(f"soup-{run.identity}", "soup")
        for name in FILES:
            artifact.add_file(str(run.folder / name))
        session.log_artifact(artifact)
        return f"run {run.identity} of the project {project} of Weights & Biases" + (
            f", {session.url}" if session.url else ""
        )


def _to_mlflow(run: TrackedRun) -> str:
    import mlflow

    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "ray_soup"))
    known = mlflow.search_runs(
        [experiment.experiment_id], f"tags.ray_soup = '{run.identity}'", max_results=1, output_format="list"
    )
    again = {"run_id": known[0].info.run_id} if known else {"run_name": run.name, "tags": {"ray_soup": run.identity}}
    with mlflow.start_run(**again) as session:
        params = [(name, str(value)[:MOST_CHARACTERS]) for name, value in _flat(run.config)]
        for first in range(0, len(params), MOST_PARAMETERS):
            mlflow.log_params(dict(params[first : first + MOST_PARAMETERS]))
        mlflow.log_metrics({_plain_key(key): value for key, value in run.figures.items()})
        for line in run.curve if not known else ():
            figures = {f"curve/{_plain_key(key)}": value for key, value in line.items() if value is not None}
            mlflow.log_metrics(figures, step=int(line["steps"]))
        for name in FILES:
            mlflow.log_artifact(str(run.folder / name))
        return f"run {session.info.run_id} of the experiment {experiment.name} of MLflow at {mlflow.get_tracking_uri()}"


TRACKERS: dict[str, Callable[[TrackedRun], str]] = {"wandb": _to_wandb, "mlflow": _to_mlflow}
"""The trackers by the names of their options."""


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

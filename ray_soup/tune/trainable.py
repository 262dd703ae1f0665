"""Soups as trials of Ray Tune, for the search and for a user's own tuner.

A trial is a driver with its own actors inside the trial's placement group. All trials share the direction store and the
decoded data in the node's cache. Trials that follow one another in a process also share the actors, if they differ only in
keys that actors do not read. Tune sees results on fit and select, never on test.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ray import tune

from ray_soup.actors.messages import Mesh, SetupInfo
from ray_soup.actors.metrics import observed, recording
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import actor_bytes, resolve_mesh
from ray_soup.errors import DiskError, SoupError
from ray_soup.io import storage
from ray_soup.io.disk import write_bytes, writing
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import Recipe, with_changes
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.methods.learned import learn_in
from ray_soup.soups.model_batch import requested_model_batch
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run
from ray_soup.soups.session import Session
from ray_soup.soups.state import LearnState
from ray_soup.task import identity
from ray_soup.task.choices import cost_in
from ray_soup.task.functions import look_in
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.preprocessing import completed

Config = dict[str, Any]
"""Recipe keys and values of a trial, as in {"learn.lr": 0.02}."""

OF_DRIVER = {
    "lr", "wd", "optimizer", "cosine_lr", "warmup", "clip", "epochs", "patience", "model_batch", "models_epochs", "screen",
    "average", "whiten", "seed",
}  # fmt: skip
"""The keys of `learn` that neither the actors nor the checks of the ingredients depend on."""


def trial_mesh(
    recipe: Recipe, parameters: int, ingredients: int, progress: ProgressCallback = no_progress
) -> tuple[Mesh, float, int]:
    """Return the mesh, the CPUs per actor and the model batch of one trial.

    `actors.replicas: auto` means one replica, so that trials run side by side; `actors.shards: auto` means as many shards as
    the trial's model batch needs. Raises RecipeError if the cluster cannot place the mesh.
    """
    model_batch = requested_model_batch(recipe, ingredients)
    if recipe.actors.replicas == "auto":
        recipe = with_changes(recipe, {"actors.replicas": 1})
    mesh, cpus = resolve_mesh(recipe, parameters, model_batch, progress)
    return mesh, cpus, model_batch


def bundles(
    recipe: Recipe, parameters: int, ingredients: int, progress: ProgressCallback = no_progress
) -> list[dict[str, float]]:
    """Return the resources of each actor of a trial: CPUs, GPUs, and memory in bytes, which grows with the model batch.

    The trial's driver needs no resources.
    """
    mesh, cpus, model_batch = trial_mesh(recipe, parameters, ingredients, progress)
    memory = int(actor_bytes(recipe, parameters, model_batch, mesh.shards))
    one = {"CPU": cpus, "GPU": recipe.actors.gpus, "memory": memory}
    return [{key: value for key, value in one.items() if value}] * mesh.size


def recipe_of(recipe: Recipe, config: Config) -> Recipe:
    """Return the recipe of a trial; `search` stores recipe keys under "soup", a user's own tuner at the top level."""
    return with_changes(recipe, keys_of(config))


def keys_of(config: Config) -> Config:
    """Return the recipe keys and values in a trial's config."""
    keys: Config = config.get("soup", config)
    return keys


def soup_trainable(recipe: Recipe, states: str | None = None) -> Callable[[Config], None]:
    """Return a function trainable for `tune.Tuner` that learns one soup by the recipe with the values of its config.

    A config is a mapping of recipe keys, as in {"learn.lr": 0.02, "learn.model_batch": 6}. After every epoch the trial
    reports select_nll, select_accuracy and select_metric of the best point so far, as far as these exist, percent (of its
    steps), seconds and peak_memory_bytes; if it fails, `error`.

    Args:
        recipe: the recipe of all trials; `soup_resources` returns the resources of each.
        states: a folder that every node sees, or a URI, where each trial keeps its state as TRIAL_ID.pt to resume from.
            None: the state is the trial's checkpoint.
    """
    folder, run, recipe = os.getcwd(), identity.RUN, resolved_recipe(recipe)

    def soup_trial(config: Config) -> None:
        with suppress(OSError):
            os.chdir(folder)  # Tune runs trials elsewhere; this is where the recipe's modules are found
        look_in(folder)
        identity.in_run(run)
        with writing(Path(tempfile.gettempdir())):
            temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with temporary as made:
            file = Path(made) / "learn.pt"
            kept = storage.join(states, f"{tune.get_context().get_trial_id()}.pt") if states is not None else None
            checkpoint = tune.get_checkpoint() if kept is None else None
            if kept is not None and storage.exists(kept):
                write_bytes(file, storage.read_bytes(kept))
            elif checkpoint is not None:
                with checkpoint.as_directory() as before:
                    write_bytes(file, Path(before, "learn.pt").read_bytes())

            def keep() -> tune.Checkpoint | None:
                if kept is None:
                    return cast(tune.Checkpoint, tune.Checkpoint.from_directory(made))
                storage.upload(file, kept)
                return None

            try:
                _learn(recipe_of(recipe, config), file, keep)
            except DiskError:  # a rerun can succeed
                raise
            except SoupError as error:  # the recipe or the data is wrong, not Ray: a retry would fail too
                worst = {"select_nll": float("inf"), "select_accuracy": 0.0, "select_metric": float("-inf")}
                tune.report({**worst, "percent": 100, "seconds": 0.0, "peak_memory_bytes": 0, "error": str(error)})

    return soup_trial


@dataclass(frozen=True)
class _Actors:
    """The actors of a trial, which are set up, and its ingredients."""

    recipe: dict[str, Any]
    """The recipe without the keys OF_DRIVER."""
    inputs: Inputs
    mesh: Mesh
    cpus: float
    pool: RayPool
    setup: SetupInfo


_KEPT: list[_Actors] = []
"""The actors that the last trial has left in this process for the next one: one entry, or none."""


@contextmanager
def _actors_for(recipe: Recipe) -> Iterator[tuple[_Actors, int]]:
    """Provide the actors and the model batch of a trial: those that the last trial has left, if they suit this one.

    After an error they are closed. Those that no trial needs any more end with this process.
    """
    own = recipe.model_dump(exclude={"learn": OF_DRIVER})
    kept = _KEPT.pop() if _KEPT else None
    pool = None if kept is None else kept.pool
    try:
        inputs = kept.inputs if kept is not None and kept.recipe == own else open_inputs(recipe, needs_fit=True)
        mesh, cpus, model_batch = trial_mesh(recipe, inputs.held[0], len(inputs.ingredients))
        if kept is not None and (kept.recipe, kept.mesh, kept.cpus) != (own, mesh, cpus):
            kept.pool.close()
            kept = None
        recipe = completed(recipe, inputs.adopted)
        if kept is None or pool is None:
            pool = RayPool(recipe, inputs.ingredients, mesh, cpus)
        actors = kept or _Actors(own, inputs, mesh, cpus, pool, pool.setup(observed(no_progress)))
        pool.reset_peak()
        yield actors, model_batch
        _KEPT.append(actors)
    except SystemExit:  # Tune stops the trial, between two steps
        _KEPT.append(actors)
        raise
    except BaseException:
        if pool is not None:
            pool.close()
        raise


def _learn(recipe: Recipe, file: Path, keep: Callable[[], tune.Checkpoint | None]) -> None:
    """Learn the coefficients of one soup with the state in `file`; after every epoch, keep the state and report."""
    with _actors_for(recipe) as (actors, model_batch), recording(actors.pool, recipe.method):
        inputs = actors.inputs
        session = Session(
            completed(recipe, inputs.adopted), inputs, actors.pool, actors.setup, actors.mesh, actors.cpus, model_batch,
            observed(no_progress), subset=inputs.everything,
        )  # fmt: skip
        _learn_in(session.with_soup(splits=session.cut(recipe.learn.seed), state_file=file), keep)


def _learn_in(session: Session, keep: Callable[[], tune.Checkpoint | None]) -> None:
    recipe, pool = session.recipe, session.pool

    def after_step(step: int, steps: int, state: LearnState) -> None:
        session.progress(f"learning {recipe.method}", step, steps)

    def report(step: int, steps: int, state: LearnState) -> None:
        best = min(state.curve, key=lambda line: cost_in(line, recipe.select_by))
        metrics: dict[str, Any] = {
            "select_nll": best["select_nll"],
            **{key: best[key] for key in ("select_accuracy", "select_metric") if key in best},
            "percent": round(100 * step / steps),
            "seconds": state.seconds,
            "peak_memory_bytes": max(pool.peak_memory()),
        }
        tune.report(metrics, checkpoint=keep())

    _, _, state = learn_in(session, after_step, report, refits=False)
    report(1, 1, state)


def soup_resources(recipe: Recipe) -> Callable[[Config], tune.PlacementGroupFactory]:
    """Return the resources of a trial of `soup_trainable` as a function of its config, for `tune.with_resources`."""
    recipe = resolved_recipe(recipe)
    inputs = open_inputs(recipe, needs_fit=True)
    parameters, count = inputs.held[0], len(inputs.ingredients)

    def resources(config: Config) -> tune.PlacementGroupFactory:
        actors = bundles(recipe_of(recipe, config), parameters, count)
        return tune.PlacementGroupFactory([{}, *actors], strategy="PACK")

    return resources


def soup_of(recipe: Recipe, result: tune.Result, out: str | Path, progress: ProgressCallback = no_progress) -> Soup:
    """Make the soup that a trial of `soup_trainable` learned, in the folder `out`, as `run` does.

    Raises SoupError if the trial has no checkpoint.
    """
    if result.checkpoint is None or result.config is None:
        reason = (result.metrics or {}).get("error", result.error)
        raise SoupError(f"The trial at {result.path} has no checkpoint: {reason}. Choose another trial.")
    with result.checkpoint.as_directory() as folder:
        return run(recipe_of(recipe, result.config), out, progress, Path(folder) / "learn.pt")

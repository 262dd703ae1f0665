"""Search over learning rate, model batch size and any other key of a recipe, with Ray Tune."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from ray_soup.actors.metrics import about_run, observed, recording
from ray_soup.actors.placement import patience_s, settle
from ray_soup.actors.ray_session import connect
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.disk import write_bytes, writing
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.recipe import LEARNED, Recipe, with_changes
from ray_soup.soups.identity import begun
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.live import check_loggers
from ray_soup.soups.output import BOARD, Output, Soup, open_output
from ray_soup.soups.run import make_soup_in
from ray_soup.soups.session import open_session
from ray_soup.soups.trajectory import check_trajectory
from ray_soup.task import identity
from ray_soup.task.heads import resolved_recipe
from ray_soup.task.models import objective_in
from ray_soup.task.own_functions import objective_of
from ray_soup.task.preprocessing import completed
from ray_soup.tune.nodes import check_seen
from ray_soup.tune.trainable import Config, bundles, keys_of, soup_resources, soup_trainable
from ray_soup.tune.trials import (
    PercentProgress,
    distribution,
    draw,
    quiet_tune,
    random_state,
    restored,
    results_of,
    wait_for_room,
)

MODES = {"select_nll": "min", "select_accuracy": "max", "select_metric": "max"}
"""Metrics that a search may optimize, and in which direction."""

Trials = list[dict[str, Any]]
"""For each trial its number (`trial`), `id`, recipe keys, metrics and `error`."""


# The search space


def optimized(recipe: Recipe) -> str:
    """Return the figure that a search goes by, a key of MODES. Raises RecipeError if there is no such figure."""
    chosen = recipe.search.metric
    if chosen == "auto":
        return f"select_{recipe.select_by}" if recipe.select_by in ("accuracy", "metric") else "select_nll"
    if chosen == "select_metric" and recipe.select_by != "metric":
        raise RecipeError(
            "search.metric: select_metric needs trials that compute the metric on select. Add `select_by: metric`, and "
            "`metric: package.module:function`."
        )
    if chosen == "select_accuracy":
        objective_of(with_changes(recipe, {"select_by": "accuracy"}), objective_in(recipe.model))  # which refuses it
    return chosen


def default_space(ingredients: int) -> dict[str, Any]:
    """Return the default space: learning rate, and model batches of a quarter, a half and all of the ingredients."""
    sizes = sorted({-(-ingredients // 4), -(-ingredients // 2), ingredients})
    return {"learn.lr": {"loguniform": [0.001, 0.1]}, "learn.model_batch": {"choice": sizes}}


def as_it_is(recipe: Recipe, keys: Sequence[str], ingredients: int) -> Config:
    """Return the recipe's own values of the keys. Raises RecipeError for an unknown key."""
    found: Config = {}
    for key in keys:
        value: Any = recipe
        for part in key.split("."):
            if not hasattr(value, part):
                raise RecipeError(f"search: the recipe has no key '{key}'. Write it with its section, as in learn.lr.")
            value = getattr(value, part)
        found[key] = ingredients if key == "learn.model_batch" and value == "auto" else value
    return found


def make_configs(recipe: Recipe, ingredients: int) -> list[Config]:
    """Return the configs to try: the unchanged recipe, then random draws or the points of a grid.

    Raises RecipeError if a key or a distribution is not valid, or if a config's method does not learn.
    """
    space = recipe.search.space or default_space(ingredients)
    first = as_it_is(recipe, list(space), ingredients)
    grids = {key: value["grid"] for key, value in space.items() if isinstance(value, dict) and "grid" in value}
    drawn = {key: distribution(f"search.{key}", value) for key, value in space.items() if key not in grids}
    random = random_state(recipe.learn.seed)

    if grids:
        points = [dict(zip(grids, point, strict=True)) for point in itertools.product(*grids.values())]
        configs = [first, *({**point, **draw(drawn, random)} for point in points)]
    else:
        configs = [first, *(draw(drawn, random) for _ in range(recipe.search.trials - 1))]
    bare = with_changes(recipe, {"search": {"space": {}}})  # whose space is not checked again for each config
    for config in configs:
        if not with_changes(bare, config).info.learns:
            raise RecipeError(f"search: the method must be one of {', '.join(LEARNED)}; {recipe.method} learns nothing.")
    return configs


# The search


@shown_in_notebooks
def search(recipe: Recipe, out: str | Path, progress: ProgressCallback = no_progress, overwrite: bool = False) -> Soup:
    """Search, then make the best soup in the folder `out` as `run` does, with the trials in its run.json and report.

    Rerun to resume; a finished search is returned without running anything, unless it is to `overwrite` an earlier run.
    Raises SoupError if every trial fails, and its
    subclasses for errors in the recipe and the ingredients.
    """
    recipe = resolved_recipe(recipe)
    check_loggers(recipe)
    progress("opening ingredients", 0, 1)
    inputs = open_inputs(recipe, needs_fit=True)
    optimized(recipe)
    configs = make_configs(recipe, len(inputs.ingredients))
    for config in configs:
        check_trajectory(with_changes(recipe, config), inputs.ingredients)
    with open_output(out, progress, recipe.ingredients, overwrite) as output:
        soup = output.begin(begun(recipe, inputs.ingredients, kind="search", **inputs.started))
        recipe = completed(recipe, inputs.adopted)
        if soup is None:
            progress("connecting to Ray", 0, 1)
            identity.in_run(output.token())
            with output.recording_failures(), connect(about_run(recipe.method, output.uri_of())):
                soup = _search(recipe, inputs, configs, output, progress)
    return soup.at(out)


def _search(recipe: Recipe, inputs: Inputs, configs: list[Config], output: Output, progress: ProgressCallback) -> Soup:
    """Run the search in an output folder after `Output.begin`."""
    settle()
    for config in configs:
        actors = bundles(with_changes(recipe, config), inputs.held[0], len(inputs.ingredients), progress)
        wait_for_room(actors, recipe.actors.wait_s, progress, "`actors:` or learn.model_batch")
    check_seen([str(output.state("begun.json"))] if output.mirror is None else [], patience_s(recipe))
    first = output.state("first", "state", "resolved.json")
    with writing(first):
        first.parent.mkdir(parents=True, exist_ok=True)
    with open_session(with_changes(recipe, configs[0]), inputs, output, True, progress, first) as session:
        session.open_store(inputs.everything, "tensor")  # all trials share this one read of the ingredients
    states = output.uri_of("state", "trials")
    with quiet_tune(output.state("tune")), recording(None, recipe.method, output.uri_of()):
        trials = _run_trials(recipe, configs, output, states, observed(progress))
    metric, keys = optimized(recipe), list(configs[0])
    best = _best(trials, metric)
    write_bytes(output.state("learn.pt"), storage.read_bytes(storage.join(states, f"{best['id']}.pt")))
    more = {
        "search": {
            "keys": keys,
            "metric": metric,
            "trials": trials,
            "pareto": pareto(trials, metric),
            "best": best["trial"],
        }
    }
    _keep_tensorboard(output)
    return make_soup_in(with_changes(recipe, {k: best[k] for k in keys}), inputs, output, progress, more)


def _run_trials(recipe: Recipe, configs: list[Config], output: Output, states: str, progress: ProgressCallback) -> Trials:
    output.state("trials").mkdir(exist_ok=True)
    PercentProgress.report_to(progress, len(configs), patience_s(recipe))
    PatientASHA.first = configs[0]
    trainable = tune.with_resources(soup_trainable(recipe, states), soup_resources(recipe))
    progress("searching", 0, len(configs))
    tuner = restored(output.state("tune"), trainable) or _new_tuner(recipe, configs, output, trainable)
    trials = _trials_of(tuner.fit(), configs, in_order=recipe.search.algorithm == "optuna")
    progress("searching", len(configs), len(configs))
    del tuner
    gc.collect()  # W&B's callback prints an error if it outlives Ray
    return trials


class PatientASHA(ASHAScheduler):
    """ASHA that never stops the trial of the unchanged recipe, so the result is never worse than that trial."""

    first: Config

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return ASHA's decision, or CONTINUE for the first trial."""
        action = super().on_trial_result(controller, trial, result)
        return TrialScheduler.CONTINUE if keys_of(trial.config) == self.first else action


def _new_tuner(recipe: Recipe, configs: list[Config], output: Output, trainable: Any) -> tune.Tuner:
    options = recipe.search
    scheduler: TrialScheduler = FIFOScheduler()
    if options.scheduler == "asha":
        # before half of its steps, a trial with model batches has moved only some of the ingredients
        scheduler = PatientASHA("percent", max_t=100, grace_period=50, reduction_factor=2)
    space: dict[str, Any] = {"soup": tune.grid_search(configs)}
    algorithm = None
    if options.algorithm == "optuna":
        space, algorithm = _optuna(recipe, configs)
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=optimized(recipe),
            mode=MODES[optimized(recipe)],
            scheduler=scheduler,
            search_alg=algorithm,
            num_samples=1 if algorithm is None else options.trials,
            time_budget_s=options.time_budget_s,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            storage_path=str(output.state()),
            name="tune",
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=2),  # only for lost actors: trials report their own errors
            callbacks=[PercentProgress(), TBXLoggerCallback(), *_loggers(recipe, output)],
        ),
    )


def _loggers(recipe: Recipe, output: Output) -> list[tune.Callback]:
    """Make Ray's callbacks for search.loggers or `loggers`. Raises RecipeError if a package or its key is missing."""
    callbacks: list[tune.Callback] = []
    name = Path(output.uri_of()).name  # the folder of a mirror has another one in each process
    for logger in recipe.search.loggers or recipe.loggers:
        try:
            if logger == "wandb":
                from ray.air.integrations.wandb import WandbLoggerCallback

                folder = output.folder / "wandb"  # W&B's local files; in offline mode, all of its files
                folder.mkdir(exist_ok=True)
                project, mode = os.environ.get("WANDB_PROJECT", "ray_soup"), os.environ.get("WANDB_MODE")
                callbacks.append(WandbLoggerCallback(project, name, dir=str(folder), mode=mode, resume="allow"))
            else:
                import mlflow
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", name)
                callbacks.append(MLflowLoggerCallback(mlflow.get_tracking_uri(), experiment_name=experiment))
        except (ImportError, RuntimeError) as error:
            raise RecipeError(f"search.loggers: {logger} is not installed. Run pip install 'ray_soup[{logger}]'.") from error
        try:
            callbacks[-1].setup()  # Tune calls it, too, but then it is too late to report what is missing
        except Exception as error:
            raise RecipeError(f"search.loggers: {logger} cannot be used. Fix this, or remove the logger: {error}") from error
    return callbacks


def _optuna(recipe: Recipe, configs: list[Config]) -> tuple[dict[str, Any], Any]:
    """Return the search space and algorithm for Optuna; the first trial is the unchanged recipe, if Optuna can draw it."""
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        algorithm = OptunaSearch(points_to_evaluate=[_numbers_only(recipe, configs[0])], seed=recipe.learn.seed % 2**32)
    except (ImportError, AssertionError) as error:
        raise RecipeError("search.algorithm: optuna is not installed. Run pip install 'ray_soup[optuna]'.") from error
    space = recipe.search.space or default_space(max(c.get("learn.model_batch", 2) for c in configs))
    drawn = {key: _with_own(value, configs[0][key]) for key, value in space.items()}
    warnings.filterwarnings("ignore", "Choices for a categorical distribution")  # {tensor: 4} is kept in memory only
    return {key: distribution(f"search.{key}", value) for key, value in drawn.items()}, algorithm


def _numbers_only(recipe: Recipe, first: Config) -> Config:
    """Leave out values such as learn.lr: auto, which no distribution of numbers has: Optuna draws these."""
    space = recipe.search.space
    return {k: v for k, v in first.items() if not (isinstance(v, str) and "choice" not in dict(space.get(k, {})))}


def _with_own(value: Any, own: Any) -> Any:
    """Add the recipe's own value to a choice that lacks it: Optuna refuses a first trial outside of its choices."""
    choices = value.get("choice") if isinstance(value, dict) else None
    return value if choices is None or own in choices else {"choice": [*choices, own]}


# Results


def _trials_of(grid: tune.ResultGrid, configs: list[Config], in_order: bool) -> Trials:
    """Return each trial's number, id, config, metrics and error; unless `in_order`, sort them like `configs`."""
    results = [(keys_of(result.config or {}), result) for result in results_of(grid)]
    if not in_order:
        results.sort(key=lambda r: configs.index(r[0]))  # a restored tuner changes the order
    found = []
    for number, (config, result) in enumerate(results):
        metrics = result.metrics or {}
        error = metrics.get("error") or (str(result.error).strip().splitlines()[-1] if result.error else None)
        kept = {k: metrics.get(k) for k in (*MODES, "seconds", "peak_memory_bytes", "percent")}
        if error is not None:
            kept |= dict.fromkeys(MODES)
        found.append({"trial": number, "id": metrics.get("trial_id"), **config, **kept, "error": error})
    known = {key for trial in found for key in MODES if trial[key] is not None} | {"select_nll"}
    return [{key: value for key, value in trial.items() if key not in MODES or key in known} for trial in found]


def _best(trials: Trials, metric: str) -> dict[str, Any]:
    """Return the best trial with results. Raises SoupError if there is none."""
    done = [t for t in trials if t.get(metric) is not None and t["id"] is not None]
    if not done:
        reasons = "; ".join(dict.fromkeys(str(t["error"]) for t in trials if t["error"])) or "no trial reported a result"
        raise SoupError(f"All {len(trials)} trials failed ({reasons}). Fix the cause, and choose a new folder.")
    return (min if MODES[metric] == "min" else max)(done, key=lambda trial: trial[metric])


def pareto(trials: Trials, metric: str = "select_nll") -> Trials:
    """Return the Pareto front of the trials in the figure `metric` on select, peak memory and seconds.

    Trials that were stopped early do not count. Memory and seconds that differ by less than 3 % are considered equal.
    """
    done = [t for t in trials if t.get(metric) is not None and t["percent"] == 100]
    sign = 1 if MODES[metric] == "min" else -1

    def beaten(t: dict[str, Any], by: dict[str, Any]) -> bool:
        pairs = [(sign * by[metric], sign * t[metric], 1.0)]
        pairs += [(by[key], t[key], 1.03) for key in ("peak_memory_bytes", "seconds")]
        return all(a <= b * slack for a, b, slack in pairs) and any(a * slack < b for a, b, slack in pairs)

    return [t for t in done if not any(beaten(t, other) for other in done)]


def _keep_tensorboard(output: Output) -> None:
    """Copy Tune's event files to OUT/tensorboard, with one folder per trial."""
    for events in output.state("tune").glob("*/events.out.tfevents*"):
        trial = events.parent.name.split("_soup=")[0]
        output.put(f"{BOARD}/{trial}/{events.name}", partial(shutil.copyfile, events))

"""Ray Tune over learning rate, model batch size and any other key of a recipe.

A trial is a driver with actors of its own, inside the trial's placement group. All trials use the direction store and the
decoded data that lie in the node's cache. Tune sees fit and select, never test.
"""

from __future__ import annotations

import gc
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.logger import TBXLoggerCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from ray_soup import finetune, models, storage
from ray_soup.actors import Actors, Watch, actor_bytes, connect, quiet, resolve_mesh, wait_for_nodes
from ray_soup.blocks import Layout
from ray_soup.checkpoints import Ingredient
from ray_soup.errors import RecipeError, SoupError
from ray_soup.finetune import distribution, draw, quiet_tune, restored
from ray_soup.folder import BOARD, Soup, begun, completed, failures_recorded, locked
from ray_soup.learn import State, learn
from ray_soup.pipeline import CALIBRATION_WHILE_CHOOSING, LEARNED, Bench, make_in, model_batch_of, open_bench, prepare, run
from ray_soup.recipe import Recipe, changed
from ray_soup.shard import Mesh

MODES = {"select_nll": "min", "select_accuracy": "max"}


def default_space(ingredients: int) -> dict[str, Any]:
    """Learning rate, and model batches of a quarter, a half and all of the ingredients."""
    sizes = sorted({-(-ingredients // 4), -(-ingredients // 2), ingredients})
    return {"learn.lr": {"loguniform": [0.001, 0.1]}, "learn.model_batch": {"choice": sizes}}


def as_it_is(recipe: Recipe, keys: Sequence[str], ingredients: int) -> dict[str, Any]:
    """The recipe's own values of these keys. Raises RecipeError for keys that it has not."""
    found: dict[str, Any] = {}
    for key in keys:
        value: Any = recipe
        for part in key.split("."):
            if not hasattr(value, part):
                raise RecipeError(f"search: the recipe has no key '{key}'; write it as in learn.lr.")
            value = getattr(value, part)
        found[key] = ingredients if key == "learn.model_batch" and value == "auto" else value
    return found


def make_configs(recipe: Recipe, ingredients: int) -> list[dict[str, Any]]:
    """What to try: the recipe as it is, then random draws, or the points of a grid. Raises RecipeError."""
    space = recipe.search.space or default_space(ingredients)
    first = as_it_is(recipe, list(space), ingredients)
    grids = {key: value["grid"] for key, value in space.items() if isinstance(value, dict) and "grid" in value}
    drawn = {key: distribution(f"search.{key}", value) for key, value in space.items() if key not in grids}
    random = np.random.RandomState(recipe.learn.seed)

    if grids:
        points = [dict(zip(grids, point, strict=True)) for point in itertools.product(*grids.values())]
        configs = [first, *({**point, **draw(drawn, random)} for point in points)]
    else:
        configs = [first, *(draw(drawn, random) for _ in range(recipe.search.trials - 1))]
    for config in configs:
        if changed(recipe, config).method not in LEARNED:
            raise RecipeError(f"search: the method must be one of {', '.join(LEARNED)}; {recipe.method} learns nothing.")
    return configs


def trial_mesh(recipe: Recipe, parameters: int, ingredients: int, watch: Watch = quiet) -> tuple[Mesh, float, int]:
    """Mesh, CPUs of an actor and model batch of one trial: one replica where the recipe says auto, so that trials run side
    by side; as many shards as its model batch needs. Raises RecipeError."""
    model_batch = model_batch_of(recipe, ingredients)
    if recipe.actors.replicas == "auto":
        recipe = changed(recipe, {"actors.replicas": 1})
    mesh, cpus = resolve_mesh(recipe, parameters, model_batch, watch)
    return mesh, cpus, model_batch


def bundles(recipe: Recipe, parameters: int, ingredients: int, watch: Watch = quiet) -> list[dict[str, float]]:
    """What a trial asks of the cluster: nothing for its driver, and for every actor CPUs, GPUs and memory, which grows with
    the model batch."""
    mesh, cpus, model_batch = trial_mesh(recipe, parameters, ingredients, watch)
    memory = int(actor_bytes(recipe, parameters, model_batch, mesh.shards))
    one = {"CPU": cpus, "GPU": recipe.actors.gpus, "memory": memory}
    return [{key: value for key, value in one.items() if value}] * mesh.size


def wait_for_room(asked: list[dict[str, float]], wait_s: float, watch: Watch) -> None:
    """Raises RecipeError where the nodes cannot hold these bundles, after `wait_s` in which the cluster may grow."""

    def nodes() -> list[dict[str, float]]:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def complaint() -> str:
        have = "; ".join(", ".join(f"{k} {n.get(k, 0):g}" for k in ("CPU", "GPU", "memory")) for n in nodes())
        return (
            f"A trial asks for {len(asked)} actors with {', '.join(f'{k} {v:g}' for k, v in asked[0].items())} each; the "
            f"nodes of the cluster have: {have}. Ask for less with actors: or learn.model_batch, or set actors.wait_s where "
            "nodes are still to come."
        )

    wait_for_nodes(lambda: [] if _fit(asked, nodes()) else asked, complaint, wait_s, watch)


def _fit(asked: list[dict[str, float]], nodes: list[dict[str, float]]) -> bool:
    free = [dict(node) for node in nodes]
    for bundle in asked:
        for node in free:
            if all(node.get(key, 0) >= value for key, value in bundle.items()):
                for key, value in bundle.items():
                    node[key] -= value
                break
        else:
            return False
    return True


def soup_trainable(recipe: Recipe, states: str | None = None) -> Callable[[dict[str, Any]], None]:
    """A function trainable for `tune.Tuner` that learns one soup, by the recipe with the values of its config, such as
    {"learn.lr": 0.02, "learn.model_batch": 6}. After every epoch it reports the point kept so far: select_nll,
    select_accuracy, percent (of its steps), seconds, peak_memory_bytes; what went wrong as `error`.

    States are kept as `states`/TRIAL_ID.pt, in a storage or on a disk that every node sees, and gone on with; without
    `states` they are the trials' checkpoints. `soup_resources` says what it asks of the cluster.
    """
    folder = os.getcwd()

    def soup_trial(config: dict[str, Any]) -> None:
        import tempfile

        with suppress(OSError):
            os.chdir(folder)  # Tune runs trials elsewhere; the recipe's modules are found here
        models.look_in(folder)
        with tempfile.TemporaryDirectory() as made:
            file = Path(made) / "learn.pt"
            kept = storage.join(states, f"{tune.get_context().get_trial_id()}.pt") if states is not None else None
            if kept is not None and storage.exists(kept):
                file.write_bytes(storage.read_bytes(kept))
            elif kept is None and tune.get_checkpoint() is not None:
                with tune.get_checkpoint().as_directory() as before:
                    shutil.copyfile(Path(before) / "learn.pt", file)

            def keep() -> tune.Checkpoint | None:
                if kept is None:
                    return tune.Checkpoint.from_directory(made)
                storage.upload(file, kept)
                return None

            try:
                _learn(changed(recipe, config.get("soup", config)), file, keep)
            except SoupError as error:  # ours or the data's: another try would end the same
                worst = {"select_nll": float("inf"), "select_accuracy": 0.0}
                tune.report({**worst, "percent": 100, "seconds": 0.0, "peak_memory_bytes": 0, "error": str(error)})

    return soup_trial


def _learn(recipe: Recipe, file: Path, keep: Callable[[], tune.Checkpoint | None]) -> None:
    ingredients, layout = prepare(recipe, needs_fit=True)
    mesh, cpus, model_batch = trial_mesh(recipe, layout.numel, len(ingredients))
    actors = Actors(recipe, ingredients, mesh, cpus)
    try:
        bench = Bench(recipe, ingredients, layout, mesh, cpus, model_batch, actors, actors.setup(quiet), quiet)
        taken = bench.take(tuple(range(len(ingredients))), recipe.blocks)
        splits = bench.cut(recipe.learn.seed)

        def report(step: int, steps: int, state: State) -> None:
            kept = min(state.curve, key=lambda line: line["select_nll"])
            metrics = {
                "select_nll": kept["select_nll"],
                "select_accuracy": kept["select_accuracy"],
                "percent": round(100 * step / steps),
                "seconds": state.seconds,
                "peak_memory_bytes": max(actors.peak_memory()),
            }
            tune.report(metrics, checkpoint=keep())

        calibration = bench.calibration(recipe, splits, CALIBRATION_WHILE_CHOOSING)
        state = learn(recipe, actors, taken.norms, splits, model_batch, file, after_epoch=report, calibration=calibration)
        report(1, 1, state)
    finally:
        actors.close()


def soup_resources(recipe: Recipe) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """For `tune.with_resources`: what a trial of `soup_trainable` asks of the cluster, as a function of its config."""
    ingredients, layout = prepare(recipe, needs_fit=True)
    parameters, count = layout.numel, len(ingredients)

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        asked = bundles(changed(recipe, config.get("soup", config)), parameters, count)
        return tune.PlacementGroupFactory([{}, *asked], strategy="PACK")

    return resources


def soup_of(recipe: Recipe, result: tune.Result, out: str | Path, watch: Watch = quiet) -> Soup:
    """What a trial of `soup_trainable` learned in a tuner of one's own, made in the folder `out` as by `run`."""
    if result.checkpoint is None or result.config is None:
        raise SoupError(
            f"The trial at {result.path} has no checkpoint: {(result.metrics or {}).get('error', result.error)}."
        )
    with result.checkpoint.as_directory() as folder:
        return run(changed(recipe, result.config.get("soup", result.config)), out, watch, Path(folder) / "learn.pt")


class Progress(finetune.Progress):
    """Tells `watch` how far the trials are, too."""

    what = "searching"

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        done = sum(100 if t.is_finished() else (t.last_result or {}).get("percent", 0) for t in trials)
        self.watch(self.what, round(done / 100), self.total)


class PatientASHA(ASHAScheduler):
    """ASHA that never stops the recipe as it is: what is found is then never worse."""

    first: dict[str, Any]

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(controller, trial, result)
        return TrialScheduler.CONTINUE if trial.config.get("soup", trial.config) == self.first else action


def search(recipe: Recipe, out: str | Path, watch: Watch = quiet) -> Soup:
    """Search, then make the best soup in the folder `out` as `run` does, with the trials in its run.json and report; goes on
    where a search before this one was stopped, or returns what is complete. Raises SoupError."""
    ingredients, layout = prepare(recipe, needs_fit=True)
    configs = make_configs(recipe, len(ingredients))
    with locked(out, watch, recipe.ingredients) as folder:
        soup = completed(folder, begun(recipe, ingredients, kind="search"))
        if soup is None:
            with failures_recorded(folder), connect():
                trials = storage.join(
                    str(out).rstrip("/") if storage.is_remote(str(out)) else str(folder), "state", "trials"
                )
                soup = _search(recipe, ingredients, layout, configs, folder, trials, watch)
    return soup.at(out)


def _search(
    recipe: Recipe,
    ingredients: list[Ingredient],
    layout: Layout,
    configs: list[dict[str, Any]],
    out: Path,
    states: str,
    watch: Watch,
) -> Soup:
    """What is said of `search`, in a folder that is locked and begun."""
    for config in configs:
        asked = bundles(changed(recipe, config), layout.numel, len(ingredients), watch)
        wait_for_room(asked, recipe.actors.wait_s, watch)
    made = out / "state" / "first"
    (made / "state").mkdir(parents=True, exist_ok=True)
    with open_bench(changed(recipe, configs[0]), ingredients, layout, made, True, watch) as bench:
        bench.take(tuple(range(len(ingredients))), "tensor")  # the one read of the ingredients, for all trials
    with quiet_tune():
        trials = _run_trials(recipe, configs, out / "state", states, watch)
    best = _best(trials, recipe.search.metric)
    keys = list(configs[0])
    (out / "state" / "learn.pt").write_bytes(storage.read_bytes(storage.join(states, f"{best['id']}.pt")))
    more = {"search": {"keys": keys, "metric": recipe.search.metric, "trials": trials, "pareto": pareto(trials),
                       "best": best["trial"]}}  # fmt: skip
    _keep_tensorboard(out)
    return make_in(changed(recipe, {k: best[k] for k in keys}), ingredients, layout, out, watch, more)


def _run_trials(
    recipe: Recipe, configs: list[dict[str, Any]], state: Path, states: str, watch: Watch
) -> list[dict[str, Any]]:
    """Each trial's number, id, config, metrics and error, in order."""
    options = recipe.search
    (state / "trials").mkdir(exist_ok=True)
    Progress.watch, Progress.total = staticmethod(watch), len(configs)
    PatientASHA.first = configs[0]
    trainable = tune.with_resources(soup_trainable(recipe, states), soup_resources(recipe))
    experiment = state / "tune"
    watch("searching", 0, len(configs))
    tuner = restored(experiment, trainable)
    if tuner is None:
        mode = MODES[options.metric]
        scheduler: TrialScheduler = FIFOScheduler()
        if options.scheduler == "asha":
            # before half of its steps a trial with model batches has moved only some of the ingredients
            scheduler = PatientASHA("percent", max_t=100, grace_period=50, reduction_factor=2)
        space: dict[str, Any] = {"soup": tune.grid_search(configs)}
        algorithm = None
        if options.algorithm == "optuna":
            space, algorithm = _optuna(recipe, configs)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=options.metric,
                mode=mode,
                scheduler=scheduler,
                search_alg=algorithm,
                num_samples=1 if algorithm is None else options.trials,
                time_budget_s=options.time_budget_s,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                storage_path=str(state),
                name="tune",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=2),  # what Ray lost is tried again
                callbacks=[Progress(), TBXLoggerCallback(), *_loggers(recipe, state.parent)],
            ),
        )
    found = []
    results = [(result.config.get("soup", result.config), result) for result in tuner.fit()]
    if options.algorithm != "optuna":
        results.sort(key=lambda r: configs.index(r[0]))  # a restored tuner mixes them up
    for number, (config, result) in enumerate(results):
        metrics = result.metrics or {}
        error = metrics.get("error") or (str(result.error).strip().splitlines()[-1] if result.error else None)
        kept = {k: metrics.get(k) for k in (*MODES, "seconds", "peak_memory_bytes", "percent")}
        if error is not None:
            kept |= dict.fromkeys(MODES)
        found.append({"trial": number, "id": metrics.get("trial_id"), **config, **kept, "error": error})
    watch("searching", len(configs), len(configs))
    del tuner
    gc.collect()  # W&B's callback complains where it outlives Ray
    return found


def _loggers(recipe: Recipe, out: Path) -> list[tune.Callback]:
    """Ray's own callbacks for what `search.loggers` names. Raises RecipeError where the package or its key is missing."""
    callbacks: list[tune.Callback] = []
    for logger in recipe.search.loggers:
        try:
            if logger == "wandb":
                from ray.air.integrations.wandb import WandbLoggerCallback

                folder = out / "wandb"  # what W&B keeps locally, and all of it where it is offline
                folder.mkdir(exist_ok=True)
                options = {"dir": str(folder), "mode": os.environ.get("WANDB_MODE"), "resume": "allow"}
                callbacks.append(WandbLoggerCallback(os.environ.get("WANDB_PROJECT", "ray_soup"), out.name, **options))
            else:
                import mlflow
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", out.name)
                callbacks.append(MLflowLoggerCallback(mlflow.get_tracking_uri(), experiment_name=experiment))
        except (ImportError, RuntimeError) as error:
            raise RecipeError(f"search.loggers: {logger} is not installed. pip install 'ray_soup[{logger}]'.") from error
        try:
            callbacks[-1].setup()  # Tune does so too, when it is late to say what is missing
        except Exception as error:
            raise RecipeError(f"search.loggers: {logger} cannot be used: {error}") from error
    return callbacks


def _optuna(recipe: Recipe, configs: list[dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    try:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        algorithm = OptunaSearch(points_to_evaluate=[configs[0]], seed=recipe.learn.seed)
    except (ImportError, AssertionError) as error:
        raise RecipeError("search.algorithm: optuna is not installed. pip install 'ray_soup[optuna]'.") from error
    space = recipe.search.space or default_space(max(c.get("learn.model_batch", 2) for c in configs))
    return {key: distribution(f"search.{key}", value) for key, value in space.items()}, algorithm


def _best(trials: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    """The best finished trial. Raises SoupError where there is none."""
    done = [t for t in trials if t.get(metric) is not None and t["id"] is not None]
    if not done:
        reasons = "; ".join(dict.fromkeys(str(t["error"]) for t in trials if t["error"])) or "none reported anything"
        raise SoupError(f"All {len(trials)} trials failed: {reasons}")
    return (min if MODES[metric] == "min" else max)(done, key=lambda trial: trial[metric])


def pareto(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials, of those that were not stopped, that no other one beats in NLL on select, peak memory and seconds
    together; memory and seconds that differ by less than 3 % are taken for equal."""
    slack = {"select_nll": 1.0, "peak_memory_bytes": 1.03, "seconds": 1.03}
    done = [t for t in trials if t.get("select_nll") is not None and t["percent"] == 100]

    def beaten(t: dict[str, Any], by: dict[str, Any]) -> bool:
        return all(by[a] <= t[a] * s for a, s in slack.items()) and any(by[a] * s < t[a] for a, s in slack.items())

    return [t for t in done if not any(beaten(t, other) for other in done)]


def _keep_tensorboard(out: Path) -> None:
    """Tune's event files, a folder a trial, in OUT/tensorboard."""
    for events in (out / "state" / "tune").glob("*/events.out.tfevents*"):
        target = out / BOARD / events.parent.name.split("_soup=")[0]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(events, target / events.name)

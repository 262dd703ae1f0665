"""Make a zoo of ingredients: one initialisation, then fine-tunings by random search (Ray Tune)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray import tune
from ray.exceptions import RayTaskError

from ray_soup import models, storage
from ray_soup.actors import Watch, connect
from ray_soup.cache import drained
from ray_soup.checkpoints import sha256_file
from ray_soup.errors import RecipeError, SoupError
from ray_soup.folder import locked, write
from ray_soup.recipe import Recipe
from ray_soup.train import Worker, probe, train

T = TypeVar("T")
HYPERPARAMETERS = ("lr", "wd", "epochs", "label_smoothing", "mixup", "shift", "randaugment")


def make_configs(recipe: Recipe) -> list[dict[str, Any]]:
    """The hyperparameters of each trial, drawn by the seed. Raises RecipeError."""
    space = {name: distribution(f"finetune.{name}", getattr(recipe.finetune, name)) for name in HYPERPARAMETERS}
    space["seed"] = tune.randint(0, 2**31)
    random = np.random.RandomState(recipe.finetune.seed)
    return [draw(space, random) for _ in range(recipe.finetune.trials)]


def draw(space: dict[str, Any], random: np.random.RandomState) -> dict[str, Any]:
    """One value of each distribution."""
    values = {key: d.sample(random_state=random) if hasattr(d, "sample") else d for key, d in space.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


def distribution(key: str, value: Any) -> Any:
    """A number as it is, or Ray Tune's distribution for what the recipe says of `key`. Raises RecipeError."""
    domains = {"loguniform": tune.loguniform, "uniform": tune.uniform, "randint": tune.randint}
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((kind, given),) = value.items()
        if kind == "choice" and isinstance(given, list) and given:
            return tune.choice(given)
        if kind in domains and isinstance(given, list) and len(given) == 2:
            return domains[kind](*given)
    raise RecipeError(
        f"{key}: {value!r} found; expected a number, or loguniform, uniform or randint: [low, high], or choice: [...]."
    )


def finetune(recipe: Recipe, out: str | Path, watch: Watch = lambda what, done, total: None) -> list[dict[str, Any]]:
    """Fill the folder `out` with fine-tuned checkpoints `model_00.safetensors`, ... and `manifest.json`, which lists for
    each its hyperparameters, metrics and SHA-256, and is returned. Goes on where a run before this one was stopped, every
    trial from its last epoch."""
    if storage.is_remote(str(out)):
        raise RecipeError(
            f"finetune cannot write to {out} yet: OUT is a folder that every node sees. Copy it there afterwards."
        )
    if recipe.data.train is None:
        raise RecipeError("The recipe names no data.train to fine-tune on. Add it, as in data: {train: train.npz}.")
    if recipe.finetune.class_names is not None and (recipe.finetune.pretrained is None or recipe.finetune.init is not None):
        raise RecipeError("finetune.class_names makes the head of finetune.pretrained, a CLIP: name that, and no init.")
    configs = make_configs(recipe)
    with locked(out, watch) as out:
        manifest = out / "manifest.json"
        if manifest.exists():
            return json.loads(manifest.read_text())
        with connect():
            at_once = _trials_at_once(recipe)
            init = recipe.finetune.init or _initialisation(recipe, out / "state" / "init.safetensors", watch)
            with quiet_tune():
                results = _search(recipe, configs, init, out / "state", at_once, watch)
        entries = []
        for number, (hyper, metrics, file) in enumerate(results):
            target = out / f"model_{number:02d}.safetensors"
            if not target.exists():
                file.replace(target)
            entries.append({"file": target.name, **hyper, **metrics, "sha256": sha256_file(str(target))})
        write(manifest, json.dumps(entries, indent=1))
        for left in ("tune", "train", "trials"):
            shutil.rmtree(out / "state" / left, ignore_errors=True)
    return entries


def _cpus(recipe: Recipe) -> float:
    """CPUs, and threads, of one worker."""
    return 1 if recipe.actors.cpus == "auto" else recipe.actors.cpus


def _trials_at_once(recipe: Recipe) -> int:
    """How many models the cluster has room for at a time. Raises RecipeError where there is none."""
    have = ray.cluster_resources()
    one = {"CPU": _cpus(recipe) * recipe.finetune.workers_per_model}
    one |= {"GPU": recipe.actors.gpus * recipe.finetune.workers_per_model} if recipe.actors.gpus else {}
    fit = min(int(have.get(what, 0) / amount) for what, amount in one.items())
    if fit < 1:
        asked, found = (", ".join(f"{v.get(k, 0):g} {k}s" for k in one) for v in (one, have))
        raise RecipeError(
            f"finetune: {recipe.finetune.workers_per_model} workers a model take {asked}; the cluster has {found}. Lower "
            "finetune.workers_per_model, actors.cpus or actors.gpus."
        )
    return fit


def _initialisation(recipe: Recipe, file: Path, watch: Watch) -> str:
    """What all trials start from, made on all cores of one node unless it is there."""
    if not file.exists():
        cpus = max(1, int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])))
        folder, pretrained = os.getcwd(), recipe.finetune.pretrained is not None

        def work(threads: int) -> Iterator[tuple[int, int]]:
            torch.set_num_threads(threads)
            models.look_in(folder)
            if pretrained:
                yield from probe(recipe, file)
            else:
                hyper = {**recipe.finetune.trunk.model_dump(), "seed": recipe.finetune.seed}
                yield from train(recipe, hyper, None, file)

        task = ray.remote(num_cpus=cpus, num_gpus=recipe.actors.gpus, max_retries=0)(work)
        try:
            for news in task.options(num_returns="streaming").remote(cpus):
                watch("fitting the head" if pretrained else "training the trunk", *ray.get(news))
        except RayTaskError as error:
            raise error.cause from error
    return str(file)


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Tune without a word on the console, without log files nobody asked for, and noting what it has done every second. Only
    for tuners of ours: a user's own are left as they are."""
    ours = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_GLOBAL_CHECKPOINT_S": "1"}
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
    """The tuner of an experiment that was stopped. None where there is none, or one that was killed while it was being set
    up; what that left is thrown away."""
    if tune.Tuner.can_restore(experiment):
        with suppress(EOFError, pickle.UnpicklingError):
            return tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True, restart_errored=True)
    shutil.rmtree(experiment, ignore_errors=True)
    return None


class Progress(tune.Callback):
    """Tells `watch` of finished trials. Tune pickles its callbacks: what cannot be pickled is kept on the class."""

    what = "fine-tuning"
    watch: Watch
    total: int

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch(self.what, sum(t.is_finished() for t in trials), self.total)


def _search(
    recipe: Recipe, configs: list[dict[str, Any]], init: str, state: Path, at_once: int, watch: Watch
) -> list[tuple[dict[str, Any], dict[str, Any], Path]]:
    """(hyperparameters, metrics, checkpoint file) of each trial that did not fail, in order."""
    total, folder, workers = recipe.finetune.trials, os.getcwd(), recipe.finetune.workers_per_model
    cpus, gpus = _cpus(recipe), recipe.actors.gpus
    trials = state / "trials"
    trials.mkdir(exist_ok=True)
    Progress.watch, Progress.total = staticmethod(watch), total

    def trial(config: dict[str, Any]) -> None:
        config, name = config["hyper"], tune.get_context().get_trial_id()
        work = {"recipe": recipe, "hyper": config, "init": init, "file": trials / f"{name}.safetensors", "folder": folder}
        if workers == 1:
            torch.set_num_threads(max(1, int(cpus)))
            models.look_in(folder)
            tune.report(drained(train(recipe, config, init, work["file"])))
            return
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        each = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        scaling = ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=each)
        runs = RunConfig(name=name, storage_path=str(state / "train"))
        TorchTrainer(_train_together, train_loop_config=work, scaling_config=scaling, run_config=runs).fit()
        tune.report(drained(train(recipe, config, init, work["file"])))  # is done: the figures

    resources: dict[str, float] = {"cpu": cpus, **({"gpu": gpus} if gpus else {})}
    if workers > 1:  # the trial only waits for its workers; Tune takes no trial that asks for nothing
        resources = {"cpu": 0, "memory": 1}
    trainable = tune.with_resources(trial, resources)
    experiment = state / "tune"
    watch("fine-tuning", 0, total)
    tuner = restored(experiment, trainable)
    if tuner is None:
        # Train asks for its workers by itself
        options = tune.TuneConfig(reuse_actors=True, max_concurrent_trials=at_once if workers > 1 else None)
        runs = tune.RunConfig(storage_path=str(state), name="tune", verbose=0, callbacks=[Progress()])
        space = {"hyper": tune.grid_search(configs)}
        tuner = tune.Tuner(trainable, param_space=space, tune_config=options, run_config=runs)
    results = sorted(tuner.fit(), key=lambda r: configs.index(r.config["hyper"]))  # a restored tuner mixes them up
    failed = [r for r in results if r.error is not None]
    failures = [{**r.config["hyper"], "error": str(r.error).strip().splitlines()[-1]} for r in failed]
    write(state / "failures.json", json.dumps(failures, indent=1))
    if len(results) - len(failed) < 2:
        reason = failures[0]["error"] if failed else "no trial was run"
        raise SoupError(f"{len(failed)} of {total} fine-tunings failed: {reason}")
    watch("fine-tuning", total, total)
    return [
        (r.config["hyper"], {k: r.metrics[k] for k in ("train_loss", "accuracy") if k in r.metrics},
         trials / f"{r.metrics['trial_id']}.safetensors")
        for r in results
        if r.error is None
    ]  # fmt: skip


def _train_together(work: dict[str, Any]) -> None:
    """One of the workers of a model, in Ray Train."""
    from ray import train as ray_train

    models.look_in(work["folder"])
    context = ray_train.get_context()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", 1))))
    worker = Worker(context.get_world_rank(), context.get_world_size())
    drained(train(work["recipe"], work["hyper"], work["init"], work["file"], worker))

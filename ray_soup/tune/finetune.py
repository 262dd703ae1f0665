"""Make a zoo of ingredients: one initialization, then fine-tuning by random search (Ray Tune)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray import tune
from ray.exceptions import RayTaskError

from ray_soup.actors.placement import patience_s, room_for, settle
from ray_soup.actors.ray_session import connect
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.disk import write_json
from ray_soup.io.hashing import sha256_file
from ray_soup.io.hugging_face import pinned_recipe
from ray_soup.io.notebook import shown_in_notebooks
from ray_soup.io.progress import ProgressCallback, drain, no_progress
from ray_soup.recipe import Data, Recipe
from ray_soup.soups.identity import begun_zoo
from ray_soup.soups.output import Output, open_output
from ray_soup.soups.own_files import REPLACED
from ray_soup.soups.records import read_begun
from ray_soup.task import identity
from ray_soup.task.evidence import Checked, check_start
from ray_soup.task.evidence_files import PREPROCESSING, RECORD
from ray_soup.task.functions import look_in
from ray_soup.task.model_spec import DTYPE, in_bfloat16
from ray_soup.task.preprocessing import completed, preprocessing_of
from ray_soup.task.sources import check_sources
from ray_soup.tune.nodes import check_seen
from ray_soup.tune.probe import probe
from ray_soup.tune.records import (
    FailedTraining,
    Hyperparameters,
    ManifestEntry,
    TrainingMetrics,
    read_manifest,
    write_failures,
    write_manifest,
)
from ray_soup.tune.train import Worker, train
from ray_soup.tune.trials import (
    TrialProgress,
    distribution,
    draw,
    not_started,
    quiet_tune,
    random_state,
    restored,
    results_of,
    wait_for_room,
)

DRAWN = ("lr", "wd", "epochs", "label_smoothing", "mixup", "shift", "randaugment")
"""Hyperparameters in the order in which they are drawn; the seed comes last."""


def make_configs(recipe: Recipe) -> list[Hyperparameters]:
    """Draw the hyperparameters of each trial from finetune.seed. Raises RecipeError if a distribution is not valid."""
    space = {name: distribution(f"finetune.{name}", getattr(recipe.finetune, name)) for name in DRAWN}
    space["seed"] = tune.randint(0, 2**31)
    random = random_state(recipe.finetune.seed)
    return [cast(Hyperparameters, draw(space, random)) for _ in range(recipe.finetune.trials)]


@shown_in_notebooks
def finetune(
    recipe: Recipe, out: str | Path, progress: ProgressCallback = no_progress, overwrite: bool = False
) -> list[ManifestEntry]:
    """Fill the folder or URI `out` with fine-tuned checkpoints `model_00.safetensors`, ... and `manifest.json`.

    Returns the manifest: file name, hyperparameters, metrics and SHA-256 of each checkpoint. Rerun to resume: each trial
    continues from its last finished epoch, unless it is to `overwrite` an earlier run. Raises RecipeError if the recipe
    cannot be run on this cluster, SoupError if fewer than two trials succeed.
    """
    _check_recipe(recipe)
    recipe = pinned_recipe(recipe)
    configs = make_configs(recipe)
    with open_output(out, progress, overwrite=overwrite) as output:
        manifest = output.folder / "manifest.json"
        checked = _checked_start(recipe, output, finished=os.path.lexists(manifest) and not overwrite)
        output.begin(begun_zoo(recipe, checked.adopted))
        identity.in_run(output.token())
        if os.path.lexists(manifest):
            return read_manifest(output.uri_of(manifest.name))
        progress("connecting to Ray", 0, 1)
        with output.discarding_refused(), connect():
            check_sources(Data(train=recipe.data.train, fit=recipe.data.fit))
            recipe = completed(recipe, checked.adopted)
            preprocessing = preprocessing_of(recipe, checked)
            settle()
            wait_for_room(_workers(recipe), recipe.actors.wait_s, progress, "finetune.workers_per_model or `actors:`")
            at_once = room_for(_workers(recipe))
            check_seen([str(output.state("begun.json"))] if output.mirror is None else [], patience_s(recipe))
            init = recipe.finetune.init or _initialization(recipe, output.uri_of("state", "init.safetensors"), progress)
            with quiet_tune(output.state("tune")):
                results = _run_trials(recipe, configs, init, output, progress, at_once=at_once)
        if preprocessing:  # which the ingredients themselves do not say
            about = {RECORD: preprocessing, **({"notes": checked.notes} if checked.notes else {})}
            output.put(PREPROCESSING, lambda file: write_json(file, about))
        return _publish(results, output, manifest)


def _checked_start(recipe: Recipe, output: Output, finished: bool) -> Checked:
    """Return what `check_start` does; of a finished run, whose first weights may be gone, what its record says."""
    if not finished:
        return check_start(recipe)
    begun = output.state("begun.json")
    return Checked(adopted=read_begun(begun).get("adopted", {}) if os.path.lexists(begun) else {})


@dataclass(frozen=True)
class _FineTuned:
    """A checkpoint of a trial that succeeded."""

    hyper: Hyperparameters
    metrics: TrainingMetrics
    name: str
    """Path of the checkpoint below the run's own folder in OUT/state."""
    sha256: str | None
    """Digest of the checkpoint; None if an earlier ray_soup trained it."""


def _check_recipe(recipe: Recipe) -> None:
    if recipe.data.train is None:
        raise RecipeError("The recipe has no data.train to fine-tune on. Add it, as in data: {train: train.npz}.")
    if recipe.actors.cpus == 0:
        raise RecipeError("actors.cpus: found 0; finetune needs CPUs for its workers. Set it to 1 or more, or to auto.")
    if in_bfloat16(recipe.model):
        raise RecipeError(
            f"model: found {recipe.model!r}; finetune trains weights in float32. Remove the option {DTYPE}; the key "
            "`precision` sets the precision of passes."
        )
    if recipe.finetune.class_names is not None and (recipe.finetune.pretrained is None or recipe.finetune.init is not None):
        raise RecipeError(
            "finetune.class_names needs a CLIP in finetune.pretrained, whose head it makes, and no finetune.init. Set "
            "finetune.pretrained, and remove finetune.init."
        )


def _publish(results: list[_FineTuned], output: Output, manifest: Path) -> list[ManifestEntry]:
    """Move the checkpoints into the output folder, write the manifest, and delete files that only a resumed run needs.

    Raises SoupError if another run took over the folder.
    """
    entries: list[ManifestEntry] = []
    targets = {f"model_{number:02d}.safetensors": one for number, one in enumerate(results)}
    if output.mirror is not None:
        output.mirror.take({target: one.name for target, one in targets.items()}, output.folder)
    for target, one in targets.items():
        if output.mirror is None and not (output.folder / target).exists():  # a run that was killed here has moved some
            output.state(one.name).replace(output.folder / target)
        digest = one.sha256 or sha256_file(output.uri_of(target))
        entries.append({"file": target, **one.hyper, **one.metrics, "sha256": digest})
    output.put(manifest.name, partial(write_manifest, entries))
    for left in ("tune", "train", "trials", REPLACED):
        shutil.rmtree(output.state(left), ignore_errors=True)
    return entries


def _cpus(recipe: Recipe) -> float:
    """Return the number of CPUs, and threads, of one worker."""
    return 1 if recipe.actors.cpus == "auto" else recipe.actors.cpus


def _workers(recipe: Recipe) -> list[dict[str, float]]:
    """Return the resources of each worker that trains a model."""
    gpus = recipe.actors.gpus
    return [{"CPU": _cpus(recipe), **({"GPU": gpus} if gpus else {})}] * recipe.finetune.workers_per_model


def _initialization(recipe: Recipe, file: str, progress: ProgressCallback) -> str:
    """Return the checkpoint that all trials start from; make it on all cores of one node if it does not exist yet."""
    if not storage.isfile(file):
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        cpus = max(1, int(min(*nodes, ray.available_resources().get("CPU", 0))))
        folder, run, pretrained = os.getcwd(), identity.RUN, recipe.finetune.pretrained is not None

        def work(threads: int) -> Iterator[tuple[int, int]]:
            torch.set_num_threads(threads)
            look_in(folder)
            identity.in_run(run)
            yield 0, 1  # says that it has started
            if pretrained:
                yield from probe(recipe, file)
            else:
                hyper = cast(Hyperparameters, {**recipe.finetune.trunk.model_dump(), "seed": recipe.finetune.seed})
                yield from train(recipe, hyper, None, file)

        task = ray.remote(num_cpus=cpus, num_gpus=recipe.actors.gpus, max_retries=0)(work)
        what = "fitting the head" if pretrained else "training the trunk"
        progress(what, 0, 1)
        stream: Any = task.options(num_returns="streaming").remote(cpus)
        patience = patience_s(recipe)
        if not ray.wait([stream], timeout=patience)[0]:
            ray.cancel(stream)
            raise not_started(f"{what[0].upper()}{what[1:]}", [{**_workers(recipe)[0], "CPU": cpus}], patience)
        try:
            for news in stream:
                progress(what, *ray.get(news))
        except RayTaskError as error:
            raise error.cause from error
    return file


def _run_trials(
    recipe: Recipe,
    configs: list[Hyperparameters],
    init: str,
    output: Output,
    progress: ProgressCallback,
    *,
    at_once: int,
) -> list[_FineTuned]:
    """Run the trials; return those that succeeded, in the order of `configs`."""
    total, workers = recipe.finetune.trials, recipe.finetune.workers_per_model
    output.state("trials").mkdir(exist_ok=True)
    if output.mirror is not None:  # what the trials write is not here
        write_json(output.state("trials", "begun.json"), {"trials": total})
    cpus, gpus = _cpus(recipe), recipe.actors.gpus
    resources: dict[str, float] = {"cpu": cpus, **({"gpu": gpus} if gpus else {})}
    if workers > 1:  # the trial only waits for its workers, but Tune refuses a trial that needs no resources
        resources = {"cpu": 0, "memory": 1}
    patience = patience_s(recipe)
    trainable = tune.with_resources(_trainable(recipe, init, output.uri_of("state"), patience), resources)
    TrialProgress.report_to(progress, total, patience)
    progress("fine-tuning", 0, total)
    tuner = restored(output.state("tune"), trainable)
    if tuner is None:
        tuner = tune.Tuner(
            trainable,
            param_space={"hyper": tune.grid_search(configs)},
            # Ray Train requests its workers outside the trial's resources, so Tune does not know how many trials fit
            tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=at_once if workers > 1 else None),
            run_config=tune.RunConfig(storage_path=str(output.state()), name="tune", verbose=0, callbacks=[TrialProgress()]),
        )
    found = _successful(tuner.fit(), configs, output.state("failures.json"))
    progress("fine-tuning", total, total)
    return found


def _trainable(recipe: Recipe, init: str, state: str, patience: float) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs for each trial; it trains one model and reports its metrics.

    The trial raises NoRoom if several workers cannot start within `patience` seconds. Its files are below the path or URI
    `state`, which every node sees.
    """
    folder, run, workers = os.getcwd(), identity.RUN, recipe.finetune.workers_per_model

    def trial(config: dict[str, Any]) -> None:
        hyper: Hyperparameters = config["hyper"]
        name = tune.get_context().get_trial_id()
        file = storage.join(state, _checkpoint_of(name))
        if workers == 1:
            torch.set_num_threads(max(1, int(_cpus(recipe))))
            look_in(folder)  # Tune runs trials in another folder
            identity.in_run(run)
        else:
            from ray.train import RunConfig, ScalingConfig
            from ray.train.torch import TorchTrainer

            _check_room(_workers(recipe), patience)
            work = {"recipe": recipe, "hyper": hyper, "init": init, "file": file, "folder": folder, "run": run}
            scaling = ScalingConfig(
                num_workers=workers, use_gpu=bool(recipe.actors.gpus), resources_per_worker=_workers(recipe)[0]
            )
            runs = RunConfig(name=name, **_place_of_train(storage.join(state, "train")))
            TorchTrainer(_train_together, train_loop_config=work, scaling_config=scaling, run_config=runs).fit()
        tune.report(dict(drain(train(recipe, hyper, init, file))))  # after Ray Train, this only reads the metrics

    return trial


def _checkpoint_of(trial: str) -> str:
    """Return the path of a trial's checkpoint below the run's own folder in OUT/state."""
    return f"trials/{trial}.safetensors"


def _place_of_train(place: str) -> dict[str, Any]:
    """Return the options of Ray Train's RunConfig for keeping its files at a path or URI."""
    if not storage.is_remote(place):
        return {"storage_path": place}
    system, path = storage.filesystem(place)
    return {"storage_path": path, "storage_filesystem": system}


def _check_room(workers: list[dict[str, float]], patience: float) -> None:
    """Wait until the cluster has room for these workers: Ray Train would wait forever. Raises NoRoom."""
    group = ray.util.placement_group(workers)
    try:
        if not group.wait(patience):
            raise not_started("A trial", workers, patience)
    finally:
        ray.util.remove_placement_group(group)


def _train_together(work: dict[str, Any]) -> None:
    """Train a model as one of its workers in Ray Train."""
    from ray import train as ray_train

    look_in(work["folder"])
    identity.in_run(work["run"])
    context = ray_train.get_context()
    torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    worker = Worker(context.get_world_rank(), context.get_world_size())
    drain(train(work["recipe"], work["hyper"], work["init"], work["file"], worker))


def _successful(grid: tune.ResultGrid, configs: list[Hyperparameters], failures_file: Path) -> list[_FineTuned]:
    """Return the trials that succeeded, in the order of `configs`, and write the others to `failures_file`.

    Raises SoupError if fewer than two succeeded.
    """
    results = [(cast(Hyperparameters, (result.config or {})["hyper"]), result) for result in results_of(grid)]
    results.sort(key=lambda r: configs.index(r[0]))  # a restored tuner changes the order
    failures: list[FailedTraining] = []
    found: list[_FineTuned] = []
    for hyper, result in results:
        if result.error is not None:
            failures.append({**hyper, "error": str(result.error).strip().splitlines()[-1]})
            continue
        reported = result.metrics or {}
        metrics = cast(TrainingMetrics, {k: reported[k] for k in ("train_loss", "accuracy") if k in reported})
        name = _checkpoint_of(reported["trial_id"])
        found.append(_FineTuned(hyper, metrics, name, reported.get("sha256")))
    write_failures(failures, failures_file)
    if len(found) < 2:
        reason = failures[0]["error"] if failures else "no trial was run"
        raise SoupError(f"{len(failures)} of {len(configs)} fine-tunings failed ({reason}). Fix the cause and rerun.")
    return found

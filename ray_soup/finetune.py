"""Make a zoo of ingredients: one initialisation, then fine-tunings by random search (Ray Tune)."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
import torch
import torch.nn.functional as F
from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.search import BasicVariantGenerator
from safetensors.torch import save_file

from ray_soup import models
from ray_soup.actors import Watch, connect
from ray_soup.checkpoints import sha256_file
from ray_soup.data import batch_positions, load_source
from ray_soup.errors import RecipeError, SoupError
from ray_soup.folder import locked
from ray_soup.recipe import Recipe

T = TypeVar("T")
HYPERPARAMETERS = ("lr", "wd", "epochs", "label_smoothing", "mixup", "shift")


def train(
    recipe: Recipe, hyper: dict[str, Any], init: str | None, seed: int, file: str
) -> Generator[tuple[int, int], None, dict[str, float]]:
    """Train the recipe's model on data.train from the checkpoint `init`, and write its state dict to `file`.

    AdamW, a tenth of the steps of linear warm-up, then a cosine to zero. Yields (epochs done, in all). The value of the
    generator is {"train_loss", and "accuracy" on data.fit where the recipe names it}.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if recipe.actors.gpus else "cpu")
    built = models.build(recipe.model)
    model = built.model.to(device)
    if init is not None:
        models.load_checkpoint(model, init)
    assert recipe.data.train is not None
    loaded = yield from load_source(recipe.data.train, built.preprocess)
    random = np.random.default_rng(seed)
    epochs = int(hyper["epochs"])
    steps_per_epoch = -(-len(loaded.labels) // recipe.finetune.batch_size)
    steps = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=hyper["lr"], weight_decay=hyper["wd"], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    model.train()
    loss_sum = 0.0
    for epoch in range(epochs):
        loss_sum = 0.0
        for positions in batch_positions(len(loaded.labels), recipe.finetune.batch_size, seed, 3, epoch):
            images = torch.from_numpy(loaded.images[positions]).to(device)
            labels = torch.from_numpy(loaded.labels[positions]).to(device)
            if hyper["shift"]:
                images = shifted(images, int(hyper["shift"]), random)
            mix = float(random.beta(hyper["mixup"], hyper["mixup"])) if hyper["mixup"] else 1.0
            if mix < 1.0:
                other = torch.from_numpy(random.permutation(len(labels))).to(device)
                images = mix * images.float() + (1 - mix) * images[other].float()
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=hyper["label_smoothing"])
            if mix < 1.0:
                swapped = F.cross_entropy(logits, labels[other], label_smoothing=hyper["label_smoothing"])
                loss = mix * loss + (1 - mix) * swapped
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(labels)
        yield epoch + 1, epochs
    if not math.isfinite(loss_sum):
        raise SoupError(f"Training diverged with {hyper}.")
    metrics = {"train_loss": loss_sum / len(loaded.labels)}
    if recipe.data.fit is not None:
        held_out = yield from load_source(recipe.data.fit, built.preprocess)
        metrics["accuracy"] = _accuracy(model.eval(), held_out.images, held_out.labels, device)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, file)
    return metrics


def shifted(images: torch.Tensor, most: int, random: np.random.Generator) -> torch.Tensor:
    """Images [n, ..., height, width], each moved by up to `most` pixels; what comes in at the edges is zero."""
    padded = F.pad(images, (most, most, most, most))
    height, width = images.shape[-2:]
    moved = [
        image[..., top : top + height, left : left + width]
        for image, (top, left) in zip(padded, random.integers(0, 2 * most + 1, (len(images), 2)), strict=True)
    ]
    return torch.stack(moved)


def _accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, device: torch.device) -> float:
    correct = 0
    with torch.inference_mode():
        for first in range(0, len(labels), 256):
            logits = model(torch.from_numpy(np.ascontiguousarray(images[first : first + 256])).to(device))
            correct += int((logits.argmax(dim=1).cpu().numpy() == labels[first : first + 256]).sum())
    return correct / len(labels)


def search_space(recipe: Recipe) -> dict[str, Any]:
    """The recipe's distributions as Ray Tune's. Raises RecipeError."""
    space = {name: distribution(f"finetune.{name}", getattr(recipe.finetune, name)) for name in HYPERPARAMETERS}
    space["seed"] = tune.randint(0, 2**31)
    return space


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
    each its hyperparameters, metrics and SHA-256, and is returned. Goes on where a run before this one was stopped."""
    out = Path(out).absolute()
    if recipe.data.train is None:
        raise RecipeError("The recipe names no data.train to fine-tune on.")
    space = search_space(recipe)
    with locked(out):
        manifest = out / "manifest.json"
        if manifest.exists():
            return json.loads(manifest.read_text())
        with connect():
            init = recipe.finetune.init or _trunk(recipe, out / "state" / "init.safetensors", watch)
            with quiet_tune():
                results = _search(recipe, space, init, out / "state", watch)
        entries = []
        for number, (hyper, metrics, file) in enumerate(results):
            target = out / f"model_{number:02d}.safetensors"
            shutil.copyfile(file, target.with_suffix(".tmp"))
            target.with_suffix(".tmp").replace(target)
            entries.append({"file": target.name, **hyper, **metrics, "sha256": sha256_file(str(target))})
        manifest.with_suffix(".tmp").write_text(json.dumps(entries, indent=1))
        manifest.with_suffix(".tmp").replace(manifest)
        shutil.rmtree(out / "state" / "tune", ignore_errors=True)
    return entries


def _trunk(recipe: Recipe, file: Path, watch: Watch) -> str:
    """The initialisation that all trials share, trained on all cores of one node unless it is there."""
    if not file.exists():
        cpus = max(1, int(min(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])))
        folder = os.getcwd()

        def work(threads: int) -> Iterator[tuple[int, int]]:
            torch.set_num_threads(threads)
            models.look_in(folder)
            yield from train(recipe, recipe.finetune.trunk, None, recipe.finetune.seed, f"{file}.tmp")
            os.replace(f"{file}.tmp", file)

        task = ray.remote(num_cpus=cpus, num_gpus=recipe.actors.gpus, max_retries=0)(work)
        try:
            for news in task.options(num_returns="streaming").remote(cpus):
                watch("training the trunk", *ray.get(news))
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


class Progress(tune.Callback):
    """Tells `watch` of finished trials. Tune pickles its callbacks: what cannot be pickled is kept on the class."""

    watch: Watch
    total: int

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watch("fine-tuning", sum(t.is_finished() for t in trials), self.total)


def _search(
    recipe: Recipe, space: dict[str, Any], init: str, state: Path, watch: Watch
) -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    """(hyperparameters, metrics, checkpoint file) of each trial that did not fail, in order."""
    total, folder = recipe.finetune.trials, os.getcwd()
    Progress.watch, Progress.total = staticmethod(watch), total

    def trial(config: dict[str, Any]) -> None:
        import tempfile

        torch.set_num_threads(1)
        models.look_in(folder)
        with tempfile.TemporaryDirectory() as made:
            work = train(recipe, config, init, config["seed"], f"{made}/model.safetensors")
            metrics = yield_from(work)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(made))

    resources = {"cpu": 1, "gpu": recipe.actors.gpus} if recipe.actors.gpus else {"cpu": 1}
    trainable = tune.with_resources(trial, resources)
    experiment = state / "tune"
    watch("fine-tuning", 0, total)
    tuner = None
    if tune.Tuner.can_restore(experiment):
        try:
            tuner = tune.Tuner.restore(str(experiment), trainable, resume_unfinished=True, restart_errored=True)
        except (EOFError, pickle.UnpicklingError):  # killed while the experiment was being set up
            shutil.rmtree(experiment)
    if tuner is None:
        algorithm = BasicVariantGenerator(random_state=recipe.finetune.seed)
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(num_samples=total, search_alg=algorithm, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(state), name="tune", verbose=0, callbacks=[Progress()]),
        )
    results = tuner.fit()
    failed = [r for r in results if r.error is not None]
    if len(results) - len(failed) < 2:
        reason = str(failed[0].error).strip().splitlines()[-1] if failed else "no trial was run"
        raise SoupError(f"{len(failed)} of {total} fine-tunings failed: {reason}")
    watch("fine-tuning", total, total)
    return [
        (r.config, {k: r.metrics[k] for k in ("train_loss", "accuracy") if k in r.metrics},
         os.path.join(r.checkpoint.path, "model.safetensors"))
        for r in results
        if r.error is None and r.checkpoint is not None
    ]  # fmt: skip


def yield_from(work: Generator[Any, None, T]) -> T:
    """The value of a generator, run to its end."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value

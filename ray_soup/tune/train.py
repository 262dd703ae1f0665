"""Train one ingredient, or the initialization that all ingredients share, without Ray.

The optimizer is AdamW, with linear warm-up over a tenth of the steps and cosine decay to zero. Random draws depend only on
the seed, the epoch and the worker, so an interrupted and resumed training run is bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save

from ray_soup.actors.precision import autocast, choose_precision, micro_batch_size
from ray_soup.actors.replica import check_examples
from ray_soup.actors.training import cosine_with_warmup
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import kept, storage
from ray_soup.recipe import Recipe
from ray_soup.soups.records import damaged
from ray_soup.task.attention import FastAttention
from ray_soup.task.data import Examples, batch_positions, load_named
from ray_soup.task.libraries import BuiltModel
from ray_soup.task.models import load_checkpoint
from ray_soup.task.objective import Inputs, has_own_outputs
from ray_soup.task.own_functions import objective_of
from ray_soup.task.preprocess_key import build_for
from ray_soup.tune.augment import Augment, check_augmentation
from ray_soup.tune.records import (
    TRAINING_VERSION,
    FinishedTraining,
    Hyperparameters,
    read_metrics,
    read_training,
    write_metrics,
)

Epochs = Generator[tuple[int, int], None, FinishedTraining]


@dataclass(frozen=True)
class Worker:
    """One of `world` processes that train a model together, each on its part of every batch."""

    rank: int = 0
    world: int = 1


@dataclass
class Training:
    """An unfinished training run: everything that a resumed one needs to be bit-identical."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of finished steps, over all epochs."""
    loss_sum: float = 0.0
    """Sum of this worker's losses over the examples of the last finished epoch."""
    precision: str = ""
    """float32 or bfloat16, once chosen. With `precision: auto` this is measured, and could differ the next time."""

    def save(self, file: str) -> None:
        """Write the state to the path or URI `file` atomically."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "precision": self.precision}
        progress = {"epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum}
        with kept.replacing(file) as stream:
            torch.save({"version": TRAINING_VERSION, **state, **progress}, stream)

    def restore(self, file: str, device: torch.device) -> None:
        """Continue from the state in `file`. Raises RecipeError if it is damaged, or a newer ray_soup wrote it."""
        with kept.local(file) as copy:
            state = read_training(copy, device)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"it is the state of another model: {error}".partition("\n")[0]
            raise damaged(file, reason, f"Remove {file} to train this checkpoint from the start.") from error
        self.epoch, self.step, self.loss_sum = state["epoch"], state["step"], state["loss_sum"]
        self.precision = state.get("precision", "")


@dataclass(frozen=True)
class TrainingSetup:
    """The parts of a training run that stay the same from epoch to epoch: hyperparameters, data and device."""

    hyper: Hyperparameters
    images_of: Augment
    """Returns augmented images for rows."""
    labels: np.ndarray
    """int64 [n]."""
    batch_size: int
    """Number of examples per step, over all workers."""
    worker: Worker
    device: torch.device

    @property
    def epochs(self) -> int:
        """Total number of epochs."""
        return int(self.hyper["epochs"])

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return self.epochs * -(-len(self.labels) // self.batch_size)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.hyper["lr"] * cosine_with_warmup(step, self.steps)


def train(recipe: Recipe, hyper: Hyperparameters, init: str | None, file: str, worker: Worker = Worker()) -> Epochs:
    """Train the recipe's model on data.train and write its state dict to `file`.

    A finished training run leaves its metrics in a .json file next to `file` and is not repeated; an unfinished one leaves
    its state in a .state file and is resumed. Yields (epochs done, total); the value of the generator is the metrics. Raises
    SoupError if the loss becomes non-finite, RecipeError if the augmentation does not fit the data.

    Args:
        recipe: names the model, the data, the batch size and the precision.
        hyper: hyperparameters of this training run.
        init: checkpoint to start from; None: the model's own initialization, drawn from the seed.
        file: path or URI of the .safetensors file to write.
        worker: this process among the workers that train the model together; rank 0 writes the files.
    """
    done_file, state_file = (f"{file.removesuffix('.safetensors')}.{end}" for end in ("json", "state"))
    if storage.isfile(done_file):
        with kept.local(done_file) as record:
            return read_metrics(record)
    assert recipe.data.train is not None
    torch.manual_seed(hyper["seed"])
    device = torch.device("cuda" if recipe.actors.gpus else "cpu")
    built = build_for(recipe)
    model = built.model.to(device)
    if init is not None:
        load_checkpoint(model, init, recipe.ignore)
    examples = yield from load_named(recipe.data, "train", built.preprocess)
    images = _trainable_on(recipe, built, examples, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hyper["lr"], weight_decay=hyper["wd"], fused=True)
    training = Training(model, optimizer)
    if storage.isfile(state_file):
        training.restore(state_file, device)
    check_augmentation(built.preprocess, hyper)
    images_of = Augment(images, hyper, examples.tail)
    setup = TrainingSetup(hyper, images_of, examples.labels, recipe.finetune.batch_size, worker, device)
    if not training.precision:
        training.precision = _shared_precision(recipe, model, setup)
        if worker.rank == 0 and recipe.precision == "auto":
            training.save(state_file)
    running: torch.nn.Module = model
    if worker.world > 1:
        running = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    precision = autocast(training.precision, device)
    while training.epoch < setup.epochs:
        train_epoch(training, running, setup, precision)
        if not math.isfinite(training.loss_sum):
            raise SoupError(f"Training diverged with {hyper}. Lower the learning rate.")
        if worker.rank == 0:
            training.save(state_file)
        yield training.epoch, setup.epochs
    metrics: FinishedTraining = {"train_loss": training.loss_sum * worker.world / len(examples)}
    if worker.rank == 0:
        if recipe.data.fit is not None:
            held_out = yield from load_named(recipe.data, "fit", built.preprocess)
            metrics["accuracy"] = accuracy(model.eval(), held_out, device)
        metrics["sha256"] = write_model(model, file)
        write_metrics(metrics, done_file)
        storage.remove(state_file)
    return metrics


def train_epoch(
    training: Training, running: torch.nn.Module, setup: TrainingSetup, precision: AbstractContextManager[object]
) -> None:
    """Train for one epoch; the result depends only on `training` and `setup`.

    Args:
        training: the run, whose model, optimizer, epoch, step and loss_sum are updated in place.
        running: the module to call in the forward pass: training.model, or its wrapper that averages gradients.
        setup: the parts that stay the same from epoch to epoch.
        precision: context of the forward passes.
    """
    training.model.train()
    seed, worker = setup.hyper["seed"], setup.worker
    random = np.random.default_rng([seed, training.epoch, worker.rank])
    torch.manual_seed(int(random.integers(2**31)))
    training.loss_sum = 0.0
    for positions in batch_positions(len(setup.labels), setup.batch_size, seed, 3, training.epoch):
        for group in training.optimizer.param_groups:
            group["lr"] = setup.lr(training.step)
        training.step += 1
        if len(positions) < worker.world:
            continue
        rows = np.array_split(positions, worker.world)[worker.rank]
        with FastAttention():
            loss = _batch_loss(running, rows, setup, random, precision)
            training.optimizer.zero_grad()
            (loss * worker.world / len(positions)).backward()  # DistributedDataParallel averages the workers' gradients
        training.optimizer.step()
        training.loss_sum += loss.item()
    training.epoch += 1


def _batch_loss(
    running: torch.nn.Module,
    rows: np.ndarray,
    setup: TrainingSetup,
    random: np.random.Generator,
    precision: AbstractContextManager[object],
) -> torch.Tensor:
    """Return the sum of the cross-entropies of the examples `rows`, with mixup (Zhang et al. 2018) if it is on."""
    images = setup.images_of(rows, random).to(setup.device)
    labels = torch.from_numpy(setup.labels[rows]).to(setup.device)
    alpha, smoothing = setup.hyper["mixup"], setup.hyper["label_smoothing"]
    mix = float(random.beta(alpha, alpha)) if alpha else 1.0
    other = torch.from_numpy(random.permutation(len(labels))).to(setup.device)  # also drawn without mixup
    if mix < 1.0:
        images = mix * images.float() + (1 - mix) * images[other].float()
    with precision:
        logits = running(images).float()
    loss = mix * F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
    if mix < 1.0:
        swapped = F.cross_entropy(logits, labels[other], label_smoothing=smoothing, reduction="sum")
        loss = loss + (1 - mix) * swapped
    return loss


def _shared_precision(recipe: Recipe, model: torch.nn.Module, setup: TrainingSetup) -> str:
    """Choose the precision of the forward passes on rank 0 for all workers."""
    parameters = sum(p.numel() for p in model.parameters())
    size = min(setup.batch_size, micro_batch_size(recipe, parameters), len(setup.labels))
    images = setup.images_of(np.arange(size), np.random.default_rng(0)).to(setup.device)
    chosen = [choose_precision(recipe, model.eval(), images)]
    if setup.worker.world > 1:
        torch.distributed.broadcast_object_list(chosen, 0)
    return chosen[0]


def _trainable_on(recipe: Recipe, built: BuiltModel, examples: Examples, device: torch.device) -> np.ndarray:
    """Check that the task is classification, and that the model fits the data; return its inputs. Raises RecipeError."""
    objective = objective_of(recipe, built.objective)
    if objective.name != "classification" or isinstance(examples.images, dict) or has_own_outputs(objective):
        named = recipe.objective if has_own_outputs(objective) else objective.name
        raise RecipeError(
            f"finetune trains classifiers of one input, and this recipe's objective is {named}. Train the "
            "checkpoints with the library's own script, and name them under `ingredients`."
        )
    check_examples(recipe, objective, built.model.eval(), {"train": examples}, device)
    return examples.images


def write_model(model: torch.nn.Module, file: str) -> str:
    """Write the state dict to the path or URI `file` atomically, and return the SHA-256 of the file."""
    data = save({name: t.contiguous() for name, t in model.state_dict().items()})
    storage.write_bytes(data, file)
    return hashlib.sha256(data).hexdigest()


def batches_in_order(examples: Examples, device: torch.device) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Yield all examples in order, as batches (inputs, labels) of up to 256."""
    for first in range(0, len(examples), 256):
        yield examples.batch(np.arange(first, min(first + 256, len(examples))), device)


def accuracy(model: torch.nn.Module, examples: Examples, device: torch.device) -> float:
    """Return the share of examples that the model classifies correctly."""
    correct = 0
    with torch.inference_mode():
        for images, labels in batches_in_order(examples, device):
            correct += int((model(images).argmax(dim=1) == labels).sum())
    return correct / len(examples)

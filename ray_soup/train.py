"""Train one ingredient, or the initialisation that all of them share. No Ray in it.

AdamW, a tenth of the steps of linear warm-up, then a cosine to zero. What is random depends on the seed, the epoch and the
worker alone, so that a training that was stopped goes on with the numbers it would have had.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ray_soup import models
from ray_soup.data import Examples, batch_positions, load_source
from ray_soup.errors import RecipeError, SoupError
from ray_soup.preprocess import Tail, takes
from ray_soup.recipe import Recipe
from ray_soup.shard import autocast, choose_precision, micro_batch_size

Epochs = Generator[tuple[int, int], None, dict[str, float]]


@dataclass(frozen=True)
class Worker:
    """One of `world` that train a model together, each on its part of every batch."""

    rank: int = 0
    world: int = 1


def train(recipe: Recipe, hyper: dict[str, Any], init: str | None, file: Path, worker: Worker = Worker()) -> Epochs:
    """Train the recipe's model on data.train from the checkpoint `init`, and write its state dict to `file`.

    hyper: lr, wd, epochs, label_smoothing, mixup, shift, randaugment, seed. Yields (epochs done, in all). The value of the
    generator is {"train_loss", and "accuracy" on data.fit where the recipe names it}; it is kept in `file`.json, beside
    which nothing is left to do. An unfinished training lies in `file`.state. Raises SoupError where the loss is not finite.
    """
    done_file, state_file = file.with_suffix(".json"), file.with_suffix(".state")
    if done_file.exists():
        return json.loads(done_file.read_text())
    assert recipe.data.train is not None
    torch.manual_seed(hyper["seed"])
    device = torch.device("cuda" if recipe.actors.gpus else "cpu")
    built = models.build(recipe.model)
    model = built.model.to(device)
    if init is not None:
        models.load_checkpoint(model, init)
    loaded = yield from load_source(recipe.data.train, built.preprocess)
    batch_size, epochs = recipe.finetune.batch_size, int(hyper["epochs"])
    steps = epochs * -(-len(loaded.labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=hyper["lr"], weight_decay=hyper["wd"], fused=True)
    epoch = step = 0
    loss_sum, chosen = 0.0, ""
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        epoch, step, loss_sum = state["epoch"], state["step"], state["loss_sum"]
        chosen = state.get("precision", "")

    def keep() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "precision": chosen}
        torch.save({**state, "epoch": epoch, "step": step, "loss_sum": loss_sum}, f"{state_file}.tmp")
        os.replace(f"{state_file}.tmp", state_file)

    if takes(built.preprocess) == "text" and (hyper["mixup"] or hyper["shift"] or hyper["randaugment"]):
        raise RecipeError("finetune: mixup, shift and randaugment are made for images. Set them to 0 for texts.")
    images_of = Augment(loaded.images, hyper, loaded.tail)
    if not chosen:
        some = np.arange(min(batch_size, micro_batch_size(recipe, sum(p.numel() for p in model.parameters())), len(loaded)))
        found = [choose_precision(recipe, model.eval(), images_of(some, np.random.default_rng(0)).to(device))]
        if worker.world > 1:
            torch.distributed.broadcast_object_list(found, 0)
        chosen = found[0]
        if worker.rank == 0 and recipe.precision == "auto":
            keep()  # a measurement: it might fall out otherwise the next time
    precision = autocast(chosen, device)
    running: torch.nn.Module = model
    if worker.world > 1:
        running = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    while epoch < epochs:
        model.train()
        random = np.random.default_rng([hyper["seed"], epoch, worker.rank])
        torch.manual_seed(int(random.integers(2**31)))
        loss_sum = 0.0
        for positions in batch_positions(len(loaded.labels), batch_size, hyper["seed"], 3, epoch):
            factor = min((step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = hyper["lr"] * factor
            step += 1
            if len(positions) < worker.world:
                continue
            mine = np.array_split(positions, worker.world)[worker.rank]
            images, labels = images_of(mine, random).to(device), torch.from_numpy(loaded.labels[mine]).to(device)
            mix = float(random.beta(hyper["mixup"], hyper["mixup"])) if hyper["mixup"] else 1.0
            other = torch.from_numpy(random.permutation(len(labels))).to(device)
            if mix < 1.0:
                images = mix * images.float() + (1 - mix) * images[other].float()
            with precision:
                logits = running(images).float()
            loss = mix * F.cross_entropy(logits, labels, label_smoothing=hyper["label_smoothing"], reduction="sum")
            if mix < 1.0:
                swapped = F.cross_entropy(logits, labels[other], label_smoothing=hyper["label_smoothing"], reduction="sum")
                loss = loss + (1 - mix) * swapped
            optimizer.zero_grad()
            (loss * worker.world / len(positions)).backward()  # the workers' gradients are averaged
            optimizer.step()
            loss_sum += loss.item()
        epoch += 1
        if not math.isfinite(loss_sum):
            raise SoupError(f"Training diverged with {hyper}.")
        if worker.rank == 0:
            keep()
        yield epoch, epochs
    metrics = {"train_loss": loss_sum * worker.world / len(loaded.labels)}
    if worker.rank == 0:
        if recipe.data.fit is not None:
            held_out = yield from load_source(recipe.data.fit, built.preprocess)
            metrics["accuracy"] = _accuracy(model.eval(), held_out, device)
        write_model(model, file)
        done_file.write_text(json.dumps(metrics))
        state_file.unlink(missing_ok=True)
    return metrics


def write_model(model: torch.nn.Module, file: Path) -> None:
    """The state dict, whole or not at all."""
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, f"{file}.tmp")
    os.replace(f"{file}.tmp", file)


class Augment:
    """Images of a source by their rows, each distorted, prepared by `tail` and moved, as the hyperparameters shift and
    randaugment say."""

    def __init__(self, images: np.ndarray, hyper: dict[str, Any], tail: Tail | None = None) -> None:
        self.images, self.tail, self.shift, self.randaugment = images, tail, int(hyper["shift"]), None
        if hyper["randaugment"]:
            from torchvision.transforms import v2

            shape = images.shape[1:]
            if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, 3)):
                raise RecipeError(
                    f"finetune.randaugment distorts images of [height, width] or [1 or 3, height, width]; these are "
                    f"{list(shape)}. Set it to 0."
                )
            self.randaugment = v2.RandAugment(magnitude=int(hyper["randaugment"]))
            some = images[:1024]  # floats are normalised somehow: brought to 8 bits between their extremes and back
            self.low, self.high = (0.0, 255.0) if images.dtype == np.uint8 else (float(some.min()), float(some.max()))

    def __call__(self, rows: np.ndarray, random: np.random.Generator) -> torch.Tensor:
        images = torch.from_numpy(np.ascontiguousarray(self.images[rows]))
        if self.randaugment is not None:
            images = self._distorted(images)
        if self.tail is not None:
            images = self.tail(images)
        return shifted(images, self.shift, random) if self.shift else images

    def _distorted(self, images: torch.Tensor) -> torch.Tensor:
        scale = (self.high - self.low) / 255 or 1.0
        pixels = ((images.float() - self.low) / scale).round().clamp(0, 255).to(torch.uint8)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        assert self.randaugment is not None
        pixels = torch.stack([self.randaugment(image) for image in pixels]).view(images.shape)
        return pixels if images.dtype == torch.uint8 else (pixels.float() * scale + self.low).to(images.dtype)


def shifted(images: torch.Tensor, most: int, random: np.random.Generator) -> torch.Tensor:
    """Images [n, ..., height, width], each moved by up to `most` pixels; what comes in at the edges is zero."""
    padded = F.pad(images, (most, most, most, most))
    height, width = images.shape[-2:]
    moved = [
        image[..., top : top + height, left : left + width]
        for image, (top, left) in zip(padded, random.integers(0, 2 * most + 1, (len(images), 2)), strict=True)
    ]
    return torch.stack(moved)


def probe(recipe: Recipe, file: Path) -> Generator[tuple[int, int], None, None]:
    """A pretrained model and a new head: the linear layer that it lacks, made of class names, or fitted to its features of
    data.train (logistic regression with an L2 penalty, by L-BFGS). Writes the state dict to `file`. Yields (images seen, in
    all)."""
    assert recipe.data.train is not None
    assert recipe.finetune.pretrained is not None
    torch.manual_seed(recipe.finetune.seed)
    device = torch.device("cuda" if recipe.actors.gpus else "cpu")
    built = models.build(recipe.model)
    model = built.model.to(device).eval()
    head = models.load_pretrained(model, recipe.model, recipe.finetune.pretrained)
    if recipe.finetune.class_names is not None:
        options = recipe.finetune
        models.fill_zero_shot(head, recipe.model, options.pretrained, options.class_names, options.templates)
        write_model(model, file)
        return
    loaded = yield from load_source(recipe.data.train, built.preprocess)
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float()))
    with torch.inference_mode():
        for images, _ in _in_order(loaded, device):
            model(images)
            yield sum(map(len, seen)), len(loaded)
    hook.remove()
    features, labels = torch.cat(seen).clone(), torch.from_numpy(loaded.labels).to(device)
    if features.shape != (len(loaded), head.in_features):
        raise RecipeError(
            f"finetune.pretrained: the new layer is fed {list(features.shape[1:])} for each image; a linear probe needs "
            f"[{head.in_features}]. Give finetune.init, a whole checkpoint, instead."
        )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 0.5 * recipe.finetune.probe_wd * head.weight.square().sum()
        loss = F.cross_entropy(head(features), labels) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    write_model(model, file)


def _in_order(examples: Examples, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for first in range(0, len(examples), 256):
        yield examples.batch(np.arange(first, min(first + 256, len(examples))), device)


def _accuracy(model: torch.nn.Module, examples: Examples, device: torch.device) -> float:
    correct = 0
    with torch.inference_mode():
        for images, labels in _in_order(examples, device):
            correct += int((model(images).argmax(dim=1) == labels).sum())
    return correct / len(examples)

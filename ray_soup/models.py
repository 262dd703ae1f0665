"""Build the model that a recipe names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import torch

from ray_soup.blocks import Layout, layout_of
from ray_soup.checkpoints import open_ingredient
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.preprocess import Preprocess, identity
from ray_soup.recipe import is_function


@dataclass(frozen=True)
class Built:
    """A model that maps a batch of images, or texts, to logits [n, classes], and what turns one of them into its input."""

    model: torch.nn.Module
    preprocess: Preprocess | None = None


class ImageClassifier(torch.nn.Module):
    """The image tower of an open_clip model and a linear head on its features."""

    def __init__(self, visual: torch.nn.Module, features: int, classes: int):
        super().__init__()
        self.visual = visual
        self.head = torch.nn.Linear(features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.visual(images))


def look_in(folder: str) -> None:
    """Find `module:function` in this folder too: a worker's current folder need not be its driver's."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def import_function(spec: str) -> Callable[..., Any]:
    """`package.module:function`, looked for in the current folder too. Raises RecipeError."""
    module_name, _, name = spec.partition(":")
    look_in(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise RecipeError(
            f"{spec}: the module {module_name} cannot be imported ({error}). It must lie in the current folder, the "
            "working directory of the job, or be installed."
        ) from error
    except AttributeError:
        raise RecipeError(f"{spec}: the module {module_name} has no '{name}'.") from None


def build(spec: str) -> Built:
    """The model that `spec` names, its numbers yet to be filled in. Raises RecipeError."""
    if spec.startswith("open_clip:"):
        return _open_clip(spec)
    if is_function(spec):
        built = import_function(spec)()
        if isinstance(built, torch.nn.Module):
            return Built(built)
        if isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], torch.nn.Module):
            return Built(*built)
        raise RecipeError(f"{spec} returned {type(built).__name__}; expected a model, or a model and its preprocessing.")
    raise RecipeError(f"model: {spec!r} found; expected open_clip:NAME?classes=N, or package.module:function.")


def _open_clip(spec: str) -> Built:
    import open_clip

    name, _, query = spec.removeprefix("open_clip:").partition("?")
    options = dict(parse_qsl(query))
    if not options.get("classes", "").isdigit() or set(options) != {"classes"}:
        raise RecipeError(f"model: {spec!r} found; expected the number of classes, as in open_clip:{name}?classes=1000.")
    config = open_clip.get_model_config(name)
    if config is None:
        raise RecipeError(f"model: open_clip has no '{name}'. `python -c 'import open_clip; "
                          "print(open_clip.list_models())'` lists what it has.")  # fmt: skip
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # that no pretrained weights were loaded: the ingredients bring theirs
    try:
        clip = open_clip.create_model(name, pretrained=None)
    finally:
        logging.disable(before)
    visual = clip.visual
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(visual.image_size, is_train=False, mean=mean, std=std)
    return Built(ImageClassifier(visual, config["embed_dim"], int(options["classes"])), preprocess)


def fingerprint(spec: str, built: Built) -> str:
    """SHA-256 of the model's structure and preprocessing, and of the file that its function lies in."""
    digest = hashlib.sha256(f"{spec}\n{built.model}\n{identity(built.preprocess)}".encode())
    if is_function(spec):
        with contextlib.suppress(OSError, TypeError):
            digest.update(inspect.getsource(sys.modules[spec.partition(":")[0]]).encode())
    return digest.hexdigest()


def load_checkpoint(model: torch.nn.Module, path: str) -> None:
    """Fill in the numbers of `model`, in place, from the checkpoint at `path`. Raises IngredientError if it does not fit."""
    layout = layout_of(model)
    checkpoint = open_ingredient(path)
    if not checkpoint.match(layout.state_shapes, layout.tied):
        missing = sorted(set(layout.state_shapes) - set(checkpoint.tensors))[:3]
        raise IngredientError(f"{path} does not fit the model: it lacks {missing}.")
    state = model.state_dict()
    with torch.no_grad():
        for name, shape in layout.state_shapes.items():
            state[name].copy_(checkpoint.read(name).view(shape))


def load_pretrained(model: torch.nn.Module, spec: str, source: str) -> torch.nn.Linear:
    """Fill in the numbers of `model`, in place, from a checkpoint that lacks its last linear layer, or whose layer has
    other classes; returns that layer. `source`: a file, or `open_clip:TAG` for weights that open_clip knows by name. What
    else is in the checkpoint (a text tower) is left. Raises RecipeError where more than one linear layer would be new."""
    state = model.state_dict()
    if source.startswith("open_clip:") and spec.startswith("open_clip:"):
        import open_clip

        name = spec.removeprefix("open_clip:").partition("?")[0]
        clip = open_clip.create_model(name, pretrained=source.removeprefix("open_clip:"))
        given = {f"visual.{key}": value for key, value in clip.visual.state_dict().items()}
    else:
        checkpoint = open_ingredient(source)
        given = {name: checkpoint.read(name).view(info.shape) for name, info in checkpoint.tensors.items() if name in state}
    new = [name for name, tensor in state.items() if name not in given or given[name].shape != tensor.shape]
    layers = sorted({name.rpartition(".")[0] for name in new})
    head = dict(model.named_modules()).get(layers[0]) if len(layers) == 1 else None
    if not isinstance(head, torch.nn.Linear):
        raise RecipeError(
            f"finetune.pretrained: {source} should hold all of the model {spec} but one linear layer, its head; it "
            + (f"lacks {len(new)} tensors: {', '.join(new[:4])}." if new else "lacks none: name it as finetune.init.")
        )
    with torch.no_grad():
        for name, tensor in state.items():
            if name not in new:
                tensor.copy_(given[name])
    return head


def describe(spec: str) -> Layout:
    """The layout of the model that `spec` names, without its numbers where the model can be built so."""
    try:
        with torch.device("meta"):
            return layout_of(build(spec).model)
    except RecipeError:
        raise
    except Exception:  # some models need real numbers to be built
        return layout_of(build(spec).model)

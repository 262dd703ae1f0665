"""What a recipe computes, from shapes alone: the size of its model, and the work of a pass over one example.

The model is built without memory, on PyTorch's meta device; a pass over it runs no arithmetic but has the shapes of one.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ray_soup.errors import RecipeError, SoupError, first_line
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.recipe import RESERVED_NAMES, Recipe, is_function
from ray_soup.task.arrays import check_npz
from ray_soup.task.empty_models import build_empty
from ray_soup.task.functions import as_in_workers
from ray_soup.task.libraries import BuiltModel
from ray_soup.task.models import call_as, objective_in
from ray_soup.task.objective import Inputs, Objective
from ray_soup.task.own_functions import objective_of
from ray_soup.task.preprocess import input_kind
from ray_soup.task.preprocess_key import build_for
from ray_soup.task.raw_examples import Source
from ray_soup.task.sources import count_examples
from ray_soup.task.tokenizing import DEFAULT_LENGTH, Tokenizing, takes_rows

SOME = 8  # examples in the larger of the two passes that are counted
COUNT = re.compile(r"(?P<spec>.*)\?K=(?P<count>[1-9][0-9]{0,5})")
"""Ingredients that do not exist yet: zoo/*.safetensors?K=72."""


@dataclass(frozen=True)
class Work:
    """The work of forward and backward passes over n examples in the dtype of the model, as fixed + each * n."""

    layout: Layout
    flops: float
    """Floating-point operations of a forward pass over one example."""
    forward_bytes: tuple[float, float]
    """Bytes that the operations of a forward pass read and write: fixed, and of each example."""
    step_bytes: tuple[float, float]
    """The same for a forward and backward pass."""
    operations: tuple[int, int]
    """Operations of a forward pass, and of a forward and backward pass."""
    saved: float
    """Bytes that a forward pass keeps of one example for the backward pass."""


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that move data, and the bytes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it unless its result is a view of an input."""
        out = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if not operation.is_view:
            self.nbytes += sum(t.numel() * t.element_size() for t in tensors)
            self.operations += 1
        return out


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Let models switch autocast off on the meta device, for which PyTorch has none; Transformers before 5 do."""
    autocast = torch.autocast

    def without_meta(device_type: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = without_meta  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _passes(model: torch.nn.Module, inputs: Inputs, objective: Objective) -> tuple[float, int, int, int, int, int]:
    """Return FLOP, bytes and operations of a forward pass, bytes and operations with the backward pass, and bytes kept."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    with _no_autocast(), FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = objective.outputs(model, inputs)
        forward = counter.get_total_flops(), traffic.nbytes, traffic.operations
        torch.autograd.backward(outputs.float().sum())
    return *forward, traffic.nbytes, traffic.operations, sum(nbytes for nbytes, _ in kept.values())


def count_work(recipe: Recipe) -> Work:
    """Count the work of a recipe's passes on shapes alone. Raises RecipeError if its model or its data do not allow that."""
    with as_in_workers():
        built = build_empty(partial(build_for, recipe), torch.device("meta"))
        layout = layout_of(built.model)
        model, example = built.model.to("meta").eval(), example_of(recipe, built)
        objective = objective_of(recipe, built.objective)
        call_as(objective, model)
        try:
            one, some = (_passes(model, repeated(example, n, "meta"), objective) for n in (1, SOME))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            raise RecipeError(
                f"model: {recipe.model} cannot be planned from shapes: {type(error).__name__}: {first_line(error)}. Use "
                "ray-soup plan without --cluster, on a machine with its checkpoints and data."
            ) from error

    def line(at: int) -> tuple[float, float]:
        each = (some[at] - one[at]) / (SOME - 1)
        return max(0.0, one[at] - each), each

    return Work(layout, one[0], line(1), line(3), (some[2], some[4]), line(5)[1])


def example_of(recipe: Recipe, built: BuiltModel) -> Inputs:
    """Return one example as the model takes it, [1, ...]: of a local .npz file, or what its preprocessing makes.

    Raises RecipeError if the shape of an example cannot be known.
    """
    fit = recipe.data.fit
    if fit is not None and fit.endswith(".npz") and os.path.isfile(fit):
        inputs = check_npz(Source("data.fit", fit, _targets_of(recipe)), fit).arrays
        if isinstance(inputs, dict):
            return {name: torch.from_numpy(array[:1].copy()) for name, array in inputs.items()}
        return torch.from_numpy(np.asarray(inputs)[:1].copy())
    if built.preprocess is None or (fit is not None and is_function(fit)):
        raise RecipeError(
            f"plan --cluster: the shape of an example is not known: {recipe.model} has no preprocessing that shows it, and "
            f"data.fit ({fit}) is not an .npz file on this machine. Set data.fit to one; a single example is enough."
        )
    if isinstance(built.preprocess, Tokenizing) and takes_rows(built.preprocess):
        length, dtype = min(built.preprocess.length, DEFAULT_LENGTH), next(built.model.parameters()).dtype
        mask = torch.zeros(1, 1, length, length, dtype=dtype)  # of another shape, its values would decide what is computed
        return {"input_ids": torch.ones(1, length, dtype=torch.int64), "attention_mask": mask}
    if input_kind(built.preprocess) == "text":
        made = built.preprocess("word " * 4096)
    else:
        from PIL import Image

        made = built.preprocess(Image.new("RGB", (640, 480)))
    if isinstance(made, dict):
        return {name: torch.as_tensor(value)[None] for name, value in made.items()}
    return torch.as_tensor(made)[None]


def repeated(example: Inputs, count: int, device: str) -> Inputs:
    """Return `count` copies of an example [1, ...] on a device."""
    if isinstance(example, dict):
        return {name: value.repeat_interleave(count, 0).to(device) for name, value in example.items()}
    return example.repeat_interleave(count, 0).to(device)


def ingredients_of(recipe: Recipe, count: int | None) -> int | list[Ingredient]:
    """Return the number of ingredients as stated, or the opened files. Raises RecipeError or IngredientError."""
    stated = isinstance(recipe.ingredients, str) and COUNT.fullmatch(recipe.ingredients)
    if count is None and stated:
        count = int(stated["count"])
    if count is not None:
        return count
    with _adding("For a plan without checkpoints, state their number as --ingredients N."):
        return open_ingredients(recipe.ingredients, RESERVED_NAMES, [])


def sizes_of(recipe: Recipe, examples: int | None) -> dict[str, int]:
    """Return the number of examples of each source: as stated, or of the files on this machine. Raises RecipeError."""
    if examples is not None:
        return dict.fromkeys({"fit": "", **recipe.data.sources()}, examples)
    if recipe.data.fit is None:
        raise RecipeError("plan --cluster: the recipe has no data.fit, so its size is not known. Add --examples N.")
    with _adding("For a plan without data, state the number of examples as --examples N."):
        return count_examples(recipe.data, _targets_of(recipe))


def _targets_of(recipe: Recipe) -> str:
    """Return the kind of targets that a recipe's data have."""
    return objective_of(recipe, objective_in(recipe.model)).targets


@contextlib.contextmanager
def _adding(advice: str) -> Iterator[None]:
    """Add to the message of an error what else can be done."""
    try:
        yield
    except SoupError as error:
        raise type(error)(f"{error} {advice}") from error

"""The model of one actor, with its data, loss and buffers.

The parameters of the model are views of one flat vector `theta`, and their gradients are views of `gradient`: the model
computes with whatever is written into the vector. Parameters in bfloat16, which `dtype=bfloat16` asks for, follow it:

    weights = round(theta)          after theta has changed
    gradient += dL/dweights         in float32, in each backward pass
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial

import numpy as np
import torch

from ray_soup.actors.by_layer import ByLayer
from ray_soup.actors.messages import Heartbeat
from ray_soup.actors.precision import micro_batch_size
from ray_soup.errors import RecipeError
from ray_soup.io.cache import content_key
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import labelled
from ray_soup.mixing.blocks import Layout, flatten, layout_of
from ray_soup.mixing.buffers import differing_layers
from ray_soup.mixing.recalibration import summed
from ray_soup.mixing.running_statistics import Statistics, Sums
from ray_soup.mixing.spectral import update_singular_vectors
from ray_soup.recipe import Recipe, is_function
from ray_soup.task import models
from ray_soup.task.data import Examples, Split, check_model_names, load_sources
from ray_soup.task.empty_models import build_empty
from ray_soup.task.functions import import_function
from ray_soup.task.libraries import BuiltModel
from ray_soup.task.logits import hold_back, sampled
from ray_soup.task.model_spec import in_bfloat16
from ray_soup.task.objective import OBJECTIVES, Inputs, Objective, has_own_outputs
from ray_soup.task.own_functions import loss_of, metric_of, objective_of
from ray_soup.task.peft_models import with_adapters
from ray_soup.task.preprocess import preprocess_identity
from ray_soup.task.preprocess_key import build_for, model_of


class Replica:
    """A model in eval mode on `device`, its vectors, its examples, its loss and its metric.

    `load_replica` builds it, `allocate` creates the parameter vector, and `hold_gradients` the gradient.
    """

    def __init__(
        self,
        recipe: Recipe,
        built: BuiltModel,
        layout: Layout,
        examples: dict[str, Examples],
        device: torch.device,
        ingredients: Sequence[Ingredient] = (),
    ) -> None:
        self.recipe, self.built, self.layout, self.examples, self.device = recipe, built, layout, examples, device
        self.ingredients = ingredients
        self.model = built.model
        self.theta = self.gradient = torch.empty(0)
        self.weights: torch.Tensor | None = None
        self.layers: ByLayer | None = None
        self.objective = objective_of(recipe, built.objective)
        outputs, targets = check_examples(recipe, self.objective, self.model, examples, device)
        if has_own_outputs(self.objective):
            for some in examples.values():
                self._check_rows(some)
        at = self.objective.classes_at
        self.classes = None if at is None else outputs.shape[at]
        self.loss = loss_of(recipe, self.objective, outputs, targets)
        self.metric = metric_of(recipe, self.objective, outputs, targets)
        frozen = getattr(self.model, "frozen_numel", 0)  # the base of adapters
        self.micro_batch = micro_batch_size(recipe, self.layout.numel + frozen, _most_outputs(outputs, examples))
        self._mixed_buffers: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._prefetch = ThreadPoolExecutor(1)

    def fingerprint(self, outside: list[str] | None = None) -> str:
        """Hash the model's structure and the source files of its function and of the metric.

        `outside` receives the names of what cannot be identified.
        """
        found = models.fingerprint(model_of(self.recipe), self.built, outside)
        found += self.objective.name if self.objective.name != "classification" else ""
        for spec in (self.recipe.metric, self.recipe.objective):
            if spec is not None and is_function(spec):
                found += content_key(preprocess_identity(import_function(spec), outside))
        return found

    @property
    def computing(self) -> torch.nn.Module:
        """The module with the layers of the model: the model itself, but for adapters their base with them in it."""
        found: torch.nn.Module = getattr(self.model, "computing", self.model)
        return found

    def outputs(self, inputs: Inputs) -> torch.Tensor:
        """Return the outputs of the model for a batch, as the objective says: [n, ...]."""
        return self.objective.outputs(self.model, inputs)

    def _check_rows(self, examples: Examples) -> None:
        """Check that the objective's own `outputs` for an example are the same among others. Raises RecipeError."""
        count = min(3, len(examples))
        with torch.inference_mode():
            alone, among = (self.outputs(examples.batch(np.arange(n), self.device)[0]).float() for n in (1, count))
        own = f"objective: the outputs of {type(self.objective).__name__}"
        cure = "Return one row for each example, computed from its own inputs only."
        if len(among) != count:
            raise RecipeError(f"{own} have {len(among)} rows for {count} examples of {examples.spec}. {cure}")
        if among.shape[1:] != alone.shape[1:]:  # texts are padded to the longest
            return
        change, largest = (t.nan_to_num().abs().amax().item() for t in (among[:1] - alone, alone))
        if change > 0.05 * largest:  # a model in bfloat16 rounds differently for another number of rows
            raise RecipeError(
                f"{own} for the first example of {examples.spec} change by up to {change:.3g}, of {largest:.3g}, if they "
                f"are computed for {count} examples at once. {cure}"
            )

    # Vectors

    def split(self, threads: int) -> None:
        """Compute the parameters layer by layer, on `threads` threads, and hold few of them. Raises RecipeError."""
        self.layers = ByLayer(self.model, self.layout, self.device, threads, self.recipe.model)

    def allocate(self, padded: int) -> None:
        """Make the parameters views of a new vector of `padded` zeros, or of its copy in bfloat16."""
        self.theta = torch.zeros(padded, device=self.device)
        if in_bfloat16(self.recipe.model):
            self._hold_weights()
        flatten(self.model, self.theta, None, self.layout, self.weights)

    def _hold_weights(self) -> None:
        """Prepare the copy of theta in bfloat16, and let gradients in bfloat16 be added to `gradient`."""
        parameters = dict(self.model.named_parameters())
        for name, start, stop in self.layout.spans():
            if parameters[name].dtype == torch.bfloat16:
                hook = partial(self._widen, start, stop)
                parameters[name].requires_grad_().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self.weights = torch.zeros(0, dtype=torch.bfloat16)
        if self.weights is not None:
            self.weights = torch.zeros(self.layout.numel, dtype=torch.bfloat16, device=self.device)

    def _widen(self, start: int, stop: int, parameter: torch.Tensor) -> None:
        """Add the gradient of a parameter in bfloat16 to `gradient`, if that is held."""
        if len(self.gradient):
            assert parameter.grad is not None
            self.gradient[start:stop] += parameter.grad.reshape(-1)
            parameter.grad = None

    def theta_changed(self) -> None:
        """Recompute what the model has of theta: weights in bfloat16, and buffers that are functions of the parameters."""
        self.round_weights()
        update_singular_vectors(self.model, self.layout.spectral)

    def round_weights(self) -> None:
        """Round theta to the weights in bfloat16, if there are any."""
        if self.weights is not None:
            self.weights.copy_(self.theta[: self.layout.numel])

    def hold_gradients(self, variant: np.ndarray) -> None:
        """Make the gradients views of one vector as long as `theta`, for the tensors that differ between ingredients.

        Args:
            variant: bool [tensors]; False where a tensor needs no gradient.
        """
        if len(self.gradient) != len(self.theta):
            self.gradient = torch.zeros(len(self.theta), device=self.device)
        parameters = dict(self.model.named_parameters())
        for name, moves in zip(self.layout.names, variant, strict=True):
            parameters[name].requires_grad_(bool(moves))
        flatten(self.model, self.theta, self.gradient, self.layout, self.weights)

    def drop_gradients(self) -> None:
        """Free the vector of `hold_gradients`."""
        self.gradient = torch.empty(0)
        for parameter in self.model.parameters():
            parameter.grad = None

    def set_parameters(self, vector: np.ndarray) -> None:
        """Copy a parameter vector, float32 [N], into the model."""
        if self.layers is not None:
            self.layers.use_vector(tensor_of(vector))
            return
        self.theta[: self.layout.numel] = tensor_of(vector)
        self.theta_changed()

    def load_file(self, path: str) -> None:
        """Set parameters and buffers to those of the checkpoint at `path`. Raises IngredientError if it does not fit."""
        if self.layers is None:
            models.load_checkpoint(self.model, path, self.recipe.ignore)
            return
        checkpoint = models.fitting(self.layout, path, self.recipe.ignore)
        models.copy_tensors(checkpoint, self.model, self.layout.buffers)
        self.layers.use_tensors(lambda name, numel: checkpoint.read(name))
        checkpoint.close()

    def output_layer(self) -> tuple[str, ...]:
        """Find the parameters that double the logits when they are doubled; empty if there are none.

        They belong to one module and have a dimension as long as the number of classes. Later modules are tried first.
        """
        if self.classes is None:
            return ()
        modules = [name for name, module in self.model.named_modules() if any(True for _ in module.parameters(False))]
        images, _ = next(iter(self.examples.values())).batch(np.zeros(1, np.int64), self.device)
        with torch.no_grad():
            logits = sampled(self.outputs(images))
            for module in reversed(modules):
                prefix = f"{module}." if module else ""
                names = [
                    name
                    for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
                    if name.startswith(prefix) and "." not in name[len(prefix) :] and self.classes in shape
                    if self.layers is None or self.layers.holds(name)
                ]
                if not names:
                    continue
                parameters = [self.model.get_parameter(name) for name in names]
                for parameter in parameters:
                    parameter.mul_(2)
                doubled = torch.allclose(sampled(self.outputs(images)), 2 * logits, rtol=1e-4, atol=1e-6)
                for parameter in parameters:
                    parameter.div_(2)
                if doubled:
                    return tuple(names)
        return ()

    # Buffers

    def set_mixed_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Set the mixed buffers of the ingredients whose directions are open; `use` copies them into the model."""
        self._mixed_buffers = {name: buffer.to(self.device) for name, buffer in buffers.items()}

    def use(self, statistics: Statistics) -> None:
        """Copy the mixed buffers into the model, as `bake` writes them, except for these running statistics."""
        self._buffers = {**self._mixed_buffers, **{name: tensor_of(values) for name, values in statistics.items()}}
        self.restore_buffers()

    def restore_buffers(self) -> None:
        """Copy the buffers that `use` set back into the model, after a file was loaded; also the base of adapters."""
        getattr(self.model, "restore", lambda: None)()
        self.copy_buffers(self._buffers)

    def copy_buffers(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Copy these buffers into the model until `restore_buffers`."""
        state = self.model.state_dict()
        for name, buffer in buffers.items():
            state[name].copy_(buffer.view(state[name].shape))

    @cached_property
    def recalibrated(self) -> tuple[str, ...]:
        """The layers whose running statistics are re-estimated: those that differ between ingredients, or all."""
        if self.recipe.buffers == "recalibrate" or not self.ingredients:
            return self.layout.tracking
        return differing_layers(self.ingredients, self.layout.tracking, self.layout.buffers)

    def sum_statistics(self, batches: Sequence[Split]) -> Generator[Heartbeat, None, Sums]:
        """Sum the running statistics of the model over `batches`, in float64.

        The buffers of the model contain meaningless values afterwards: call `restore_buffers` or `copy_buffers`.
        """

        def images_of(split: Split) -> Inputs:
            return self.examples[split.source].batch(split.rows, self.device)[0]

        return (
            yield from labelled("recalibrating", summed(self.model, batches, images_of, self.recalibrated, self.outputs))
        )

    # Examples

    def micro_batches(self, split: Split) -> Iterator[tuple[Inputs, torch.Tensor]]:
        """Yield inputs and targets of `split`, one micro-batch at a time; the next one loads while this one is used."""
        batch = self.examples[split.source].batch
        parts = [split.rows[first : first + self.micro_batch] for first in range(0, len(split), self.micro_batch)]
        coming = self._prefetch.submit(batch, parts[0], self.device) if len(parts) > 1 else None
        for number, rows in enumerate(parts):
            found = batch(rows, self.device) if coming is None else coming.result()
            if number + 1 < len(parts):
                coming = self._prefetch.submit(batch, parts[number + 1], self.device)
            yield found

    def pieces(self, split: Split) -> Iterator[Split]:
        """Cut a split into pieces of a few micro-batches: the work between two heartbeats."""
        size = 8 * self.micro_batch
        for first in range(0, len(split), size):
            yield Split(split.source, split.rows[first : first + size])


def _most_outputs(outputs: torch.Tensor, examples: Mapping[str, Examples]) -> int:
    """Return how many numbers a model returns for one example at most, from what it returned for the first of a source."""
    of_tokens = [e.lengths for e in examples.values() if e.lengths is not None]
    if not of_tokens or outputs.ndim < 3:
        return outputs.numel()
    return outputs.numel() // outputs.shape[1] * int(max(lengths.max(initial=1) for lengths in of_tokens))


def check_examples(
    recipe: Recipe, objective: Objective, model: torch.nn.Module, examples: Mapping[str, Examples], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check that a model in eval mode can process the first example of each source, and that its targets suit it.

    Returns the outputs float [1, ...] and the targets [1, ...] of an example. Raises RecipeError.
    """
    if not examples:
        raise RecipeError("The recipe has no data. Add `data:` with fit and test.")
    for some in examples.values():
        inputs, targets = some.batch(np.zeros(1, np.int64), device)
        outputs = models.outputs_of(model, inputs, targets, objective, recipe.model, some.spec)
        if objective.classes_at is not None and objective.targets in ("classes", "units", "pixels"):
            some.check_labels(outputs.shape[objective.classes_at], objective.targets)
        check_model_names(some, getattr(getattr(model, "config", None), "id2label", None))
    return outputs.float(), targets


def load_replica(
    recipe: Recipe, device: torch.device, ingredients: Sequence[Ingredient] = ()
) -> Generator[Heartbeat, None, Replica]:
    """Build the model and decode the data. The value of the generator is the Replica.

    Raises RecipeError if model and data do not fit together.
    """
    built = build_empty(partial(build_for, recipe), device) if recipe.actors.by_layer else build_for(recipe)
    objective = objective_of(recipe, built.objective)
    models.call_as(objective, built.model)
    built = with_adapters(built, ingredients)
    built.model.to(device).eval()
    layout = layout_of(built.model)

    def check(first: dict[str, Examples]) -> None:
        check_examples(recipe, objective, built.model, first, device)

    if recipe.loss is recipe.metric is None and type(objective) is OBJECTIVES.get(built.objective):
        hold_back(built.model, device)  # functions of the user get all logits
    examples = yield from load_sources(recipe.data, built.preprocess, check, objective.targets)
    return Replica(recipe, built, layout, examples, device, ingredients)


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """Return a tensor that shares the array's memory, without torch's warning about read-only arrays: it is only read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)

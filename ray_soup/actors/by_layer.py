"""A model whose parameters are computed layer by layer, so that memory does not grow with the number of its layers.

    forward    before a layer runs, its parameters are computed:  theta = center + sum of x d, for this layer; then freed
    backward   the layer runs once more with them; once its gradient is complete, it is projected and freed

The layers are the repeated layers of the model (checkpointing.repeated_layers). All other parameters, such as embeddings and
the head, are held, with their gradient. The parameters of a layer that does not run are NaN, so that a model which uses them
elsewhere has a loss that is not finite, which is an error.

Parameters come from a source: the coordinates, or a parameter vector, which for a checkpoint or a mixture is on the disk.
They are float32; those that the model has in bfloat16, as `dtype=bfloat16` asks for, are rounded, and their gradients are
added up in float32.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from ray_soup.errors import RecipeError
from ray_soup.io.cache import cache_folder
from ray_soup.io.check import common_dtype
from ray_soup.io.disk import writing
from ray_soup.io.formats import dtype_of
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.blocks import Layout, Partition
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.hyperplane import Hyperplane
from ray_soup.task.attention import FastAttention
from ray_soup.task.checkpointing import repeated_layers
from ray_soup.task.model_spec import in_bfloat16

M_MMAP_THRESHOLD = -3  # of mallopt in glibc
HELD = -1
"""The number of what is held, beside those of the layers."""


@dataclass
class Span:
    """Consecutive tensors of the parameter vector that belong to one layer."""

    layer: int
    """Number of the layer, or HELD."""
    low: int
    """First parameter."""
    high: int
    """End (excluded)."""
    tensors: list[tuple[str, torch.nn.Parameter, int, int]] = field(default_factory=list)
    """Name, parameter, start and stop, counted from `low`."""
    gradient: torch.Tensor | None = None
    """float32 [high - low] while a backward pass adds to it."""
    awaited: set[int] = field(default_factory=set)
    """The ids of the parameters whose gradients have not arrived."""


Source = Callable[[Span, torch.Tensor], None]
"""Writes the parameters of a span into a vector, float32 [high - low]."""


class ByLayer:
    """The parameters of a model, in eval mode, of which one layer's are there at a time.

    `use` sets where they come from; `use_store` and `begin` prepare the coordinates.
    """

    def __init__(self, model: torch.nn.Module, layout: Layout, device: torch.device, threads: int, spec: str) -> None:
        """Replace the parameters of the layers by NaN, and the model's way to run its layers.

        Args:
            model: the model, on `device`.
            layout: its layout.
            device: where it computes.
            threads: number of threads that combine and project.
            spec: the recipe key `model`, for messages.

        Raises RecipeError if the model has no repeated layers, or has spectral normalization.
        """
        layers = list(repeated_layers(model))
        reasons = {
            "has no repeated layers: no ModuleList or Sequential of two or more layers of one class": not layers,
            "has spectral normalization, which needs whole weights": bool(layout.spectral),
            "is the base of adapters, which is held whole": hasattr(model, "computing"),
        }
        for why, wrong in reasons.items():
            if wrong:
                raise RecipeError(f"actors.by_layer is true, and {spec} {why}. Remove this key.")
        if getattr(getattr(model, "config", None), "use_cache", False) is True:
            model.config.use_cache = False  # type: ignore[union-attr]  # a layer would put its keys there twice
        _return_memory()
        self.device = device
        self.spans = _spans(model, layout, layers)
        self._places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._places.setdefault(id(parameter), []).append((module, key))
        self._threads, self._pool = threads, ThreadPoolExecutor(threads)
        self._nothing = torch.full((), float("nan"), device=device)
        self._rounds = in_bfloat16(spec)
        self._held = {span.low: torch.zeros(span.high - span.low, device=device) for span in self._of(HELD)}
        self._source: Source = _zeros
        self._kept: torch.Tensor | None = None
        self._planes: dict[int, Hyperplane] = {}
        self._sums: np.ndarray | float | None = None
        for span in self.spans:
            for _, parameter, start, stop in span.tensors:
                hook = partial(self._accumulated, span, start, stop)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._set(span, self._held.get(span.low))
        self.use(_zeros)
        for number, layer in enumerate(layers):
            layer.forward = partial(self._forward, number, layer.forward)

    # Where the parameters come from

    def use(self, source: Source) -> None:
        """Take the parameters from `source` from here on."""
        self._source = source
        for span in self._of(HELD):
            source(span, self._held[span.low])
            if self._rounds:
                self._set(span, self._held[span.low])

    def use_vector(self, vector: torch.Tensor) -> None:
        """Take the parameters from a parameter vector, float32 [N]."""

        def copy(span: Span, out: torch.Tensor) -> None:
            out.copy_(vector[span.low : span.high])

        self.use(copy)

    def use_tensors(self, tensor: Callable[[str, int], torch.Tensor]) -> None:
        """Take the parameters from `tensor`, which returns one, of any dtype [n], by its name and n.

        Each is asked for once, and kept in a file without a name in the cache folder. Raises DiskError.
        """
        if self._kept is None:
            self._kept = _vector_on_disk(self.spans[-1].high)
        for span in self.spans:
            for name, _, start, stop in span.tensors:
                self._kept[span.low + start : span.low + stop].copy_(tensor(name, stop - start))
        self.use_vector(self._kept)

    def use_mean(self, ingredients: Sequence[Ingredient]) -> None:
        """Take the parameters from the mean of ingredients, in float64, then rounded as `bake` does."""

        def mean(name: str, numel: int) -> torch.Tensor:
            total = torch.zeros(numel, dtype=torch.float64)
            for ingredient in ingredients:
                total += ingredient.read(name).view(-1)
            return (total / len(ingredients)).to(dtype_of(common_dtype(ingredients, name)))

        self.use_tensors(mean)
        for ingredient in ingredients:
            ingredient.close()

    def holds(self, name: str) -> bool:
        """Return whether a parameter is always there."""
        return any(name == tensor for span in self._of(HELD) for tensor, *_ in span.tensors)

    def use_store(self, store: DirectionStore, parts: Partition, center: torch.Tensor) -> None:
        """Prepare the coordinates of a store's directions; `begin` must follow.

        Args:
            store: the store.
            parts: the blocks, without the invariant ones.
            center: float32 [N], on the CPU.
        """
        self._center = center
        self._planes = {
            span.low: Hyperplane(store, parts, span.low, span.high, self.device, self._threads, self._pool)
            for span in self.spans
        }
        variant = dict(zip(store.layout.names, store.variant.tolist(), strict=True))
        for span in self.spans:
            for name, parameter, _, _ in span.tensors:
                parameter.requires_grad_(variant[name])

    def begin(self, chosen: np.ndarray, x: np.ndarray) -> None:
        """Begin a model batch: the ingredients `chosen`, int64 [m], move; the others stay at x, float32 [K, B]."""
        others = np.setdiff1d(np.flatnonzero(np.any(x != 0, axis=1)), chosen)
        size = max(1, len(chosen))
        self._others = [
            (some, np.ascontiguousarray(x[some], np.float32)) for some in np.split(others, range(size, len(others), size))
        ]
        self._chosen = chosen

    def use_coordinates(self, x: np.ndarray) -> None:
        """Take the parameters from the coordinates x, float32 [m, B]."""

        def combine(span: Span, out: torch.Tensor) -> None:
            plane = self._planes[span.low]
            out.copy_(self._center[span.low : span.high])
            for some, coordinates in (*self._others, (self._chosen, x)):
                if len(some):
                    plane.choose(some, release=False)
                    plane.combine(out, out, coordinates)
            plane.free()

        self.use(combine)

    # Gradients

    def start(self) -> None:
        """Begin a step: no gradient yet."""
        self._sums = 0.0
        for span in self._of(HELD):
            self._gather(span)

    def projected(self) -> np.ndarray:
        """End a step: return the projection of the gradient, float64 [m, B]."""
        for span in self.spans:
            self._project(span)
        sums, self._sums = self._sums, None
        return np.asarray(sums)

    def _gather(self, span: Span) -> None:
        """Let the gradients of a span be views of one vector, or be added to it if they are bfloat16."""
        if span.gradient is not None or not any(p.requires_grad for _, p, _, _ in span.tensors):
            return
        span.gradient = torch.zeros(span.high - span.low, device=self.device)
        for _, parameter, start, stop in span.tensors:
            if parameter.requires_grad:
                if parameter.dtype == span.gradient.dtype:
                    parameter.grad = span.gradient[start:stop].view(parameter.shape)
                span.awaited.add(id(parameter))

    def _accumulated(self, span: Span, start: int, stop: int, parameter: torch.nn.Parameter) -> None:
        """Project the gradient of a layer once all of it is there."""
        if self._sums is None:  # a backward pass that is only timed
            parameter.grad = None
            return
        if span.gradient is not None and parameter.grad is not None and parameter.dtype != span.gradient.dtype:
            span.gradient[start:stop] += parameter.grad.reshape(-1)
            parameter.grad = None
        span.awaited.discard(id(parameter))
        if not span.awaited and span.layer != HELD:
            self._project(span)

    def _project(self, span: Span) -> None:
        if span.gradient is None or self._sums is None:
            return
        plane = self._planes[span.low]
        plane.choose(self._chosen, release=False)
        self._sums = self._sums + plane.project(span.gradient)
        plane.free()
        span.gradient = None
        span.awaited.clear()
        for _, parameter, _, _ in span.tensors:
            parameter.grad = None

    # Running layers

    def _of(self, layer: int) -> Iterator[Span]:
        return (span for span in self.spans if span.layer == layer)

    def _set(self, span: Span, vector: torch.Tensor | None) -> None:
        """Let the parameters of a span be views of a vector, or of it rounded; None: NaN, which takes no memory.

        In a layer, a parameter without a gradient is replaced by another one: checkpointing keeps it itself for the backward
        pass, and of the others a view.
        """
        source = self._nothing if vector is None else vector
        rounded = source.bfloat16() if self._rounds else source
        for _, parameter, start, stop in span.tensors:
            of = rounded if parameter.dtype == rounded.dtype else source
            values = of.expand(parameter.shape) if vector is None else of[start:stop].view(parameter.shape)
            shown = parameter
            if parameter.requires_grad or span.layer == HELD or vector is None:
                parameter.data = values
            else:
                shown = torch.nn.Parameter(values, requires_grad=False)
            for module, key in self._places[id(parameter)]:
                module._parameters[key] = shown

    def fill(self, number: int, gathers: bool) -> None:
        """Compute the parameters of a layer; if it `gathers`, collect their gradients from here on."""
        with torch.inference_mode(False), torch.no_grad():
            for span in self._of(number):
                vector = torch.empty(span.high - span.low, device=self.device)
                self._source(span, vector)
                self._set(span, vector)
                if gathers and self._sums is not None:
                    self._gather(span)

    def empty(self, number: int) -> None:
        """Let the parameters of a layer be NaN again."""
        for span in self._of(number):
            self._set(span, None)

    def _forward(self, number: int, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            with _Filled(self, number):
                return forward(*inputs, **named)

        def contexts() -> tuple[_Filled, _Filled]:
            return _Filled(self, number), _Filled(self, number, gathers=True)

        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts, **named)


class _Filled(FastAttention):
    """A context in which the parameters of a layer are there; what a backward pass needs of them stays until it ends.

    A layer's two runs have to keep the same tensors for the backward pass, so attention is fast in both.

    If it `gathers`, the gradients of the layer are collected from here on.
    """

    def __init__(self, layers: ByLayer, number: int, gathers: bool = False) -> None:
        self.layers, self.number, self.gathers = layers, number, gathers

    def __enter__(self) -> None:
        self.layers.fill(self.number, self.gathers)
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.layers.empty(self.number)


def _vector_on_disk(numel: int) -> torch.Tensor:
    """Return a vector, float32 [N], in a file that ends with this process. Raises DiskError if the disk has no room."""
    folder = cache_folder()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the map holds it
        os.posix_fallocate(file.fileno(), 0, 4 * numel)
        return torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(numel,)))


def _return_memory() -> None:
    """Let the C library return freed arrays of 1 MB or more to the system; glibc keeps arrays of up to 32 MB for reuse."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _zeros(span: Span, out: torch.Tensor) -> None:
    out.zero_()


def _spans(model: torch.nn.Module, layout: Layout, layers: Sequence[torch.nn.Module]) -> list[Span]:
    """Cut a layout into spans; a parameter that is used by several layers, or outside of them, is held."""
    numbers = {id(layer): number for number, layer in enumerate(layers)}
    owners: dict[int, set[int]] = {}

    def visit(module: torch.nn.Module, owner: int) -> None:
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(owner)
        for child in module.children():
            visit(child, numbers.get(id(child), owner))

    visit(model, HELD)
    parameters = dict(model.named_parameters())
    spans: list[Span] = []
    for name, start, stop in layout.spans():
        parameter = parameters[name]
        mine = owners[id(parameter)]
        layer_number = next(iter(mine)) if len(mine) == 1 else HELD
        if not spans or spans[-1].layer != layer_number:
            spans.append(Span(layer_number, start, start))
        span = spans[-1]
        span.tensors.append((name, parameter, start - span.low, stop - span.low))
        span.high = stop
    return spans

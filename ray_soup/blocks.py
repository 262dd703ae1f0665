"""Parameters <-> flat vector; partition into blocks.

The parameter vector is all float parameters of a model, flattened in the model's own order, tied ones once. A block is a
contiguous run of parameter tensors that share one coefficient per ingredient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from ray_soup.errors import RecipeError
from ray_soup.running_statistics import tracking_layers


@dataclass(frozen=True)
class Layout:
    """The parameter vector of a model: names and shapes in the model's order, offsets in numbers, and its buffers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Names and shapes of what else the state dict holds."""
    tied: dict[str, str] = field(default_factory=dict)
    """Second names of tensors, to their first: of tied ones, and names that only files have."""
    tracking: tuple[str, ...] = ()
    """Layers that keep running statistics: BatchNorm and its kin."""

    @cached_property
    def sizes(self) -> np.ndarray:
        """Numbers in each tensor, int64 [tensors]."""
        return np.array([int(np.prod(shape)) for shape in self.shapes], dtype=np.int64)

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each tensor begins, and the end: int64 [tensors + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @cached_property
    def numel(self) -> int:
        """N, the length of the parameter vector."""
        return int(self.sizes.sum())

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Name, start and stop of each tensor."""
        return zip(self.names, self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """What a checkpoint of the model holds: parameters, then buffers."""
        return {**dict(zip(self.names, self.shapes, strict=True)), **self.buffers}


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of `model`. Raises RecipeError for parameters that are not floats."""
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            continue
        if not parameter.dtype.is_floating_point:
            raise RecipeError(f"The model's parameter {name} is {parameter.dtype}; expected floats.")
        first[id(parameter)] = name
        names.append(name)
        shapes.append(tuple(parameter.shape))
    buffers = {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor) and id(t) not in first}
    tied = {**getattr(model, "names_in_files", {}), **tied}
    return Layout(tuple(names), tuple(shapes), buffers, tied, tuple(tracking_layers(model)))


def flatten(model: torch.nn.Module, vector: torch.Tensor, gradient: torch.Tensor | None, layout: Layout) -> None:
    """Make the parameters of `model` views of `vector` [>= N], and their gradients views of `gradient` [>= N].

    No numbers are copied: what is written into the vector is what the model computes with.
    """
    parameters = dict(model.named_parameters())
    for name, start, size in zip(layout.names, layout.offsets, layout.sizes, strict=False):
        parameter = parameters[name]
        parameter.data = vector[start : start + size].view(parameter.shape)
        if gradient is not None:
            parameter.grad = gradient[start : start + size].view(parameter.shape)


@dataclass(frozen=True)
class Partition:
    """Blocks of a layout: `block[t]` is the block of tensor t; a name and a size in numbers for each block."""

    names: tuple[str, ...]
    block: np.ndarray

    @property
    def count(self) -> int:
        return len(self.names)

    def sum_tensors(self, per_tensor: np.ndarray) -> np.ndarray:
        """Sum over the tensors of each block: [K, tensors] -> [K, B]."""
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        return np.add.reduceat(per_tensor, starts, axis=1)


def _layer_of(name: str) -> str:
    """`transformer.resblocks.3.mlp.c_fc.weight` -> `transformer.resblocks.3`: up to the last number, else the module
    that owns the tensor."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ".".join(parts[:-1]) or name


def partition(layout: Layout, blocks: str | int) -> Partition:
    """Cut a layout into blocks: `tensor`, `layer`, `model`, or tensors in a row up to a least size in numbers (what is
    left over at the end joins the block before it)."""
    if blocks == "model":
        return Partition(("model",), np.zeros(len(layout.names), dtype=np.int64))
    if blocks == "tensor":
        return Partition(layout.names, np.arange(len(layout.names)))
    if blocks == "layer":
        keys = [_layer_of(name) for name in layout.names]
        starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
        labels = [keys[i] for i in starts]
        if len(set(labels)) < len(labels):  # a layer's tensors may lie apart in the model's order
            labels = [f"{label}@{layout.names[i]}" for label, i in zip(labels, starts, strict=True)]
    elif isinstance(blocks, int) and blocks > 0:
        starts, filled = [0], 0
        for i, size in enumerate(layout.sizes):
            if filled >= blocks:
                starts.append(i)
                filled = 0
            filled += int(size)
        if filled < blocks and len(starts) > 1:
            starts.pop()
        labels = [f"{layout.names[i]}..." for i in starts]
    else:
        raise RecipeError(f"blocks: {blocks!r} found; expected tensor, layer, model, or a size of 1 or more.")
    block = np.zeros(len(layout.names), dtype=np.int64)
    block[starts[1:]] = 1
    return Partition(tuple(labels), np.cumsum(block))

"""Layout of the parameter vector, and its partition into blocks.

The parameter vector holds all float parameters of a model, flattened in the model's own order, tied parameters once. A block
is a contiguous run of parameter tensors, or a group of neighbouring rows of one tensor, that share one coefficient per
ingredient.

Shapes: N parameters, T parameter tensors, B blocks, K ingredients.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.mixing.file_names import FileNames, file_names
from ray_soup.mixing.row_groups import groups_of, row_cuts, rows_together
from ray_soup.mixing.running_statistics import buffers_of
from ray_soup.mixing.spectral import SpectralNorm, spectral_norms

Blocks = str | int | Mapping[Literal["tensor"], int]
"""What shares a coefficient, as in a recipe: tensor, layer, model, a minimum size, or {tensor: R} for R groups of rows."""


@dataclass(frozen=True)
class Layout:
    """The parameter vector of a model, tensor by tensor, and the model's buffers."""

    names: tuple[str, ...]
    """Names of the T parameter tensors, in the model's order."""
    shapes: tuple[tuple[int, ...], ...]
    """Their shapes."""
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the other tensors of the state dict, by name."""
    tied: dict[str, str] = field(default_factory=dict)
    """Maps other names of a tensor to its first name: names of tied tensors, and names that occur in files only."""
    tracking: tuple[str, ...] = ()
    """Names of the layers that track running statistics (BatchNorm and related layers)."""
    spectral: tuple[SpectralNorm, ...] = ()
    """The weights under spectral normalization, whose buffers are functions of the weights."""
    owners: dict[str, str] = field(default_factory=dict)
    """The class of the module that owns each buffer, by the buffer's name."""
    in_files: FileNames = field(default_factory=FileNames)
    """Names that occur in checkpoints only."""
    together: dict[str, int] = field(default_factory=dict)
    """How many neighbouring rows of a parameter tensor stay in one block, by name, where it is not 1."""

    @property
    def known_names(self) -> dict[str, str]:
        """Maps every other name of a tensor, in the model or in a file, to its first name."""
        return {**self.in_files.old, **self.tied}

    def with_names(self, names: Collection[str]) -> Layout:
        """Return this layout with those old names of tensors among `tied` that are in `names`."""
        used = {name: first for name, first in self.in_files.old.items() if name in names}
        return replace(self, tied={**used, **self.tied}) if used else self

    @cached_property
    def mixed_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that are taken from the ingredients and not computed from the weights."""
        computed = {name for norm in self.spectral for name in (norm.u, norm.v)}
        return tuple(name for name in self.buffers if name not in computed)

    @cached_property
    def other_buffers(self) -> tuple[str, ...]:
        """Names of the mixed buffers that are not running statistics of a known layer."""
        known = set(buffers_of(self.tracking))
        return tuple(name for name in self.mixed_buffers if name not in known)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Number of elements of each tensor, int64 [T]."""
        return np.array([int(np.prod(shape)) for shape in self.shapes], dtype=np.int64)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Start of each tensor in the parameter vector, and the end of the last one, int64 [T + 1]."""
        return np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)

    @cached_property
    def numel(self) -> int:
        """N, the length of the parameter vector."""
        return int(self.sizes.sum())

    def spans(self) -> Iterator[tuple[str, int, int]]:
        """Yield the name, start and stop of each tensor in the parameter vector."""
        return zip(self.names, self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)

    @property
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that a checkpoint of the model holds: parameters, then buffers."""
        return {**dict(zip(self.names, self.shapes, strict=True)), **self.buffers}


def layout_of(model: torch.nn.Module) -> Layout:
    """Return the layout of `model`.

    Raises RecipeError if a parameter is not a float tensor.
    """
    from ray_soup.mixing.recalibration import tracking_layers

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
            raise RecipeError(
                f"The model's parameter {name} is {parameter.dtype}; expected floats. Register it as a buffer instead."
            )
        first[id(parameter)] = name
        names.append(name)
        shapes.append(tuple(parameter.shape))
    buffers = {name: tuple(t.shape) for name, t in state.items() if isinstance(t, torch.Tensor) and id(t) not in first}
    names_in_files: dict[str, str] = getattr(model, "names_in_files", {})
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {
        name: type(modules[name.rpartition(".")[0]]).__name__ for name in buffers if name.rpartition(".")[0] in modules
    }
    return Layout(
        tuple(names), tuple(shapes), buffers, {**names_in_files, **tied}, tuple(tracking_layers(model)),
        spectral_norms(model), owners, file_names(model), rows_together(model),
    )  # fmt: skip


def flatten(
    model: torch.nn.Module,
    vector: torch.Tensor,
    gradient: torch.Tensor | None,
    layout: Layout,
    rounded: torch.Tensor | None = None,
) -> None:
    """Make the parameters of `model` views of a flat vector.

    Nothing is copied: the model computes with whatever is written into the vector.

    Args:
        model: the model of `layout`.
        vector: float [at least N].
        gradient: float [at least N], the vector that the parameters' gradients become views of; None leaves them unchanged.
        layout: the layout of the model.
        rounded: bfloat16 [N], the vector that parameters in bfloat16 become views of, without a gradient; None: all
            parameters become views of `vector`.
    """
    parameters = dict(model.named_parameters())
    for name, start, stop in layout.spans():
        parameter = parameters[name]
        if rounded is not None and parameter.dtype == rounded.dtype:
            parameter.data, parameter.grad = rounded[start:stop].view(parameter.shape), None
            continue
        parameter.data = vector[start:stop].view(parameter.shape)
        if gradient is not None:
            parameter.grad = gradient[start:stop].view(parameter.shape)


@dataclass(frozen=True)
class Partition:
    """The blocks of a layout."""

    names: tuple[str, ...]
    """Name of each of the B blocks."""
    block: NDArray[np.int64]
    """Block of each parameter tensor, int64 [T]; -1 for a tensor without coefficients. Of a tensor that is cut into groups
    of rows, the block of the first group; those of the others follow."""
    cuts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The elements at which the other groups of such a tensor begin, by the number of the tensor."""

    @property
    def count(self) -> int:
        """B, the number of blocks."""
        return len(self.names)

    def groups(self, tensor: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, block) of each group of a tensor of `size` elements; a whole tensor is one group."""
        return groups_of(int(self.block[tensor]), self.cuts.get(tensor, ()), size)

    def sum_tensors(self, per_tensor: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sum over the tensors of each block, none of which is cut: float64 [K, T] to float64 [K, B]."""
        starts = np.flatnonzero(np.diff(self.block, prepend=-1))
        return np.add.reduceat(per_tensor, starts, axis=1)


def partition(layout: Layout, blocks: Blocks) -> Partition:
    """Cut a layout into blocks.

    Args:
        layout: the layout of the model.
        blocks: `tensor`, `layer` or `model`; or a minimum block size in parameters: consecutive tensors are grouped until
            they reach this size, and a smaller remainder at the end joins the block before it; or {tensor: R}, each
            tensor in R groups of rows, as row_groups says.

    Raises RecipeError if `blocks` is none of these.
    """
    if blocks == "model":
        return Partition(("model",), np.zeros(len(layout.names), dtype=np.int64))
    if blocks == "tensor":
        return Partition(layout.names, np.arange(len(layout.names)))
    if isinstance(blocks, Mapping) and blocks.keys() == {"tensor"} and blocks["tensor"] > 0:
        return _in_rows(layout, blocks["tensor"])
    if blocks == "layer":
        starts, labels = _layers(layout)
    elif isinstance(blocks, int) and blocks > 0:
        starts = _starts_of_size(layout, blocks)
        labels = [f"{layout.names[i]}..." for i in starts]
    else:
        raise RecipeError(
            f"blocks: found {blocks!r}; expected tensor, layer, model, a minimum block size of 1 or more, or "
            "{tensor: R} for R groups of rows. Fix `blocks:` in the recipe."
        )
    block = np.zeros(len(layout.names), dtype=np.int64)
    block[starts[1:]] = 1
    return Partition(tuple(labels), np.cumsum(block))


def _in_rows(layout: Layout, groups: int) -> Partition:
    """Cut each tensor into groups of rows, and name them by their rows, as in `head.weight[0:96]`."""
    names: list[str] = []
    first: list[int] = []
    cuts: dict[int, tuple[int, ...]] = {}
    for t, rows in enumerate(row_cuts(layout.names, layout.shapes, layout.together, groups)):
        name, shape = layout.names[t], layout.shapes[t]
        first.append(len(names))
        if not rows or not layout.sizes[t]:
            names.append(name)
            continue
        cuts[t] = tuple(row * (int(layout.sizes[t]) // shape[0]) for row in rows)
        names += [f"{name}[{start}:{stop}]" for start, stop in zip((0, *rows), (*rows, shape[0]), strict=True)]
    return Partition(tuple(names), np.array(first, dtype=np.int64), cuts)


def _layers(layout: Layout) -> tuple[list[int], list[str]]:
    """Return the first tensor and the label of each layer."""
    keys = [layer_of(name) for name in layout.names]
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    labels = [keys[i] for i in starts]
    if len(set(labels)) < len(labels):  # the tensors of a layer need not be adjacent in the model's order
        labels = [f"{label}@{layout.names[i]}" for label, i in zip(labels, starts, strict=True)]
    return starts, labels


def layer_of(name: str) -> str:
    """Return the layer of a tensor: its name up to the last numeric part, otherwise the module that owns it.

    For example `transformer.resblocks.3.mlp.c_fc.weight` belongs to `transformer.resblocks.3`.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ".".join(parts[:-1]) or name


def _starts_of_size(layout: Layout, least: int) -> list[int]:
    """Return the first tensor of each block of at least `least` parameters."""
    starts, filled = [0], 0
    for i, size in enumerate(layout.sizes):
        if filled >= least:
            starts.append(i)
            filled = 0
        filled += int(size)
    if filled < least and len(starts) > 1:
        starts.pop()
    return starts

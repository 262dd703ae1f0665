"""Groups of neighbouring rows: which tensors are cut into them, and where.

A tensor of two or more dimensions is cut along dimension 0, which is that of the outputs of torch's linear and convolution
layers, into groups of about equal size. A vector with as many elements as a matrix of the same module has rows, such as its
bias, is cut as that matrix is; all other vectors stay whole. Some rows stay together:

- Those of one attention head, if the model tells the size or the number of its heads. If it does not, a projection to
  queries, keys and values at once is cut between these three only, and one to queries, keys or values alone stays whole.
- All rows of a weight whose dimension 0 is that of the inputs: transposed convolutions, and `Conv1D` of transformers.

Any cut is correct, since a group has coefficients of its own; these rules only keep together what belongs together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray_soup.io.lazy import torch

Shape = tuple[int, ...]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_SIZES = ("head_dim", "attention_head_size", "head_size", "dim_head", "d_head", "dim_per_head", "key_value_proj_dim")
_WIDTHS = ("embed_dim", "all_head_size", "hidden_size", "d_model", "inner_dim", "n_embd", "dim")
_FUSED = re.compile("(^|_)(w?qkv|c_attn|query_key_value)(_|$)|^in_proj_(weight|bias)$")
_SEPARATE = re.compile("(^|_)(w?[qkv]|kv|query|key|value)(_|$)")
_BY_HEAD = "query_key_value"  # the queries, keys and values of one head follow one another


def groups_of(block: int, cuts: Sequence[int], size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, block) of each group of a tensor, in elements.

    Args:
        block: block of the first group; those of the others follow.
        cuts: where the other groups begin; empty for a whole tensor.
        size: number of elements of the tensor.
    """
    for number, (start, stop) in enumerate(zip((0, *cuts), (*cuts, size), strict=True)):
        yield start, stop, block + number


def row_cuts(
    names: Sequence[str], shapes: Sequence[Shape], together: Mapping[str, int], groups: int
) -> Iterator[tuple[int, ...]]:
    """Yield the rows at which groups of each tensor begin, without the first, which begins at row 0.

    Args:
        names: names of the tensors.
        shapes: their shapes.
        together: number of neighbouring rows of a tensor that stay together, where it is not 1.
        groups: number of groups, or fewer if a tensor does not have as many rows.
    """
    matrices: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) > 1:
            place = name.rpartition(".")[0], shape[0]
            matrices.setdefault(place, _even_cuts(shape[0], together.get(name, 1), groups))
    for name, shape in zip(names, shapes, strict=True):
        if len(shape) > 1:
            yield _even_cuts(shape[0], together.get(name, 1), groups)
        else:
            yield matrices.get((name.rpartition(".")[0], shape[0]), ()) if shape else ()


def _even_cuts(rows: int, unit: int, groups: int) -> tuple[int, ...]:
    """Cut rows into at most `groups` groups, with each `unit` of rows together; return where those after the first begin."""
    units = max(1, rows // unit)
    count = min(groups, units)
    return tuple(number * units // count * unit for number in range(1, count))


def rows_together(model: torch.nn.Module) -> dict[str, int]:
    """Return how many neighbouring rows of a tensor stay together, by the tensor's name, where it is not 1."""
    from torch.nn.modules.conv import _ConvTransposeNd

    found: dict[str, int] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            name = f"{path}.{key}" if path else key
            rows = parameter.shape[0]
            if isinstance(module, _ConvTransposeNd) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf")):
                found[name] = max(rows, 1)
                continue
            last = [part for part in name.lower().split(".")[-2:] if part not in ("weight", "bias")]
            fused = any(_FUSED.search(part) for part in last)
            if fused or any(_SEPARATE.search(part) for part in last):
                heads, size = _heads_of(modules, path)
                found[name] = _unit(rows, fused, heads, size, _BY_HEAD in last)
    return {name: unit for name, unit in found.items() if unit > 1}


def _unit(rows: int, fused: bool, heads: int, size: int, by_head: bool) -> int:
    """Return how many rows of a projection stay together.

    Args:
        rows: its rows.
        fused: whether it is to queries, keys and values at once.
        heads: the number of heads; 0 if the model does not tell.
        size: rows of one head; 0 if the model does not tell.
        by_head: whether the queries, keys and values of one head follow one another.
    """
    parts = 3 if fused else 1
    if not size and heads and rows % (parts * heads) == 0:
        size = rows // (parts * heads)
    if by_head and size and rows % (3 * size) == 0:
        return 3 * size
    if size and rows % size == 0:
        return size
    return rows // 3 if fused and rows % 3 == 0 else max(rows, 1)


def _heads_of(modules: Mapping[str, torch.nn.Module], path: str) -> tuple[int, int]:
    """Return the number of heads and the size of one, which the nearest module that encloses `path` tells.

    A module tells by its own attributes, or by those of its config; what none tells is 0.
    """
    while True:
        module = modules[path]
        for owner in (module, _config_of(module)):
            heads, size, width = (_number(owner, names) for names in (_HEADS, _SIZES, _WIDTHS))
            if not size and heads and width % heads == 0:
                size = width // heads
            if heads or size:
                return heads, size
        if not path:
            return 0, 0
        path = path.rpartition(".")[0]


def _config_of(module: torch.nn.Module) -> Any:
    with suppress(Exception):
        return getattr(module, "config", None)
    return None


def _number(owner: Any, names: Sequence[str]) -> int:
    """Return the first of these attributes that is a positive integer, otherwise 0."""
    for name in names:
        with suppress(Exception):  # a property of a model may do anything
            value = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return 0

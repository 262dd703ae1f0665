"""The difference between a soup and the model that was trained from it.

    model[name] = round(float32(soup[name]) + difference[name])

The soup is the written one, in its own dtypes; the sum is float32, and is rounded once to the dtype of the tensor. With the
coefficients and the ingredients, a file of differences proves the model as coefficients alone prove a soup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ray_soup.errors import RecipeError
from ray_soup.io.disk import write_at
from ray_soup.io.formats import TensorInfo, safetensors_header
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.shard_files import ShardWriter, bytes_of, plan_files

RANGE = 1 << 20  # elements at a time
Shapes = Mapping[str, tuple[int, ...]]


def trained(soup: torch.Tensor, difference: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the model's elements: dtype [n], from those of the written soup, any dtype [n], and float32 [n]."""
    return (soup.float() + difference).to(dtype)


def write_difference(file: Path, shapes: Shapes, difference_of: Callable[[str], torch.Tensor]) -> None:
    """Write a file of differences atomically.

    Args:
        file: the safetensors file.
        shapes: the shape of each parameter tensor.
        difference_of: returns the difference of a tensor, float32 [n], on the CPU.

    Raises SoupError if it cannot be written.
    """
    files = plan_files(shapes, dict.fromkeys(shapes, "float32"), file.with_name(f"{file.name}.tmp"), None, {})
    with files.removed_on_error():
        with ShardWriter(files) as writer:
            for name in shapes:
                writer.write(name, 0, difference_of(name))
            writer.sync()
        files.path.replace(file)


def open_difference(file: str, shapes: Shapes) -> Ingredient:
    """Open a file of differences of the parameter tensors `shapes`, at a path or URI.

    Raises RecipeError if it is for another model.
    """
    found = open_ingredient(file)
    have = {name: (tuple(info.shape), info.dtype) for name, info in found.tensors.items()}
    expected = {name: (tuple(shape), torch.float32) for name, shape in shapes.items()}
    odd = next((name for name in {**expected, **have} if expected.get(name) != have.get(name)), None)
    if odd is not None:
        raise RecipeError(
            f"{file} is for another model: its tensor {odd} is {_shown(have.get(odd))}; expected: "
            f"{_shown(expected.get(odd))}. Restore the file of the same run."
        )
    return found


def _shown(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if found is None else f"{str(found[1]).removeprefix('torch.')} {list(found[0])}"


def apply_difference(difference: Ingredient, model: Path) -> float:
    """Turn the soup in the safetensors file or index `model` into the trained model, in place.

    Args:
        difference: the differences, from `open_difference`.
        model: the written soup. If this function fails, it is neither the soup nor the model.

    Returns the norm of the difference, relative to that of the soup's parameters.
    """
    soup, squares = open_ingredient(str(model)), np.zeros(2)
    for number, name in enumerate(soup.files):
        places, _ = safetensors_header(name, number, soup.sizes[number])
        with open(name, "r+b") as stream:
            for tensor in (tensor for tensor in places if tensor in difference.tensors):
                info = places[tensor]
                for start in range(0, info.numel, RANGE):
                    stop = min(start + RANGE, info.numel)
                    before = _read(stream.fileno(), info, start, stop)
                    change = difference.read(tensor, start, stop)
                    after = trained(before, change, info.dtype)
                    write_at(stream, bytes_of(after), info.place + start * info.itemsize)
                    squares += [_square(change), _square(before)]
            os.fsync(stream.fileno())
    difference.close()
    return float(np.sqrt(squares[0] / squares[1])) if squares[1] else float("inf")


def _read(descriptor: int, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Read elements of a tensor that this process may have written just now."""
    size = info.itemsize
    data = bytearray(os.pread(descriptor, (stop - start) * size, info.place + start * size))
    return torch.frombuffer(data, dtype=info.dtype)


def _square(values: torch.Tensor) -> float:
    return float(values.double().square().sum())

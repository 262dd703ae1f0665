"""Prove a soup's numbers without this package's readers: recompute a sample of its tensors from the original files.

The values come from the libraries that wrote the files: safetensors, `torch.load` and `torch.distributed.checkpoint`. The
sum is NumPy's, in float64 and in the order of the ingredients. The mixing kernels may round a product and a sum once instead
of twice (a fused multiply-add), so an element must lie between the results at both ends of that sum's rounding error. For
float32 and narrower dtypes both ends are the same number almost everywhere.
"""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ray_soup.errors import IngredientError, SoupError
from ray_soup.io import storage
from ray_soup.io.formats import SAFETENSORS_SUFFIX, TensorInfo
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.rank_files import is_rank_file
from ray_soup.io.torch_files import NUMPY
from ray_soup.mixing.coefficients import Coefficients

TENSORS = 12
"""Number of tensors in a sample."""
ELEMENTS = 1 << 14
"""Number of elements that are compared of each tensor."""


def sample_of(coefficients: Coefficients, model: Ingredient) -> list[str]:
    """Choose parameter tensors: the largest, the smallest, and others at even distances between them in size."""
    names = sorted((n for n in model.tensors if n in coefficients.block_of), key=lambda n: (model.tensors[n].numel, n))
    picks = np.linspace(0, len(names) - 1, min(TENSORS, len(names))).round().astype(int) if names else []
    return [names[n] for n in dict.fromkeys(int(p) for p in picks) if model.tensors[names[n]].numel]


def compare_sample(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], model: Ingredient, difference: Ingredient | None = None
) -> int | None:
    """Compare a sample of the model's tensors with their sums, read by the files' own libraries.

    Args:
        coefficients: the soup's coefficients.
        ingredients: the K ingredients, bound to the model.
        model: the soup's model.
        difference: what training all weights added to the soup; None: nothing.

    Returns:
        The number of tensors compared; None if an ingredient is in remote storage, which its library cannot read.

    Raises SoupError for a tensor that differs.
    """
    if any(storage.is_remote(file) for ingredient in (*ingredients, model) for file in ingredient.files):
        return None
    names = sample_of(coefficients, model)
    sums = {name: _Sum(coefficients.at(name, picked(model.tensors[name].numel))) for name in names}
    for k, ingredient in enumerate(ingredients):
        read = Library(ingredient)
        for name in names:
            sums[name].add(k, read.elements(name))
    read, added = Library(model), None if difference is None else Library(difference)
    for name in names:
        expected = sums[name].check(read.elements(name), None if added is None else added.elements(name))
        if expected is not None:
            raise SoupError(
                f"{model.files[model.tensors[name].file]}: the tensor {name} has {expected[0]!r} where the ingredients, as "
                f"their own libraries load them, give {expected[1]!r}. Rebuild the model with ray-soup bake."
            )
    return len(names)


class _Sum:
    """The sum of one tensor's elements over the ingredients, with a bound on its rounding error.

    `factors` are the coefficients, float64 [K, n], or [K, 1] if all elements have the same.
    """

    def __init__(self, factors: NDArray[np.float64]) -> None:
        self._factors = factors
        self._wide = torch.float32
        self._total: NDArray[np.float64] = np.zeros(1)
        self._size: NDArray[np.float64] = np.zeros(1)

    def add(self, k: int, values: torch.Tensor) -> None:
        """Add the elements of ingredient k, times its coefficient."""
        self._wide = torch.float64 if values.dtype == torch.float64 else self._wide
        part = self._factors[k] * values.to(torch.float64).numpy()
        self._total, self._size = self._total + part, self._size + np.abs(part)

    def check(self, found: torch.Tensor, added: torch.Tensor | None = None) -> tuple[float, float] | None:
        """Compare with the model's elements; return the first that differs and what it should be, or None.

        What training `added` to the written soup, float32, is added in float32 and rounded once.
        """
        wide = torch.float64 if found.dtype == torch.float64 else self._wide
        slack = (2 * len(self._factors) + 2) * 2.0**-53 * self._size
        soups = [torch.from_numpy(self._total + sign * slack).to(wide).to(found.dtype) for sign in (-1, 1)]
        low, high = ((soup if added is None else (soup.float() + added).to(found.dtype)).to(torch.float64) for soup in soups)
        have = found.to(torch.float64)
        wrong = ~((low <= have) & (have <= high))
        at = int(wrong.nonzero()[0]) if wrong.any() else None
        more = 0.0 if added is None or at is None else added[at].item()
        return None if at is None else (have[at].item(), float(self._total[at]) + more)


def picked(numel: int) -> NDArray[np.int64]:
    """Return the positions of the elements of a tensor that are compared, evenly spaced in row-major order."""
    found: NDArray[np.int64] = np.linspace(0, numel - 1, min(ELEMENTS, numel)).round().astype(np.int64)
    return found


class Library:
    """A checkpoint as the library of its format reads it."""

    def __init__(self, ingredient: Ingredient) -> None:
        self._ingredient = ingredient
        self._loaded: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}

    def elements(self, name: str) -> torch.Tensor:
        """Return evenly spaced elements of a tensor in row-major order: at most ELEMENTS.

        Raises IngredientError if the library does not find the tensor, or finds another shape.
        """
        tensor, info = self.whole(name), self._ingredient.tensors[name]
        picks = picked(info.numel)
        where = tuple(torch.from_numpy(index) for index in np.unravel_index(picks, info.shape)) if info.shape else ()
        return tensor.detach()[where].reshape(-1)

    def whole(self, name: str) -> torch.Tensor:
        """Return a tensor. Raises IngredientError as `elements` does."""
        info = self._ingredient.tensors[name]
        file, (key, stored) = self._ingredient.files[info.file], self._stored(name)
        if info.pieces and is_rank_file(file):
            tensor: torch.Tensor | None = _from_ranks(self._ingredient.files, info.stored[1])
        elif info.pieces:
            tensor = _from_distributed(file, info)
        elif file.endswith(SAFETENSORS_SUFFIX):
            tensor = _from_safetensors(file, stored)
        else:
            tensor = self._from_torch(file, key, stored)
        if tensor is None or tuple(tensor.shape) != tuple(info.shape):
            raise IngredientError(
                f"{file}: its own library does not find the tensor {stored} {list(info.shape)}. Restore the file."
            )
        return tensor

    def _stored(self, name: str) -> tuple[str, str]:
        """Return the container of a tensor of the model, and the name that it has there."""
        info, found = self._ingredient.tensors[name], []
        for key, tensors in self._ingredient.containers.items():
            found += [(key, stored) for stored, one in tensors.items() if one is info]
        equal = [(key, stored) for key, stored in found if stored == name or stored.endswith(f".{name}")]
        return next(iter(equal or found), ("", name))

    def _from_torch(self, file: str, key: str, name: str) -> torch.Tensor | None:
        """Return a tensor of a torch file, from the container `key` or else the first one that has it."""
        if file not in self._loaded:
            self._loaded[file] = _mappings(file)
        have = [(path, found[name]) for path, found in self._loaded[file] if isinstance(found.get(name), torch.Tensor)]
        return next((tensor for path, tensor in have if path == key), have[0][1] if have else None)


def _from_safetensors(file: str, name: str) -> torch.Tensor | None:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name) if name in set(opened.keys()) else None


def _from_distributed(file: str, info: TensorInfo) -> torch.Tensor:
    """Load a tensor of a distributed checkpoint with its library; io/distributed.py has checked that this runs no code."""
    from torch.distributed.checkpoint import state_dict_loader

    loaded = {info.stored[1]: torch.empty(info.shape, dtype=info.dtype)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        state_dict_loader.load(loaded, checkpoint_id=os.path.dirname(file))
    return loaded[info.stored[1]]


def _from_ranks(files: Sequence[str], name: str) -> torch.Tensor:
    """Load a tensor from the state dicts of all processes of FSDP with torch, and put its shards together."""
    import torch.distributed.tensor as distributed

    shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True)[name] for file in files]
    placements = shards[0].placements if isinstance(shards[0], distributed.DTensor) else ()
    local = [shard.to_local() if isinstance(shard, distributed.DTensor) else shard for shard in shards]
    cut = placements[0].dim if placements and isinstance(placements[0], distributed.Shard) else None
    return local[0] if cut is None else torch.cat([part for part in local if part.numel()], cut)


def _mappings(file: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Load a torch file with torch; return every mapping in it, with the keys that lead there, outermost first."""
    with torch.serialization.safe_globals([Namespace, *NUMPY]):
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of torch before 1.6 cannot be memory-mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    found, queue = [], [("", loaded)]
    while queue:
        path, value = queue.pop(0)
        if isinstance(value, Mapping):
            found.append((path, value))
            queue += [(f"{path}.{key}".lstrip("."), one) for key, one in value.items() if isinstance(one, Mapping)]
    return found

"""Buffers of a soup: which can be averaged over ingredients, which are copied, and which are neither.

A mean is right for a buffer that is the same in all ingredients, and usable for the running statistics of a known layer. The
singular vectors of spectral normalization are recomputed (mixing.spectral). Integers, such as a counter of steps, have no
mean: those that differ are taken from the first ingredient, and a note says so. Nobody can say what the mean of any other
float buffer is: a decay, a quantizer's range, a codebook. Such a buffer is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ray_soup.errors import IngredientError
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.running_statistics import KEYS, buffers_of

COUNTER = KEYS[2]
"""Name of the buffer in which a layer counts batches; copied from the first ingredient."""


def mixed_buffer(ingredients: Sequence[Ingredient], name: str, policy: str) -> torch.Tensor:
    """Return the soup's buffer `name`, flattened to one dimension.

    Args:
        ingredients: the ingredients that the soup uses.
        name: name of the buffer in the state dict.
        policy: `first` copies the buffer of the first ingredient. Any other value averages: floats become their mean in
            float64 [elements]; integers are copied from the first ingredient.
    """
    first = ingredients[0].read(name)
    if policy == "first" or not first.dtype.is_floating_point:
        return first.clone()
    total = torch.zeros(first.shape, dtype=torch.float64)
    for ingredient in ingredients:
        total += ingredient.read(name)
    return total / len(ingredients)


def check_buffers(
    ingredients: Sequence[Ingredient], names: Sequence[str], owners: Mapping[str, str], policy: str
) -> list[str]:
    """Check that the buffers `names`, which are no running statistics, can be mixed.

    Args:
        ingredients: all ingredients.
        names: names of the buffers.
        owners: the class of the module that owns a buffer, by the buffer's name.
        policy: the recipe's `buffers`. `auto` requires equal floats; the others require nothing.

    Returns:
        Notes about integer buffers that differ. Raises IngredientError for the first float buffer that differs and must not.
    """
    names = [name for name in names if not name.endswith(COUNTER)]
    if policy == "first" or not names:
        return []
    first = ingredients[0]
    kept = {name: first.read(name).clone() for name in names}
    first.close()
    integers: dict[str, str] = {}
    for ingredient in ingredients[1:]:
        for name, expected in kept.items():
            floats = expected.dtype.is_floating_point
            if (policy == "auto" or not floats) and not _agree(ingredient.read(name), expected):
                if floats:
                    raise _floats_differ(ingredient, first, name, owners)
                integers.setdefault(name, ingredient.path)
        ingredient.close()
    if not integers:
        return []
    name, path = next(iter(integers.items()))
    more = f" and {len(integers) - 1} more" if len(integers) > 1 else ""
    return [
        f"Integer buffers differ between ingredients and have no mean: {name}{more}, as in {first.path} and {path}. A soup "
        "has those of the first ingredient that it uses."
    ]


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two buffers are equal, NaN included, in the narrower of their dtypes."""
    dtype = min(one.dtype, other.dtype, key=lambda d: d.itemsize)
    one, other = one.to(dtype), other.to(dtype)
    return torch.equal(one, other) or torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _floats_differ(ingredient: Ingredient, first: Ingredient, name: str, owners: Mapping[str, str]) -> IngredientError:
    owner = f" of a {owners[name]}" if name in owners else ""
    return IngredientError(
        f"{ingredient.path}: the buffer {name}{owner} differs from that of {first.path}, and it is not a running statistic "
        "of a known normalization layer: its mean may be meaningless. If it is meaningful, set buffers: average; to take "
        "the buffers of the first ingredient, set buffers: first."
    )


def differing_layers(
    ingredients: Sequence[Ingredient], tracking: Sequence[str], buffers: Collection[str]
) -> tuple[str, ...]:
    """Return the layers whose running statistics differ between ingredients; the other layers were frozen.

    Args:
        ingredients: all ingredients.
        tracking: names of the layers that track running statistics.
        buffers: names of the buffers that the ingredients have.
    """
    if not tracking:
        return ()
    statistics = {
        layer: [name for name in buffers_of([layer]) if name in buffers and not name.endswith(COUNTER)] for layer in tracking
    }
    first = {name: ingredients[0].read(name).clone() for names in statistics.values() for name in names}
    found: set[str] = set()
    for ingredient in ingredients[1:]:
        for layer, names in statistics.items():
            if layer not in found and not all(torch.equal(ingredient.read(name), first[name]) for name in names):
                found.add(layer)
    return tuple(layer for layer in tracking if layer in found)

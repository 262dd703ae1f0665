"""Check, from headers alone, that ingredients fit together and fit the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.formats import FLOATS
from ray_soup.io.ingredient import Ingredient

Shapes = Mapping[str, tuple[int, ...]]


def check_together(
    ingredients: Sequence[Ingredient],
    shapes: Shapes | None = None,
    tied: Mapping[str, str] | None = None,
) -> list[Ingredient]:
    """Bind all ingredients to a model and compare their names, shapes and dtypes with it.

    Args:
        ingredients: the opened ingredients.
        shapes: shapes of the model's tensors, by name; default: the result of `common_shapes`.
        tied: maps the second name of a tied tensor to its first.

    Returns the bound ingredients, in order. Raises IngredientError, which lists the differences file by file, and
    RecipeError for fewer than two ingredients.
    """
    if len(ingredients) < 2:
        raise RecipeError(
            f"ingredients: a soup needs two or more ingredients; found one: {ingredients[0].path}. Add ingredients, or "
            "fix the glob."
        )
    whose = "the model"
    if shapes is None:
        shapes, whose = common_shapes(ingredients)
    floats = {name: _mostly_floats(ingredients, name) for name in shapes}
    bound = [ingredient.bind(shapes, tied or {}) for ingredient in ingredients]
    faults = []
    for ingredient in bound:
        lines = _differences(ingredient, shapes, whose, floats)
        if lines:
            more = [f"and {len(lines) - 6} more"] if len(lines) > 6 else []
            faults.append(f"{ingredient.path} does not fit:\n" + "\n".join(f"    {line}" for line in lines[:6] + more))
    if faults:
        more_files = f"\n  and {len(faults) - 5} more files" if len(faults) > 5 else ""
        raise IngredientError(
            f"{len(faults)} of {len(ingredients)} ingredients do not fit together with {whose}:\n  "
            + "\n  ".join(faults[:5])
            + more_files
            + "\nExclude these files, or set `model:` to the model that they belong to."
        )
    return bound


def common_shapes(ingredients: Sequence[Ingredient]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the most common shapes, by name, and the path of the first ingredient that has them."""
    votes = Counter(_signature(i) for i in ingredients)
    reference = next(i for i in ingredients if _signature(i) == votes.most_common(1)[0][0])
    return {name: info.shape for name, info in reference.tensors.items()}, reference.path


def _signature(ingredient: Ingredient) -> tuple[Any, ...]:
    return tuple(sorted((n, i.shape, i.dtype in FLOATS) for n, i in ingredient.tensors.items()))


def _mostly_floats(ingredients: Sequence[Ingredient], name: str) -> bool:
    """Return whether most of the ingredients that have the tensor `name` store it as floats."""
    votes = Counter(i.tensors[name].dtype in FLOATS for i in ingredients if name in i.tensors)
    return votes.most_common(1)[0][0] if votes else True


def _differences(ingredient: Ingredient, shapes: Shapes, whose: str, floats: Mapping[str, bool]) -> list[str]:
    """List what does not fit in a bound ingredient, one line per difference."""
    tensors = ingredient.tensors
    lines = [f"missing: {name} {list(shapes[name])}" for name in shapes if name not in tensors]
    lines += [f"not in {whose}: {name} {tensors[name]}" for name in tensors if name not in shapes]
    for name, info in tensors.items():
        if name in shapes and info.shape != shapes[name]:
            lines.append(f"shape: {name} is {list(info.shape)}, in {whose} {list(shapes[name])}")
        elif name in shapes and (info.dtype in FLOATS) != floats[name]:
            expected = "floats" if floats[name] else "integers"
            lines.append(f"dtype: {name} is {info}, the other ingredients have {expected}")
    return lines


def check_floats(ingredients: Sequence[Ingredient], parameters: Iterable[str]) -> None:
    """Check that all parameters are floats. Raises IngredientError for one stored as integers."""
    for name in parameters:
        for ingredient in ingredients:
            if ingredient.tensors[name].dtype not in FLOATS:
                raise IngredientError(
                    f"{ingredient.path}: the parameter {name} is {ingredient.tensors[name]}; expected floats. A quantized "
                    "checkpoint cannot be mixed: use the checkpoint from before quantization."
                )


def check_finite(ingredients: Sequence[Ingredient], name: str, start: int, parts: Sequence[torch.Tensor]) -> None:
    """Check that all elements read are finite. Raises IngredientError for the first ingredient with a non-finite one.

    Args:
        ingredients: the K ingredients.
        name: name of the tensor.
        start: index of the first element read.
        parts: any float dtype [n] for each ingredient, the elements `start` to `start + n` of its tensor.
    """
    for ingredient, part in zip(ingredients, parts, strict=True):
        wrong = torch.nonzero(~torch.isfinite(part)).flatten()
        if len(wrong):
            raise IngredientError(
                f"{ingredient.path}: the tensor {name} contains {part[wrong[0]].item()} at element {start + int(wrong[0])}; "
                "expected finite values. The training run diverged: exclude this checkpoint."
            )


def common_dtype(ingredients: Sequence[Ingredient], name: str) -> torch.dtype:
    """Return the dtype in which the soup's tensor `name` is written: the widest one among the ingredients."""
    dtype = ingredients[0].tensors[name].dtype
    for ingredient in ingredients[1:]:
        dtype = torch.promote_types(dtype, ingredient.tensors[name].dtype)
    return dtype

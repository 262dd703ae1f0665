"""Check, from headers alone, that ingredients fit together and fit the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.binding import Ignored, Tensors, without_shared_prefix
from ray_soup.io.formats import dtype_of, name_of
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.leftovers import groups_of

Shapes = Mapping[str, tuple[int, ...]]
Advice = Callable[[Ingredient], str]
"""Says what to do about an ingredient that does not fit the model, as a sentence; empty if nothing is known."""
CANDIDATES = 8  # different sets of shapes that are compared to find the common one
PAIRS = 3  # names that a file lacks for which the closest name in it is shown
TRIED, COMPARED = 20, 300  # such names that are tried, and names of a file that each of them is compared with
ALIKE = 0.6  # likeness of two names from which on they are shown


def check_together(
    ingredients: Sequence[Ingredient],
    shapes: Shapes | None = None,
    tied: Mapping[str, str] | None = None,
    ignore: Ignored = (),
    strict: bool = True,
    advise: Advice | None = None,
) -> list[Ingredient]:
    """Bind all ingredients to a model and compare their names, shapes and dtypes with it.

    Args:
        ingredients: the opened ingredients.
        shapes: shapes of the model's tensors, by name; default: the result of `common_shapes`.
        tied: maps the second name of a tied tensor to its first.
        ignore: tensors to leave out if the model does not have them: glob patterns of names, or expressions.
        strict: False leaves out all tensors that are not in `shapes`, as for a finished soup, whose run checked them.
        advise: called with the first ingredient that does not fit, bound as well as possible; says what may help.

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
    bound = [ingredient.bind(shapes, tied or {}, ignore) for ingredient in ingredients]
    if not strict:
        bound = [replace(i, tensors={n: info for n, info in i.tensors.items() if n in shapes}) for i in bound]
    _check_distinct(bound)
    floats = _mostly_floats(bound)
    faults = [fault for i in bound if (fault := _fault(i, shapes, whose, floats))]
    if faults:
        more_files = f"\n  and {len(faults) - 5} more files" if len(faults) > 5 else ""
        first = next(i for i in bound if _differences(i, shapes, whose, floats))
        raise IngredientError(
            f"{len(faults)} of {len(ingredients)} ingredients do not fit together with {whose}:\n  "
            + "\n  ".join(faults[:5])
            + more_files
            + "\nExclude these files, list tensors that the model does not have under `ignore:`, or set `model:` to the "
            f"model that they belong to.{_cure(first, shapes, advise)}"
        )
    return bound


def _check_distinct(bound: Sequence[Ingredient]) -> None:
    """Check that no two ingredients use the same tensors of one file. Raises IngredientError."""
    by_files: dict[tuple[str, ...], list[Ingredient]] = {}
    for ingredient in bound:
        for other in by_files.setdefault(ingredient.files, []):
            if other.tensors == ingredient.tensors:
                raise IngredientError(
                    f"{ingredient.path} and {other.path} are the same tensors, which would count twice. Exclude one."
                )
        by_files[ingredient.files].append(ingredient)


def check_fits(
    ingredient: Ingredient, shapes: Shapes, tied: Mapping[str, str], ignore: Ignored = (), advise: Advice | None = None
) -> Ingredient:
    """Bind one checkpoint to a model, with arguments as in `check_together`.

    Raises IngredientError, which lists the differences.
    """
    bound = ingredient.bind(shapes, tied, ignore)
    lines = _differences(bound, shapes, "the model", {})
    if lines:
        raise IngredientError(
            f"{bound.path} does not fit the model:{_shortened(lines)}\nUse a checkpoint of this model, or list tensors that "
            f"the model does not have under `ignore:`.{_cure(bound, shapes, advise)}"
        )
    return bound


def left_out_notes(ingredients: Sequence[Ingredient]) -> list[str]:
    """Return notes about tensors of bound ingredients that were left out, and about which of several models was used."""
    said: dict[str, list[str]] = {}
    for ingredient in ingredients:
        for remark in ingredient.remarks:
            said.setdefault(remark, []).append(ingredient.path)
    return [
        remark if remark[0].isupper() else f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''}: {remark}"
        for remark, paths in said.items()
    ]


def common_shapes(ingredients: Sequence[Ingredient]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the shapes that most ingredients fit, by name, and the path of the first ingredient that has them.

    If the names differ, prefixes that all names of a file share are removed first.
    """
    shared: list[Tensors] = [ingredient.tensors for ingredient in ingredients]
    if len({_signature(tensors) for tensors in shared}) > 1:
        shared = [without_shared_prefix(tensors) for tensors in shared]
    signatures = [_signature(tensors) for tensors in shared]
    candidates = [signatures.index(signature) for signature, _ in Counter(signatures).most_common(CANDIDATES)]
    reference = (
        max(candidates, key=lambda n: _how_many_fit(ingredients, shared[n])) if len(candidates) > 1 else candidates[0]
    )
    return {name: info.shape for name, info in shared[reference].items()}, ingredients[reference].path


def _how_many_fit(ingredients: Sequence[Ingredient], tensors: Tensors) -> int:
    """Count the ingredients that have tensors of these names and shapes, and no others."""
    shapes = {name: info.shape for name, info in tensors.items()}
    bound = (ingredient.bind(shapes, {}) for ingredient in ingredients)
    return sum(not i.unclear and {name: info.shape for name, info in i.tensors.items()} == shapes for i in bound)


def _signature(tensors: Tensors) -> tuple[Any, ...]:
    return tuple(sorted((n, i.shape, i.is_float) for n, i in tensors.items()))


def _mostly_floats(ingredients: Sequence[Ingredient]) -> dict[str, bool]:
    """Return, for each tensor, whether most of the ingredients that have it store it as floats."""
    votes: dict[str, Counter[bool]] = {}
    for ingredient in ingredients:
        for name, info in ingredient.tensors.items():
            votes.setdefault(name, Counter())[info.is_float] += 1
    return {name: counts.most_common(1)[0][0] for name, counts in votes.items()}


def _fault(ingredient: Ingredient, shapes: Shapes, whose: str, floats: Mapping[str, bool]) -> str:
    """Describe what does not fit in a bound ingredient, on several lines; empty if it fits."""
    lines = _differences(ingredient, shapes, whose, floats)
    return f"{ingredient.path} does not fit:{_shortened(lines)}" if lines else ""


def _shortened(lines: list[str]) -> str:
    more = [f"and {len(lines) - 6} more"] if len(lines) > 6 else []
    return "".join(f"\n    {line}" for line in lines[:6] + more)


def _differences(ingredient: Ingredient, shapes: Shapes, whose: str, floats: Mapping[str, bool]) -> list[str]:
    """List what does not fit in a bound ingredient, one line per difference."""
    tensors = ingredient.tensors
    if ingredient.unclear:
        return [ingredient.unclear]
    lines = [f"missing: {name} {list(shapes[name])}" for name in shapes if name not in tensors]
    lines += [f"not in {whose}: {name} {tensors[name]}" for name in tensors if name not in shapes]
    for name, info in tensors.items():
        if name in shapes and info.shape != shapes[name]:
            lines.append(f"shape: {name} is {list(info.shape)}, in {whose} {list(shapes[name])}")
        elif name in shapes and name in floats and info.is_float != floats[name]:
            expected = "floats" if floats[name] else "integers"
            lines.append(f"dtype: {name} is {info}, the other ingredients have {expected}")
    return lines


def _cure(ingredient: Ingredient, shapes: Shapes, advise: Advice | None) -> str:
    """Say more about a bound ingredient that does not fit: the closest names, the line to write, and the advice."""
    found = [name for name in ingredient.tensors if name not in shapes]
    missing = [name for name in shapes if name not in ingredient.tensors]
    if ingredient.unclear:
        return ""
    differs = found or missing or any(info.shape != shapes[name] for name, info in ingredient.tensors.items())
    advice, lines = advise(ingredient) if advise is not None and differs else "", []
    groups = groups_of(found)
    of_model = set(groups) & set(groups_of(shapes))  # more layers of the kind that the model has are no leftovers
    patterns = ", ".join(f'"{group}"' for group in groups)
    if found and not (missing or of_model or advice) and len(patterns) < 200:
        lines.append(f"If the model computes the same without them, write in the recipe\n    ignore: [{patterns}]")
    pairs = _closest({name: shapes[name] for name in missing}, {name: ingredient.tensors[name].shape for name in found})
    if pairs:
        lines.append(f"The closest names in {ingredient.path}:" + "".join(f"\n    {pair}" for pair in pairs))
    return "".join(f"\n{line}" for line in (*lines, advice) if line)


def _closest(missing: Shapes, found: Shapes) -> list[str]:
    """Return lines with names of the model that a file lacks and the most similar name in it, if possible of its shape."""
    lines = []
    for name, shape in list(missing.items())[:TRIED]:
        candidates = [other for other, its_shape in found.items() if its_shape == shape] or list(found)
        matcher = SequenceMatcher(b=name, autojunk=False)
        likeness = {}
        for other in candidates[:COMPARED]:
            matcher.set_seq1(other)
            likeness[other] = matcher.ratio() if matcher.quick_ratio() > ALIKE else 0.0
        best = max(likeness, key=lambda other: likeness[other], default="")
        if best and likeness[best] > ALIKE:
            lines.append(f"expected {name} {list(shape)}, found {best} {list(found[best])}")
        if len(lines) == PAIRS:
            break
    return lines


def check_floats(ingredients: Sequence[Ingredient], parameters: Iterable[str]) -> None:
    """Check that all parameters are floats. Raises IngredientError for one stored as integers."""
    for name in parameters:
        for ingredient in ingredients:
            if not ingredient.tensors[name].is_float:
                raise IngredientError(
                    f"{ingredient.path}: the parameter {name} is {ingredient.tensors[name]}; expected floats. A quantized "
                    "checkpoint cannot be mixed: use the checkpoint from before quantization."
                )


def check_finite(ingredients: Sequence[Ingredient], name: str, start: int, parts: Sequence[NDArray[Any]]) -> None:
    """Check that all elements read are finite. Raises IngredientError for the first ingredient with a non-finite one.

    Args:
        ingredients: the K ingredients.
        name: name of the tensor.
        start: index of the first element read.
        parts: float32 or float64 [n] for each ingredient, the elements `start` to `start + n` of its tensor.
    """
    for ingredient, part in zip(ingredients, parts, strict=True):
        wrong = np.flatnonzero(~np.isfinite(part))
        if len(wrong):
            raise IngredientError(
                f"{ingredient.path}: the tensor {name} contains {part[wrong[0]].item()} at element {start + int(wrong[0])}; "
                "expected finite values. The training run diverged: exclude this checkpoint."
            )


def common_dtype(ingredients: Sequence[Ingredient], name: str) -> str:
    """Return torch's name of the dtype in which the soup's tensor `name` is written: the widest among the ingredients."""
    names = list(dict.fromkeys(ingredient.tensors[name].dtype_name for ingredient in ingredients))
    if len(names) == 1:
        return names[0]
    return name_of(reduce(torch.promote_types, map(dtype_of, names)))

"""Check a finished soup of adapters: its tensors, its config, its base, and its products by other libraries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.adapters import CONFIG, MODEL, AdapterIngredient, open_adapter
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet, LiftedIngredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.adapter_bake import Form, outline, positions, scaled, soup_factors, soup_tensors, written_config
from ray_soup.mixing.coefficients import Coefficients, check_covers
from ray_soup.mixing.truncate import distance, truncated
from ray_soup.recipe import Recipe
from ray_soup.soups.records import RunRecord
from ray_soup.task.adapters import lift_finished

MODULES = 12
"""Number of modules whose product is computed from the files by other libraries."""
CLOSE = 8.0
"""Relative error of such a product, in units of the rounding of the dtype that was written."""


def lifted_ingredients(
    out: Path,
    recipe: Recipe,
    record: RunRecord,
    coefficients: Coefficients,
    adapters: Sequence[AdapterIngredient],
    names: Path,
) -> list[Ingredient]:
    """Lift the adapters of a finished soup, and check that base and coefficients are those of its run.

    Raises RecipeError or IngredientError.
    """
    found = lift_finished(recipe.model, adapters, recipe.ignore)
    group, known = found[0].group, record.get("base", {})
    if known.get("sha256") != group.base_sha256:
        raise IngredientError(
            f"{group.base.path}, the base, has changed since the soup was made: its SHA-256 is {group.base_sha256[:16]}..., "
            f"and was {str(known.get('sha256'))[:16]}... by {out / 'run.json'}. Restore the original files."
        )
    check_covers(coefficients, {name: info.shape for name, info in group.infos().items()}, names)
    lacking = next((name for name in group.infos() if name not in coefficients.block_of), None)
    if lacking is not None:
        raise RecipeError(f"{names} is for other adapters: it has no block for {lacking}. Restore the file of the same run.")
    return [*found]


def about_digest(record: RunRecord) -> str:
    """Return the line of `verify` about the base, which `lifted_ingredients` compared."""
    return f"the base {record['base']['path']} has the digest in run.json"


def compare_tensors(
    out: Path, recipe: Recipe, coefficients: Coefficients, ingredients: Sequence[Ingredient], progress: ProgressCallback
) -> int:
    """Recompute every tensor and the config, and compare them with those in `out`; return the number of tensors.

    Raises SoupError for the first that differs.
    """
    group, model = group_in(ingredients), open_adapter(str(out))
    form = Form(recipe.out_dtype, recipe.adapter.rank)
    shapes, dtypes = outline(coefficients, ingredients, group, form)
    cure = "Rebuild the model with ray-soup bake."
    there = {name: (info.shape, info.dtype) for name, info in model.tensors.items()}
    odd = next((n for n in {**shapes, **there} if there.get(n) != (shapes.get(n), dtypes.get(n))), None)
    if odd is not None:
        raise SoupError(f"{model.files[0]}: the tensor {odd} is not as coefficients and ingredients give it. {cure}")
    short = _compare_truncated(model, coefficients, ingredients, form)
    for done, (name, values) in enumerate(soup_tensors(coefficients, ingredients, group, form)):
        if name not in short and not torch.equal(values.view(torch.uint8), model.read(name).view(torch.uint8)):
            raise SoupError(
                f"{model.files[0]}: the tensor {name} differs from the one computed from coefficients and ingredients. "
                f"{cure}"
            )
        progress("comparing", done + 1, len(shapes))
    expected = written_config(group, positions(coefficients, ingredients), "", scaled(coefficients), form)
    found = {**model.config.values, "base_model_name_or_path": "", "revision": None}
    if json.dumps(found, sort_keys=True) != json.dumps(expected, sort_keys=True):
        raise SoupError(f"{out / CONFIG} is not the config of this soup. {cure}")
    return len(shapes)


def _compare_truncated(
    model: AdapterIngredient, coefficients: Coefficients, ingredients: Sequence[Ingredient], form: Form
) -> set[str]:
    """Check that truncated products are as near as their rank allows; return the names of their factors.

    Their bits depend on the library of linear algebra. Raises SoupError.
    """
    found: set[str] = set()
    for one, a, b in soup_factors(coefficients, ingredients, group_in(ingredients)) if form.rank else ():
        if form.rank_of(len(a)) == len(a):
            continue
        flat, infos = a.double().flatten(1), (model.tensors[one.a], model.tensors[one.b])
        _, _, lost, total = truncated(b, flat, form.rank_of(len(a)))
        have_a, have_b = (
            model.read(name).double().view(info.shape).flatten(1) for name, info in zip((one.a, one.b), infos, strict=True)
        )
        slack = CLOSE * max(torch.finfo(info.dtype).eps for info in infos) * math.sqrt(total)
        error = distance(b, flat, have_b, have_a)
        if not error <= math.sqrt(lost) * (1 + 1e-6) + slack:
            raise SoupError(
                f"{model.files[0]}: the product of {one.b} differs by {error:.3e} from that of the ingredients; its rank "
                f"allows {math.sqrt(lost):.3e}. Rebuild the model with ray-soup bake."
            )
        found |= {one.a, one.b}
    return found


def group_in(ingredients: Sequence[Ingredient]) -> AdapterSet:
    """Return the set that lifted ingredients belong to."""
    first = ingredients[0]
    assert isinstance(first, LiftedIngredient)
    return first.group


def compare_products(out: Path, recipe: Recipe, coefficients: Coefficients, ingredients: Sequence[Ingredient]) -> int | None:
    """Compare products B A of the soup with sum_k c_k s_k B_k A_k, of factors that safetensors and torch load, in NumPy.

    Truncated products are not compared. Returns the number of modules compared; None if an ingredient is in remote
    storage. Raises SoupError for a product that differs by more than the rounding of what was written.
    """
    group = group_in(ingredients)
    if any(storage.is_remote(file) for adapter in group.adapters for file in adapter.files):
        return None
    from safetensors.torch import load_file

    soup = load_file(out / MODEL)
    form, used = Form(rank=recipe.adapter.rank), positions(coefficients, ingredients)
    exact = {m: sum(one.ranks[k] for k in used) for m, one in group.modules.items() if one.b in soup}
    modules = sorted((m for m, rank in exact.items() if form.rank_of(rank) == rank), key=lambda m: exact[m])
    picks = (
        [modules[int(n)] for n in np.linspace(0, len(modules) - 1, min(MODULES, len(modules))).round()] if modules else []
    )
    sums = {module: np.zeros(1) for module in picks}
    sizes = dict.fromkeys(picks, 0.0)
    for n, ingredient in enumerate(ingredients):
        adapter = group.adapters[ingredient.position]  # type: ignore[attr-defined] # of a lifted ingredient
        tensors = _loaded(adapter.files[0])
        for module in picks:
            if module in adapter.pairs:
                pair = adapter.pairs[module]
                c = float(coefficients.of(group.modules[module].b)[n])
                product = c * pair.scale * _product(tensors[pair.b], tensors[pair.a])
                sums[module] = sums[module] + product
                sizes[module] += float(np.linalg.norm(product))
    for module in dict.fromkeys(picks):
        one = group.modules[module]
        found = _product(soup[one.b], soup[one.a])
        slack = CLOSE * max(torch.finfo(soup[name].dtype).eps for name in (one.a, one.b)) * sizes[module]
        error = float(np.linalg.norm(found - sums[module]))
        if not error <= slack:
            raise SoupError(
                f"{out / MODEL}: the product B A of {module} differs by {error:.1e} from that of the ingredients, as their "
                f"own libraries load them; rounding explains {slack:.1e}. Rebuild the model with ray-soup bake."
            )
    return len(dict.fromkeys(picks))


def _loaded(file: str) -> Mapping[str, Any]:
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    found: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _product(b: torch.Tensor, a: torch.Tensor) -> np.ndarray:
    """Return B A, float64 [outputs, inputs]."""
    product: np.ndarray = b.double().flatten(1).numpy() @ a.double().flatten(1).numpy()
    return product

"""Exact baking of a soup of adapters: one adapter whose product is the weighted sum of the products.

    A = the rows of A_k of the adapters used,    B = [c_k s_k B_k of the same adapters],    scale 1

Rounding: c_k s_k B_k is computed in float64 and rounded once, to the dtype that is written; A is copied. Ranks add up, and
adapters whose coefficients are all 0 are left out; a smaller rank is made by truncation (mixing.truncate). Whole tensors are
weighted sums, as in mixing.bake.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_soup.errors import IngredientError
from ray_soup.io.adapters import CONFIG, MODEL, PREFIX, AdapterConfig
from ray_soup.io.disk import write_bytes
from ray_soup.io.formats import name_of
from ray_soup.io.hub_path import HubPath, is_hub
from ray_soup.io.ingredient import Ingredient, check_unchanged
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet, LiftedModule, WholeTensor
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.mixing.bake import RANGE, as_tensor, mix_range, too_large
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.shard_files import ShardWriter, plan_files
from ray_soup.mixing.truncate import truncated


@dataclass(frozen=True)
class Form:
    """What a soup of adapters is written as."""

    out_dtype: str = "keep"
    """Dtype of the tensors, or `keep` for the widest among the ingredients."""
    rank: int | None = None
    """Largest rank of a module, to which larger ones are truncated (mixing.truncate); None: exact, the sum of the ranks."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of all tensors; None for the widest of each."""
        found: torch.dtype | None = None if self.out_dtype == "keep" else getattr(torch, self.out_dtype)
        return found

    def rank_of(self, exact: int) -> int:
        """Return the rank that is written for a module whose ranks add up to `exact`."""
        return exact if self.rank is None else min(exact, self.rank)


def bake_adapter(
    coefficients: Coefficients,
    ingredients: Sequence[Ingredient],
    group: AdapterSet,
    folder: Path,
    progress: CountCallback = no_count,
    form: Form | None = None,
) -> Path:
    """Write the soup as an adapter of PEFT: adapter_model.safetensors and adapter_config.json in `folder`.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: the K lifted ingredients that they are for.
        group: the set that these belong to.
        folder: where the files are written.
        progress: called with the tensors written so far and in total.
        form: dtype and rank to write.

    Returns:
        The file of weights.

    Raises SoupError if the files cannot be written, IngredientError if a value is not finite or an ingredient has changed.
    """
    path, form = folder / MODEL, form or Form()
    shapes, dtypes = outline(coefficients, ingredients, group, form)
    files = plan_files(shapes, {name: name_of(dtype) for name, dtype in dtypes.items()}, path, None, {})
    try:
        with files.removed_on_error():
            with ShardWriter(files) as writer:
                for done, (name, tensor) in enumerate(soup_tensors(coefficients, ingredients, group, form)):
                    writer.write(name, 0, tensor)
                    progress(done + 1, len(shapes))
                writer.sync()
            check_unchanged(ingredients)
            used = positions(coefficients, ingredients)
            values = written_config(group, used, group.base.path, scaled(coefficients), form)
            text = json.dumps(values, indent=2, sort_keys=True)
            write_bytes(folder / CONFIG, text.encode())
            return path
    finally:
        group.close()


def positions(coefficients: Coefficients, ingredients: Sequence[Ingredient]) -> list[int]:
    """Return the positions in the set of the ingredients that have a nonzero coefficient."""
    return [_position(ingredients[k]) for k in coefficients.used()]


def _position(ingredient: Ingredient) -> int:
    position: int = ingredient.position  # type: ignore[attr-defined] # of a lifted ingredient
    return position


def outline(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet, form: Form
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype]]:
    """Return the shapes and the dtypes of the tensors of a soup, by name."""
    used = positions(coefficients, ingredients)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for one in _modules(group, used).values():
        rank = form.rank_of(sum(one.ranks[k] for k in used))
        shapes |= {one.a: (rank, *one.a_shape[1:]), one.b: (one.b_shape[0], rank, *one.b_shape[2:])}
        dtypes |= {one.a: form.dtype or one.a_dtype, one.b: form.dtype or one.b_dtype}
    for name, tensor in _whole(group, used, scaled(coefficients)).items():
        shapes[name], dtypes[name] = tensor.shape, form.dtype or tensor.dtype
    return shapes, dtypes


def soup_factors(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet
) -> Iterator[tuple[LiftedModule, torch.Tensor, torch.Tensor]]:
    """Compute the factors of a soup, module by module: A [r, ...] copied, and B float64 [outputs, r] with scale and c_k.

    Raises IngredientError if a value is not finite.
    """
    for module, one in _modules(group, positions(coefficients, ingredients)).items():
        yield one, *factors_of(coefficients, ingredients, group, module)


def factors_of(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet, module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the factors A and B of one module of a soup, as `soup_factors` does."""
    used, one = positions(coefficients, ingredients), group.modules[module]
    factor_of = {_position(i): n for n, i in enumerate(ingredients)}
    owners, c = [k for k in used if one.ranks[k]], coefficients.of(one.b)
    a = [finite(group.factor_a(module, k), group, k, one.a).to(one.a_dtype) for k in owners]
    b = [finite(group.factor_b(module, k), group, k, one.b) * c[factor_of[k]] for k in owners]
    return torch.cat(a), torch.cat(b, dim=1)


def soup_tensors(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet, form: Form
) -> Iterator[tuple[str, torch.Tensor]]:
    """Compute the tensors of a soup one after another: (name, values [elements] in the dtype that is written).

    Raises IngredientError if a value is not finite.
    """
    used = positions(coefficients, ingredients)
    dtypes = outline(coefficients, ingredients, group, form)[1]
    for one, a, b in soup_factors(coefficients, ingredients, group):
        if form.rank_of(len(a)) < len(a):
            b, a = truncated(b, a.double().flatten(1), form.rank_of(len(a)))[:2]
        for name, values in ((one.a, a.to(dtypes[one.a])), (one.b, b.to(dtypes[one.b]))):
            if not torch.isfinite(values).all():
                raise too_large(name, name_of(dtypes[name]))
            yield name, values.reshape(-1)
    lifted_names = {tensor.base: name for name, tensor in group.whole.items()}
    for name, tensor in _whole(group, used, scaled(coefficients)).items():
        own = lifted_names[tensor.base]
        out = torch.empty(math.prod(tensor.shape), dtype=dtypes[name])
        for start in range(0, len(out), RANGE):
            stop = min(start + RANGE, len(out))
            out[start:stop] = as_tensor(
                mix_range(ingredients, own, coefficients.of(own), start, stop, name_of(dtypes[name]))
            )
        yield name, out


def relative_error(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], group: AdapterSet, form: Form
) -> float | None:
    """Return the Frobenius norm of what truncation leaves out of all products, relative to theirs; None if it is exact."""
    lost, total, found = 0.0, 0.0, False
    for _, a, b in soup_factors(coefficients, ingredients, group) if form.rank else ():
        found = found or form.rank_of(len(a)) < len(a)
        out, whole = truncated(b, a.double().flatten(1), form.rank_of(len(a)))[2:]
        lost, total = lost + out, total + whole
    return math.sqrt(lost / total) if found and total else None


def finite(values: torch.Tensor, group: AdapterSet, k: int | None, name: str) -> torch.Tensor:
    """Return the values if all are finite, of adapter k or of the base (None). Raises IngredientError."""
    if not torch.isfinite(values).all():
        if k is None:
            raise IngredientError(f"{group.base.path}, the base: {name} contains values that are not finite. Use another.")
        raise IngredientError(
            f"{group.adapters[k].path}: the tensor {name} contains values that are not finite. The training run diverged: "
            "exclude this adapter."
        )
    return values


def _modules(group: AdapterSet, used: Sequence[int]) -> dict[str, LiftedModule]:
    """Return the modules that the adapters `used` change."""
    return {module: one for module, one in group.modules.items() if any(one.ranks[k] for k in used)}


def scaled(coefficients: Coefficients) -> tuple[str, ...]:
    """Return the whole tensors that a learned factor on the logits is multiplied into."""
    return coefficients.factored if coefficients.factor != 1 else ()


def _whole(group: AdapterSet, used: Sequence[int], others: Collection[str]) -> dict[str, WholeTensor]:
    """Return the whole tensors that the adapters `used` contain, and `others`, by their names in the soup's file."""
    modules, found = _modules(group, used), {}
    for name, tensor in group.whole.items():
        module, _, last = tensor.base.rpartition(".")
        if name in others or any(tensor.stored[k] is not None for k in used):
            inside = module in modules and not tensor.saved
            found[f"{PREFIX}{module}.base_layer.{last}" if inside else PREFIX + tensor.base] = tensor
    return found


def written_config(
    group: AdapterSet, used: Sequence[int], base: str, others: Collection[str] = (), form: Form | None = None
) -> dict[str, Any]:
    """Return the adapter_config.json of a soup of the adapters `used`, with scale 1 for every module.

    Args:
        group: the set of adapters.
        used: positions of the adapters in it.
        base: the path of the base, or its hf:// path with the commit.
        others: whole tensors that the soup contains even if no adapter in `used` does.
        form: the rank that was written.
    """
    form = form or Form()
    ranks = {module: form.rank_of(sum(one.ranks[k] for k in used)) for module, one in _modules(group, used).items()}
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    configs = [group.adapters[k].config for k in used]
    biases = {str(c.values.get("bias") or "none") for c in configs}
    whole = [tensor for tensor in _whole(group, used, others).values() if tensor.saved]
    owners = [group.adapters[k].config for k in sorted({k for tensor in whole for k in tensor.owners})]
    ends = dict.fromkeys(end for config in owners for end in config.modules_to_save)
    saved = [end for end in ends if any(AdapterConfig("", {"modules_to_save": [end]}).saves(t.base) for t in whole)]
    tasks = {c.values.get("task_type") for c in configs}
    name, revision = _base_for_peft(base)
    return {
        "peft_type": "LORA",
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": name,
        "revision": revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": unusual,
        "use_rslora": False,
        "target_modules": _targets(group, ranks),
        "modules_to_save": saved or None,
        "bias": "none" if biases == {"none"} else "all" if "all" in biases else "lora_only",
        "fan_in_fan_out": any(bool(c.values.get("fan_in_fan_out")) for c in configs),
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _base_for_peft(base: str) -> tuple[str, str | None]:
    """Return the name and the revision by which PEFT finds a base: those on the Hub if it is a repository there."""
    if not is_hub(base) or (where := HubPath.parse(base)).inside:  # PEFT has no word for a folder in a repository
        return base, None
    return where.repo, where.revision


def _targets(group: AdapterSet, ranks: dict[str, int]) -> list[str] | str:
    """Return target_modules for exactly these modules of the base.

    These are the last parts of their names if no other module of the base has one of them, otherwise an expression.
    """
    ends = sorted({module.rpartition(".")[2] for module in ranks})
    modules = {name.rpartition(".")[0] for name in group.base.tensors}
    parts = {".".join(m.split(".")[:end]) for m in modules for end in range(1, m.count(".") + 2)} | set(group.modules)
    if ends and {m for m in parts if m.rpartition(".")[2] in ends} == set(ranks):
        return ends
    return "|".join(re.escape(module) for module in sorted(ranks)) or "(?!)"


def remove_adapter(folder: Path) -> None:
    """Delete the files that `bake_adapter` wrote into a folder."""
    for name in (MODEL, CONFIG):
        (folder / name).unlink(missing_ok=True)


def is_adapter_folder(folder: Path) -> bool:
    """Return whether a folder contains an adapter."""
    return os.path.lexists(folder / CONFIG)

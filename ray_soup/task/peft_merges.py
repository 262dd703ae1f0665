"""PEFT's own merges of adapters with equal weights (`add_weighted_adapter`), to compare soups with.

    linear   A = sum_k sqrt(s_k / K) A_k,  B = sum_k sqrt(s_k / K) B_k: a product of sums, which has cross terms
    cat      the factors side by side: the uniform soup
    svd      the largest singular vectors of sum_k s_k B_k A_k / K, as many as the largest rank
    ties     of A and of B, the largest fifth of each adapter's elements, averaged where signs agree (Yadav et al. 2023)

TIES itself divides by the number of adapters, so that its weights are 1; those of the others are 1 / K.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray_soup.io.adapters import AdapterIngredient
from ray_soup.io.lazy import torch
from ray_soup.io.lifting import AdapterSet
from ray_soup.task.functions import as_in_workers
from ray_soup.task.models import build
from ray_soup.task.peft_models import import_peft

DENSITY = 0.2
"""Share of elements that TIES keeps, as in its paper."""
MOST_SVD = 1e12
"""Largest sum of m n min(m, n) over all changed matrices [m, n] for which PEFT decomposes them: some minutes."""
MERGED = "merged"


class NoMergeError(ValueError):
    """PEFT does not make this merge; the text says why."""


def merge_with_peft(spec: str, group: AdapterSet, kind: str, folder: Path) -> Path:
    """Let PEFT merge all adapters of a set, and save the result.

    Args:
        spec: the recipe key `model`, their base.
        group: the adapters.
        kind: linear, cat, svd or ties.
        folder: a new folder below which PEFT writes.

    Returns:
        The folder of the adapter.

    Raises NoMergeError if PEFT refuses these adapters, or would leave out something of them.
    """
    peft = import_peft()
    _check(group, kind)
    count = len(group.adapters)
    names, weights = [f"adapter{k}" for k in range(count)], [1.0 if kind == "ties" else 1 / count] * count
    try:
        with as_in_workers(), warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            torch.manual_seed(0)  # PEFT multiplies random factors by 0, which leaves their signs
            model: Any = None
            for name, adapter in zip(names, group.adapters, strict=True):
                scales = {module: 1.0 if kind == "svd" else pair.scale for module, pair in adapter.pairs.items()}
                config = _plain_config(peft, adapter, scales)
                if model is None:
                    model = peft.get_peft_model(_base(spec), config, adapter_name=name)
                else:
                    model.add_adapter(name, config)
                tensors = _factors(adapter, scales)
                peft.set_peft_model_state_dict(model, tensors, adapter_name=name)
                adapter.close()
                _check_scales(model, name, adapter, scales)
            more = {"density": DENSITY} if kind == "ties" else {"svd_full_matrices": False} if kind == "svd" else {}
            model.add_weighted_adapter(names, weights, MERGED, kind, **more)
            for name, parameter in model.named_parameters():
                if name.endswith((f".{MERGED}", f".{MERGED}.weight")):
                    parameter.data = parameter.data.contiguous()  # safetensors takes no others
            model.save_pretrained(str(folder), selected_adapters=[MERGED], save_embedding_layers=False)
    except NoMergeError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
        reason = str(error).partition("\n")[0][:200].rstrip(".")
        raise NoMergeError(f"PEFT {peft.__version__} refuses such a merge ({reason})") from error
    return folder / MERGED


def _check(group: AdapterSet, kind: str) -> None:
    """Check that PEFT's merge would be of all that the adapters contain, and takes minutes at most. Raises NoMergeError."""
    whole = next((t for name, t in group.whole.items() if t.saved or not _is_base(group, name)), None)
    if whole is not None:
        raise NoMergeError(f"PEFT merges factors only, and adapters contain {whole.base} whole")
    sizes = [(one.b_shape[0], math.prod(one.a_shape[1:])) for one in group.modules.values()]
    if kind == "svd" and (work := sum(m * n * min(m, n) for m, n in sizes)) > MOST_SVD:
        raise NoMergeError(f"PEFT decomposes each whole change of weights, here {len(sizes)} with {work:.0e} operations")


def _is_base(group: AdapterSet, name: str) -> bool:
    """Return whether a whole tensor is that of the base in all adapters: PEFT saves it with the factors of embeddings."""
    base, count = group.base_of(name), len(group.adapters)
    return all(torch.equal(group.whole_of(name, k).to(base.dtype), base) for k in range(count))


def _factors(adapter: AdapterIngredient, scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Read the factors of an adapter by their names; B is multiplied by what `scales` lacks."""
    found: dict[str, torch.Tensor] = {}
    for module, pair in adapter.pairs.items():
        a, b = (adapter.read(name).view(adapter.tensors[name].shape) for name in (pair.a, pair.b))
        found |= {pair.a: a, pair.b: b if scales[module] == pair.scale else b.float() * (pair.scale / scales[module])}
    return found


def _plain_config(peft: Any, adapter: AdapterIngredient, scales: Mapping[str, float]) -> Any:
    """Return a config for an adapter with these scales, without rsLoRA: PEFT would keep that of the first for the merge.

    Of `svd`, old versions of PEFT apply scales twice: they must be 1, and B contains them.
    """
    values = adapter.config.values
    ranks = {name: pair.rank for name, pair in adapter.pairs.items()}
    alphas = {name: pair.rank * scales[name] for name, pair in adapter.pairs.items()}
    largest, usual = max(ranks.values()), Counter(alphas.values()).most_common(1)[0][0]
    plain = {
        "r": largest,  # which old versions of PEFT take for that of all modules
        "lora_alpha": usual,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != largest},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != usual},
        "target_modules": values.get("target_modules"),
        "fan_in_fan_out": bool(values.get("fan_in_fan_out")),
        "layers_to_transform": values.get("layers_to_transform"),
        "layers_pattern": values.get("layers_pattern"),
        "exclude_modules": values.get("exclude_modules"),
    }
    known = {key: value for key, value in plain.items() if value is not None}
    return peft.LoraConfig(**known)


def _check_scales(model: Any, name: str, adapter: AdapterIngredient, scales: Mapping[str, float]) -> None:
    """Check that PEFT scales each product by the value in `scales`. Raises NoMergeError."""
    modules = dict(model.base_model.model.named_modules())
    for module, scale in scales.items():
        if not math.isclose(modules[module].scaling[name], scale, rel_tol=1e-9):
            raise NoMergeError(f"PEFT would scale {module} of {adapter.path} in another way")


def _base(spec: str) -> torch.nn.Module:
    """Return the base without its weights, which no merge reads: each parameter is one zero, seen with the right shape."""
    with torch.device("meta"):
        base = build(spec).model
    zero = torch.zeros(())
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
    return base

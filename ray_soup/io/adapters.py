"""LoRA adapters of PEFT: folders with adapter_config.json and adapter_model.safetensors or adapter_model.bin.

    W_m + s_m B_m A_m,    s_m = alpha_m / r_m,  or alpha_m / sqrt(r_m) with use_rslora

for each target module m: A [r, inputs], B [outputs, r]. An adapter may also contain whole tensors of its base: of
`modules_to_save`, trained biases, and embeddings. Settings whose effect is anything else are refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from ray_soup.errors import IngredientError
from ray_soup.io import storage
from ray_soup.io.checkpoint_files import ADAPTER_CONFIG, ADAPTER_FILES, checkpoint_of, split_key, stem
from ray_soup.io.formats import TensorInfo
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.json_files import read_json
from ray_soup.io.mapped import version_of
from ray_soup.io.tensor_files import open_tensors

CONFIG, MODEL, WEIGHTS = ADAPTER_CONFIG, ADAPTER_FILES[0], ADAPTER_FILES
"""The files of an adapter: its settings, its weights, and the names that its weights may have."""
PREFIX = "base_model.model."
"""What PEFT puts in front of the names of a base model."""
PAIR = re.compile(r"base_model\.model\.(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))")
MOST_RANK = 1 << 16
HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Settings that are read here, or that change nothing once an adapter is trained."""
REFUSED = {
    "use_dora": "DoRA, which also learns the length of each column of a weight: a sum of such adapters is none",
    "layer_replication": "a base whose layers are repeated",
    "loftq_config": "LoftQ, which changes the weights of the base",
    "megatron_config": "layers of Megatron",
    "target_parameters": "parameters that are no modules",
    "alora_invocation_tokens": "an activated LoRA, which acts on some tokens only",
    "trainable_token_indices": "single rows of an embedding",
    "lora_bias": "a bias of B",
    "use_qalora": "QALoRA",
    "ensure_weight_tying": "tied adapters",
}
"""Settings that are refused, and what they mean."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that do not change the weights of the base."""


def adapter_file(path: str) -> str | None:
    """Return the file of weights of the adapter at `path`, a folder or this file; None if it is no adapter.

    The file adapter_config.json beside it decides. Raises IngredientError for a folder that also contains a whole model.
    """
    path = split_key(path)[0]
    file = checkpoint_of(path)
    if file is None or not storage.isfile(storage.join(_folder_of(file), CONFIG)):
        return None
    name = os.path.basename(file)
    if name in WEIGHTS:
        return file
    if file.rstrip("/") == path.rstrip("/"):  # the user named this file
        return None
    raise IngredientError(
        f"{path} contains two models: {name}, and an adapter ({CONFIG}). Remove the one that you do not want, or list the "
        "file that you want."
    )


def _folder_of(file: str) -> str:
    return file.rpartition("/")[0] or ("/" if file.startswith("/") else ".")


@dataclass(frozen=True)
class AdapterConfig:
    """The content of an adapter_config.json, checked."""

    path: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base that the adapter was trained on, as PEFT noted it; often empty."""
        return str(self.values.get("base_model_name_or_path") or "")

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """The ends of the names of modules that are trained and saved whole."""
        return tuple(self.values.get("modules_to_save") or ())

    def rank(self, module: str) -> int:
        """Return the rank that the config states for a module."""
        return int(self._of(module, "rank_pattern", "r"))

    def scale(self, module: str, rank: int) -> float:
        """Return s, the factor of B A, for a module of this rank."""
        alpha = float(self._of(module, "alpha_pattern", "lora_alpha"))
        return alpha / math.sqrt(rank) if self.values.get("use_rslora") else alpha / rank

    def _of(self, module: str, patterns: str, default: str) -> float:
        """Return the value of the first pattern that matches a module, as PEFT finds it, otherwise the default."""
        found: Mapping[str, float] = self.values.get(patterns) or {}
        return next((v for key, v in found.items() if re.match(rf"(.*\.)?({key})$", module)), self.values.get(default, 8))

    def saves(self, tensor: str) -> bool:
        """Return whether a tensor of the base belongs to a module in `modules_to_save`."""
        parts = tensor.split(".")
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return any(module.endswith(end) for module in modules for end in self.modules_to_save)


def read_config(path: str) -> AdapterConfig:
    """Read and check an adapter_config.json. Raises IngredientError."""
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"found a {type(values).__name__}; expected settings by name")
        _check_values(values)
    except (ValueError, TypeError, OSError, re.error) as error:
        raise IngredientError(f"{path} is damaged ({error}). Copy the adapter's folder again.") from error
    kind = values.get("peft_type")
    if kind != "LORA":
        raise IngredientError(
            f"{path}: peft_type is {kind}; expected LORA, the only kind of adapter that can be mixed. Merge it into its "
            "base (peft: merge_and_unload()) and mix the whole models, or exclude it."
        )
    odd = next((key for key, value in values.items() if value and key not in HARMLESS), None)
    if odd is not None:
        what = REFUSED.get(odd, "a setting that is not known here")
        raise IngredientError(
            f"{path}: {odd} is {str(values[odd])[:80]} ({what}); expected plain LoRA. Merge the adapter into its base "
            "(peft: merge_and_unload()) and mix the whole models, or exclude it."
        )
    start = values.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise IngredientError(
            f"{path}: init_lora_weights is {start}, by which the training changed the weights of the base; expected an "
            "adapter of the unchanged base. Save it with PEFT's path_initial_model_for_weight_conversion, or exclude it."
        )
    return AdapterConfig(path, values)


def _check_values(values: Mapping[str, Any]) -> None:
    """Check the types of the settings that are read here. Raises ValueError."""
    for key in ("r", "lora_alpha"):
        _check_number(key, values.get(key))
    for key in ("rank_pattern", "alpha_pattern"):
        found = values.get(key) or {}
        if not isinstance(found, dict):
            raise ValueError(f"{key} is {str(found)[:80]}; expected numbers by the names of modules")
        for name, value in found.items():
            re.compile(name)
            _check_number(f"{key}.{name}", value)
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ValueError(f"modules_to_save is {str(saved)[:80]}; expected a list of names")
    if values.get("bias", "none") not in ("none", "all", "lora_only"):
        raise ValueError(f"bias is {str(values['bias'])[:80]}; expected none, all or lora_only")
    task = values.get("task_type")
    if not isinstance(task, (str, type(None))):
        raise ValueError(f"task_type is {str(task)[:80]}; expected a name")
    targets = values.get("target_modules")
    if not isinstance(targets, (str, list, type(None))):
        raise ValueError(f"target_modules is {str(targets)[:80]}; expected names")
    if not isinstance(values.get("use_rslora") or False, bool):
        raise ValueError(f"use_rslora is {str(values['use_rslora'])[:80]}; expected true or false")


def _check_number(key: str, value: Any) -> None:
    rank = key.startswith("r")
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not fits or (rank and (value != int(value) or value > MOST_RANK)):
        raise ValueError(f"{key} is {value!r}; expected a positive {'integer' if rank else 'number'}")


@dataclass(frozen=True)
class Pair:
    """The two factors of one module in an adapter."""

    a: str
    """Name of A in the file."""
    b: str
    """Name of B in the file."""
    rank: int
    scale: float
    """s, the factor of B A."""


@dataclass(frozen=True)
class AdapterIngredient(Ingredient):
    """An adapter: its tensors under the names of its file. It is mixed as part of a set, by io.lifting."""

    config: AdapterConfig = field(default_factory=AdapterConfig)

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """The factors by the name of the module in the base. Raises IngredientError if they do not fit the config."""
        sides: dict[str, dict[str, str]] = {}
        for name in self.tensors:
            found = PAIR.fullmatch(name)
            if found is not None:
                sides.setdefault(found[1], {})[found[2] or found[3]] = name
        return {module: self._pair(module, names) for module, names in sides.items()}

    def _pair(self, module: str, names: Mapping[str, str]) -> Pair:
        for side in "AB":
            if side not in names:
                other = next(iter(names.values()))
                raise IngredientError(
                    f"{self.files[0]} lacks the factor {side} of {module}: found {other} alone. Save the adapter again."
                )
        a, b = self.tensors[names["A"]], self.tensors[names["B"]]
        rank = self.config.rank(module)
        fits = len(a.shape) == len(b.shape) and len(a.shape) in (2, 4) and a.shape[0] == b.shape[1] and min(b.shape) > 0
        if not fits or a.numel == 0 or math.prod(b.shape[2:]) != 1:
            raise IngredientError(
                f"{self.files[0]}: the factors of {module} are {list(a.shape)} and {list(b.shape)}; expected [r, inputs] "
                "and [outputs, r]. Save the adapter again from one process."
            )
        if a.shape[0] != rank:
            raise IngredientError(
                f"{self.files[0]}: the factors of {module} have rank {a.shape[0]}, but {self.config.path} states {rank}: "
                "the files belong to different adapters. Copy both of them again."
            )
        return Pair(names["A"], names["B"], rank, self.config.scale(module, rank))

    @cached_property
    def whole(self) -> dict[str, str]:
        """The names in the file of whole tensors of the base, by their names in the base."""
        found: dict[str, str] = {}
        for name in self.tensors:
            if PAIR.fullmatch(name) is None:
                if not name.startswith(PREFIX) or "lora_" in name:
                    raise IngredientError(
                        f"{self.files[0]} contains {name}; expected the tensors of a LoRA adapter, as PEFT saves them "
                        f"({PREFIX}MODULE.lora_A.weight). Save it with save_pretrained."
                    )
                found[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = name
        return found


def open_adapter(path: str, name: str | None = None) -> AdapterIngredient:
    """Open an adapter without reading its tensors. Raises IngredientError if it is broken, or cannot be mixed."""
    file = adapter_file(path)
    if file is None:
        raise IngredientError(f"{path} is not an adapter: expected a folder with {CONFIG} and {MODEL}. Check the path.")
    config = read_config(storage.join(_folder_of(file), CONFIG))
    stats = [storage.stat(f) for f in (file, config.path)]
    opened = open_tensors(file, stats[0].size, headers_only=True)
    tensors = _tensors(file, opened.describe(0))
    seen = {0: opened.version} if opened.version is not None else {}
    if not storage.is_remote(config.path):
        seen[1] = version_of(config.path)
    made = AdapterIngredient(
        name or stem(path), path, (file, config.path), tuple(s.size for s in stats), tuple(s.version for s in stats),
        {"": tensors}, tensors, metadata=opened.metadata, _seen=seen, config=config,
    )  # fmt: skip
    if not made.pairs and not made.whole:
        raise IngredientError(f"{file} contains no tensors. Save the adapter again.")
    return made


def _tensors(file: str, described: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
    tensors = dict(described.get("", next(iter(described.values()), {})))
    wrong = next((name for name, info in tensors.items() if not info.is_float), None)
    if wrong is not None:
        raise IngredientError(
            f"{file}: the tensor {wrong} is {tensors[wrong]}; expected floats. Save the adapter without quantizing it."
        )
    return tensors


def open_checkpoint(path: str, name: str | None = None) -> Ingredient:
    """Open an adapter, or a checkpoint of a whole model, as `open_ingredient` does."""
    return open_adapter(path, name) if adapter_file(path) is not None else open_ingredient(path, name)


def adapters_among(ingredients: Iterable[Ingredient]) -> tuple[AdapterIngredient, ...]:
    """Return the ingredients if they are adapters; empty if they are whole models. Raises IngredientError for a mixture."""
    found = list(ingredients)
    adapters = tuple(i for i in found if isinstance(i, AdapterIngredient))
    if adapters and len(adapters) < len(found):
        whole = next(i for i in found if not isinstance(i, AdapterIngredient))
        raise IngredientError(
            f"{adapters[0].path} is an adapter and {whole.path} a whole model; expected ingredients of one kind. Exclude "
            "one kind, or merge the adapters into their base."
        )
    return adapters


def as_kind(ingredient: Ingredient, kind: type[Ingredient], **more: Any) -> dict[str, Any]:
    """Return the fields of an ingredient, as arguments for a class derived from it, with some changed or added."""
    known = {f.name for f in fields(kind)}
    return {**{f.name: getattr(ingredient, f.name) for f in fields(ingredient) if f.name in known}, **more}

"""A base model of transformers with the factors of all adapters of a run, built by PEFT itself.

The base is frozen and not part of the parameter vector. The parameters of the model are the tensors of an adapter, under
the names that they have in its file; the factors of all adapters stand side by side (io.lifting), with a scale of 1.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.adapters import AdapterConfig, AdapterIngredient, adapter_file, open_adapter
from ray_soup.io.check import check_finite
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lifting import AdapterSet, group_of
from ray_soup.mixing.adapter_bake import written_config
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.mixing.truncate import truncated
from ray_soup.task.functions import as_in_workers
from ray_soup.task.libraries import BuiltModel
from ray_soup.task.models import build
from ray_soup.task.whole_file import WholeFile

NO_LOSS = 1e-12
"""Share of the squares of a product that is rounding error, and not of a larger rank."""
NAME = "default"
"""The name that PEFT gives to the only adapter of a model."""


def import_peft() -> Any:
    """Import the library peft. Raises RecipeError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError(
            f"ingredients: LoRA adapters need the library peft, which cannot be imported ({error}). Install it: pip install "
            "'ray_soup[peft]'"
        ) from error
    return peft


class AdaptedModel(torch.nn.Module):
    """A model whose parameters are those of its adapter; it computes with the whole model, base included.

    Its state dict is that of an adapter's file. The modules of the base are hidden from `parameters` and `state_dict`.
    """

    def __init__(self, base: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], group: AdapterSet) -> None:
        """Wrap `base`, into which PEFT has put the factors `parameters`, by their names in a file."""
        super().__init__()
        self.__dict__["base"] = base  # not as a submodule
        self.group = group
        self._merged: WholeFile | None = None
        self.config = base.config
        for name, parameter in parameters.items():
            owner: Any = self
            *path, last = name.split(".")
            for part in path:
                owner = owner._modules.setdefault(part, torch.nn.Module())
            owner._parameters[last] = parameter

    @property
    def computing(self) -> torch.nn.Module:
        """The whole model, with the modules that compute."""
        base: torch.nn.Module = self.__dict__["base"]
        return base

    def get_output_embeddings(self) -> Any:
        """Return the output layer, as a model of transformers does; None if it has none."""
        return getattr(self.__dict__["base"], "get_output_embeddings", lambda: None)()

    @property
    def frozen_numel(self) -> int:
        """The number of parameters of the base."""
        own = {id(p) for p in self.parameters()}
        return sum(p.numel() for p in self.__dict__["base"].parameters() if id(p) not in own)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the whole model returns."""
        return self.__dict__["base"](*inputs, **named)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AdaptedModel:
        self.__dict__["base"]._apply(fn, recurse)  # the parameters are shared
        return self

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode of the whole model."""
        self.__dict__["base"].train(mode)
        return super().train(mode)

    def __repr__(self) -> str:
        """Show the whole model, PEFT and the base's weights, because the fingerprint is computed from the printed model."""
        return f"peft {import_peft().__version__}, base {self.group.base_sha256}\n{self.__dict__['base']!r}"

    def restore(self) -> None:
        """Put the weights of the base back, if a merged model was loaded in their place."""
        if self._merged is not None:
            self._merged.restore()
            self._merged = None

    def load_adapter_file(self, path: str) -> None:
        """Fill in the parameters, in place, from the adapter at `path`, whose ranks may be smaller.

        If there is a whole model at `path`, into which adapters were merged, it takes the place of the base until `restore`.
        Raises IngredientError if it does not fit.
        """
        if adapter_file(path) is None:
            self._merged = WholeFile(self.computing, self.group, path)
            return
        adapter, group, state = open_adapter(path), self.group, dict(self.named_parameters())
        whole = group.whole_in(adapter)
        unknown = [*(m for m in adapter.pairs if m not in group.modules)]
        known = {tensor.base: name for name, tensor in group.whole.items()}
        unknown += [name for name in whole if name not in known]
        if unknown:
            raise IngredientError(
                f"{adapter.files[0]} changes {unknown[0]}, which no ingredient of this run does. Use an adapter of this run."
            )
        with torch.no_grad():
            for module, lifted in group.modules.items():
                a, b = state[lifted.a], state[lifted.b]
                a.zero_()
                b.zero_()
                if module in adapter.pairs:
                    self._fill(adapter, module, a, b)
            for name, tensor in group.whole.items():
                stored = whole.get(tensor.base)
                values = group.base_of(name) if stored is None else adapter.read(stored)
                if values.numel() != state[name].numel():
                    raise IngredientError(f"{adapter.files[0]}: {stored} has {values.numel():,} elements; expected "
                                          f"{list(state[name].shape)}. Use an adapter of this base.")  # fmt: skip
                state[name].copy_(values.view(state[name].shape))
        adapter.close()

    @staticmethod
    def _fill(adapter: AdapterIngredient, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copy the factors of a module into the first rows of A and the first columns of B."""
        pair = adapter.pairs[module]
        shape_a, shape_b = adapter.tensors[pair.a].shape, adapter.tensors[pair.b].shape
        rank, scaled = pair.rank, adapter.read(pair.b).view(shape_b).double() * pair.scale
        first = adapter.read(pair.a).view(shape_a)
        if rank > len(a) and shape_a[1:] == a.shape[1:]:  # PEFT's merges state a rank that their products may not have
            less_b, less_a, lost, total = truncated(scaled.flatten(1), first.double().flatten(1), len(a))
            if lost <= NO_LOSS * total:
                rank, scaled, first = len(a), less_b.view(len(b), -1, *shape_b[2:]), less_a.view(a.shape)
        if shape_a[1:] != a.shape[1:] or shape_b[0] != b.shape[0] or rank > len(a):
            raise IngredientError(
                f"{adapter.files[0]}: the factors of {module} are {list(shape_a)} and {list(shape_b)}; expected rank "
                f"{len(a)} or less for {list(a.shape)} and {list(b.shape)}. Use an adapter of this run."
            )
        a[:rank] = first.to(a.dtype)
        b[:, :rank] = scaled.to(b.dtype)


def with_adapters(built: BuiltModel, ingredients: Sequence[Ingredient]) -> BuiltModel:
    """Return a built model; if the ingredients are adapters, with the weights of the base and the factors of all adapters.

    Raises IngredientError if the base cannot be read, RecipeError if the library peft is missing.
    """
    group = group_of(ingredients)
    if group is None:
        return built
    load_base(built.model, group.base)
    return replace(built, model=adapted(built.model, group))


def load_base(model: torch.nn.Module, base: Ingredient) -> None:
    """Fill in the weights of the base. Tensors that it lacks belong to heads that every adapter contains."""
    state = model.state_dict()
    with torch.no_grad():
        for name in base.tensors:
            values = base.read(name)
            if not torch.isfinite(values).all():
                check_finite([base], name, 0, [values.double().numpy()])
            state[name].copy_(values.view(state[name].shape))
    base.check_unchanged()
    base.close()


def adapted(base: torch.nn.Module, group: AdapterSet) -> AdaptedModel:
    """Put the factors of a set into `base`, in place. Raises IngredientError if PEFT makes something else of them."""
    config = AdapterConfig(
        "the soup's adapter_config.json", written_config(group, range(len(group.adapters)), group.base.path)
    )
    whole = with_peft(base, config)
    parameters = _parameters(whole, group)
    for name, info in group.infos().items():
        found = parameters.get(name)
        if found is None or tuple(found.shape) != info.shape:
            there = "nothing" if found is None else str(list(found.shape))
            raise IngredientError(
                f"{group.adapters[0].path} and the others give {name} {list(info.shape)} together, but PEFT makes {there} "
                "of it. Merge these adapters into their base and mix the whole models."
            )
    _check_scales(whole, config, lambda module: 1.0)
    for name, parameter in parameters.items():
        one = group.module_of(name)
        parameter.requires_grad_(one is None or name == one.b)
    return AdaptedModel(base, parameters, group)


def with_peft(base: torch.nn.Module, config: AdapterConfig) -> Any:
    """Let PEFT put an adapter with a config into `base`, in place; return its PeftModel. Raises IngredientError."""
    peft = import_peft()
    known = {f.name for f in fields(peft.LoraConfig)} - {"peft_type", "runtime_config", "auto_mapping", "peft_version"}
    values = {key: value for key, value in config.values.items() if key in known}
    values |= {"init_lora_weights": False, "bias": "none", "inference_mode": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.LoraConfig(**values)
            made.task_type = None  # which was checked, and would only add methods and names of heads
            return peft.get_peft_model(base, made, adapter_name=NAME)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise IngredientError(
            f"{config.path}: PEFT {peft.__version__} cannot put this adapter into the recipe's model ({str(error)[:300]}). "
            "Set `model:` to the base that the adapter was trained on."
        ) from error


def _parameters(whole: Any, group: AdapterSet) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a PeftModel that a file of its adapter contains, by their names there."""
    wanted, found = group.infos(), {}
    for name, parameter in whole.named_parameters(remove_duplicate=False):
        in_file = name.replace(f".modules_to_save.{NAME}.", ".")
        if f".{NAME}" in in_file and "lora_" in in_file:
            in_file = in_file.replace(f".{NAME}", "")
        if in_file in wanted and ".original_module." not in name:
            found[in_file] = parameter
    return found


def _check_scales(whole: Any, config: AdapterConfig, expected: Callable[[str], float]) -> None:
    """Check that PEFT scales every module as the config is read here. Raises IngredientError."""
    for name, module in whole.base_model.model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and NAME in scaling:
            want = expected(name)
            if abs(scaling[NAME] - want) > 1e-9 * abs(want):
                raise IngredientError(
                    f"{config.path}: PEFT {import_peft().__version__} scales {name} by {scaling[NAME]}; expected {want} by "
                    "its rank and alpha. State rank_pattern and alpha_pattern with whole names of modules."
                )


def check_with_peft(spec: str, adapters: Sequence[AdapterIngredient]) -> None:
    """Check that each adapter has exactly the tensors that PEFT loads for its config, with the same shapes and scales.

    Models are built without weights, one for each config that occurs. Raises IngredientError.
    """
    import_peft()
    with as_in_workers(), torch.device("meta"):
        base = build(spec).model
        expected: dict[str, tuple[dict[str, tuple[int, ...]], set[str]]] = {}
        for adapter in adapters:
            config = adapter.config
            ignored = ("base_model_name_or_path", "peft_version", "lora_dropout", "inference_mode", "revision")
            values = {k: v for k, v in config.values.items() if k not in ignored}
            key = json.dumps(values, sort_keys=True)
            if key not in expected:
                whole = with_peft(copy.deepcopy(base), config)
                ranks = {name: module.r[NAME] for name, module in _layers(whole)}
                _check_scales(whole, config, lambda name, c=config, r=ranks: c.scale(name, r[name]))  # type: ignore[misc]
                expected[key] = _names(whole), set(whole.state_dict())
            _check_tensors(adapter, *expected[key])


def _layers(whole: Any) -> list[tuple[str, Any]]:
    """Return the modules that PEFT has put factors into, by their names in the base."""
    named = whole.base_model.model.named_modules()
    return [(n, m) for n, m in named if isinstance(getattr(m, "scaling", None), dict) and NAME in m.scaling]


def _names(whole: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that the file of an adapter must contain, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = import_peft().get_peft_model_state_dict(whole, adapter_name=NAME, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _check_tensors(adapter: AdapterIngredient, expected: Mapping[str, tuple[int, ...]], state: set[str]) -> None:
    """Compare the tensors of an adapter with those that PEFT expects, and with its whole state. Raises IngredientError."""
    file, tensors = adapter.files[0], adapter.tensors
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise IngredientError(
            f"{file} lacks {missing[0]} {list(expected[missing[0]])} ({len(missing)} tensors are missing), which its "
            "adapter_config.json states; PEFT would fill it in at random. Save the adapter again."
        )
    factors = {name for pair in adapter.pairs.values() for name in (pair.a, pair.b)}
    odd = next((name for name in tensors if name not in expected and name in factors), None)
    odd = odd or next((n for n in expected if n in tensors and tensors[n].shape != expected[n]), None)
    if odd is not None:
        want = f"{list(expected[odd])}" if odd in expected else "no such tensor by its adapter_config.json"
        raise IngredientError(
            f"{file} contains {odd} {list(tensors[odd].shape)}; expected {want}, as PEFT makes it in the recipe's model. "
            "Restore the config that was saved with it, or set `model:` to the base that it was trained on."
        )
    for name, in_file in adapter.whole.items():
        if adapter.config.saves(name) != (in_file in expected):
            raise IngredientError(
                f"{file}: {in_file} is {'in' if in_file not in expected else 'not in'} modules_to_save of its "
                "adapter_config.json, and PEFT sees it otherwise. State the whole names of modules there."
            )
        if in_file not in expected and in_file not in state:
            raise IngredientError(
                f"{file} contains {in_file}, which PEFT would leave out when it loads the adapter; expected the names by "
                "which this version of PEFT saves. Load and save the adapter with the PEFT that wrote it, or exclude it."
            )


def describe_adapted(spec: str, group: AdapterSet) -> Layout:
    """Return the layout of the model with the factors of a set, without allocating it."""
    with as_in_workers(), torch.device("meta"):
        return layout_of(adapted(build(spec).model, group))

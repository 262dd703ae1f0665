"""Build the model that a recipe names, describe it, and fill in its parameters from a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.binding import Ignored
from ray_soup.io.check import check_fits, check_floats
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.recipe import is_function
from ray_soup.task.code_files import is_of_library, version
from ray_soup.task.functions import MOVED, as_in_workers, call, import_function, own_lines
from ray_soup.task.identity import FORWARD_HOOKS, PLAIN, identify, own_state, without_addresses
from ray_soup.task.kept_models import kept
from ray_soup.task.libraries import LIBRARIES, BuiltModel, size_option
from ray_soup.task.loader_names import loader_of, with_old_names, with_remarks
from ray_soup.task.logits import can_be_scored
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.objective import Inputs, Objective, Segmentation, has_own_outputs
from ray_soup.task.preprocess import preprocess_identity
from ray_soup.task.segmentation import is_segmentation
from ray_soup.task.transformers_tasks import transformers_objective

OUTPUTS = ("logits", "out")
"""The names under which models return their outputs among others."""


def build(spec: str) -> BuiltModel:
    """Build the model that `spec` names, with random parameters. Raises RecipeError."""
    parsed = ModelSpec.parse(spec)
    if parsed.library in LIBRARIES:
        built = LIBRARIES[parsed.library](parsed)
    elif is_function(spec):
        built = _made_by(spec)
    else:
        raise RecipeError(
            f"model: found {spec!r}; expected open_clip:, timm: or torchvision:NAME?classes=N, transformers:FOLDER, or "
            "package.module:function. Write it in one of these forms."
        )
    _check_state(built.model, spec)
    if loader_of(parsed, built.model) is not None:
        vars(built.model)["own_loader"] = spec
    built.model.register_forward_pre_hook(_by_name, with_kwargs=True)
    built.model.register_forward_hook(_outputs_alone)
    return built


def _by_name(model: torch.nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass a dictionary of inputs on as arguments by name."""
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        return (), {**inputs[0], **named}
    return inputs, named


def _outputs_alone(model: torch.nn.Module, inputs: Any, output: Any) -> Any:
    """Take the outputs out of what models return with them: `.logits`, an entry `logits` or `out`, the first of a tuple."""
    if isinstance(output, Mapping):
        return next((output[name] for name in OUTPUTS if name in output), output)
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor) and not hasattr(output, "_fields"):
        return output[0]
    return next((getattr(output, name) for name in OUTPUTS if hasattr(output, name)), output)


def call_as(objective: Objective, model: torch.nn.Module) -> None:
    """Let a model of `build` return all that its forward returns, if the objective says what its outputs are."""
    if has_own_outputs(objective):
        hooks = model._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _outputs_alone]:
            del hooks[key]


def _made_by(spec: str) -> BuiltModel:
    """Call the function `spec`, and check what it returns."""
    made = call("model", spec, import_function(spec, "model"))
    model, *more = made if isinstance(made, tuple) and len(made) == 2 else (made,)
    if isinstance(model, torch.nn.Module) and all(p is None or (callable(p) and not isinstance(p, type)) for p in more):
        return BuiltModel(model, *more)
    found = type(made).__name__
    if isinstance(made, tuple):
        found = f"tuple ({', '.join(_kind(part) for part in made[:4])})"
    elif isinstance(made, type):
        found = f"the class {made.__name__} instead of an object of it"
    raise RecipeError(
        f"model: {spec} returned {found}; expected a model, or (model, preprocess) with a function or None as preprocess. "
        "Change what the function returns."
    )


def _kind(part: object) -> str:
    return f"the class {part.__name__}" if isinstance(part, type) else type(part).__name__


def _check_state(model: torch.nn.Module, spec: str) -> None:
    """Check that the state dict of a model consists of its parameters and buffers, so that they determine its outputs.

    Raises RecipeError.
    """
    unmade = [name for name, tensor in model.named_parameters() if torch.nn.parameter.is_lazy(tensor)]
    if unmade:
        raise RecipeError(
            f"model: {spec}: the shape of {unmade[0]} is not known yet. Call the model once, on an input of the right "
            "shape, before the function returns it."
        )
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    state = model.state_dict(keep_vars=True)
    odd = sorted(set(state) - {name for name, _ in named})
    if odd:
        raise RecipeError(
            f"model: {spec}: {odd[0]} in its state dict is neither a parameter nor a buffer ({len(odd)} such entries); they "
            "cannot be mixed. Register them as parameters or buffers instead of using get_extra_state or a state dict hook."
        )
    missing = [name for name, _ in model.named_parameters() if name not in state]
    if missing:
        raise RecipeError(
            f"model: {spec}: its state dict lacks the parameter {missing[0]} ({len(missing)} are missing). Remove the hook "
            "that changes the names in the state dict."
        )


def objective_in(spec: str) -> str:
    """Return the objective that a model names by itself, without building it; empty if it names none. Raises RecipeError."""
    parsed = ModelSpec.parse(spec)
    if is_segmentation(parsed):
        return Segmentation.name
    return transformers_objective(parsed) if parsed.library == "transformers" else ""


def describe(spec: str) -> Layout:
    """Return the layout of the model that `spec` names, without allocating its parameters if the model allows that.

    Raises RecipeError.
    """
    return kept("layout", spec, Layout, lambda: _described(spec))


def _described(spec: str) -> Layout:
    with as_in_workers():  # a matplotlib.py in the current folder must not replace the library
        with contextlib.suppress(Exception), torch.device("meta"):  # some models cannot be built there
            return layout_of(build(spec).model)
        return layout_of(build(spec).model)


def outputs_of(
    model: torch.nn.Module, inputs: Inputs, targets: torch.Tensor, objective: Objective, spec: str, source: str
) -> torch.Tensor:
    """Compute the outputs for one example, and check what the model returns: float [1, ...].

    Args:
        model: the model that `spec` names.
        inputs: one example, [1, ...].
        targets: its targets, [1, ...].
        objective: what the outputs are for.
        spec: the recipe key `model`.
        source: where the example comes from, for messages.

    Raises RecipeError.
    """
    named = inputs.items() if isinstance(inputs, Mapping) else (("", inputs),)
    example = f"one example of {source}, " + ", ".join(f"{n} {t.dtype} {list(t.shape[1:])}".strip() for n, t in named)
    own = f"objective: the outputs of {type(objective).__name__}" if has_own_outputs(objective) else ""
    try:
        with torch.inference_mode():
            outputs = objective.outputs(model, inputs) if own else call("model", spec, model, inputs)
    except RecipeError as error:
        cause = error.__cause__
        if cause is None or own:
            raise
        lines = "".join(f"\n    {line}" for line in own_lines(cause)) if is_function(spec) else ""
        raise RecipeError(
            f"model: {spec} cannot process {example}: {type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
            f"{lines}\nChange `model:`{_size_option(spec)} or the data."
        ) from cause
    if own and not isinstance(outputs, torch.Tensor):
        raise RecipeError(
            f"{own} are {type(outputs).__name__} for {example}; expected one float tensor [n, ...]. Join several outputs "
            "with torch.cat or torch.stack."
        )
    if not can_be_scored(outputs):
        raise RecipeError(
            f"model: {spec} returned {type(outputs).__name__} for {example}; expected a tensor, alone, first in a tuple, or "
            "as `logits` or `out`. Change what the model's forward returns."
        )
    is_one = outputs.ndim >= 1 and len(outputs) == 1 and outputs.is_floating_point()
    expected = objective.check(outputs, targets) if is_one else "floats with one entry for each example"
    if expected is not None:
        if objective.name == "classification":
            expected, cure = "float logits [1, classes]", "If the task is not classification, set `objective:`"
        else:
            cure = f"The objective is {objective.name}: change the recipe key `objective`, or the data"
        whose, change = (f"{own} are", "them") if own else (f"model: {spec} returned", "what the model returns")
        raise RecipeError(
            f"{whose} {outputs.dtype} {list(outputs.shape)} for {example}; expected {expected}. {cure}. Otherwise change "
            f"{change}."
        )
    return outputs


def _size_option(spec: str) -> str:
    name = size_option(ModelSpec.parse(spec))
    return f" (its option `{name}` sets the size of the images)" if name else ""


def load_checkpoint(model: torch.nn.Module, path: str, ignore: Sequence[str] = ()) -> None:
    """Fill in the parameters and buffers of `model`, in place, from the checkpoint at `path`.

    Args:
        model: the model.
        path: a checkpoint.
        ignore: glob patterns of tensors to leave out, the recipe key `ignore`.

    Raises IngredientError if the checkpoint does not fit.
    """
    load_adapter = getattr(model, "load_adapter_file", None)
    if load_adapter is not None:  # the base with an adapter, task.peft_models
        load_adapter(path)
        return
    layout = layout_of(model)
    copy_tensors(fitting(layout, path, ignore), model, layout.state_shapes)


def fitting(layout: Layout, path: str, ignore: Sequence[str] = ()) -> Ingredient:
    """Open the checkpoint at `path` for a model with this layout. Raises IngredientError if it does not fit."""
    return fit(layout, open_ingredient(path), ignore)


def fit(layout: Layout, opened: Ingredient, ignore: Sequence[str] = ()) -> Ingredient:
    """Bind an opened checkpoint to the layout of a model. Raises IngredientError if it does not fit."""
    unneeded: Ignored = (*ignore, *layout.in_files.unsaved)
    layout = with_old_names(layout, [opened], unneeded)
    checkpoint = check_fits(opened, layout.state_shapes, layout.known_names, unneeded)
    checkpoint.check_copies()
    check_floats([checkpoint], layout.names)
    return with_remarks(layout, checkpoint)


def copy_tensors(checkpoint: Ingredient, model: torch.nn.Module, names: Iterable[str]) -> None:
    """Copy tensors of a checkpoint into a model, in place."""
    state = model.state_dict()
    with torch.no_grad():
        for name in names:
            state[name].copy_(checkpoint.read(name).view(state[name].shape))


def fingerprint(spec: str, built: BuiltModel, outside: list[str] | None = None) -> str:
    """Hash everything that the outputs of a model depend on, except its parameters and persistent buffers.

    This is the SHA-256 of `spec`, of the model's structure and preprocessing, of its other tensors, attributes and hooks, of
    the source of the user's modules that it is made of, and of the version of its library. The hash is the same in every
    process and part of the cache keys of evaluations. `outside` receives the names of what cannot be identified.
    """
    spec = MOVED.get(spec, spec)
    model = built.model
    more = [str(getattr(model, name, "")) for name in ("config", "prompts")]
    parts = [spec, without_addresses(str(model)), *preprocess_identity(built.preprocess, outside), *more]
    state = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    loose = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in state}
    parts.append(identify(loose))
    if is_function(spec):
        classes = sorted({f"{type(m).__module__} {type(m).__qualname__}": type(m) for m in model.modules()}.items())
        attributes = [_attributes(module) for module in model.modules()]
        for value in (import_function(spec), classes, attributes):
            parts.append(identify(value, strict=False, state=state, outside=outside))
    else:
        parts.append(version(importlib.import_module(ModelSpec.parse(spec).library).__name__))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _attributes(module: torch.nn.Module) -> dict[str, object]:
    """Return what the outputs of a module depend on besides its code, parameters, buffers and submodules.

    Of a module of a library, these are plain values, hooks, and methods that were replaced.
    """
    found = own_state(module)
    name = type(module).__module__
    if not is_of_library(getattr(sys.modules.get(name), "__file__", None) or os.__file__, name):
        return found
    return {
        name: value
        for name, value in found.items()
        if type(value) in PLAIN or name in FORWARD_HOOKS or callable(getattr(type(module), name, None))
    }

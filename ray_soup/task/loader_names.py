"""Old names of tensors that the own loader of a model's library renames, when it reads a file.

    timm           `checkpoint_filter_fn` of the model's module
    torchvision    the names of DenseNet from before version 0.2.1
    open_clip      the names of the text tower from before it was a module of its own

A loader may do more: resample position embeddings, or join tensors. Only what it passes on unchanged, in the same
memory, is a name to know here; it is given tensors on the device meta, which have no values.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from ray_soup.io.binding import Ignored, without_shared_prefix
from ray_soup.io.check import Advice, check_together
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.mixing.blocks import Layout
from ray_soup.task.empty_models import build_empty
from ray_soup.task.libraries import LIBRARIES
from ray_soup.task.model_spec import ModelSpec

State: TypeAlias = "dict[str, torch.Tensor]"
OF_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.(?:weight|bias|running_mean|running_var))$")
"""Names in old files of torchvision, whose own loader drops the dot before the number."""


def loader_of(model: ModelSpec, built: torch.nn.Module) -> Callable[[State], State] | None:
    """Return what the library's own loader does to a state dict before the model loads it; None if that is nothing."""
    if model.library == "timm":
        function = getattr(sys.modules[type(built).__module__], "checkpoint_filter_fn", None)
        return None if function is None else lambda state: function(state, built)
    if model.library == "torchvision" and model.name.startswith("densenet"):
        return lambda state: {OF_DENSENET.sub(r"\1\2", name): tensor for name, tensor in state.items()}
    if model.library == "open_clip" and hasattr(built, "text"):
        from open_clip.model import convert_to_custom_text_state_dict

        return convert_to_custom_text_state_dict  # type: ignore[no-any-return]
    return None


@functools.lru_cache(maxsize=1)
def _built(spec: str) -> torch.nn.Module:
    """Build a model without memory."""
    model = ModelSpec.parse(spec)
    return build_empty(partial(LIBRARIES[model.library], model), torch.device("meta")).model


def loaded(spec: str, ingredient: Ingredient, cuts: bool = True) -> tuple[State, State]:
    """Return the tensors of an ingredient, on the device meta, and what the library's own loader makes of them.

    If it `cuts`, what all names begin with, as `net.`, is left out. Raises whatever the library raises for a file that it
    does not expect.
    """
    built, tensors = _built(spec), without_shared_prefix(ingredient.tensors)
    load = loader_of(ModelSpec.parse(spec), built)
    cut = 0
    while cuts and len(begins := {name[cut:].partition(".")[0] for name in tensors}) == 1 and len(tensors) > 1:
        cut += len(begins.pop()) + 1
    with torch.device("meta"):
        state = {name[cut:]: torch.empty(info.shape, dtype=info.dtype) for name, info in tensors.items()}
    return state, state if load is None else load(dict(state))


def with_old_names(layout: Layout, ingredients: Sequence[Ingredient], ignore: Ignored = ()) -> Layout:
    """Return a layout with the old names of tensors in those ingredients that only have to be renamed to fit the model.

    Args:
        layout: the layout of the model.
        ingredients: opened checkpoints.
        ignore: tensors to leave out if the model does not have them.
    """
    old: dict[str, str] = {}
    for ingredient in ingredients if layout.in_files.loader else ():
        bound = ingredient.bind(layout.state_shapes, layout.known_names, ignore)
        if bound.unclear or bound.tensors.keys() != layout.state_shapes.keys():
            for name, own in _renamed(layout, bound).items():
                if old.setdefault(name, own) != own:
                    return layout
    return replace(layout, in_files=replace(layout.in_files, old={**layout.in_files.old, **old})) if old else layout


def _renamed(layout: Layout, bound: Ingredient) -> Mapping[str, str]:
    """Return the model's name of each tensor that is only renamed, by its name in the file; none if another one changes."""
    state, found = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    second = {name: info for name, info in bound.tensors.items() if name not in layout.state_shapes}
    both = len(second) + len(layout.state_shapes) == len(bound.tensors)  # as a soup has in the format dcp
    bound = replace(bound, tensors=second) if both else bound
    with contextlib.suppress(Exception):  # whatever a loader does with a file that it does not expect
        state, found = loaded(layout.in_files.loader, bound, cuts=not both)
    names = {_identity(tensor): name for name, tensor in found.items()}
    changed = any(tensor._version for tensor in state.values())  # in place
    if changed or len(names) != len(found) or names.keys() != {_identity(tensor) for tensor in state.values()}:
        return {}
    renamed = {name: own for name, tensor in state.items() if (own := names[_identity(tensor)]) != name}
    taken = layout.state_shapes.keys() | layout.known_names  # a name that both have would be another tensor in each
    return {} if taken & renamed.keys() or not layout.state_shapes.keys() >= {*renamed.values()} else renamed


def _identity(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what is equal for two tensors only if they are the same elements in the same order."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def check_named(
    layout: Layout, ingredients: Sequence[Ingredient], ignore: Ignored, advise: Advice
) -> tuple[Layout, list[Ingredient]]:
    """Bind ingredients to a model, under their old names where its library knows them, and check that they fit.

    The arguments are those of `check_together`. Returns the layout with the other names that the ingredients use, and the
    bound ingredients. Raises IngredientError, or RecipeError for fewer than two.
    """
    layout = with_old_names(layout, ingredients, ignore)
    bound = check_together(ingredients, layout.state_shapes, layout.known_names, ignore, advise=advise)
    return layout.with_names({alias for one in bound for alias in one.aliases}), [with_remarks(layout, one) for one in bound]


def with_remarks(layout: Layout, bound: Ingredient) -> Ingredient:
    """Return a bound ingredient that says which of its names were changed."""
    return replace(bound, remarks=(*bound.remarks, *_remarks(layout, bound))) if layout.in_files.loader else bound


def _remarks(layout: Layout, bound: Ingredient) -> Iterator[str]:
    """Say which names of a bound ingredient were changed."""
    library, old = layout.in_files.loader.partition(":")[0], layout.in_files.old
    names = [name for name in bound.aliases if name in old and name not in layout.tied]
    if names:
        many = f"{len(names)} tensors were" if len(names) > 1 else "1 tensor was"
        yield f"{many} renamed, such as {names[0]} to {old[names[0]]}, as {library}'s own loader does."

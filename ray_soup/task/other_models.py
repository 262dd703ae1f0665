"""What may help with a checkpoint that does not fit the model: another model of the same library, or the library's loader.

Models are described on the device meta, and only if their names are close to the recipe's: this takes a second or two.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.io.check import Advice
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.names import COUNTER
from ray_soup.mixing.blocks import Layout
from ray_soup.task.loader_names import loaded
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import describe

CLOSE = 8
"""Models with similar names that are compared."""
Shape = tuple[int, ...]


def advice_for(spec: str) -> Advice:
    """Return what says which model of the library of `spec` an ingredient fits, or how its own loader renames tensors."""
    model = ModelSpec.parse(spec)

    def advise(ingredient: Ingredient) -> str:
        if model.library not in ("timm", "torchvision", "open_clip"):
            return ""
        with contextlib.suppress(Exception):  # an unusual file or model must not hide the message that this adds to
            return _of_loader(model, ingredient) or _of_other_model(model, ingredient)
        return ""

    return advise


def _of_other_model(model: ModelSpec, ingredient: Ingredient) -> str:
    """Return the line with the first model that fits; empty if none does."""
    for name in _candidates(model, ingredient):
        candidate = replace(model, name=name)
        with contextlib.suppress(RecipeError):  # it has no such option
            layout = describe(candidate.with_options({}))
            differing = _differing(layout, ingredient)
            spec = candidate.with_options({})
            if differing and (count := _classes(differing)) and "classes" in model.options:
                spec = candidate.with_options({"classes": str(count)})
                differing = _differing(describe(spec), ingredient)
            if differing == []:
                return f"{ingredient.path} fits another model. If that is right, write in the recipe\n    model: {spec}"
    return ""


def _differing(layout: Layout, ingredient: Ingredient) -> list[tuple[Shape, Shape]] | None:
    """Return the shapes that differ, those of the model first; None if an ingredient has other names."""
    shapes = layout.state_shapes
    bound = ingredient.bind(shapes, layout.known_names, layout.in_files.unsaved)
    if bound.unclear or bound.tensors.keys() != shapes.keys():
        return None
    return [(shapes[name], info.shape) for name, info in bound.tensors.items() if info.shape != shapes[name]]


def _classes(differing: list[tuple[Shape, Shape]]) -> int:
    """Return the number of classes of an ingredient if only the head differs from the model's; otherwise 0."""
    counts = {theirs[0] if theirs and ours[1:] == theirs[1:] else 0 for ours, theirs in differing}
    return counts.pop() if len(counts) == 1 else 0


def _candidates(model: ModelSpec, ingredient: Ingredient) -> Iterable[str]:
    """Return the model's own name, that in the checkpoint, and those close to it."""
    names = _names(model)
    inner = ingredient.metadata.get("args")
    sources = (ingredient.metadata, inner if isinstance(inner, Mapping) else {})
    said = [source.get(key) for source in sources for key in ("arch", "model", "architecture")]
    known = [name for name in said if isinstance(name, str) and name in names]
    bare = model.name.partition(".")[0]
    return dict.fromkeys([model.name, *known, *difflib.get_close_matches(bare, names, CLOSE)])


def _names(model: ModelSpec) -> list[str]:
    library: Any = model.import_library()
    if model.library == "torchvision":
        return list(library.models.list_models(module=library.models))
    return list(library.list_models())


def _of_loader(model: ModelSpec, ingredient: Ingredient) -> str:
    """Return how to save an ingredient as the library's own loader changes it; empty if it does not."""
    state, found = loaded(model.with_options({}), ingredient)
    shapes = describe(model.with_options({})).state_shapes
    ours = {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}
    theirs = {name: tuple(tensor.shape) for name, tensor in found.items() if not name.endswith(COUNTER)}
    if found.keys() == state.keys() or ours != theirs:
        return ""
    said = f"{model.library}'s own loader changes the tensors of such a file"
    if model.library != "timm" or storage.is_remote(ingredient.files[0]):
        return f"{said}: load it with that, and save model.state_dict()."
    classes = int(model.options.get("classes", 0))
    code = (
        f"import timm, torch; f = {ingredient.files[0]!r}; m = timm.create_model({model.name!r}, pretrained=True, "
        f"num_classes={classes}, pretrained_cfg_overlay=dict(file=f, num_classes={classes}, custom_load=False)); "
        "torch.save(m.state_dict(), f + '.renamed.pt')"
    )
    return f"{said}. Save it once as that reads it:\n    python -c {shlex.quote(code)}"

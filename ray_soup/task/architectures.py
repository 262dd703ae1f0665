"""Which model of timm, torchvision or open_clip has exactly the tensors of a checkpoint.

Names that the files mention are tried first. Otherwise the source of a library is compared with the names of the tensors:
a module that defines them is likely to have the model, and the numbers in its functions must be sizes of the checkpoint.
Only what is left is built, without memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lazy import torch
from ray_soup.io.names import without_shared_prefix
from ray_soup.mixing.blocks import Layout, layout_of
from ray_soup.task.empty_models import build_empty
from ray_soup.task.evidence import POSITIONS
from ray_soup.task.libraries import BuiltModel
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.models import build
from ray_soup.task.segmentation import is_segmentation

LIBRARIES = ("torchvision", "timm", "open_clip")
MODULES, BUILT = 12, 200
"""Modules of a library that are searched, and models that are built."""
OTHERS, AFTER = 3, 16
"""Further models that are listed if they fit as well, and models that are built to find them."""
ALIKE = 0.7  # share of the parts of names that a module must define
DEFINED = re.compile(r"\bself\.(\w+)|[\"'](\w+)[\"']")
OF_TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
PROBE = 7  # a number of classes, by which the tensors of a head are found
SIZES = re.compile(r"\b(?:embed_dims?|width|dims|depths?|layers|patch_size|stem_width)=([\[(]?\d[\d, ]*)")
"""Arguments in the functions of timm whose numbers are sizes of tensors, or numbers of layers."""


def installed() -> list[str]:
    """Return those of the libraries that are installed."""
    return [library for library in LIBRARIES if importlib.util.find_spec(library) is not None]


def names_in(library: str) -> tuple[str, ...]:
    """Return the names of the models of a library."""
    module: Any = importlib.import_module(library)
    if library == "torchvision":
        models = module.models
        return (*models.list_models(module=models), *models.list_models(module=models.segmentation))
    return tuple(module.list_models())


def mentioned(library: str, words: Iterable[str]) -> list[str]:
    """Return the models of a library that words name, as in ViT-B/32, hf_hub:timm/resnet18.a1_in1k or models.resnet18."""
    known, found = set(names_in(library)), []
    for word in words:
        last = re.split(r"[/:]", word)[-1]
        bare = last.rpartition(".")[2] if "models." in word else last.partition(".")[0]
        options = (word.replace("/", "-"), bare) if library == "open_clip" else (bare,)
        found += [name for name in options if name in known]
    return list(dict.fromkeys(found))


def fitted(library: str, name: str, ingredient: Ingredient) -> str:
    """Return the recipe key `model` for a library's model if the ingredient has exactly its tensors; empty otherwise.

    The head may have any number of classes, and position embeddings any length: images may have had another size.
    """
    spec = ModelSpec("", library, name, {"classes": str(PROBE)})
    if is_segmentation(spec) and any(".aux_classifier." in f".{tensor}" for tensor in ingredient.tensors):
        spec = replace(spec, options={**spec.options, "aux_loss": "true"})
    layout = _layout(lambda: build(spec.with_options({})))
    if layout is None:
        return ""
    bound = ingredient.bind(layout.state_shapes, layout.known_names, layout.in_files.unsaved)
    if bound.unclear or bound.tensors.keys() != layout.state_shapes.keys():
        return ""
    counts = set()
    for tensor, ours in layout.state_shapes.items():
        theirs = bound.tensors[tensor].shape
        if theirs != ours and not (tensor.endswith(POSITIONS) and theirs[-1:] == ours[-1:] and len(theirs) == len(ours)):
            counts.add(theirs[0] if theirs and ours[0] == PROBE and theirs[1:] == ours[1:] else 0)
    fits = 0 not in counts and len(counts) <= 1
    return spec.with_options({"classes": str(next(iter(counts), PROBE))}) if fits else ""


def _layout(make: Callable[[], BuiltModel]) -> Layout | None:
    """Return the layout of a model, built without its parameters; None if the library cannot create it."""
    with no_weight_warnings():
        with contextlib.suppress(Exception), torch.device("meta"):
            return layout_of(make().model)
        with contextlib.suppress(Exception):  # some models compute with buffers when they are created
            return layout_of(build_empty(make, torch.device("cpu")).model)
    return None


def whole_clip(name: str, ingredient: Ingredient) -> bool:
    """Return whether the ingredient has exactly the tensors of a whole CLIP of open_clip, with its text tower."""
    import open_clip

    layout = _layout(lambda: BuiltModel(open_clip.create_model(name, pretrained=None)))
    if layout is None:
        return False
    bound = ingredient.bind(layout.state_shapes, layout.known_names, layout.in_files.unsaved)
    return not bound.unclear and {n: i.shape for n, i in bound.tensors.items()} == dict(layout.state_shapes)


def similar(library: str, ingredient: Ingredient, words: Sequence[str]) -> Iterator[str]:
    """Yield the models of a library that may have the ingredient's tensors, likely ones first."""
    shapes = {name: info.shape for name, info in without_shared_prefix(ingredient.tensors).items()}
    path = " ".join(words).lower()
    found = list(_likely(library, shapes))
    yield from sorted(found, key=lambda name: name.lower() not in path)[:BUILT]


def _likely(library: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if library == "open_clip":
        import open_clip

        yield from (n for n in names_in(library) if _has_sizes(open_clip.get_model_config(n) or {}, shapes))
        return
    parts = {part for name in shapes for part in name.split(".") if not part.isdigit()}
    sizes = {size for shape in shapes.values() for size in shape} | _lengths(shapes)
    modules = _modules(library)
    scores = {module: len(parts & words) for module, (words, _) in modules.items()}
    for module in sorted(modules, key=lambda one: -scores[one])[:MODULES]:
        if scores[module] >= ALIKE * len(parts):
            yield from (name for name in sorted(modules[module][1], key=len) if _numbers(library, name) <= sizes)


@functools.cache
def _modules(library: str) -> dict[str, tuple[set[str], list[str]]]:
    """Return the words in each source file of a library, and the models that it defines."""
    found: dict[str, tuple[set[str], list[str]]] = {}
    for name in names_in(library):
        module = importlib.import_module(f"{library}.models")
        function: Any = module.get_model_builder(name) if library == "torchvision" else module.model_entrypoint(name)
        file = inspect.unwrap(function).__globals__["__file__"]
        if file not in found:
            found[file] = _words(Path(file)), []
        found[file][1].append(name)
    return found


def _words(file: Path) -> set[str]:
    """Return the names of attributes in a source file, and in the files of blocks that it imports, such as `._blocks`."""
    text = file.read_text(encoding="utf-8")
    blocks = [file.with_name(f"{name}.py") for name in re.findall(r"^from \.(_\w+) import", text, re.MULTILINE)]
    texts = [text, *(block.read_text(encoding="utf-8") for block in blocks if block.exists())]
    return OF_TENSORS | {word for one in texts for pair in DEFINED.findall(one) for word in pair}


@functools.cache
def _numbers(library: str, name: str) -> set[int]:
    """Return the numbers in the function of a model of timm that must be sizes of its tensors."""
    if library != "timm":
        return set()
    source = inspect.getsource(importlib.import_module("timm.models").model_entrypoint(name))
    return {int(number) for group in SIZES.findall(source) for number in re.findall(r"\d+", group)}


def _lengths(shapes: Iterable[str]) -> set[int]:
    """Return the lengths of the lists of layers that names count."""
    ends: dict[str, int] = {}
    for name in shapes:
        for at in re.finditer(r"\.(\d+)\.", f".{name}"):
            above = f".{name}"[: at.start()]
            ends[above] = max(ends.get(above, 0), int(at[1]) + 1)
    return set(ends.values())


def _has_sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a configuration of open_clip may be that of these tensors."""
    vision = config.get("vision_cfg", {})
    first = next((shape for name, shape in shapes.items() if name.endswith("visual.conv1.weight")), None)
    if first is None or not isinstance(vision.get("layers"), int):
        return first is None and any("visual." in name for name in shapes) and not isinstance(vision.get("layers"), int)
    blocks = len({m[1] for name in shapes if (m := re.search(r"visual\.transformer\.resblocks\.(\d+)\.", name))})
    return first[::3] == (vision.get("width"), vision.get("patch_size")) and blocks == vision["layers"]

"""Evidence of how ingredients were trained, compared with the model and the preprocessing of a recipe.

Training scripts write their arguments into checkpoints, and libraries write the settings of preprocessing next to them.
Checkpoints that were trained on images of another size, mean or crop have the same shapes, and would be evaluated wrongly:
what the files say is used where the recipe states nothing, and files that contradict each other are refused.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.mixing.blocks import Layout
from ray_soup.recipe import Data, Preprocessing, Recipe, is_function
from ray_soup.task.adoption import Evidence, check_unstatable, compare, contradicted, unread_values
from ray_soup.task.evidence_files import BESIDE, EVERY, RECORD, beside_in, sources
from ray_soup.task.libraries import IMAGE_OPTIONS, SIZE_OPTIONS, has_auxiliary
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess_key import describe_for, model_of, stated_options
from ray_soup.task.segmentation import is_segmentation
from ray_soup.task.settings import facts_of, settings_of, used_settings
from ray_soup.task.transformers_folders import check_folders
from ray_soup.task.values import Found, Settings, mapping, same_value

POSITIONS = ("pos_embed", "positional_embedding", "pos_embedding")
"""Ends of the names of position embeddings, which are as long as the image has patches."""
AUXILIARY = re.compile(r"(^|\.)(aux[12]|AuxLogits)\.")
"""Names of tensors of the auxiliary classifiers of torchvision's models."""
SHAPES = "the shape of its position embedding"


@dataclass(frozen=True)
class Checked:
    """What came of the comparison of evidence with a recipe."""

    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    said: Mapping[str, str] = field(default_factory=dict)
    """The options that the files say something about, and where."""
    adopted: Settings = field(default_factory=dict)
    """The options that the recipe does not state, with the values that the files do."""


def check_evidence(recipe: Recipe, ingredients: Sequence[Ingredient], layout: Layout | None = None) -> Checked:
    """Compare what the ingredients say about their training with what the recipe does.

    Args:
        recipe: the recipe.
        ingredients: the opened ingredients, or one checkpoint to evaluate.
        layout: the layout of the recipe's model, to recognize position embeddings of another size.

    The notes are about values that the recipe does not state and files do, a value that options of `model` state, although
    files say another, values that are not understood, architectures of other names, and what differs from the preprocessing
    of a user's own function.

    Raises RecipeError, with the line to write, if the recipe does not state a value, and files differ from each other, if
    the recipe key `preprocess` states another one, or if no option states what a file says.
    """
    spec = ModelSpec.parse(model_of(recipe))
    images, own = takes_images(recipe.data), is_function(recipe.model) or isinstance(recipe.preprocess, str)
    if spec.library == "transformers":
        notes = _check_function(recipe, ingredients, functools.cache(functools.partial(beside_in, ())))
        if images and isinstance(recipe.preprocess, Preprocessing):
            notes += _compare_function(recipe, ingredients)
        of_folders, length = check_folders(spec, ingredients, images and recipe.preprocess is None)
        return Checked([*notes, *of_folders], adopted=length)
    notes = _compare_function(recipe, ingredients) if own and images else []
    if spec.library not in IMAGE_OPTIONS or is_segmentation(spec):  # whose script writes no settings of images
        return Checked(notes)
    used = used_settings(spec)
    beside = functools.cache(functools.partial(beside_in, BESIDE[spec.library]))
    notes += _check_function(recipe, ingredients, beside) if images else []
    found = [_evidence_of(ingredient, spec, layout, used, beside) for ingredient in ingredients]
    if own or not images:
        for evidence in found:
            _keep_structure(evidence, spec.library)
    check_unstatable(spec, found)
    of_options, adopted = compare(recipe, spec, found, used)
    stated = {*spec.options, *(option for evidence in found for option in evidence.options)}
    if images and not own and "crop_size" in adopted and "resize_size" not in stated:  # by the library's share
        adopted["resize_size"] = stated_options(spec, Preprocessing(size=int(adopted["crop_size"])))["resize_size"]
    notes += [*of_options, *unread_values(spec, found, used)]
    named = next((e for e in found if e.architecture and not _same_architecture(e.architecture, spec.name)), None)
    if named is not None:
        notes.append(f"{named.path} was trained as {named.architecture}, and the recipe's model is {spec.name}.")
    unknown = next((e for e in found if e.unknown), None)
    if unknown is not None:
        notes.append(
            f"{unknown.path} was trained as {unknown.unknown}, a name that this version of {spec.library} does not have; "
            "only the preprocessing that its arguments state was compared."
        )
    notes += [f"{e.path} {e.remark}" for e in found if e.remark][:1]
    said = {
        option: place for e in found for option, place in (*dict.fromkeys(e.unread, e.source).items(), *e.places.items())
    }
    return Checked(notes, said, adopted)


def _keep_structure(evidence: Evidence, library: str) -> None:
    """Drop what is about preprocessing, where the library's is not used."""
    dropped = {name for name in IMAGE_OPTIONS[library] if evidence.places.get(name) != SHAPES}
    evidence.options = {name: value for name, value in evidence.options.items() if name not in dropped}
    evidence.unread = {name: said for name, said in evidence.unread.items() if name not in dropped}
    unstatable = evidence.unstatable.items()
    evidence.unstatable = {name: value for name, value in unstatable if name not in IMAGE_OPTIONS["timm"]}


def check_start(recipe: Recipe) -> Checked:
    """Compare what is known about the weights that fine-tuning starts from with what the recipe does, as `check_evidence`.

    Raises RecipeError.
    """
    spec, source = ModelSpec.parse(model_of(recipe)), recipe.finetune.init or recipe.finetune.pretrained
    if source is None:
        return Checked()
    if spec.library == "transformers":  # the folder states the preprocessing to train with
        return Checked(check_folders(spec, [open_ingredient(source)], preprocessed=False)[0])
    if not source.startswith("open_clip:"):
        return check_evidence(recipe, [open_ingredient(source)])
    if spec.library != "open_clip" or not takes_images(recipe.data):
        return Checked()
    import open_clip

    known = open_clip.get_pretrained_cfg(spec.name, source.partition(":")[2])
    evidence = Evidence(source)
    evidence.add("its settings in open_clip", Found(settings_of(spec, {"preprocess_cfg": known}).settings))
    notes, adopted = compare(recipe, spec, [evidence], used_settings(spec))
    return Checked(notes, evidence.places, adopted)


def _compare_function(recipe: Recipe, ingredients: Sequence[Ingredient]) -> list[str]:
    """Return a note for each visible setting of a user's own preprocessing that files contradict: the user decides there.

    Raises RecipeError if a mapping `preprocess` contradicts them.
    """
    beside = functools.cache(functools.partial(beside_in, EVERY))
    stated = [
        (name, value, ingredient.path, source)
        for ingredient in ingredients
        for source, values in sources(ingredient, beside)
        for name, value in facts_of(values).items()
    ]
    ours = describe_for(recipe)[1] if stated else {}
    where = recipe.preprocess if isinstance(recipe.preprocess, str) else recipe.model
    notes: dict[str, str] = {}
    for name, value, path, source in stated:
        if name not in ours or same_value(value, ours[name]):
            continue
        if isinstance(recipe.preprocess, Preprocessing):
            raise contradicted(recipe.preprocess, path, source, {name: value}, {name: value}, ours)
        said = f"{path} was trained with {name} {value} ({source})"
        notes.setdefault(name, f"{said}; the preprocessing of {where} has {ours[name]}, which is used.")
    return [*notes.values()]


def _check_function(
    recipe: Recipe, ingredients: Sequence[Ingredient], beside: Callable[[str], list[tuple[str, Mapping[str, Any]]]]
) -> list[str]:
    """Check that a function which this package preprocessed the images of a soup with is the recipe's too.

    Returns a note if the recipe states something else. Raises RecipeError if it states nothing.
    """
    for ingredient in ingredients:
        for source, values in sources(ingredient, beside):
            function = mapping(values.get(RECORD)).get("function")
            if not isinstance(function, str) or function == recipe.preprocess:
                continue
            said = f"The images of {ingredient.path} were preprocessed by the function {function} ({source})"
            if recipe.preprocess is None:
                raise RecipeError(
                    f"{said}; the recipe names none. Write in the recipe\n    preprocess: {function}\nor state another "
                    "preprocessing there to use it on purpose."
                )
            return [f"{said}; the recipe states another preprocessing, which is used."]
    return []


def takes_images(data: Data) -> bool:
    """Return whether a recipe has data that are preprocessed: arrays, in .npz files or from functions, are not."""
    sources = filter(None, (data.train, *data.sources().values()))
    return any(not is_function(source) and not source.endswith(".npz") for source in sources)


def _evidence_of(
    ingredient: Ingredient,
    spec: ModelSpec,
    layout: Layout | None,
    used: Settings,
    beside: Callable[[str], list[tuple[str, Mapping[str, Any]]]],
) -> Evidence:
    evidence = Evidence(ingredient.path)
    for source, values in sources(ingredient, beside):
        said = settings_of(spec, values)
        if said != Found():
            evidence.add(source, said)
        name = next((values[key] for key in ("model", "arch", "architecture") if isinstance(values.get(key), str)), "")
        evidence.architecture = evidence.architecture or (name if said.settings else "")
    if has_auxiliary(spec):
        auxiliary = any(AUXILIARY.search(name) for name in ingredient.tensors)
        evidence.set("its tensors", {"aux_logits": str(auxiliary).lower()})
    if layout is not None:
        evidence.set(SHAPES, _size_of_positions(ingredient, layout, used, spec))
    return evidence


def _size_of_positions(ingredient: Ingredient, layout: Layout, used: Settings, spec: ModelSpec) -> dict[str, str]:
    """Infer the size of the images from a position embedding that is longer or shorter than the model's."""
    option = SIZE_OPTIONS[spec.library]
    shapes = layout.state_shapes
    name = next((n for n in shapes if n.endswith(POSITIONS) and (spec.library != "open_clip" or "visual" in n)), None)
    theirs = next((i.shape for n, i in ingredient.tensors.items() if name and n.endswith(name)), None)
    if name is None or theirs is None or len(theirs) != len(shapes[name]) or len(theirs) < 2 or "," in used[option]:
        return {}
    ours = shapes[name]
    grid = math.isqrt(ours[-2])
    other = math.isqrt(max(theirs[-2] - (ours[-2] - grid**2), 0))
    size = int(used[option])
    if theirs[-1] != ours[-1] or theirs[-2] == ours[-2] or other**2 + ours[-2] - grid**2 != theirs[-2] or size % grid:
        return {}
    return {option: str(other * size // grid)}


def _same_architecture(one: str, other: str) -> bool:
    def plain(name: str) -> str:
        return name.rpartition("/")[2].partition(".")[0].replace("-", "_").lower()

    return plain(one) == plain(other)

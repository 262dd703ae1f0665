"""Evidence of how ingredients were trained, compared with the model and the preprocessing of a recipe.

Training scripts write their arguments into checkpoints, and libraries write the settings of preprocessing next to them.
Checkpoints that were trained on images of another size, mean or crop have the same shapes, and would be evaluated wrongly: a
recipe that does not state what the files say is refused, with the line to write.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.mixing.blocks import Layout
from ray_soup.recipe import Data, Preprocessing, Recipe, is_function
from ray_soup.task.evidence_files import BESIDE, EVERY, RECORD, beside_in, sources
from ray_soup.task.libraries import IMAGE_OPTIONS, SIZE_OPTIONS, WITH_AUXILIARY, has_auxiliary
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess_key import as_mapping, describe_for, keys_of, model_of
from ray_soup.task.settings import facts_of, settings_of, used_settings
from ray_soup.task.transformers_folders import check_folders
from ray_soup.task.values import Found, Settings, mapping, same_value

POSITIONS = ("pos_embed", "positional_embedding", "pos_embedding")
"""Ends of the names of position embeddings, which are as long as the image has patches."""
AUXILIARY = re.compile(r"(^|\.)(aux[12]|AuxLogits)\.")
"""Names of tensors of the auxiliary classifiers of torchvision's models."""
SHAPES = "the shape of its position embedding"


@dataclass
class Evidence:
    """What the files of one ingredient say about its training."""

    path: str
    options: dict[str, str] = field(default_factory=dict)
    """Values by the name of the option of the recipe key `model`."""
    unstatable: dict[str, str] = field(default_factory=dict)
    """Arguments that change what a model computes, and that no option states."""
    unread: dict[str, str] = field(default_factory=dict)
    """Keys with values that are not understood, by the option that they would be."""
    unknown: str = ""
    """The name of the model, if it is not one of the library's."""
    other_model: str = ""
    """The library's name of the model, if it has another structure than the recipe's."""
    remark: str = ""
    """What a user should know about the training, as the end of a sentence that begins with the file."""
    architecture: str = ""
    """The architecture, if the file names one."""
    source: str = ""
    """Where the values were found."""


@dataclass(frozen=True)
class Checked:
    """What came of the comparison of evidence with a recipe."""

    notes: list[str] = field(default_factory=list)
    """Notes for the user."""
    said: frozenset[str] = frozenset()
    """The options that the files say something about."""


def check_evidence(recipe: Recipe, ingredients: Sequence[Ingredient], layout: Layout | None = None) -> Checked:
    """Compare what the ingredients say about their training with what the recipe does.

    Args:
        recipe: the recipe.
        ingredients: the opened ingredients, or one checkpoint to evaluate.
        layout: the layout of the recipe's model, to recognize position embeddings of another size.

    The notes are about a value that options of `model` state, although files say another, values that are not understood,
    architectures of other names, and what differs from the preprocessing of a user's own function.

    Raises RecipeError, with the line to write, if the recipe does not state a value, and files differ from the library's
    default or from each other, or if the recipe key `preprocess` states another one.
    """
    spec = ModelSpec.parse(model_of(recipe))
    images, own = takes_images(recipe.data), is_function(recipe.model) or isinstance(recipe.preprocess, str)
    if spec.library == "transformers":
        notes = _check_function(recipe, ingredients, functools.cache(functools.partial(beside_in, ())))
        return Checked([*notes, *check_folders(spec, ingredients, images and recipe.preprocess is None)])
    notes = _compare_function(recipe, ingredients) if own and images else []
    if spec.library not in IMAGE_OPTIONS:
        return Checked(notes)
    used = used_settings(spec)
    beside = functools.cache(functools.partial(beside_in, BESIDE[spec.library]))
    notes += _check_function(recipe, ingredients, beside) if images else []
    found = [_evidence_of(ingredient, spec, layout, used, beside) for ingredient in ingredients]
    if own or not images:
        for evidence in found:
            _keep_structure(evidence)
    _check_unstatable(spec, found)
    notes += _compare(recipe, spec, found, used)
    notes += _unread(spec, found, used)
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
    return Checked(notes, frozenset(option for e in found for option in (*e.options, *e.unread)))


def _keep_structure(evidence: Evidence) -> None:
    """Drop what is about preprocessing, where the library's is not used."""
    sizes = SIZE_OPTIONS.values() if evidence.source == SHAPES else ()
    kept = ("in_chans", "global_pool", *WITH_AUXILIARY, *sizes)
    evidence.options = {name: value for name, value in evidence.options.items() if name in kept}
    evidence.unread = {name: said for name, said in evidence.unread.items() if name in kept}
    unstatable = evidence.unstatable.items()
    evidence.unstatable = {name: value for name, value in unstatable if name not in IMAGE_OPTIONS["timm"]}


def check_start(recipe: Recipe) -> None:
    """Compare what is known about the weights that fine-tuning starts from with what the recipe does, as `check_evidence`.

    Raises RecipeError.
    """
    spec = ModelSpec.parse(model_of(recipe))
    for source in filter(None, (recipe.finetune.init, recipe.finetune.pretrained)):
        if spec.library == "transformers":  # the folder states the preprocessing to train with
            check_folders(spec, [open_ingredient(source)], preprocessed=False)
        elif not source.startswith("open_clip:"):
            check_evidence(recipe, [open_ingredient(source)])
        elif spec.library == "open_clip" and takes_images(recipe.data):
            import open_clip

            known = open_clip.get_pretrained_cfg(spec.name, source.partition(":")[2])
            settings = settings_of(spec, {"preprocess_cfg": known}).settings
            evidence = Evidence(source, settings, source="its settings in open_clip")
            _compare(recipe, spec, [evidence], used_settings(spec))


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
            raise _contradicted(recipe.preprocess, path, source, {name: value}, {name: value}, ours)
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


def _contradicted(
    stated: Preprocessing, path: str, source: str, theirs: Settings, named: Settings, ours: Settings
) -> RecipeError:
    """Return the error for a mapping `preprocess` that a file contradicts.

    Args:
        stated: the mapping.
        path: the file.
        source: where in it the values are.
        theirs: the values that the file says, by option.
        named: the same by the keys of the mapping.
        ours: the values in use, by option.
    """
    said = ", ".join(f"{option} {value}" for option, value in theirs.items())
    used = ", ".join(f"{option} {ours.get(option, 'unset')}" for option in theirs)
    line = ", ".join(f"{key}: {value}" for key, value in {**stated.values(), **as_mapping(named)}.items())
    return RecipeError(
        f"{path} was trained with {said} ({source}); with the recipe key `preprocess`, {used} is used. Write in the recipe"
        f"\n    preprocess: {{{line}}}\nor name a function that does otherwise on purpose: preprocess: module:function"
    )


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
            evidence.source = evidence.source or source
            evidence.options = {**said.settings, **evidence.options}
            evidence.unstatable |= said.unstatable
            evidence.unknown = evidence.unknown or said.unknown
            evidence.other_model = evidence.other_model or said.other_model
            evidence.remark = evidence.remark or said.remark
            evidence.unread = {**said.unread, **evidence.unread}
        name = next((values[key] for key in ("model", "arch", "architecture") if isinstance(values.get(key), str)), "")
        evidence.architecture = evidence.architecture or (name if said.settings else "")
    if has_auxiliary(spec):
        evidence.options["aux_logits"] = str(any(AUXILIARY.search(name) for name in ingredient.tensors)).lower()
        evidence.source = evidence.source or "its tensors"
    size = _size_of_positions(ingredient, layout, used, spec) if layout is not None else {}
    if size:
        evidence.options |= size
        evidence.source = evidence.source or SHAPES
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


def _check_unstatable(spec: ModelSpec, found: Sequence[Evidence]) -> None:
    for evidence in found:
        if evidence.unstatable:
            said = ", ".join(f"{name} {value}" for name, value in evidence.unstatable.items())
            if evidence.other_model:
                line = replace(spec, name=evidence.other_model).with_options({})
                raise RecipeError(
                    f"{evidence.path} was trained as {evidence.other_model}, with {said} ({evidence.source}); the recipe's "
                    f"model {spec.name} computes something else. Write in the recipe\n    model: {line}"
                )
            raise RecipeError(
                f"{evidence.path} was trained with {said} ({evidence.source}), which changes the results, and "
                f"the prefix `{spec.library}:` has no option for it. Write a function that creates the model as in the "
                "training and returns (model, preprocess), and name it: model: module:function"
            )


def _unread(spec: ModelSpec, found: Sequence[Evidence], used: Settings) -> list[str]:
    """Return a note for each option that a file names with a value that is not understood, and the recipe does not state."""
    notes: dict[str, str] = {}
    for evidence in found:
        for option, said in evidence.unread.items():
            if option not in spec.options and option not in evidence.options:
                notes.setdefault(
                    option,
                    f"{evidence.path} has {said} ({evidence.source}), which is not understood; {option} "
                    f"{used.get(option, 'unset')} is used. If that is wrong, state it, as in model: "
                    f"{spec.with_options({option: used.get(option, 'VALUE')})}",
                )
    return [*notes.values()]


def _compare(recipe: Recipe, spec: ModelSpec, found: Sequence[Evidence], used: Settings) -> list[str]:
    """Compare the options of all ingredients with those in use. Returns notes. Raises RecipeError.

    Args:
        recipe: the recipe.
        spec: its model, with the options that its key `preprocess` stands for.
        found: what the files say.
        used: the options in use.
    """
    by_model = ModelSpec.parse(recipe.model).options
    notes, missing = [], {}
    for option in dict.fromkeys(name for evidence in found for name in evidence.options):
        have = [evidence for evidence in found if option in evidence.options]
        first = have[0]
        odd = next((e for e in have if not same_value(e.options[option], first.options[option])), None)
        if option in spec.options:
            other = next((e for e in have if not same_value(e.options[option], used.get(option, ""))), None)
            if other is not None and isinstance(recipe.preprocess, Preprocessing) and option not in by_model:
                stated = {name: value for name, value in other.options.items() if name in spec.options.keys() - by_model}
                raise _contradicted(
                    recipe.preprocess, other.path, other.source, {option: other.options[option]}, keys_of(spec, stated), used
                )
            if other is not None and option == "aux_logits":  # which decides about the tensors
                missing[option] = other
            elif other is not None:
                notes.append(
                    f"{other.path} was trained with {option} {other.options[option]} ({other.source}); the recipe states "
                    f"{used.get(option, '')}, which is used."
                )
        elif odd is not None:
            line = spec.with_options({option: first.options[option]})
            raise RecipeError(
                f"{first.path} was trained with {option} {first.options[option]} and {odd.path} with {odd.options[option]}; "
                f"one value must be used for all. Choose it with the option `{option}`, as in\n    model: {line}"
            )
        elif not same_value(first.options[option], used.get(option, "")):
            missing[option] = first
    if missing:
        first = next(iter(missing.values()))
        options = {name: evidence.options[name] for name, evidence in missing.items()}
        theirs = ", ".join(f"{name} {value}" for name, value in options.items())
        ours = ", ".join(f"{name} {used.get(name, 'unset')}" for name in options)
        raise RecipeError(
            f"{first.path} was trained with {theirs} ({first.source}); the recipe's model uses {ours}. Write in the recipe"
            f"\n    model: {spec.with_options(options)}\nor state other values of these options to use them on purpose."
        )
    return notes


def _same_architecture(one: str, other: str) -> bool:
    def plain(name: str) -> str:
        return name.rpartition("/")[2].partition(".")[0].replace("-", "_").lower()

    return plain(one) == plain(other)

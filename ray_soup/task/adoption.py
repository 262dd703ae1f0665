"""What files say about the training and the recipe does not is used; what contradicts itself or the recipe is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from ray_soup.errors import RecipeError
from ray_soup.recipe import Preprocessing, Recipe
from ray_soup.task.libraries import IMAGE_OPTIONS, SIZE_OPTIONS
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.preprocess_key import as_mapping, keys_of
from ray_soup.task.values import Found, Settings, same_value

LARGEST, SMALLEST = 4096, 0.1
"""The size of images in pixels, and the share of them, up to and from which a file's word for it is taken."""


@dataclass
class Evidence:
    """What the files of one ingredient say about its training."""

    path: str
    options: dict[str, str] = field(default_factory=dict)
    """Values by the name of the option of the recipe key `model`."""
    places: dict[str, str] = field(default_factory=dict)
    """Where each of these values was found."""
    conflicts: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Another value of an option, and where that was found."""
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
    whole: bool = False
    """Whether a file lists all arguments that its model was created with."""
    source: str = ""
    """Where the first of the values was found."""

    def add(self, source: str, said: Found) -> None:
        """Add what is said in one more place; the first one counts."""
        self.source = self.source or source
        for option, value in said.settings.items():
            if not same_value(self.options.setdefault(option, value), value):
                self.conflicts.setdefault(option, (value, source))
            self.places.setdefault(option, source)
        self.unstatable |= said.unstatable
        self.unknown = self.unknown or said.unknown
        self.other_model = self.other_model or said.other_model
        self.remark = self.remark or said.remark
        self.unread = {**said.unread, **self.unread}
        self.whole = self.whole or said.whole

    def set(self, source: str, settings: Settings) -> None:
        """Set values that tensors show, whatever is said elsewhere."""
        self.options |= settings
        self.places |= dict.fromkeys(settings, source)
        self.conflicts = {option: other for option, other in self.conflicts.items() if option not in settings}
        self.source = self.source or source if settings else self.source


def compare(recipe: Recipe, spec: ModelSpec, found: Sequence[Evidence], used: Settings) -> tuple[list[str], Settings]:
    """Compare the options of all ingredients with those in use.

    Args:
        recipe: the recipe.
        spec: its model, with the options that its key `preprocess` stands for.
        found: what the files say.
        used: the options in use.

    Returns notes, and the options that the recipe does not state, with the values that the files do. Raises RecipeError if
    the files contradict each other where the recipe states nothing, or if `preprocess` contradicts them.
    """
    notes: list[str] = []
    adopted: dict[str, Evidence] = {}
    for option in dict.fromkeys(name for evidence in found for name in evidence.options):
        have = [evidence for evidence in found if option in evidence.options]
        if option in spec.options:
            other = next((e for e in have if not same_value(e.options[option], used.get(option, ""))), None)
            notes += [] if other is None else [_stated(recipe, spec, option, other, used)]
            continue
        _check_agreement(spec, option, found)
        if not same_value(have[0].options[option], used.get(option, "")):
            _check_size(spec, option, have[0])
            adopted[option] = have[0]
    return [*notes, *_adopted(adopted, found)], {option: one.options[option] for option, one in adopted.items()}


def _stated(recipe: Recipe, spec: ModelSpec, option: str, other: Evidence, used: Settings) -> str:
    """Return the note about a value that an option of `model` states, although a file says another. Raises RecipeError."""
    by_model = ModelSpec.parse(recipe.model).options
    if isinstance(recipe.preprocess, Preprocessing) and option not in by_model:
        stated = {name: value for name, value in other.options.items() if name in spec.options.keys() - by_model}
        named = keys_of(spec, stated)
        raise contradicted(recipe.preprocess, other.path, other.places[option], {option: other.options[option]}, named, used)
    if option == "aux_logits":  # which decides about the tensors
        value = other.options[option]
        line = spec.with_options({option: value})
        raise RecipeError(
            f"{other.path} was trained with {option} {value} ({other.places[option]}); the recipe's model uses {option} "
            f"{used[option]}. Write in the recipe\n    model: {line}"
        )
    return (
        f"{other.path} was trained with {option} {other.options[option]} ({other.places[option]}); the recipe states "
        f"{used.get(option, '')}, which is used."
    )


def _check_agreement(spec: ModelSpec, option: str, found: Sequence[Evidence]) -> None:
    """Check that all files say the same about an option that the recipe does not state. Raises RecipeError."""
    first = next(evidence for evidence in found if option in evidence.options)
    value = first.options[option]
    more = spec.with_options({option: value})
    cure = f"one value must be used for all. Choose it with the option `{option}`, as in\n    model: {more}"
    for evidence in found:
        if option in evidence.conflicts:
            other, source = evidence.conflicts[option]
            said = f"{option} {evidence.options[option]} ({evidence.places[option]}) or {other} ({source})"
            raise RecipeError(f"{evidence.path} was trained with {said}: its files contradict each other, and {cure}")
        if option in evidence.options and not same_value(evidence.options[option], value):
            raise RecipeError(
                f"{first.path} was trained with {option} {value} and {evidence.path} with {evidence.options[option]}; {cure}"
            )
        if option not in evidence.options and evidence.whole and option not in IMAGE_OPTIONS[spec.library]:
            raise RecipeError(f"{first.path} was trained with {option} {value} and {evidence.path} without it; {cure}")


def _check_size(spec: ModelSpec, option: str, evidence: Evidence) -> None:
    """Check that a size from a file is one of ordinary images: others take all memory. Raises RecipeError."""
    value = evidence.options[option]
    sizes = option in ("resize_size", *SIZE_OPTIONS.values()) and max(map(int, value.split(","))) > LARGEST
    if sizes or (option == "crop_pct" and float(value) < SMALLEST):
        raise RecipeError(
            f"{evidence.path} was trained with {option} {value} ({evidence.places[option]}), which is not used unless the "
            f"recipe states it. If it is right, write\n    model: {spec.with_options({option: value})}\n"
            "or state another value."
        )


def _adopted(adopted: dict[str, Evidence], found: Sequence[Evidence]) -> list[str]:
    """Return a note for each place with values that are used because the recipe states none."""
    notes = []
    for (path, source), options in groupby(
        adopted, key=lambda option: (adopted[option].path, adopted[option].places[option])
    ):
        names = list(options)
        count = sum(all(name in evidence.options for name in names) for evidence in found) - 1
        said = ", ".join(f"{name} {adopted[name].options[name]}" for name in names)
        who = f"{path} and {count} more were" if count else f"{path} was"
        silent = len(found) - count - 1
        others = f"; {silent} other{'s do' if silent > 1 else ' does'} not say" if silent else ""
        notes.append(f"{who} trained with {said} ({source}{others}); the recipe states nothing else, so this is used.")
    return notes


def check_unstatable(spec: ModelSpec, found: Sequence[Evidence]) -> None:
    """Check that no ingredient was trained with an argument that no option states. Raises RecipeError."""
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


def unread_values(spec: ModelSpec, found: Sequence[Evidence], used: Settings) -> list[str]:
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


def contradicted(
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

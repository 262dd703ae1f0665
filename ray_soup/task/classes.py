"""Names of classes: sources number their classes in different ways, and equal names must get equal labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_soup.errors import RecipeError


@dataclass(frozen=True)
class Classes:
    """The names of a source's classes, by label."""

    key: str
    """The recipe key of the source, such as data.fit."""
    spec: str
    """The source as the recipe names it."""
    names: tuple[str, ...]
    """Unique names."""
    by_position: bool = False
    """True if a label is a position in a sorted list of folders; False if the source stores labels."""

    def __str__(self) -> str:
        shown = [f"{label}={name}" for label, name in enumerate(self.names)]
        return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-3:]])


def is_numeric(names: Iterable[str]) -> bool:
    """Return whether all names are different integers."""
    names = list(names)
    return all(re.fullmatch(r"-?[0-9]+", n) for n in names) and len({int(n) for n in names}) == len(names)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort the names of class folders: as integers if all of them are integers, as text otherwise."""
    names = list(names)
    return tuple(sorted(names, key=int) if is_numeric(names) else sorted(names))


def reference(known: Sequence[Classes]) -> Classes | None:
    """Return the numbering that all sources must share; None if no source knows names.

    The numbering of data.train, or else data.fit, counts if it stores labels or has all the names: the ingredients were
    trained with it. Otherwise it is that of the first source that stores labels. If there are class folders only, a label is
    the position of a folder's name among the names of all sources, so that a set that lacks a class has the labels of the
    others. Raises RecipeError if stored labels contradict the order of the folders of data.train or data.fit.
    """
    stored = next((classes for classes in known if not classes.by_position), None)
    if stored is None:
        return replace(known[0], names=in_order({n for classes in known for n in classes.names})) if known else None
    first = [c for key in ("data.train", "data.fit") for c in known if c.key == key]
    if first and not first[0].by_position:
        return first[0]
    folders = [c for c in first if c.by_position and is_numeric(c.names) == is_numeric(stored.names)]
    for own in folders:
        if not _lacking(own, stored):
            return own
    for own in folders:
        _check_order(own, stored)
    return stored


def _lacking(own: Classes, other: Classes) -> list[str]:
    """Return the names of `other` that `own` lacks; both have integers as names, or neither."""
    key = _comparable(own)
    found = {key(name) for name in own.names}
    return [name for name in other.names if key(name) not in found]


def _check_order(folders: Classes, stored: Classes) -> None:
    """Check that class folders which lack some of the stored names are numbered in the same order. Raises RecipeError."""
    key = _comparable(folders)
    label_of = {key(name): label for label, name in enumerate(stored.names)}
    order = sorted({key(name) for name in (*folders.names, *stored.names)})
    for name in folders.names:
        label, position = label_of.get(key(name)), order.index(key(name))
        if label not in (None, position):
            raise RecipeError(
                f"{folders.key}: {folders.spec}: its class folders lack '{_lacking(folders, stored)[0]}', a class of "
                f"{stored.key} ({stored.spec}), where '{name}' has label {label}; by the order of the folders it is "
                f"{position}. Found {folders}; {stored}. Add a data.train that has all classes, or store the labels of "
                f"{folders.key}: use Parquet or .npz."
            )


def _comparable(classes: Classes) -> Callable[[str], int | str]:
    """Return the function that turns names into what they are compared by."""
    return int if is_numeric(classes.names) else str


def unlike_image_folder(shared: Classes) -> str:
    """Describe the labels if they are not those of torchvision's ImageFolder, which sorts folders as text; else empty."""
    if not shared.by_position or list(shared.names) == sorted(shared.names):
        return ""
    return (
        f"The names of the class folders are integers, so labels follow their numeric order ({shared}), unlike in "
        "torchvision's ImageFolder, which sorts them as text."
    )


def renumbering(own: Classes, shared: Classes, used: Iterable[int]) -> np.ndarray | None:
    """Map the labels of a source to the labels of the shared numbering, by name.

    Args:
        own: the source's classes.
        shared: the shared numbering.
        used: the labels that occur in the source.

    Returns int64 [len(own.names)], -1 for an unused class that `shared` does not have; None if no label changes. Raises
    RecipeError if a class has no counterpart.
    """
    if own.names == shared.names:
        return None
    used = sorted(used)
    if is_numeric(own.names) != is_numeric(shared.names):
        _check_numbers(own, shared, used)
        return None
    key = _comparable(own)
    label_of = {key(name): label for label, name in enumerate(shared.names)}
    unknown = [label for label in used if key(own.names[label]) not in label_of]
    if unknown:
        raise RecipeError(
            f"{own.key}: {own.spec}: its class '{own.names[unknown[0]]}' (label {unknown[0]}) is not a class of "
            f"{shared.key} ({shared.spec}), which has {shared}. Classes are compared by name: rename or remove it, or "
            "store both sources with the same classes."
        )
    found = np.array([label_of.get(key(name), -1) for name in own.names], dtype=np.int64)
    return None if all(found[label] == label for label in used) else found


def relabeled(labels: np.ndarray, own: Classes, shared: Classes) -> tuple[np.ndarray, str]:
    """Give the labels of a source the numbers of the shared numbering, by name.

    Args:
        labels: int64 [n, ...]; negative ones do not change.
        own: the source's classes.
        shared: the shared numbering.

    Returns the labels, and a note about what changed; the note is empty if nothing did. Raises RecipeError if a class has no
    counterpart.
    """
    used = np.unique(labels)
    mapping = renumbering(own, shared, used[used >= 0].tolist())
    if mapping is None:
        return labels, ""
    note = f"{own.key}: labels were renumbered by name, to those of {shared.key}: {differing(own, mapping)}."
    return np.where(labels < 0, labels, mapping[np.maximum(labels, 0)]).astype(labels.dtype), note


def _check_numbers(own: Classes, shared: Classes, used: Sequence[int]) -> None:
    """Check that the source whose names are integers is numbered by them. Raises RecipeError."""
    numbers = own if is_numeric(own.names) else shared
    for label in used if numbers is own else range(len(shared.names)):
        if int(numbers.names[label]) != label:
            raise RecipeError(
                f"{own.key}: {own.spec} and {shared.key} ({shared.spec}) name their classes differently: {own}; {shared}. "
                f"Class {numbers.names[label]} of {numbers.key} has label {label}, so they cannot be matched by number. Use "
                "the same names in both."
            )


def differing(own: Classes, mapping: np.ndarray) -> str:
    """Describe the first labels that a renumbering changes, as in "cat: 0 -> 2"."""
    changed = [(name, old, int(mapping[old])) for old, name in enumerate(own.names) if mapping[old] not in (old, -1)]
    shown = ", ".join(f"{name}: {old} -> {new}" for name, old, new in changed[:5])
    return f"{shown}{', ...' if len(changed) > 5 else ''}"

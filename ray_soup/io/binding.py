"""Match the tensor names of a checkpoint with those of a model: containers, prefixes, wrappers, tied tensors, leftovers.

Every way to match is a one-to-one map of names (names.py), so no tensor is dropped or merged unseen. What stands beside the
model is left out with a remark if it is another copy of the model, such as an EMA, or evidently no part of it
(leftovers.py); otherwise the match does not fit. Of several copies, the one in use is reported, or all are refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import NamedTuple

from ray_soup.io.formats import BEFORE_AVERAGING, ZERO, TensorInfo
from ray_soup.io.leftovers import LeftOut
from ray_soup.io.names import (
    COUNTER,
    TEXT_TOWER,
    Candidate,
    Expected,
    Ignored,
    ModelNames,
    Tensors,
    likely,
    prefixed,
    renamed,
    whole_models,
    without_shared_prefix,
)

__all__ = ["Expected", "Ignored", "Reading", "Tensors", "best_reading", "without_shared_prefix"]


class Reading(NamedTuple):
    """One way to match the tensors of a container with the names of a model."""

    tensors: dict[str, TensorInfo]
    """The tensors by the model's names, and those that nothing allows to leave out."""
    copies: tuple[tuple[str, str, TensorInfo], ...] = ()
    """Second copies of tied tensors: first name, second name, place."""
    left_out: tuple[str, ...] = ()
    """Names of the tensors left out."""
    remarks: tuple[str, ...] = ()
    """What a user should know about the choice, without the name of the file."""
    unclear: str = ""
    """Why the choice is ambiguous; empty if it is not."""
    aliases: tuple[str, ...] = ()
    """The other names of tied or renamed tensors that the container uses."""
    chosen: str = ""
    """The prefix of the tensors in use if it depends on `ignore`; otherwise empty, because container and model decide."""


def best_reading(
    containers: Mapping[str, Tensors], expected: Expected | set[str], tied: Mapping[str, str], ignore: Ignored = ()
) -> Reading:
    """Return the match of a checkpoint with a model; if nothing fits, the nearest one.

    A match fits if it has all names of the model, no other ones, and is not `unclear`.

    Args:
        containers: every state dict of the checkpoint, by the key that it is stored under.
        expected: shapes of the model's tensors by name, or their names; of several copies of the model, those with the
            right shapes are preferred.
        tied: maps the second name of a tied tensor to its first.
        ignore: tensors to leave out if the model does not have them.
    """
    shapes = expected if isinstance(expected, Mapping) else dict.fromkeys(sorted(expected))
    ignore = tuple(ignore)
    globs = "|".join(fnmatch.translate(pattern) for pattern in ignore if isinstance(pattern, str))
    model = ModelNames(
        shapes,
        tied,
        any(n.startswith("visual.") for n in shapes) and not any(map(TEXT_TOWER.match, shapes)),
        re.compile(globs) if globs else None,
        tuple(pattern for pattern in ignore if not isinstance(pattern, str)),
        _uncounted(containers, shapes),
    )
    complete = {key: found for key, tensors in containers.items() if (found := whole_models(tensors, model))}
    fitting = {k: found for k, found in complete.items() if any(model.has_shapes(c, containers[k]) for c in found)}
    complete = fitting or complete
    if not complete:
        return _nearest(containers, model)
    key, found = next(iter(complete.items()))
    reading = _chosen(found, containers[key], model)
    if len(complete) == 1:
        return reading
    places = [f"`{other}`" if other else "its top level" for other in complete]
    second = next(other for other in complete if other and other != key)
    remark = (
        f"it contains the whole model under {' and '.join(places)}. The first was used; append ?key={second} to the path to "
        "use another."
    )
    if (key, second) == ("state_dict", BEFORE_AVERAGING):
        remark = (
            f"its `{key}` is the average of the weights over the training (Lightning's WeightAveraging), and was used; "
            f"append ?key={second} to the path to use the last weights."
        )
    return reading._replace(remarks=(*reading.remarks, remark))


def _uncounted(containers: Mapping[str, Tensors], expected: Expected) -> frozenset[str]:
    """Return the names of the buffers in which a model counts batches, if nothing in the checkpoint is such a buffer."""
    if any(name.endswith(COUNTER) for tensors in containers.values() for name in tensors):
        return frozenset()
    return frozenset(n for n, shape in expected.items() if n.rpartition(".")[2] == COUNTER and shape in ((), None))


def _nearest(containers: Mapping[str, Tensors], model: ModelNames) -> Reading:
    """Return the match that has the most names of the model, so that the caller can list the differences."""
    best, best_overlap = Reading({}), -1
    for tensors in containers.values():
        ways = [*prefixed(tensors), *likely(tensors, model)]
        for candidate in (way for plain in ways for way in (plain, renamed(plain, model)) if way is not None):
            reading = _reading_of(candidate, tensors, model, ())
            overlap = len(reading.tensors.keys() & model.expected.keys())
            if overlap > best_overlap:
                best, best_overlap = Reading(reading.tensors, reading.copies), overlap
    return best


# The choice among copies of the model


def _chosen(found: list[Candidate], tensors: Tensors, model: ModelNames) -> Reading:
    """Return the match with one of several copies of the model, which is `unclear` if nothing decides between them."""
    kept = [c for c in found if not model.ignores_all(c)] or found
    used, rivals = _preferred(kept)
    reading = _reading_of(used, tensors, model, tuple(c for c in kept if c is not used))
    reading = reading._replace(unclear=_ambiguity(used, rivals, model))
    first, others = _preferred(found)
    if first is not used or len(others) > len(rivals):
        reading = reading._replace(chosen=used.in_file(model))
    swapped = [one for one, other in used.doubled if len(one) < len(other)]
    return reading._replace(chosen=f"{reading.chosen} {swapped[0]}".strip()) if swapped else reading


def _preferred(found: list[Candidate]) -> tuple[Candidate, list[Candidate]]:
    """Return the copy of the model to use, and the copies that have the same claim, itself included.

    An average over the training gives way to any other copy; a teacher to the model at the top level or below `model.`.
    """
    rivals = [c for c in found if not c.is_average] or found
    plain = [c for c in rivals if c.is_plain]
    if len(plain) == 1 and all(c.is_teacher for c in rivals if c is not plain[0]):
        rivals = plain
    return rivals[0], rivals


def _ambiguity(used: Candidate, rivals: list[Candidate], model: ModelNames) -> str:
    """Say why the choice of a copy, or of a tensor, is unclear; empty if it is not."""
    if len(rivals) > 1:
        places = [f"`{c.in_file(model)}`" if c.prefix else "its top level" for c in rivals]
        second = rivals[-1].in_file(model)
        return (
            f"the whole model occurs under {' and '.join(places[:3])}. List the names to leave out in the recipe, as in "
            f'ignore: ["{second}*"], or append the one to use to the paths, as in ?key={second.rstrip(".")}'
        )
    for one, other in used.doubled:
        if not model.ignores(other, other):
            return _twice(one, other)
    for name in used.outside:
        if (name in model.expected or name in model.tied) and not model.ignores(name, name):
            return _twice(used.in_file(model) + name, name)
    return ""


def _twice(one: str, other: str) -> str:
    return (
        f"it contains both {one} and {other}, which the model has once. List the one to leave out in the recipe, as in "
        f'ignore: ["{other}"]'
    )


# What a match leaves out


def _reading_of(candidate: Candidate, tensors: Tensors, model: ModelNames, others: tuple[Candidate, ...]) -> Reading:
    """Return the match with this candidate's names; `others` are the other copies of the model."""
    named: dict[str, TensorInfo] = {}
    aliases: list[str] = []
    left = LeftOut(candidate, model, others)
    for name, in_file in candidate.names.items():
        if name in model.tied:
            aliases.append(name)
        elif name in model.expected or not left.take(name, in_file, tensors[in_file]):
            named[name] = tensors[in_file]
    copies = []
    for alias in aliases:
        info = tensors[candidate.names[alias]]
        if named.setdefault(model.tied[alias], info) is not info:
            copies.append((model.tied[alias], alias, info))
    for in_file in (*candidate.outside, *(other for _, other in candidate.doubled)):
        if not left.take_outside(in_file, tensors[in_file]) and in_file not in model.expected:
            named[in_file] = tensors[in_file]
    remarks = [*left.remarks()]
    if model.counters and model.has_all(candidate):
        named |= dict.fromkeys(sorted(model.counters), ZERO)
        remarks.append(f"it has no {COUNTER}, like files from before PyTorch 0.4.1: they are 0, as torch loads it.")
    return Reading(named, tuple(copies), tuple(left.names), tuple(remarks), aliases=tuple(aliases))

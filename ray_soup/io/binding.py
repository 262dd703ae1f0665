"""Match the tensor names of a checkpoint with those of a model: containers, prefixes, tied tensors, tensors to leave out.

Every way to match is a one-to-one map of names, so no tensor is dropped or merged unseen. Of the containers of a file, the
first one that contains the whole model is taken, and of the prefixes, the only one; all else is refused or reported.
"""

from __future__ import annotations

import fnmatch
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ray_soup.io.formats import TensorInfo

PREFIXES = ("module.", "_orig_mod.", "model.")
DEEPEST = 6  # prefixes in a row, as in module._orig_mod.
MANY = 64  # other prefixes that are tried
TEXT_TOWER = re.compile(  # tensors of a CLIP outside `visual.`, which no image classifier needs
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|text|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size)(\.|$)"
)
COUNTED = re.compile(r"(.*\.)?embeddings\.position_ids$")  # 0, 1, 2, ...: a buffer that transformers no longer saves

Tensors = Mapping[str, TensorInfo]
Ignored = Iterable[str | re.Pattern[str]]
"""Tensors to leave out if the model does not have them: glob patterns of whole names, or expressions to search for."""


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


class _Candidate(NamedTuple):
    """Names for the tensors of a container."""

    prefix: str
    names: dict[str, str]
    """The name in the file of each tensor that may be the model's, by its name in the model."""
    outside: tuple[str, ...] = ()
    """Names in the file of the tensors that do not begin with the prefix."""


class _Model(NamedTuple):
    """The names of a model, and what its checkpoints may contain beyond them."""

    expected: set[str]
    tied: Mapping[str, str]
    image_only: bool
    globs: re.Pattern[str] | None
    searched: tuple[re.Pattern[str], ...]

    def has_all(self, candidate: _Candidate) -> bool:
        """Return whether a candidate contains all tensors of the model."""
        names = candidate.names
        if len(names) < len(self.expected):
            return False
        lacking = [name for name in self.expected if name not in names]
        return not lacking or set(lacking) <= {first for alias, first in self.tied.items() if alias in names}

    def ignores(self, name: str, in_file: str) -> bool:
        """Return whether the user lists this tensor under `ignore:`."""
        return self.globs is not None and bool(self.globs.fullmatch(name) or self.globs.fullmatch(in_file))

    def ignores_all(self, names: Iterable[str]) -> bool:
        """Return whether the user lists all tensors with these names in the file under `ignore:`."""
        return all(self.ignores(name, name) for name in names)

    def expects_no(self, name: str) -> bool:
        """Return whether this is a constant or a text tower, which every checkpoint of a library may contain."""
        found = COUNTED.match(name) or (self.image_only and TEXT_TOWER.match(name))
        return bool(found) or any(pattern.search(name) for pattern in self.searched)


def best_reading(
    containers: Mapping[str, Tensors], expected: set[str], tied: Mapping[str, str], ignore: Ignored = ()
) -> Reading:
    """Return the match of a checkpoint with a model; if nothing fits, the nearest one.

    A match fits if it has all names of the model, no other ones, and is not `unclear`. The choice does not depend on what
    may be left out.

    Args:
        containers: every state dict of the checkpoint, by the key that it is stored under.
        expected: names of the model's tensors.
        tied: maps the second name of a tied tensor to its first.
        ignore: tensors to leave out if the model does not have them.
    """
    ignore = tuple(ignore)
    globs = "|".join(fnmatch.translate(pattern) for pattern in ignore if isinstance(pattern, str))
    model = _Model(
        expected,
        tied,
        any(n.startswith("visual.") for n in expected) and not any(map(TEXT_TOWER.match, expected)),
        re.compile(globs) if globs else None,
        tuple(pattern for pattern in ignore if not isinstance(pattern, str)),
    )
    complete = {key: found for key, tensors in containers.items() if (found := _complete(tensors, model))}
    if not complete:
        return _nearest(containers, model)
    key, found = next(iter(complete.items()))
    reading = _reading_of(found[0], containers[key], model)._replace(unclear=_ambiguity(found, model))
    if globs and [c.prefix for c in _complete(containers[key], model._replace(globs=None))] != [found[0].prefix]:
        reading = reading._replace(chosen=found[0].prefix)
    if len(complete) == 1:
        return reading
    places = [f"`{other}`" if other else "its top level" for other in complete]
    second = next(other for other in complete if other and other != key)
    remark = (
        f"it contains the whole model under {' and '.join(places)}. The first was used; append ?key={second} to the path to "
        "use another."
    )
    return reading._replace(remarks=(*reading.remarks, remark))


def _complete(tensors: Tensors, model: _Model) -> list[_Candidate]:
    """Return the ways to find the whole model in a container; more than one if the choice is ambiguous."""
    bare, *prefixed = _prefixed(tensors)
    found = [c for c in _renamed(bare, model) if model.has_all(c)]
    if found:
        return found[:1]
    known = [c for prefix in prefixed for c in _renamed(prefix, model) if model.has_all(c)]
    found = [c for c in known or _mixed(tensors, model) if not model.ignores_all(c.names.values())]
    if found:
        return found
    others = [c for c in _other_prefixes(tensors, model) if model.has_all(c)]
    return [c for c in others if model.ignores_all(c.outside)] or others or known


def _reading_of(candidate: _Candidate, tensors: Tensors, model: _Model) -> Reading:
    """Return the match with this candidate's names."""
    named: dict[str, TensorInfo] = {}
    aliases, towers, ignored = [], [], []
    left_out = []
    for name, in_file in candidate.names.items():
        if name in model.tied:
            aliases.append(name)
        elif name in model.expected or not (model.expects_no(name) or model.ignores(name, in_file)):
            named[name] = tensors[in_file]
        else:
            left_out.append(name)
            if model.image_only and TEXT_TOWER.match(name):
                towers.append(name)
            elif not model.expects_no(name):
                ignored.append(name)
    copies = []
    for alias in aliases:
        info = tensors[candidate.names[alias]]
        if named.setdefault(model.tied[alias], info) is not info:
            copies.append((model.tied[alias], alias, info))
    ignored += [name for name in candidate.outside if model.ignores(name, name)]
    outside = [name for name in candidate.outside if not model.ignores(name, name)]
    remarks = []
    if towers:
        remarks.append(f"The text tower ({len(towers)} tensors, such as {towers[0]}) was left out: the model has none.")
    if ignored:
        remarks.append(f"{_some(ignored)} left out because of `ignore:`.")
    if outside:
        verb = "were" if len(outside) > 1 else "was"
        remarks.append(f"{_some(outside)} outside `{candidate.prefix}` {verb} left out: the model has none.")
    return Reading(named, tuple(copies), (*left_out, *candidate.outside), tuple(remarks), aliases=tuple(aliases))


def _nearest(containers: Mapping[str, Tensors], model: _Model) -> Reading:
    """Return the match that has the most names of the model, so that the caller can list the differences."""
    best, best_overlap = Reading({}), -1
    for tensors in containers.values():
        for prefixed in _prefixed(tensors):
            for candidate in _renamed(prefixed, model):
                reading = _reading_of(candidate, tensors, model)
                overlap = len(reading.tensors.keys() & model.expected)
                if overlap > best_overlap:
                    others = {n for n in candidate.outside if not model.ignores(n, n)} - model.expected - model.tied.keys()
                    outside = {name: tensors[name] for name in candidate.outside if name in others}
                    best, best_overlap = Reading({**outside, **reading.tensors}, reading.copies), overlap
    return best


def _prefixed(tensors: Tensors) -> Iterator[_Candidate]:
    """Yield the names unchanged, then without each known prefix, or several in a row, that some of them have."""
    yield _Candidate("", {name: name for name in tensors})
    queue = deque([("", list(tensors), 0)])
    while queue:
        stem, below, depth = queue.popleft()
        for prefix in PREFIXES if depth < DEEPEST else ():
            start = stem + prefix
            inside = [name for name in below if name.startswith(start) and name != start]
            if inside:
                outside = tuple(name for name in tensors if not name.startswith(start) or name == start)
                yield _Candidate(start, {name[len(start) :]: name for name in inside}, outside)
                queue.append((start, inside, depth + 1))


def without_shared_prefix(tensors: Tensors) -> Tensors:
    """Return tensors without the known prefixes that all their names share."""
    shared = [candidate for candidate in _prefixed(tensors) if not candidate.outside]
    return {name: tensors[in_file] for name, in_file in shared[-1].names.items()}


def _renamed(candidate: _Candidate, model: _Model) -> Iterator[_Candidate]:
    """Yield a candidate, and with the Model Soups code's names for CLIP and head if it has them."""
    yield candidate
    if "head.weight" in model.expected and any(name.startswith("classification_head.") for name in candidate.names):
        names = {re.sub("^classification_head", "head", n).removeprefix("model."): f for n, f in candidate.names.items()}
        if len(names) == len(candidate.names):
            yield candidate._replace(names=names)


def _mixed(tensors: Tensors, model: _Model) -> list[_Candidate]:
    """Return the names without the known prefixes that only some of them have, unless two names become one."""
    names = {_bare(name, model.expected): name for name in tensors}
    candidate = _Candidate("", names)
    return [candidate] if len(names) == len(tensors) and model.has_all(candidate) else []


def _bare(name: str, expected: set[str]) -> str:
    for _ in range(DEEPEST):
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None or name in expected:
            break
        name = name.removeprefix(prefix)
    return name


def _other_prefixes(tensors: Tensors, model: _Model) -> Iterator[_Candidate]:
    """Yield the names below every prefix that one name of the model has in the file, such as `net.` or `ema_model.`."""
    longest = max(model.expected, key=len, default="")
    aliases = [longest, *(alias for alias, first in model.tied.items() if first == longest)]
    ends = {name[: -len(alias)] for name in tensors for alias in aliases if name.endswith(f".{alias}")}
    known = {candidate.prefix for candidate in _prefixed(tensors)}
    for prefix in sorted(ends - known)[:MANY]:
        names = {name[len(prefix) :]: name for name in tensors if name.startswith(prefix)}
        yield _Candidate(prefix, names, tuple(name for name in tensors if not name.startswith(prefix)))


def _ambiguity(found: list[_Candidate], model: _Model) -> str:
    """Say why the choice of a prefix is unclear; empty if it is not."""
    places = [f"`{candidate.prefix}`" for candidate in found]
    if len(found) > 1:
        return (
            f"the whole model occurs under {' and '.join(places[:3])}. List the names to leave out in the recipe, as in "
            f'ignore: ["{found[-1].prefix}*"]'
        )
    prefix, beside = found[0].prefix, [name for name in found[0].outside if not model.ignores(name, name)]
    second = next((name for name in beside if name in model.expected or name in model.tied), None)
    if second is not None:
        return (
            f"it contains both {prefix}{second} and {second}, which the model has once. List the one to leave out in the "
            f'recipe, as in ignore: ["{second}"]'
        )
    if prefix.endswith(PREFIXES) or not beside:
        return ""
    return (
        f"the whole model occurs under {places[0]}, beside {_some(beside)}. List the names to leave out in the recipe, as "
        f'in ignore: ["{beside[0].partition(".")[0]}.*"]'
    )


def _some(names: list[str]) -> str:
    """Return the number of names, and the groups that they belong to."""
    groups = list(dict.fromkeys(name.partition(".")[0] + ".*" if "." in name else name for name in names))
    more = ", ..." if len(groups) > 4 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({', '.join(groups[:4])}{more})"

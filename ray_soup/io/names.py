"""The names of a checkpoint's tensors, and the ways to read them as the names of a model.

A prefix P, such as `net.`, is a way if P + name is in the file for every name of the model. What wrappers such as
torch.compile add to names is dropped wherever it stands, if every name stays distinct; the model's own names never change.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ray_soup.io.formats import TensorInfo

WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, DataParallel, activation checkpointing and FSDP add to names, wherever the wrapped module stands."""
PREFIXES = ("module.", "_orig_mod.", "model.")
DEEPEST = 6  # prefixes in a row, as in module._orig_mod.
MOST_PARTS = 64  # parts of a name that are tried as ends of a prefix
COUNTER = "num_batches_tracked"
"""The last part of the names of buffers that files from before PyTorch 0.4.1 lack: torch reads them as 0."""
TEXT_TOWER = re.compile(  # tensors of a CLIP outside `visual.`, which no image classifier needs
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|text|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size)(\.|$)"
)
COUNTED = re.compile(r"(.*\.)?embeddings\.position_ids$")  # 0, 1, 2, ...: a buffer that transformers no longer saves
AVERAGES = re.compile(
    r"(?i:(?:(?:model|net|network|student|generator|unet)_)?(?:ema|swa|averaged|shadow)"
    r"(?:_(?:model|module|net|network|weights|params|parameters|state|unet|v\d))?|avg_model|average_model|polyak)"
)
"""Parts of names above the average of a model over its training."""
TEACHERS = re.compile(
    r"(?i:teacher|teacher_(?:model|net|network)|momentum_(?:model|encoder|net)|target_(?:model|net|network))"
)
"""Parts of names above a model that another one is trained to follow."""

Tensors = Mapping[str, TensorInfo]
Ignored = Iterable[str | re.Pattern[str]]
"""Tensors to leave out if the model does not have them: glob patterns of whole names, or expressions to search for."""
Expected = Mapping[str, tuple[int, ...] | None]
"""The shape of each tensor of a model, by name; None if it does not matter."""


@dataclass(frozen=True)
class Candidate:
    """Names for the tensors of a container."""

    prefix: str
    """The prefix, without wrappers."""
    names: dict[str, str]
    """The name in the file of each tensor below the prefix, by its name in the model."""
    outside: tuple[str, ...] = ()
    """Names in the file of the tensors that are not below the prefix."""
    doubled: tuple[tuple[str, str], ...] = ()
    """Pairs of names in the file that are the same name of the model: the one in use, and the other."""

    @property
    def is_plain(self) -> bool:
        """Return whether the prefix says nothing about the role of the model."""
        return set(self.prefix.split(".")) <= {"model", ""}

    @property
    def is_average(self) -> bool:
        """Return whether the prefix says that this is an average of a model over its training."""
        return any(map(AVERAGES.fullmatch, self.prefix.split(".")))

    @property
    def is_teacher(self) -> bool:
        """Return whether the prefix says that another model was trained to follow this one."""
        return any(map(TEACHERS.fullmatch, self.prefix.split(".")))

    def in_file(self, model: ModelNames) -> str:
        """Return the prefix as it stands in the file, with wrappers."""
        for name in model.expected:
            if self.names.get(name, "").endswith(name):
                return self.names[name].removesuffix(name)
        return self.prefix


@dataclass(frozen=True)
class ModelNames:
    """The names of a model, and what its checkpoints may contain beyond them."""

    expected: Expected
    tied: Mapping[str, str]
    image_only: bool
    globs: re.Pattern[str] | None
    searched: tuple[re.Pattern[str], ...]
    counters: frozenset[str] = frozenset()
    """Buffers in which layers count batches, and which the file lacks, as files from before PyTorch 0.4.1 do."""

    @cached_property
    def known(self) -> tuple[str, ...]:
        """All names, those of tied tensors included."""
        return (*self.expected, *(alias for alias in self.tied if alias not in self.expected))

    @cached_property
    def unlike(self) -> set[str]:
        """Names that are equal to another one without wrappers; for these, a file must have the unchanged name."""
        count = Counter(map(unwrapped, self.known))
        return {name for name in self.known if count[unwrapped(name)] > 1}

    @cached_property
    def bare(self) -> dict[str, str]:
        """The name of each tensor by its name without wrappers."""
        return {unwrapped(name): name for name in self.known if name not in self.unlike}

    def name_of(self, rest: str, in_file: str) -> str:
        """Return the model's name of a tensor, from its name below a prefix without wrappers; `rest` if it has none."""
        found = self.bare.get(rest)
        if found is None and self.unlike:
            ends = [in_file[n:] for n in _starts(in_file)]
            found = next((end for end in ends if end in self.unlike and unwrapped(end) == rest), None)
        return rest if found is None else found

    def has_all(self, candidate: Candidate) -> bool:
        """Return whether a candidate contains all tensors of the model."""
        names = candidate.names
        if len(names) < len(self.expected) - len(self.counters):
            return False
        lacking = [name for name in self.expected if name not in names and name not in self.counters]
        return not lacking or set(lacking) <= {first for alias, first in self.tied.items() if alias in names}

    def has_shapes(self, candidate: Candidate, tensors: Tensors) -> bool:
        """Return whether the tensors of a candidate have the model's shapes, as far as these are known."""
        return all(
            shape is None or name not in candidate.names or tensors[candidate.names[name]].shape == shape
            for name, shape in self.expected.items()
        )

    def ignores(self, name: str, in_file: str) -> bool:
        """Return whether the user lists this tensor under `ignore:`."""
        return self.globs is not None and bool(self.globs.fullmatch(name) or self.globs.fullmatch(in_file))

    def first_of(self, one: str, other: str) -> tuple[str, str]:
        """Sort two names in a file that are one name of the model; the longer one is used unless it alone is ignored."""
        one, other = sorted((one, other), key=len, reverse=True)
        ignored = [self.globs is not None and bool(self.globs.fullmatch(name)) for name in (one, other)]
        return (other, one) if ignored == [True, False] else (one, other)

    def ignores_all(self, candidate: Candidate) -> bool:
        """Return whether the user lists all tensors of a copy of the model under `ignore:`, by their names in the file.

        A tensor that has the model's own name is never ignored.
        """
        used = [(name, in_file) for name, in_file in candidate.names.items() if name in self.expected or name in self.tied]
        return all(name != in_file and self.ignores(in_file, in_file) for name, in_file in used)

    def expects_no(self, name: str, in_file: str) -> bool:
        """Return whether this is a constant or a text tower, which every checkpoint of a library may contain."""
        found = COUNTED.match(name) or (self.image_only and TEXT_TOWER.match(name))
        return bool(found) or any(pattern.search(name) or pattern.search(in_file) for pattern in self.searched)


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers of modules add, wherever they stand."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    *above, last = name.split(".")
    return ".".join([*(part for part in above if part not in WRAPPERS), last])


def _starts(name: str) -> Iterator[int]:
    """Yield where the ends of a name begin, the shortest end last."""
    at = 0
    for _ in range(MOST_PARTS):
        yield at
        at = name.find(".", at) + 1
        if at == 0:
            return


# Ways to match


def below(prefix: str, bare: Mapping[str, str], model: ModelNames) -> Candidate:
    """Return the names below a prefix; `bare` are the names without wrappers, by the names in the file."""
    names: dict[str, str] = {}
    outside, doubled = [], []
    for in_file, name in sorted(bare.items(), key=lambda item: item[0] != item[1]):  # wrapped names last
        if not name.startswith(prefix) or name == prefix:
            outside.append(in_file)
            continue
        own = model.name_of(name[len(prefix) :], in_file)
        if own not in names:
            names[own] = in_file
        elif own in model.expected or own in model.tied:
            names[own], other = model.first_of(names[own], in_file)
            doubled.append((names[own], other))
        else:  # it has a wrapper in it, and no other key has
            names[in_file] = in_file
    return Candidate(prefix, names, tuple(outside), tuple(doubled))


def whole_models(tensors: Tensors, model: ModelNames) -> list[Candidate]:
    """Return the ways to find the whole model in a container, those with its shapes if there are any."""
    if tensors.keys() == model.expected.keys():
        return [Candidate("", {name: name for name in tensors})]
    bare = {name: unwrapped(name) for name in tensors}
    longest = max((name for name in model.expected if name not in model.counters), key=len, default="")
    ends = [unwrapped(n) for n in (longest, *(alias for alias, first in model.tied.items() if first == longest))]
    prefixes = {name[: -len(end)] for name in bare.values() for end in ends if name == end or name.endswith(f".{end}")}
    there, firsts = set(bare.values()), set(model.tied.values())
    needed = [unwrapped(name) for name in model.expected if name not in firsts and name not in model.counters]
    whole = [prefix for prefix in sorted(prefixes | {""}) if not prefix or all(prefix + name in there for name in needed)]
    candidates = [below(prefix, bare, model) for prefix in whole]
    found = [c for way in candidates for c in (way, renamed(way, model)) if c is not None and model.has_all(c)]
    found = found or [c for c in _mixed(bare, model) if model.has_all(c)]
    return [c for c in found if model.has_shapes(c, tensors)] or found


def renamed(candidate: Candidate, model: ModelNames) -> Candidate | None:
    """Return a candidate with the Model Soups code's names for CLIP and head if it has them."""
    if "head.weight" not in model.expected or not any(n.startswith("classification_head.") for n in candidate.names):
        return None
    names = {re.sub("^classification_head", "head", n).removeprefix("model."): f for n, f in candidate.names.items()}
    return Candidate(candidate.prefix, names, candidate.outside) if len(names) == len(candidate.names) else None


def _mixed(bare: Mapping[str, str], model: ModelNames) -> list[Candidate]:
    """Return the names without the known prefixes that only some of them have, unless two names become one."""
    names = {_without_known(name, model): in_file for in_file, name in bare.items()}
    return [Candidate("", names)] if len(names) == len(bare) else []


def _without_known(name: str, model: ModelNames) -> str:
    for _ in range(DEEPEST):
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None or name in model.bare:
            break
        name = name.removeprefix(prefix)
    return model.bare.get(name, name)


def prefixed(tensors: Tensors) -> Iterator[Candidate]:
    """Yield the names unchanged, then without each known prefix, or several in a row, that some of them have."""
    yield Candidate("", {name: name for name in tensors})
    queue = deque([("", list(tensors), 0)])
    while queue:
        stem, names, depth = queue.popleft()
        for prefix in PREFIXES if depth < DEEPEST else ():
            start = stem + prefix
            inside = [name for name in names if name.startswith(start) and name != start]
            if inside:
                outside = tuple(name for name in tensors if not name.startswith(start) or name == start)
                yield Candidate(start, {name[len(start) :]: name for name in inside}, outside)
                queue.append((start, inside, depth + 1))


def without_shared_prefix(tensors: Tensors) -> Tensors:
    """Return tensors without the known prefixes that all their names share, and without what torch.compile adds."""
    compiled = {name.replace("._orig_mod.", "."): info for name, info in tensors.items()}
    tensors = compiled if len(compiled) == len(tensors) else tensors
    shared = [candidate for candidate in prefixed(tensors) if not candidate.outside]
    return {name: tensors[in_file] for name, in_file in shared[-1].names.items()}


def likely(tensors: Tensors, model: ModelNames) -> Iterator[Candidate]:
    """Yield the names below the prefix that the most names of the model have in the file."""
    bare = {name: unwrapped(name) for name in tensors}
    votes = Counter(name[:at] for name in bare.values() for at in _starts(name) if name[at:] in model.bare)
    for prefix, _ in votes.most_common(1):
        yield below(prefix, bare, model)

"""Match the tensor names of a checkpoint with those of a model: containers, prefixes, tied tensors, tensors to leave out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ray_soup.io.formats import TensorInfo

PREFIXES = ("module.", "_orig_mod.", "model.")
TEXT_TOWER = re.compile(  # tensors of a CLIP outside `visual.`, which no image classifier needs
    r"(transformer|token_embedding|positional_embedding|ln_final|text_projection|text|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size)(\.|$)"
)
COUNTED = re.compile(r"(.*\.)?embeddings\.position_ids$")  # 0, 1, 2, ...: a buffer that transformers no longer saves

Tensors = Mapping[str, TensorInfo]


class Reading(NamedTuple):
    """One way to match the tensors of a container with the names of a model."""

    tensors: dict[str, TensorInfo]
    copies: tuple[tuple[str, str, TensorInfo], ...]
    left_out: tuple[str, ...]


def _reading_of(candidate: Tensors, expected: set[str], tied: Mapping[str, str], image_only: bool) -> Reading:
    named = dict(candidate)
    copies = []
    for alias, first in tied.items():
        if alias in named:
            info = named.pop(alias)
            if named.setdefault(first, info) != info:
                copies.append((first, alias, info))
    left_out = [n for n in named if n not in expected and (COUNTED.match(n) or (image_only and TEXT_TOWER.match(n)))]
    for name in left_out:
        del named[name]
    return Reading(named, tuple(copies), tuple(left_out))


def best_reading(containers: Mapping[str, Tensors], expected: set[str], tied: Mapping[str, str]) -> Reading:
    """Return the match of a checkpoint with a model; if nothing fits, the nearest one.

    Args:
        containers: every state dict of the checkpoint, by the key that it is stored under.
        expected: names of the model's tensors.
        tied: maps the second name of a tied tensor to its first.
    """
    image_only = any(n.startswith("visual.") for n in expected) and not any(map(TEXT_TOWER.match, expected))
    best = Reading({}, (), ())
    best_score = (False, -1)
    for tensors in containers.values():
        for candidate in _candidates(tensors, expected):
            reading = _reading_of(candidate, expected, tied, image_only)
            score = (reading.tensors.keys() == expected, len(reading.tensors.keys() & expected))
            if score > best_score:
                best, best_score = reading, score
    return best


def _candidates(tensors: Tensors, expected: set[str]) -> Iterator[Tensors]:
    """Yield the tensors of a file under each set of names that may be the model's."""
    for named in _stripped(tensors):
        yield named
        if any(name.startswith("classification_head.") for name in named):  # the Model Soups code's names for CLIP and head
            renamed = {re.sub("^classification_head", "head", n).removeprefix("model."): info for n, info in named.items()}
            if "head.weight" in expected and len(renamed) == len(named):
                yield renamed


def _stripped(tensors: Tensors) -> Iterator[Tensors]:
    """Yield the names unchanged, then without each prefix that all of them share, one prefix after another."""
    yield tensors
    names = tensors
    while names:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            return
        names = {name.removeprefix(prefix): info for name, info in names.items()}
        yield names

"""Calls to actors: how they are made, what is heard meanwhile, and what is lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ray_soup.io.progress import ProgressCallback

Call = Callable[[Any, int], Any]
"""Maps (handle, rank) to a pending call of an actor's method, as in `lambda actor, rank: actor.step.remote(...)`."""
Hear = Callable[[int, str, int, int], None]
"""Called with the key of a call and its heartbeat: what it does, the units done so far, and the units in total."""


def of_each(progress: ProgressCallback) -> Hear:
    """Report the heartbeats of actors that all do the same work: those of the first one heard of."""
    first = math.inf

    def hear(key: int, what: str, done: int, total: int) -> None:
        nonlocal first
        first = min(first, key)
        if key == first:
            progress(what, done, total)

    return hear


def of_all(progress: ProgressCallback, total: int) -> Hear:
    """Report the heartbeats of actors that share work of `total` units, as the sum of what they have done."""
    done_by: dict[int, int] = {}

    def hear(key: int, what: str, done: int, its_total: int) -> None:
        done_by[key] = done
        progress(what, min(sum(done_by.values()), total), total)

    return hear


def unheard(key: int, what: str, done: int, total: int) -> None:
    """Ignore a heartbeat."""


@dataclass(frozen=True)
class Loss:
    """The calls that were lost, because their actors were."""

    keys: frozenset[int]
    """The keys of the lost calls."""
    reason: str
    """What the transport reported."""
    alone: frozenset[int] = frozenset()
    """Those among them whose actor lives, but has lost another one that it works with."""


def all_lost(losses: Iterable[Loss | None]) -> Loss | None:
    """Join losses of the same call: the reason is that of the first one."""
    found = [loss for loss in losses if loss is not None]
    if not found:
        return None
    keys, alone = (frozenset[int]().union(*sets) for sets in ([x.keys for x in found], [x.alone for x in found]))
    return Loss(keys, found[0].reason, alone)


class LostAgain(Exception):
    """An actor was lost while it started."""

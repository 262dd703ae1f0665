"""The greedy search (Wortsman et al. 2022), exact, but with each candidate evaluated on no more examples than needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ray_soup.actors.pool import ActorPool
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome

LEAST_IMAGES = 32  # per actor and call: with fewer, the call takes longer than the evaluation


def ranking(held_out: dict[int, Outcome]) -> list[int]:
    """Return ingredients from best to worst: by accuracy on the held-out set, then by NLL, then in the given order."""
    return sorted(held_out, key=lambda k: (-int(held_out[k].correct.sum()), held_out[k].nll, k))


@dataclass
class GreedySearch:
    """The result of a greedy search."""

    kept: list[int]
    """The ingredients kept, in the order in which they were added."""
    correct: int
    """Number of examples of the held-out set that the soup classifies correctly."""
    candidates: int = 0
    """Number of ingredients that were tried."""
    looked: int = 0
    """Number of examples that candidates were evaluated on, summed over candidates."""
    trail: list[dict[str, int]] = field(default_factory=list)
    """One entry per candidate: ingredient, examples evaluated, how many of these were correct, and whether it was kept."""


def greedy(
    pool: ActorPool,
    held_out: dict[int, Outcome],
    splits: list[Split],
    keep: str = ">=",
    count: CountCallback = no_count,
    calibration: Sequence[Split] = (),
) -> GreedySearch:
    """Keep an ingredient, from the best down, if the mean with it classifies no fewer examples correctly than without it.

    The examples that ingredients most often get wrong come first, and a candidate is dropped as soon as the remaining
    examples cannot bring it up to the best: the result is that of a full evaluation.

    Args:
        pool: the actors.
        held_out: the outcome of each ingredient, by position, on `splits` joined.
        splits: the held-out set.
        keep: `>=`, or `>` to keep an ingredient only if more examples are correct with it.
        count: called with (candidates done, total).
        calibration: batches that the running statistics of a mean are estimated on; empty: the statistics are averaged.
    """
    order = ranking(held_out)
    wrong = np.sum([~o.correct for o in held_out.values()], axis=0)
    hardest = np.argsort(-wrong, kind="stable")
    source = np.repeat(np.arange(len(splits)), [len(s) for s in splits])[hardest]
    rows = np.concatenate([s.rows for s in splits])[hardest]
    total = len(rows)
    least = LEAST_IMAGES * pool.mesh.size
    search = GreedySearch([order[0]], int(held_out[order[0]].correct.sum()))
    for number, k in enumerate(order[1:]):
        needed = search.correct + (keep == ">")
        done = correct = 0
        while done < total and correct + (total - done) >= needed:
            spare = total - done - (needed - correct)  # mistakes that the candidate may still make
            stop = min(total, done + max(spare + 1, least))
            some = [Split(s.source, rows[done:stop][source[done:stop] == n]) for n, s in enumerate(splits)]
            correct += pool.try_candidate(tuple(search.kept), k, some, calibration)
            done = stop
        kept = done == total and correct >= needed
        search.candidates, search.looked = search.candidates + 1, search.looked + done
        search.trail.append({"ingredient": k, "looked": done, "correct": correct, "kept": int(kept)})
        if kept:
            search.kept.append(k)
            search.correct = correct
        count(number + 1, len(order) - 1)
    pool.forget()
    return search

"""The greedy search (Wortsman et al. 2022), exact, but with each candidate evaluated on no more examples than needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ray_soup.actors.pool import ActorPool
from ray_soup.io.progress import CountCallback, no_count
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import mean_of
from ray_soup.task.choices import gain, gains, ranking
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome

LEAST_IMAGES = 32  # per actor and call: with fewer, the call takes longer than the evaluation

ROUNDING = 1e-6
"""Relative to the sum of the losses or scores: two sums this close are equal, since a model's loss on an example is rounded
in another way in a batch of another size. Counts of correct examples are exact."""


@dataclass
class GreedySearch:
    """The result of a greedy search."""

    kept: list[int]
    """The ingredients kept, in the order in which they were added."""
    gain: float
    """The figure of the soup on the held-out set, summed over its examples: how many are correct, or minus the losses."""
    candidates: int = 0
    """Number of ingredients that were tried."""
    looked: int = 0
    """Number of examples that candidates were evaluated on, summed over candidates."""
    trail: list[dict[str, float]] = field(default_factory=list)
    """One entry per candidate: ingredient, examples evaluated, the gain on these, and whether it was kept."""


def greedy_soup(session: Session) -> NDArray[np.float64]:
    """Average the ingredients that a greedy search keeps."""
    run, names = session.run, session.names
    session.figures["held_out"] = dict(zip(names, session.held_out(), strict=True))
    held_out = run.individual()
    search = greedy(
        run.pool,
        {k: held_out[k] for k in run.subset},
        run.held_out,
        run.recipe.greedy.keep,
        lambda done, total: run.progress("greedy", done, total),
        run.calibration(CALIBRATION_WHILE_CHOOSING),
        run.recipe.select_by,
    )
    kept = [run.subset.index(k) for k in search.kept]
    share = search.looked / max(1, search.candidates * len(held_out[0]))
    session.figures["image_passes"] += search.looked
    session.figures["greedy"] = {
        "kept": [names[n] for n in kept], "candidates": search.candidates, "looked_share": share
    }  # fmt: skip
    session.notes.append(
        f"Greedy kept {len(kept)} of {len(names)} ingredients; it evaluated its candidates on {share:.0%} of the held-out "
        "examples."
    )
    return mean_of(kept, len(names))[:, 0]


def greedy(
    pool: ActorPool,
    held_out: dict[int, Outcome],
    splits: list[Split],
    keep: str = ">=",
    count: CountCallback = no_count,
    calibration: Sequence[Split] = (),
    select_by: str = "auto",
) -> GreedySearch:
    """Keep an ingredient, from the best down, if the mean with it is no worse on the held-out set than without it.

    Worse means fewer correct examples, or what `select_by` says; sums of losses or scores that differ by no more than
    `ROUNDING` are equal, so that a duplicate is kept or left out as `keep` says on every machine. The examples that
    ingredients are worst on come first, and a candidate is dropped as soon as the remaining examples cannot bring it up to
    the best: the result is that of a full evaluation.

    Args:
        pool: the actors.
        held_out: the outcome of each ingredient, by position, on `splits` joined.
        splits: the held-out set.
        keep: `>=`, or `>` to keep an ingredient only if the soup is better with it.
        count: called with the examples that are done, those of a dropped candidate included, and their total.
        calibration: batches that the running statistics of a mean are estimated on; empty: the statistics are averaged.
        select_by: the recipe key.
    """
    order = ranking(held_out, select_by)
    each = {k: gains(outcome, select_by) for k, outcome in held_out.items()}
    hardest = np.argsort(np.sum([gain for gain, _ in each.values()], axis=0), kind="stable")
    source = np.repeat(np.arange(len(splits)), [len(s) for s in splits])[hardest]
    rows = np.concatenate([s.rows for s in splits])[hardest]
    total = len(rows)
    limits = np.broadcast_to(np.max(np.array([limit for _, limit in each.values()]), axis=0), total)[hardest]
    possible = np.append(np.cumsum(limits[::-1])[::-1], 0)  # what the examples from a place on can add at most
    least = LEAST_IMAGES * pool.mesh.size
    first = each[order[0]][0]
    equal = 0.0 if first.dtype.kind == "i" else ROUNDING * np.abs(first).sum().item()
    search = GreedySearch([order[0]], first.sum().item())
    for number, k in enumerate(order[1:]):
        done, found = 0, 0.0
        while done < total and _reaches(found + possible[done], search.gain, keep, equal):
            spare = found + possible[done] - search.gain - (keep == ">")  # what the candidate may still miss
            stop = min(total, done + max(int(min(spare, total)) + 1, least))
            some = [Split(s.source, rows[done:stop][source[done:stop] == n]) for n, s in enumerate(splits)]
            found += gain(pool.try_candidate(tuple(search.kept), k, some, calibration), select_by)
            done = stop
            count(number * total + done, (len(order) - 1) * total)
        kept = done == total and _reaches(found, search.gain, keep, equal)
        search.candidates, search.looked = search.candidates + 1, search.looked + done
        search.trail.append({"ingredient": k, "looked": done, "gain": found, "kept": int(kept)})
        if kept:
            search.kept.append(k)
            search.gain = found
        count((number + 1) * total, (len(order) - 1) * total)
    pool.forget()
    return search


def _reaches(found: float, best: float, keep: str, equal: float) -> bool:
    return found > best + equal if keep == ">" else found >= best - equal

"""Best single, uniform and greedy soups; what models do, spread over the actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ray_soup.actors import Actors
from ray_soup.cache import cached, content_key, lookup
from ray_soup.data import Split
from ray_soup.outcomes import Outcome, load_outcomes, save_outcomes

FORMAT = 1
Watch = Callable[[int, int], None]
"""Is told (models done, in all)."""


def evaluation_key(*parts: str) -> str:
    """A name for what one ingredient does on one split: of the model, the numbers, the data and the device."""
    return content_key("evaluation", FORMAT, *parts)


def remember(key: str, outcome: Outcome) -> None:
    """Keep an outcome in the cache of this node."""

    def make(folder: Path) -> Iterator[None]:
        save_outcomes({"": outcome}, folder / "outcome.npz")
        yield

    work = cached("evaluations", key, outcome.loss.nbytes * 3, make)
    try:
        while True:
            next(work)
    except StopIteration as stop:
        stop.value.close()


def recall(key: str) -> Outcome | None:
    """An outcome that was kept."""
    hold = lookup("evaluations", key)
    if hold is None:
        return None
    outcome = load_outcomes(hold.path / "outcome.npz")[""]
    hold.close()
    return outcome


def individual_outcomes(
    actors: Actors, paths: list[str], keys: list[list[str]], splits: list[Split], watch: Watch
) -> list[list[Outcome]]:
    """What each checkpoint does on each split, [K][splits]: whole checkpoints spread over the actors, those evaluated
    before left out. `keys` [K][splits] are the names they are kept under."""
    found = [[recall(key) for key in row] for row in keys]
    missing = [k for k, row in enumerate(found) if any(outcome is None for outcome in row)]
    watch(0, len(missing))
    for done, outcomes in enumerate(actors.evaluate_files([paths[k] for k in missing], splits)):
        k = missing[done]
        found[k] = list(outcomes)
        for key, outcome in zip(keys[k], outcomes, strict=True):
            remember(key, outcome)
        watch(done + 1, len(missing))
    return found  # type: ignore[return-value]


def ensemble_outcomes(
    actors: Actors, paths: list[str], keys: list[list[str]], splits: list[Split], watch: Watch
) -> tuple[list[list[Outcome]], list[Outcome]]:
    """What each checkpoint does on each split, [K][splits], and what the mean of all their logits does [splits]: one pass,
    the examples spread over the actors."""
    individual: list[list[Outcome]] = []
    for k in range(len(paths)):
        outcomes = actors.evaluate_member(tuple(paths[: k + 1]), splits)
        for key, outcome in zip(keys[k], outcomes, strict=True):
            remember(key, outcome)
        individual.append(outcomes)
        watch(k + 1, len(paths))
    together = actors.evaluate_ensemble(tuple(paths), splits)
    actors.forget()
    return individual, together


def ranking(held_out: dict[int, Outcome]) -> list[int]:
    """Ingredients from the best: by accuracy on the held-out set, among equals by NLL, then as they were listed."""
    return sorted(held_out, key=lambda k: (-int(held_out[k].correct.sum()), held_out[k].nll, k))


@dataclass
class Search:
    """How a greedy search went."""

    kept: list[int]
    """In the order in which they were taken in."""
    correct: int
    """Of the held-out set, by the soup."""
    candidates: int = 0
    looked: int = 0
    """Images that candidates were evaluated on."""
    trail: list[dict[str, int]] = field(default_factory=list)
    """A line a candidate: ingredient, images looked at, right among them, kept."""


def greedy(
    actors: Actors,
    held_out: dict[int, Outcome],
    splits: list[Split],
    keep: str = ">=",
    watch: Watch = lambda done, total: None,
    calibration: Sequence[Split] = (),
) -> Search:
    """Greedy soup (Wortsman et al. 2022), exact: from the best ingredient down, each is kept if the plain mean with it gets
    at least (`>=`) or more than (`>`) as many examples of the held-out set right as the mean without.

    held_out: what each of the actors' ingredients, by number, does on `splits`, joined. The images that ingredients most
    often get wrong come first, and a candidate is dropped when those left cannot bring it up to the best. Means have running
    statistics of the batches `calibration`, where there are any.
    """
    order = ranking(held_out)
    wrong = np.sum([~o.correct for o in held_out.values()], axis=0)
    hardest = np.argsort(-wrong, kind="stable")
    source = np.repeat(np.arange(len(splits)), [len(s) for s in splits])[hardest]
    rows = np.concatenate([s.rows for s in splits])[hardest]
    total = len(rows)
    least = 32 * actors.mesh.size  # fewer images at a time are slower to ask for than to look at
    search = Search([order[0]], int(held_out[order[0]].correct.sum()))
    for number, k in enumerate(order[1:]):
        needed = search.correct + (keep == ">")
        done = correct = 0
        while done < total and correct + (total - done) >= needed:
            spare = total - done - (needed - correct)  # mistakes that it may still make
            stop = min(total, done + max(spare + 1, least))
            some = [Split(s.source, rows[done:stop][source[done:stop] == n]) for n, s in enumerate(splits)]
            correct += actors.try_candidate(tuple(search.kept), k, some, calibration)
            done = stop
        kept = done == total and correct >= needed
        search.candidates, search.looked = search.candidates + 1, search.looked + done
        search.trail.append({"ingredient": k, "looked": done, "correct": correct, "kept": int(kept)})
        if kept:
            search.kept.append(k)
            search.correct = correct
        watch(number + 1, len(order) - 1)
    actors.forget()
    return search


def one_hot(chosen: int, ingredients: int) -> np.ndarray:
    """Coefficients float64 [K, 1] of a soup of one ingredient."""
    return mean_of([chosen], ingredients)


def mean_of(kept: list[int], ingredients: int) -> np.ndarray:
    """Coefficients float64 [K, 1] of the plain mean of some ingredients."""
    values = np.zeros((ingredients, 1))
    values[kept] = 1 / len(kept)
    return values


def uniform(ingredients: int) -> np.ndarray:
    """Coefficients float64 [K, 1] of the plain mean."""
    return mean_of(list(range(ingredients)), ingredients)

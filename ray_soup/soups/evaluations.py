"""Evaluate models on the actors, cache the outcomes of ingredients, and turn outcomes into figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ray_soup.actors.messages import KeptEnsemble
from ray_soup.actors.pool import ActorPool
from ray_soup.errors import SoupError
from ray_soup.io import kept
from ray_soup.io.cache import cached, content_key, lookup
from ray_soup.io.progress import CountCallback, drain
from ray_soup.task.data import Split
from ray_soup.task.outcomes import (
    Outcome,
    best_log_factor,
    calibration_error,
    load_outcomes,
    save_outcomes,
    scaled_nll,
    test_sets,
)

FORMAT = 2


def evaluation_key(*parts: str) -> str:
    """Return the cache key of one ingredient's evaluation on one split, from keys of model, parameters, data and device."""
    return content_key("evaluation", FORMAT, *parts)


def remember(key: str, outcome: Outcome) -> None:
    """Keep an outcome in this node's cache."""

    def make(folder: Path) -> Iterator[None]:
        save_outcomes({"": outcome}, folder / "outcome.npz")
        yield

    drain(cached("evaluations", key, outcome.loss.nbytes * 3, make)).close()


def recall(key: str) -> Outcome | None:
    """Return the outcome kept under `key`, or None."""
    hold = lookup("evaluations", key)
    if hold is None:
        return None
    try:
        return load_outcomes(hold.path / "outcome.npz").get("")
    except SoupError:  # a damaged entry counts as missing
        return None
    finally:
        hold.close()


def individual_outcomes(
    pool: ActorPool, paths: list[str], keys: list[list[str]], splits: list[Split], count: CountCallback
) -> list[list[Outcome]]:
    """Evaluate each checkpoint on each split, one checkpoint per actor at a time; those in the cache are skipped.

    Args:
        pool: the actors.
        paths: the K checkpoints.
        keys: their cache keys, [K][splits].
        splits: the splits to evaluate on.
        count: called with the examples done, over all checkpoints, and their total.

    Returns:
        Outcomes [K][splits].
    """
    found = [[recall(key) for key in row] for row in keys]
    missing = [k for k, row in enumerate(found) if any(outcome is None for outcome in row)]
    count(0, len(missing) * sum(map(len, splits)))
    evaluated = pool.evaluate_files([paths[k] for k in missing], splits, lambda what, *examples: count(*examples))
    for done, outcomes in enumerate(evaluated):
        k = missing[done]
        found[k] = list(outcomes)
        for key, outcome in zip(keys[k], outcomes, strict=True):
            remember(key, outcome)
    return [[outcome for outcome in row if outcome is not None] for row in found]


def ensemble_outcomes(
    pool: ActorPool,
    paths: list[str],
    keys: list[list[str]],
    splits: list[Split],
    count: CountCallback,
    stem: str = "",
) -> tuple[list[list[Outcome]], list[Outcome]]:
    """Evaluate each checkpoint and the mean of all their logits in one pass, the examples spread over the actors.

    A pass that was interrupted is resumed with its next checkpoint.

    The first arguments are those of `individual_outcomes`; `stem` is the path or URI without a suffix where actors keep what
    a resumed pass needs. Returns outcomes [K][splits], and those of the ensemble [splits].
    """
    rows = [split.rows.tolist() for split in splits]
    keep = KeptEnsemble(stem, content_key(keys, rows, pool.mesh.size))
    individual: list[list[Outcome]] = []
    each = sum(map(len, splits))
    for k in range(len(paths)):

        def count_examples(what: str, done: int, total: int, before: int = k * each) -> None:
            count(before + done, len(paths) * each)

        found = [recall(key) for key in keys[k]] if stem and kept.found(f"{stem}.") else []
        known = [outcome for outcome in found if outcome is not None]
        if len(known) < len(splits):
            known = pool.evaluate_member(tuple(paths[: k + 1]), splits, count_examples, keep)
            for key, outcome in zip(keys[k], known, strict=True):
                remember(key, outcome)
        individual.append(known)
    together = pool.evaluate_ensemble(tuple(paths), splits, keep)
    pool.forget()
    return individual, together


def figures_of(outcomes: dict[str, Outcome]) -> dict[str, float]:
    """Return a model's figures on each split, by the keys of results.jsonl; the temperature is fitted on select."""
    row: dict[str, float] = {}
    select = outcomes.get("select")
    factor = best_log_factor(select) if select is not None and select.factored is not None else None
    for split, outcome in outcomes.items():
        known = {"accuracy": outcome.accuracy, "nll": outcome.nll, "bits_per_byte": outcome.bits_per_byte, **outcome.means}
        row |= {f"{split}_{name}": value for name, value in known.items() if value is not None}
        if outcome.size is not None:
            row[f"{split}_perplexity"] = float(np.exp(outcome.nll))
        if factor is not None and split != "select":
            row[f"{split}_nll_scaled"] = scaled_nll(outcome, factor)
        if outcome.scores is not None:
            row[f"{split}_metric"] = float(outcome.scores.mean(dtype=np.float64))
        if outcome.confidence is not None and outcome.correct is not None:
            row[f"{split}_ece"] = calibration_error(outcome)
    if factor is not None:
        row["temperature"] = float(np.exp(-factor))
    return row


def reported(splits: dict[str, Split]) -> dict[str, Split]:
    """Return the splits that a finished soup is evaluated on: select and the test sets."""
    return {name: splits[name] for name in ("select", *test_sets(splits)) if name in splits}


def cosines(gram: np.ndarray) -> np.ndarray:
    """Return the cosines of directions with the inner products `gram`, both float64 [K, K]; 0 for a zero direction."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.outer(lengths, lengths)
    found: np.ndarray = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    return found

"""The best single ingredient, which stands beside every soup that was made with held-out data.

It is chosen on select, by accuracy and then by NLL, so its own figures there are optimistic: a soup that does not beat it is
no reason to use a soup.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.evaluations import evaluation_key, figures_of, recall, remember, reported
from ray_soup.soups.greedy import ranking
from ray_soup.soups.records import ResultRow
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.session import Session
from ray_soup.task.outcomes import Outcome

NOTHING_TO_COMPARE_WITH = "Nothing says whether it is better than its best ingredient."


@dataclass(frozen=True)
class Baseline:
    """The best single ingredient, and the soup compared with it."""

    name: str
    """The ingredient."""
    outcomes: dict[str, Outcome]
    """Its outcomes on select and the test sets."""
    improvement: dict[str, float]
    """For run.json: the soup's figures on select minus the ingredient's, as from `improvement`."""
    notes: list[str]
    """Notes for the user, if the soup is not better."""

    @property
    def row(self) -> ResultRow:
        """The ingredient's row in results.jsonl."""
        return {"model_name": BEST_SINGLE, "ingredient": self.name, **figures_of(self.outcomes), "ingredients_used": 1}

    @property
    def record(self) -> dict[str, Any]:
        """Keys for run.json."""
        return {BEST_SINGLE: self.name, "improvement": self.improvement}


def compare_with_best_single(session: Session, outcomes: dict[str, Outcome]) -> Baseline | None:
    """Find the best single ingredient on select and compare the session's soup with it.

    Evaluations of ingredients are kept in the cache, so a resumed run does not repeat them.

    Args:
        session: the session that made the soup.
        outcomes: the outcomes of the soup, by split.

    Returns:
        None if there is no select data, if the recipe does not want it, or if the soup is the best single ingredient.
    """
    if "select" not in outcomes or session.recipe.baseline == "none" or session.recipe.info.is_reference:
        return None
    individual = session.on(session.splits["select"])
    best = ranking({k: individual[k] for k in session.subset})[0]
    splits = reported(session.splits)
    keys = [evaluation_key("factored", key) for key in session.keys(list(splits.values()))[best]]
    found = [outcome for key in keys if (outcome := recall(key)) is not None]
    if len(found) < len(keys):
        path = session.inputs.ingredients[best].path
        found = session.pool.evaluate_file(path, list(splits.values()), session.progress)
        for key, outcome in zip(keys, found, strict=True):
            remember(key, outcome)
    single = dict(zip(splits, found, strict=True))
    name = session.inputs.names[best]
    change = improvement(outcomes["select"], single["select"])
    return Baseline(name, single, change, remarks_on(name, outcomes["select"], single["select"], change))


def improvement(ours: Outcome, single: Outcome) -> dict[str, float]:
    """Return a soup's figures on select minus those of the best single ingredient, with paired 95 % bootstrap intervals."""
    test = paired_test(ours, single)
    found = {"select_accuracy": ours.accuracy - single.accuracy, "select_nll": ours.nll - single.nll}
    return found | {f"select_{key}_{end}": test[f"{key}_{end}"] for key in ("accuracy", "nll") for end in ("low", "high")}


def remarks_on(name: str, ours: Outcome, single: Outcome, change: dict[str, float]) -> list[str]:
    """Return a note if a soup is worse than the best single ingredient `name` on select, or not significantly better."""
    low, high = change["select_nll_low"], change["select_nll_high"]
    figures = (
        f"NLL {ours.nll:.4f} against {single.nll:.4f} (difference {change['select_nll']:+.4f}, 95 % interval {low:+.4f} to "
        f"{high:+.4f}), accuracy {ours.accuracy:.2%} against {single.accuracy:.2%}"
    )
    if change["select_nll"] == 0 and low == high:
        return [f"This soup is no better than the best single ingredient on select, {name}: {figures}."]
    if low > 0:
        return [
            f"This soup is worse than the best single ingredient on select, {name}: {figures}. Use that ingredient, or "
            "another method."
        ]
    if high >= 0:
        which = "higher" if change["select_nll"] > 0 else "lower"
        return [
            f"This soup has a {which} NLL than the best single ingredient on select, {name}, but not significantly: "
            f"{figures}. The interval contains 0."
        ]
    if change["select_accuracy"] < 0:
        return [
            f"This soup has a lower NLL than the best single ingredient on select, {name}, but also a lower accuracy: "
            f"{figures}."
        ]
    return []


def significance(change: dict[str, float]) -> list[str]:
    """Return a note if a lower NLL on select is within chance. `change` is from `improvement`."""
    low, high = change["select_nll_low"], change["select_nll_high"]
    if change["select_nll"] >= 0 or high < 0:
        return []
    return [
        f"That difference in NLL on select is not significant: its 95 % interval, {low:+.4f} to {high:+.4f}, contains 0."
    ]


def warn_if_worse(baseline: Baseline) -> None:
    """Warn the caller of `mix_state_dicts`, who may not look at the notes, about a soup whose NLL on select is higher."""
    if baseline.improvement["select_nll"] > 0:
        warnings.warn("\n".join(baseline.notes), stacklevel=4)

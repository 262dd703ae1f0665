"""The best single ingredient, which stands beside every soup that was made with held-out data.

It is chosen on select, by accuracy and then by NLL unless `select_by` says otherwise, so its own figures there are
optimistic: a soup that does not beat it is no reason to use a soup.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.evaluations import evaluation_key, figures_of, recall, remember, reported
from ray_soup.soups.records import ResultRow
from ray_soup.soups.report.measures import Measures, measures_of
from ray_soup.soups.report.statistics import paired_test
from ray_soup.task.choices import ranking
from ray_soup.task.outcomes import Outcome, test_sets

if TYPE_CHECKING:
    from ray_soup.soups.session import Session

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
    tests: list[dict[str, Any]]
    """For run.json: paired tests of the soup against the ingredient on each test set."""
    measures: Measures
    """What the figures are called, and which of them decides."""

    @property
    def row(self) -> ResultRow:
        """The ingredient's row in results.jsonl."""
        return {"model_name": BEST_SINGLE, "ingredient": self.name, **figures_of(self.outcomes), "ingredients_used": 1}

    @property
    def record(self) -> dict[str, Any]:
        """Keys for run.json."""
        return {BEST_SINGLE: self.name, "improvement": self.improvement, "tests": self.tests}


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
    best = ranking({k: individual[k] for k in session.subset}, session.recipe.select_by)[0]
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
    change, measures = improvement(outcomes["select"], single["select"]), measures_of(session.recipe)
    notes = remarks_on(name, outcomes["select"], single["select"], change, measures)
    found_on = {split: paired_test(outcomes[split], single[split]) for split in test_sets(outcomes)}
    about = {"model_name": session.recipe.method, "against": BEST_SINGLE}
    tests = [{"split": split, **about, **test} for split, test in found_on.items()]
    return Baseline(name, single, change, notes, tests, measures)


def improvement(ours: Outcome, single: Outcome) -> dict[str, float]:
    """Return a soup's figures on select minus those of the best single ingredient, with paired 95 % bootstrap intervals."""
    test = paired_test(ours, single)
    found = {} if ours.accuracy is None or single.accuracy is None else {"select_accuracy": ours.accuracy - single.accuracy}
    found |= {"select_nll": ours.nll - single.nll}
    if ours.metric is not None and single.metric is not None:
        found |= {"select_metric": ours.metric - single.metric}
    ends = (f"{key}_{end}" for key in ("accuracy", "nll", "metric") for end in ("low", "high"))
    return found | {f"select_{end}": test[end] for end in ends if end in test}


def remarks_on(
    name: str, ours: Outcome, single: Outcome, change: dict[str, float], measures: Measures = Measures()
) -> list[str]:
    """Return a note if a soup is worse than the best single ingredient `name` on select, or not significantly better.

    The figure that decides is the one that the recipe selects by; `change` is from `improvement`.
    """
    figure = measures.decisive(change)
    difference, low, high = (change[f"select_{figure}{end}"] for end in ("", "_low", "_high"))
    figures = compared(ours, single, measures, figure, (difference, low, high))
    if difference == 0 and low == high:
        return [f"This soup is no better than the best single ingredient on select, {name}: {figures}."]
    if (low > 0) if figure == "nll" else (high < 0):
        return [
            f"This soup is worse than the best single ingredient on select, {name}: {figures}. Use that ingredient, or "
            "another method."
        ]
    if low <= 0 <= high:
        which = "higher" if difference > 0 else "lower"
        return [
            f"This soup has a {which} {measures.name_of(figure)} than the best single ingredient on select, {name}, but not "
            f"significantly: {figures}. The interval contains 0."
        ]
    if figure == "nll" and change.get("select_accuracy", 0) < 0:
        return [
            f"This soup has a {measures.better('nll')} than the best single ingredient on select, {name}, but also a lower "
            f"{measures.accuracy}: {figures}."
        ]
    return []


def compared(
    ours: Outcome, theirs: Outcome, measures: Measures, first: str, interval: tuple[float, float, float] | None = None
) -> str:
    """Return the words that compare the figures of two models, the figure `first` before NLL and accuracy.

    Args:
        ours: an outcome of a model.
        theirs: that of another one.
        measures: what the figures are called.
        first: the figure that decides.
        interval: the difference in it, and the ends of its 95 % interval, if they are to be named.
    """
    found = []
    for figure in dict.fromkeys((first, "nll", "accuracy")):
        a, b = getattr(ours, figure), getattr(theirs, figure)
        if a is not None and b is not None:
            found.append(f"{measures.name_of(figure)} {measures.shown(figure, a)} against {measures.shown(figure, b)}")
            if figure == first and interval is not None:
                difference, low, high = (measures.shown(figure, value, "+") for value in interval)
                found[-1] += f" (difference {difference}, 95 % interval {low} to {high})"
    return ", ".join(found)


def significance(change: dict[str, float], measures: Measures = Measures()) -> list[str]:
    """Return a note if an improvement on select is within chance. `change` is from `improvement`."""
    figure = measures.decisive(change)
    low, high = change[f"select_{figure}_low"], change[f"select_{figure}_high"]
    if not measures.improved(change) or not low <= 0 <= high:
        return []
    ends = " to ".join(measures.shown(figure, end, "+") for end in (low, high))
    return [
        f"That difference in {measures.name_of(figure)} on select is not significant: its 95 % interval, {ends}, contains 0."
    ]


def warn_if_worse(baseline: Baseline) -> None:
    """Warn the caller of `mix_state_dicts`, who may not look at the notes, about a soup that is worse on select."""
    change, figure = baseline.improvement, baseline.measures.decisive(baseline.improvement)
    if change[f"select_{figure}"] != 0 and not baseline.measures.improved(change):
        warnings.warn("\n".join(baseline.notes), stacklevel=5)  # of mix_state_dicts and its decorated inner part

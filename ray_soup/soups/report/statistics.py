"""Confidence intervals and paired tests of outcomes, example by example."""

from __future__ import annotations

import numpy as np

from ray_soup.task.outcomes import Outcome

RESAMPLES = 2000
"""Bootstrap resamples behind an interval of a mean."""


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of the accuracy `correct / count`.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    from scipy.stats import binomtest

    found = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Return the mean of paired differences and its 95 % percentile bootstrap interval.

    The resampling has a fixed seed: the same differences give the same interval.

    Args:
        differences: float64 [n], one difference for each example.

    Returns:
        Mean, lower bound and upper bound.
    """
    from scipy.stats import bootstrap

    differences = np.asarray(differences, dtype=np.float64)
    mean = float(differences.mean())
    if not np.ptp(differences):
        return mean, mean, mean
    found = bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=64, method="percentile", random_state=np.random.default_rng(0)
    ).confidence_interval
    return mean, float(found.low), float(found.high)


def paired_test(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Compare two models on the same examples.

    Differences are ours minus theirs, with paired bootstrap intervals (95 %). The p-value is that of the exact McNemar test:
    of the examples that only one of the two models got right, how many were ours?

    Args:
        ours: outcome on n examples.
        theirs: outcome on the same n examples, in the same order.

    Returns:
        `gained` and `lost` (examples that only ours or only theirs got right), `mcnemar_p`, and `accuracy`, `accuracy_low`,
        `accuracy_high`, `nll`, `nll_low`, `nll_high`.
    """
    from scipy.stats import binomtest

    gained = int((ours.correct & ~theirs.correct).sum())
    lost = int((theirs.correct & ~ours.correct).sum())
    accuracy = mean_interval(ours.correct.astype(float) - theirs.correct)
    nll = mean_interval(ours.loss.astype(np.float64) - theirs.loss)
    return {
        "gained": gained,
        "lost": lost,
        "mcnemar_p": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        **dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True)),
        **dict(zip(("nll", "nll_low", "nll_high"), nll, strict=True)),
    }

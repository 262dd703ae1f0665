"""Confidence intervals and paired tests of outcomes, example by example."""

from __future__ import annotations

import numpy as np

from ray_soup.task.outcomes import Outcome

RESAMPLES = 2000
"""Bootstrap resamples behind an interval of a mean."""
FLIPS = 9_999
"""Random sign flips behind a p-value; the smallest one is 1 / (FLIPS + 1)."""
LEAST_FLIPS = 999
"""The same where there are very many differences."""
SIGNS = 10**8
"""Signs to draw for one p-value, which takes about a second."""


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


def ratio_interval(
    differences: np.ndarray, weight: np.ndarray | None = None, group: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Return the sum of paired differences over the sum of the weights, and its 95 % percentile bootstrap interval.

    Args:
        differences: float64 [n], one difference for each example, summed over its tokens or pixels.
        weight: float64 [n], the number of these; None: 1 each, so the ratio is the mean.
        group: int64 [n], the document of each example, which is resampled as a whole; None: each stands for itself.

    Returns:
        Ratio, lower bound and upper bound.
    """
    from scipy.stats import bootstrap

    if weight is None and group is None:
        return mean_interval(differences)
    weight = np.ones(len(differences)) if weight is None else weight
    if group is not None:
        differences, weight = by_group(differences, group), by_group(weight, group)
    ratio = float(differences.sum() / max(weight.sum(), 1e-300))
    if len(differences) < 2 or not np.ptp(differences):
        return ratio, ratio, ratio
    found = bootstrap(
        (differences, weight), lambda d, w, axis=-1: d.sum(axis) / np.maximum(w.sum(axis), 1e-300), n_resamples=RESAMPLES,
        batch=64, method="percentile", paired=True, random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return ratio, float(found.low), float(found.high)


def by_group(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the sums of `values`, float64 [n], over the examples of each document; `group` is int64 [n]."""
    return np.bincount(np.unique(group, return_inverse=True)[1], values)


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the two-sided p-value of the paired permutation test on the sum of differences.

    If two models are equally good, then swapping their results on any example changes the sign of its difference and nothing
    else. The p-value is the share of the sign patterns whose sum is at least as far from 0 as the sum that was found. All
    2^n patterns are counted if there are few; otherwise it is (1 + count) / (1 + drawn) of patterns drawn with a fixed seed.

    Source: Fisher 1935, "The design of experiments", section 21.

    Args:
        differences: float64 [n], one difference for each example or document.
    """
    differences = np.asarray(differences, dtype=np.float64)
    differences = differences[differences != 0]
    count, total = len(differences), differences.sum()
    if not count:
        return 1.0
    least = abs(total) * (1 - 1e-12)  # two sums of the same values in another order may differ in the last bits
    if 2**count <= FLIPS:
        every = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float((np.abs(total - 2 * (every @ differences)) >= least).mean())
    drawn = min(FLIPS, max(LEAST_FLIPS, SIGNS // count))
    random, found, step = np.random.default_rng(0), 0, max(1, 10**6 // count)
    for first in range(0, drawn, step):
        rows = min(step, drawn - first)
        bits = np.unpackbits(random.integers(256, size=(rows, -(-count // 8)), dtype=np.uint8), axis=1, count=count)
        found += int((np.abs(total - 2 * (bits.astype(np.float64) @ differences)) >= least).sum())
    return (1 + found) / (1 + drawn)


def paired_test(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Compare two models on the same examples.

    Differences are ours minus theirs, with paired bootstrap intervals (95 %) over the examples, or over the documents that
    they belong to. If each example is either right or wrong, the p-value is that of the exact McNemar test: of the examples
    that only one of the two models got right, how many were ours? Otherwise it is that of the paired permutation test on the
    losses of the examples or documents, as from `sign_flip_p`.

    Args:
        ours: outcome on n examples.
        theirs: outcome on the same n examples, in the same order.

    Returns:
        `gained` and `lost` (examples that only ours or only theirs got right), `mcnemar_p`, and `accuracy`, `accuracy_low`,
        `accuracy_high`, `nll`, `nll_low`, `nll_high`, and the same for `metric`; those of accuracy only if it has a meaning,
        those of the metric only if the recipe has one. Without McNemar's test, `nll_p`. For each score of the objective,
        as `score_NAME`, `score_NAME_low`, `score_NAME_high` and `score_NAME_p`, the p-value of the permutation test.
    """
    from scipy.stats import binomtest

    losses = ours.loss.astype(np.float64) - theirs.loss
    nll = ratio_interval(losses, ours.weight, ours.group)
    found = dict(zip(("nll", "nll_low", "nll_high"), nll, strict=True))
    if ours.scores is not None and theirs.scores is not None:
        metric = ratio_interval(ours.scores.astype(np.float64) - theirs.scores, None, ours.group)
        found |= dict(zip(("metric", "metric_low", "metric_high"), metric, strict=True))
    for name in ours.means if ours.means.keys() == theirs.means.keys() else ():
        found |= _of_score(name, ours, theirs)
    if ours.correct is None or theirs.correct is None or ours.weight is not None:
        found["nll_p"] = sign_flip_p(losses if ours.group is None else by_group(losses, ours.group))
    if ours.correct is None or theirs.correct is None:
        return found
    difference = ours.correct.astype(np.float64) - theirs.correct
    accuracy = ratio_interval(difference, ours.weight, ours.group)
    found |= dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True))
    if ours.weight is not None:
        return found
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return {"gained": gained, "lost": lost, "mcnemar_p": p, **found}


def _of_score(name: str, ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Return the paired test of one of the objective's scores."""
    assert ours.named is not None
    assert theirs.named is not None
    differences = ours.named[name] - theirs.named[name]
    key, ends = f"score_{name}", ratio_interval(differences, None, ours.group)
    p = sign_flip_p(differences if ours.group is None else by_group(differences, ours.group))
    return {**dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True)), f"{key}_p": p}


def is_better(ours: Outcome, theirs: Outcome, select_by: str) -> bool:
    """Return whether ours is significantly better in what `select_by` names: the interval of `paired_test` is beyond 0."""
    found = paired_test(ours, theirs)
    low = found.get(f"{select_by}_low") if select_by in ("accuracy", "metric") else None
    return bool(found["nll_high"] < 0) if low is None else low > 0

"""Intervals and paired tests agree with their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from ray_soup.soups.report.statistics import accuracy_interval, mean_interval, paired_test
from ray_soup.task.outcomes import Outcome


def two_models() -> tuple[Outcome, Outcome]:
    """Of 200 examples, only the first model gets 14 right, and only the second gets 4 right."""
    ours, theirs = np.ones(200, bool), np.ones(200, bool)
    theirs[:14], ours[14:18] = False, False
    random = np.random.default_rng(0)
    loss = random.random(200).astype(np.float32)
    noise = random.standard_normal(200).astype(np.float32)
    return Outcome(loss - 0.1, ours, loss), Outcome(loss + 0.1 * noise, theirs, loss)


def test_mcnemar_p_value_is_that_of_the_binomial_distribution() -> None:
    """The p-value is 2 P(Binomial(18, 1/2) <= 4)."""
    a, b = two_models()
    found = paired_test(a, b)
    assert (found["gained"], found["lost"]) == (14, 4)
    assert found["mcnemar_p"] == pytest.approx(2 * sum([1, 18, 153, 816, 3060]) / 2**18)


def test_paired_bootstrap_intervals_contain_the_difference_and_match_the_normal_distribution() -> None:
    a, b = two_models()
    found = paired_test(a, b)
    assert found["accuracy"] == pytest.approx(0.05)
    assert found["accuracy_low"] < 0.05 < found["accuracy_high"]
    assert found["nll_low"] < found["nll"] < found["nll_high"] < 0
    assert found["nll_high"] - found["nll_low"] == pytest.approx(2 * 1.96 * (a.loss - b.loss).std() / np.sqrt(200), rel=0.1)


def test_swapping_the_models_keeps_p_and_changes_the_sign() -> None:
    a, b = two_models()
    found, swapped = paired_test(a, b), paired_test(b, a)
    assert swapped["mcnemar_p"] == found["mcnemar_p"]
    assert swapped["nll"] == pytest.approx(-found["nll"])
    assert (swapped["gained"], swapped["lost"]) == (found["lost"], found["gained"])


def test_a_model_does_not_differ_from_itself() -> None:
    a, _ = two_models()
    same = paired_test(a, a)
    assert (same["mcnemar_p"], same["nll_low"], same["nll_high"]) == (1, 0, 0)


def test_the_same_differences_give_the_same_interval() -> None:
    differences = np.random.default_rng(1).standard_normal(300)
    assert mean_interval(differences) == mean_interval(differences.copy())
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25, 0.25)


def test_accuracy_interval_follows_wilsons_formula() -> None:
    low, high = accuracy_interval(95, 100)
    z, p, n = 1.959964, 0.95, 100
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(
        (low, high), ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)), atol=1e-6
    )

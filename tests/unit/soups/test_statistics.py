"""Intervals and paired tests agree with their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from ray_soup.soups.report.statistics import FLIPS, accuracy_interval, mean_interval, paired_test, sign_flip_p
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


@pytest.mark.parametrize("count", [2, 8, 13])
def test_few_differences_have_the_exact_p_value_of_the_permutation_test(count: int) -> None:
    """Of all 2^n sign patterns, as scipy counts them."""
    from scipy.stats import permutation_test

    for seed in range(5):
        differences = np.random.default_rng(seed).normal(0.4, 1, count)
        exact = permutation_test((differences,), np.sum, permutation_type="samples", vectorized=False, n_resamples=FLIPS)
        assert sign_flip_p(differences) == exact.pvalue
    assert sign_flip_p(np.ones(13)) == 2 / 2**13
    assert sign_flip_p(np.array([1.0, 1.0, -1.0, -1.0])) == 1


def test_many_differences_have_the_p_value_of_the_normal_limit() -> None:
    from scipy.stats import norm

    for seed, count in ((0, 14), (1, 500), (2, 5_000)):
        differences = np.random.default_rng(seed).normal(1.5 / np.sqrt(count), 1, count)
        limit = 2 * norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
        p = sign_flip_p(differences)
        assert p == pytest.approx(limit, abs=0.03 if count == 14 else 4 * np.sqrt(limit / 5000))
        assert sign_flip_p(differences) == sign_flip_p(-differences) == p
    assert sign_flip_p(np.full(300, 0.25)) == 1 / (1 + FLIPS)
    assert sign_flip_p(np.zeros(300)) == 1


def test_without_a_difference_between_models_p_is_uniform() -> None:
    found = [sign_flip_p(np.random.default_rng(seed).standard_t(3, 12)) for seed in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 400))


def test_the_p_value_of_a_language_model_is_that_of_its_documents() -> None:
    """Windows of one document are not independent: many of them prove no more than one."""
    random, windows = np.random.default_rng(0), 50
    of_document = random.normal(0.3, 1, 10)
    ours = np.repeat(of_document, windows) / windows
    weight, group = np.full(len(ours), 7.0), np.repeat(np.arange(10), windows)
    a, b = (Outcome(loss, weight, weight=weight, group=group) for loss in (ours + 3, np.full(len(ours), 3.0)))
    found = paired_test(a, b)
    assert "mcnemar_p" not in found
    assert found["nll_p"] == pytest.approx(sign_flip_p(of_document))
    assert found["nll_p"] > 20 * sign_flip_p(ours)
    assert paired_test(b, a)["nll_p"] == found["nll_p"]
    assert "nll_p" not in paired_test(*two_models())

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from ray_soup.outcomes import (
    BINS,
    Outcome,
    accuracy_interval,
    best_log_factor,
    calibration_error,
    join,
    load_outcomes,
    paired_test,
    reliability,
    save_outcomes,
    scaled_nll,
)
from ray_soup.shard import outcome_of


def example(n: int = 500, classes: int = 7, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = scale * (torch.randn(n, classes, generator=generator) + F.one_hot(labels, classes))
    return logits, labels


def test_an_outcome_is_what_torch_says() -> None:
    logits, labels = example()
    outcome = outcome_of(logits, labels)
    assert outcome.nll == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert outcome.accuracy == (logits.argmax(1) == labels).double().mean().item()
    np.testing.assert_allclose(outcome.confidence, logits.softmax(1).max(1).values.numpy(), rtol=1e-5)
    assert outcome.factored is None


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_one_with_the_lowest_nll(scale: float) -> None:
    logits, labels = example(scale=scale)
    found = best_log_factor(outcome_of(logits, labels, factored=True))

    def nll(log_factor: float) -> float:
        return F.cross_entropy(logits.double() * np.exp(log_factor), labels).item()

    best = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(best.x, abs=1e-3)
    assert scaled_nll(outcome_of(logits, labels, factored=True), found) == pytest.approx(best.fun, rel=1e-5)
    other_logits, other_labels = example(scale=scale, seed=1)
    elsewhere = scaled_nll(outcome_of(other_logits, other_labels, factored=True), found)
    assert elsewhere == pytest.approx(F.cross_entropy(other_logits.double() * np.exp(found), other_labels).item(), rel=1e-5)


def test_parts_joined_and_saved_are_the_whole(tmp_path: Path) -> None:
    logits, labels = example()

    def of(some: slice) -> Outcome:
        return outcome_of(logits[some], labels[some], factored=True, metric=lambda logits, labels: logits.mean(dim=1))

    whole = of(slice(None))
    parts = [of(s) for s in (slice(0, 123), slice(123, 500))]
    save_outcomes({"test": join(parts), "bare": outcome_of(logits, labels)}, tmp_path / "o.npz")
    loaded = load_outcomes(tmp_path / "o.npz")
    for a, b in zip(loaded["test"].arrays(), whole.arrays(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert loaded["bare"].factored is loaded["bare"].scores is None
    some = np.array([5, 3, 400])
    np.testing.assert_array_equal(whole.at(some).loss, whole.loss[some])


def test_reliability_counts_every_example_once() -> None:
    correct = np.array([True, False, True, True])
    confidence = np.array([0.5, 0.51, 1.0, 0.99], np.float32)
    outcome = Outcome(np.zeros(4, np.float32), correct, confidence)
    bins = reliability(outcome)
    assert sum(b["count"] for b in bins) == 4
    assert [b["accuracy"] for b in bins] == [0.5, 1.0]
    assert calibration_error(outcome) == pytest.approx((2 * abs(0.505 - 0.5) + 2 * (1 - 0.995)) / 4, abs=1e-6)
    assert BINS == 15


def test_paired_tests() -> None:
    """14 examples that only ours gets right, 4 that only theirs does, of 200: p = 2 P(Binomial(18, 1/2) <= 4)."""
    ours, theirs = np.ones(200, bool), np.ones(200, bool)
    theirs[:14], ours[14:18] = False, False
    random = np.random.default_rng(0)
    loss = random.random(200).astype(np.float32)
    a = Outcome(loss - 0.1, ours, loss)
    b = Outcome(loss + 0.1 * random.standard_normal(200).astype(np.float32), theirs, loss)
    found = paired_test(a, b)
    assert (found["gained"], found["lost"]) == (14, 4)
    assert found["mcnemar_p"] == pytest.approx(2 * sum([1, 18, 153, 816, 3060]) / 2**18)
    assert found["accuracy"] == pytest.approx(0.05)
    assert found["accuracy_low"] < 0.05 < found["accuracy_high"]
    assert found["nll_low"] < found["nll"] < found["nll_high"] < 0
    # the interval is close to the one of the normal distribution
    assert found["nll_high"] - found["nll_low"] == pytest.approx(2 * 1.96 * (a.loss - b.loss).std() / np.sqrt(200), rel=0.1)
    turned = paired_test(b, a)
    assert turned["mcnemar_p"] == found["mcnemar_p"]
    assert turned["nll"] == pytest.approx(-found["nll"])
    same = paired_test(a, a)
    assert (same["mcnemar_p"], same["nll_low"], same["nll_high"]) == (1, 0, 0)


def test_an_interval_of_an_accuracy() -> None:
    """Wilson's, by its formula."""
    low, high = accuracy_interval(95, 100)
    z, p, n = 1.959964, 0.95, 100
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(
        (low, high), ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)), atol=1e-6
    )

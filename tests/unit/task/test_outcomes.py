from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from ray_soup.task.outcomes import (
    BINS,
    LOG_FACTORS,
    Outcome,
    Score,
    best_log_factor,
    calibration_error,
    join_outcomes,
    judged,
    load_outcomes,
    reliability,
    save_outcomes,
    scaled_nll,
)


def example(n: int = 500, classes: int = 7, scale: float = 3.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = scale * (torch.randn(n, classes, generator=generator) + F.one_hot(labels, classes))
    return logits, labels


def outcome_of(logits: torch.Tensor, labels: torch.Tensor, full: bool = True) -> Outcome:
    """What the actors compute, in the plainest way; `full`: with the optional fields."""
    factored = [F.cross_entropy(logits * float(np.exp(f)), labels, reduction="none").numpy() for f in LOG_FACTORS]
    return Outcome(
        F.cross_entropy(logits, labels, reduction="none").numpy(),
        (logits.argmax(1) == labels).numpy(),
        logits.softmax(1).max(1).values.numpy(),
        np.stack(factored, axis=1) if full else None,
        logits.mean(dim=1).numpy() if full else None,
    )


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_is_the_one_with_the_lowest_nll(scale: float) -> None:
    logits, labels = example(scale=scale)
    found = best_log_factor(outcome_of(logits, labels))

    def nll(log_factor: float) -> float:
        return F.cross_entropy(logits.double() * np.exp(log_factor), labels).item()

    best = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(best.x, abs=1e-3)
    assert scaled_nll(outcome_of(logits, labels), found) == pytest.approx(best.fun, rel=1e-5)
    other_logits, other_labels = example(scale=scale, seed=1)
    elsewhere = scaled_nll(outcome_of(other_logits, other_labels), found)
    assert elsewhere == pytest.approx(F.cross_entropy(other_logits.double() * np.exp(found), other_labels).item(), rel=1e-5)


def test_parts_joined_and_saved_are_the_whole(tmp_path: Path) -> None:
    logits, labels = example()
    whole = outcome_of(logits, labels)
    parts = [outcome_of(logits[some], labels[some]) for some in (slice(0, 123), slice(123, 123), slice(123, 500))]
    save_outcomes({"test": join_outcomes(parts), "bare": outcome_of(logits, labels, full=False)}, tmp_path / "o.npz")
    loaded = load_outcomes(tmp_path / "o.npz")
    assert [file.name for file in tmp_path.iterdir()] == ["o.npz"]
    for a, b in zip(loaded["test"].arrays(), whole.arrays(), strict=True):
        assert (a is None) == (b is None)
        np.testing.assert_allclose(a, b, rtol=1e-6) if b is not None else None
    assert loaded["bare"].factored is loaded["bare"].scores is None
    some = np.array([5, 3, 400])
    for a, b in zip(whole.at(some).arrays(), whole.arrays(), strict=True):
        assert (a is None) == (b is None)
        np.testing.assert_array_equal(a, b[some]) if b is not None else None
    assert loaded["bare"].at(some).factored is None
    assert len(join_outcomes([])) == 0


def test_means_of_an_outcome_and_of_added_scores_agree() -> None:
    logits, labels = example()
    outcome = outcome_of(logits, labels)
    scores = [
        Score(float(part.loss.sum(dtype=np.float64)), int(part.correct.sum()), len(part), None, len(part))
        for part in (outcome.at(np.arange(n, n + 250)) for n in (0, 250))
    ]
    total = sum(scores, Score())
    assert total.nll == pytest.approx(outcome.nll) == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert total.accuracy == outcome.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_reliability_counts_every_example_once() -> None:
    correct = np.array([True, False, True, True])
    confidence = np.array([0.5, 0.51, 1.0, 0.99], np.float32)
    outcome = Outcome(np.zeros(4, np.float32), correct, confidence)
    bins = reliability(outcome)
    assert sum(b["count"] for b in bins) == 4
    assert [b["accuracy"] for b in bins] == [0.5, 1.0]
    assert calibration_error(outcome) == pytest.approx((2 * abs(0.505 - 0.5) + 2 * (1 - 0.995)) / 4, abs=1e-6)
    assert BINS == 15


def test_reports_show_the_test_sets_or_else_select() -> None:
    assert judged(["fit", "select", "test_a", "test_b", "testing"]) == ["test_a", "test_b"]
    assert judged({"select": 1, "test": 2}) == ["test"]
    assert judged(["fit", "select"]) == ["select"]


def test_outcomes_are_read_without_torch() -> None:
    code = "import sys, ray_soup.task.outcomes; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

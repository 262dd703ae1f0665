"""What a model did on a split, and what can be said from it: accuracy, NLL, calibration, and paired tests between models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

LOG_FACTORS = np.linspace(-2, 2, 41)  # the logits are multiplied with exp of these to find a temperature; the middle is 0
BINS = 15  # of equal width in confidence
RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """Sums over examples; scores add up."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    @property
    def nll(self) -> float:
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


@dataclass(frozen=True)
class Outcome:
    """Example by example: NLL float32 [n], whether the answer was right bool [n], and the probability given to it
    float32 [n]; `factored`, where it was asked for, the NLL with the logits times exp(LOG_FACTORS), float32 [n, 41];
    `scores`, where the recipe has a metric, float32 [n]."""

    loss: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    factored: np.ndarray | None = None
    scores: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def nll(self) -> float:
        return float(self.loss.mean(dtype=np.float64))

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def at(self, rows: np.ndarray) -> Outcome:
        return Outcome(*(None if a is None else a[rows] for a in self.arrays()))  # type: ignore[arg-type]

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.loss, self.correct, self.confidence, self.factored, self.scores


NO_OUTCOME = Outcome(np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.float32))


def test_sets(splits: Iterable[str]) -> list[str]:
    """Those of the splits that are only reported on: `test`, or `test_NAME` for each of several."""
    return [name for name in splits if name == "test" or name.startswith("test_")]


def judged(splits: Iterable[str]) -> list[str]:
    """What a soup is shown on: the test sets, or select where there is none."""
    return test_sets(splits) or ["select"]


def join(parts: Sequence[Outcome]) -> Outcome:
    """The outcomes of examples in a row, as one."""
    parts = [part for part in parts if len(part)] or [NO_OUTCOME]
    columns = zip(*(part.arrays() for part in parts), strict=True)
    return Outcome(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def save_outcomes(outcomes: dict[str, Outcome], file: Path) -> None:
    """As .npz, whole or not at all."""
    arrays = {
        f"{name}.{f.name}": getattr(outcome, f.name)
        for name, outcome in outcomes.items()
        for f in fields(Outcome)
        if getattr(outcome, f.name) is not None
    }
    temporary = file.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(file)


def load_outcomes(file: Path) -> dict[str, Outcome]:
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(file) as arrays:
        for key in arrays.files:
            name, _, column = key.rpartition(".")
            found.setdefault(name, {})[column] = arrays[key]
    return {name: Outcome(**columns) for name, columns in found.items()}


def best_log_factor(outcome: Outcome) -> float:
    """Temperature scaling (Guo et al. 2017): log of the factor on the logits with the lowest NLL on these examples, which is
    convex in the factor; the temperature is exp(-this)."""
    from scipy.interpolate import CubicSpline

    assert outcome.factored is not None
    means = outcome.factored.mean(axis=0, dtype=np.float64)
    spline = CubicSpline(LOG_FACTORS, means)
    stationary = [r for r in spline.derivative().roots(extrapolate=False) if np.isfinite(r)]
    return float(min([LOG_FACTORS[0], *stationary, LOG_FACTORS[-1]], key=spline))


def scaled_nll(outcome: Outcome, log_factor: float) -> float:
    """NLL with the logits times exp(log_factor)."""
    from scipy.interpolate import CubicSpline

    assert outcome.factored is not None
    return float(CubicSpline(LOG_FACTORS, outcome.factored.mean(axis=0, dtype=np.float64))(log_factor))


def reliability(outcome: Outcome) -> list[dict[str, float]]:
    """For each bin of confidence that holds examples: their count, mean confidence and accuracy."""
    number = np.minimum((outcome.confidence * BINS).astype(int), BINS - 1)
    return [
        {
            "count": int((number == b).sum()),
            "confidence": float(outcome.confidence[number == b].mean(dtype=np.float64)),
            "accuracy": float(outcome.correct[number == b].mean()),
        }
        for b in range(BINS)
        if (number == b).any()
    ]


def calibration_error(outcome: Outcome) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over the bins."""
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(outcome)) / len(outcome)


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % (Wilson) of an accuracy."""
    from scipy.stats import binomtest

    found = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def mean_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """Mean of [n] paired differences and its 95 % percentile bootstrap interval."""
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
    """Two models on the same examples: differences ours - theirs of accuracy and NLL with their 95 % intervals (paired
    bootstrap), and the p of the exact McNemar test, from the examples that only one of them got right."""
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

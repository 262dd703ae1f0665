"""Outcomes of a model on a split, example by example: accuracy, NLL and calibration. Does not import torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np

from ray_soup.errors import SoupError
from ray_soup.io.disk import write_bytes

LOG_FACTORS = np.linspace(-2, 2, 41)
"""Logarithms of the factors on the logits that are tried to find a temperature; the middle one is 0."""
BINS = 15
"""Bins of equal width in confidence."""


@dataclass(frozen=True)
class Score:
    """Sums over examples. Scores of parts of a split add up."""

    loss: float = 0.0
    """Sum of the losses."""
    correct: int = 0
    """Number of examples whose label has the largest logit."""
    count: int = 0
    """Number of examples."""

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    @property
    def nll(self) -> float:
        """Mean loss of an example: the NLL if the loss is cross-entropy."""
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        """Share of examples that are correct."""
        return self.correct / self.count


@dataclass(frozen=True)
class Outcome:
    """The results of a model on a split, example by example."""

    loss: np.ndarray
    """NLL float32 [n]."""
    correct: np.ndarray
    """Whether the prediction was right, bool [n]."""
    confidence: np.ndarray
    """Probability of the predicted class, float32 [n]."""
    factored: np.ndarray | None = None
    """NLL with the logits times exp(LOG_FACTORS), float32 [n, 41]; None if it was not computed."""
    scores: np.ndarray | None = None
    """The recipe's metric, float32 [n]; None if the recipe has none."""

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def nll(self) -> float:
        """Mean NLL of an example."""
        return float(self.loss.mean(dtype=np.float64))

    @property
    def accuracy(self) -> float:
        """Share of examples that are correct."""
        return float(self.correct.mean())

    def at(self, rows: np.ndarray) -> Outcome:
        """Select the examples at `rows`, int [m]."""
        optional = (None if array is None else array[rows] for array in (self.factored, self.scores))
        return Outcome(self.loss[rows], self.correct[rows], self.confidence[rows], *optional)

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """Return the fields in order, loss first."""
        return self.loss, self.correct, self.confidence, self.factored, self.scores


NO_OUTCOME = Outcome(np.zeros(0, np.float32), np.zeros(0, bool), np.zeros(0, np.float32))
"""The outcome of no examples."""


def join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """Concatenate the outcomes of parts of a split."""
    parts = [part for part in parts if len(part)] or [NO_OUTCOME]

    def joined(columns: list[np.ndarray | None]) -> np.ndarray | None:
        return None if columns[0] is None else np.concatenate(cast(list[np.ndarray], columns))

    return Outcome(
        np.concatenate([part.loss for part in parts]),
        np.concatenate([part.correct for part in parts]),
        np.concatenate([part.confidence for part in parts]),
        joined([part.factored for part in parts]),
        joined([part.scores for part in parts]),
    )


def test_sets(splits: Iterable[str]) -> list[str]:
    """Select the splits used for reporting only: `test`, or `test_NAME` for each of several test sets."""
    return [name for name in splits if name == "test" or name.startswith("test_")]


def judged(splits: Iterable[str]) -> list[str]:
    """Select the splits whose figures a report shows: the test sets, or select if there are none."""
    return test_sets(splits) or ["select"]


def save_outcomes(outcomes: dict[str, Outcome], file: Path) -> None:
    """Write outcomes by name to an .npz file, atomically."""
    arrays = {
        f"{name}.{f.name}": getattr(outcome, f.name)
        for name, outcome in outcomes.items()
        for f in fields(Outcome)
        if getattr(outcome, f.name) is not None
    }
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        write_bytes(file, buffer.getvalue())


def load_outcomes(file: Path) -> dict[str, Outcome]:
    """Read outcomes by name from a file that `save_outcomes` wrote. Raises SoupError if it is missing or damaged."""
    found: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(file, allow_pickle=False) as arrays:
            for key in arrays.files:
                name, _, column = key.rpartition(".")
                found.setdefault(name, {})[column] = arrays[key]
        outcomes = {name: Outcome(**columns) for name, columns in found.items()}
        if not outcomes or any(len({len(a) for a in o.arrays() if a is not None}) > 1 for o in outcomes.values()):
            raise ValueError("its arrays do not fit together")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise SoupError(f"{file} is damaged ({error}). Remove it to compute it again.") from error
    return outcomes


def best_log_factor(outcome: Outcome) -> float:
    """Find the factor on the logits with the lowest NLL on these examples, for temperature scaling (Guo et al. 2017).

    Returns the log of the factor; the temperature is exp(-log). NLL is convex in the factor. Requires `outcome.factored`.
    """
    from scipy.interpolate import CubicSpline

    assert outcome.factored is not None
    means = outcome.factored.mean(axis=0, dtype=np.float64)
    spline = CubicSpline(LOG_FACTORS, means)
    stationary = [r for r in spline.derivative().roots(extrapolate=False) if np.isfinite(r)]
    return float(min([LOG_FACTORS[0], *stationary, LOG_FACTORS[-1]], key=spline))


def scaled_nll(outcome: Outcome, log_factor: float) -> float:
    """Compute the mean NLL with the logits times exp(log_factor). Requires `outcome.factored`."""
    from scipy.interpolate import CubicSpline

    assert outcome.factored is not None
    return float(CubicSpline(LOG_FACTORS, outcome.factored.mean(axis=0, dtype=np.float64))(log_factor))


def reliability(outcome: Outcome) -> list[dict[str, float]]:
    """Compute count, mean confidence and accuracy of each non-empty bin of confidence."""
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
    """Compute the expected calibration error: the mean difference of confidence and accuracy, weighted by bin counts."""
    return sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in reliability(outcome)) / len(outcome)

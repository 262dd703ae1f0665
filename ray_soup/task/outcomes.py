"""Outcomes of a model on a split, example by example: loss, accuracy and calibration. Does not import torch."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

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
    correct: float | None = 0
    """Sum of what is correct: examples whose label has the largest logit, tokens, pixels; None if nothing can be."""
    weight: float = 0
    """Sum of the weights: the number of examples, tokens, pixels."""
    metric: float | None = 0
    """Sum of the recipe's metric; None if the recipe has none."""
    count: int = 0
    """Number of examples."""

    def __add__(self, other: Score) -> Score:
        correct = None if self.correct is None or other.correct is None else self.correct + other.correct
        metric = None if self.metric is None or other.metric is None else self.metric + other.metric
        loss, weight = self.loss + other.loss, self.weight + other.weight
        return Score(loss, correct, weight, metric, self.count + other.count)

    @property
    def nll(self) -> float:
        """Mean loss per unit of weight: the NLL if the loss is cross-entropy."""
        return self.loss / self.weight if self.weight else 0.0

    @property
    def accuracy(self) -> float | None:
        """Share of the weight that is correct, if that means something."""
        return None if self.correct is None else self.correct / self.weight if self.weight else 0.0

    @property
    def mean_metric(self) -> float | None:
        """Mean of the recipe's metric over the examples, if the recipe has one."""
        return None if self.metric is None else self.metric / max(1, self.count)


@dataclass(frozen=True)
class Outcome:
    """The results of a model on a split, example by example."""

    loss: np.ndarray
    """Sum of the losses of each example, float [n]: for classification its NLL."""
    correct: np.ndarray | None = None
    """What was right, [n]: for classification bool; otherwise the number of tokens, pixels or labels. None: no accuracy."""
    confidence: np.ndarray | None = None
    """Probability of the predicted class, float32 [n]; None unless each example has one."""
    factored: np.ndarray | None = None
    """NLL with the logits times exp(LOG_FACTORS), float32 [n, 41]; None if it was not computed."""
    scores: np.ndarray | None = None
    """The recipe's metric, float32 [n]; None if the recipe has none."""
    weight: np.ndarray | None = None
    """Number of tokens, pixels or labels that each loss is a sum over, float64 [n]; None: 1 each."""
    group: np.ndarray | None = None
    """Number of the document that each example belongs to, int64 [n]; None: examples are independent."""
    size: np.ndarray | None = None
    """Bytes of text that each example scores, float64 [n]; None if it is not text."""
    named: np.ndarray | None = None
    """What the objective's `scores` returned, by name: float64 [n] with a field for each name; None if it has none."""

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def nll(self) -> float:
        """Mean loss per unit of weight: of an example, a token, a pixel."""
        if self.weight is None:
            return float(self.loss.mean(dtype=np.float64))
        return float(self.loss.sum(dtype=np.float64) / max(self.weight.sum(), 1e-300))

    @property
    def accuracy(self) -> float | None:
        """Share of the examples, tokens or pixels that are correct; None if it has no meaning."""
        if self.correct is None:
            return None
        return float(self.correct.mean() if self.weight is None else self.correct.sum() / max(self.weight.sum(), 1e-300))

    @property
    def metric(self) -> float | None:
        """Mean of the recipe's metric over the examples."""
        return None if self.scores is None else float(self.scores.mean(dtype=np.float64))

    @property
    def bits_per_byte(self) -> float | None:
        """Loss in bits per byte of text, if the examples are texts."""
        if self.size is None:
            return None
        return float(self.loss.sum(dtype=np.float64) / np.log(2) / max(self.size.sum(), 1e-300))

    def at(self, rows: np.ndarray) -> Outcome:
        """Select the examples at `rows`, int [m]."""
        return Outcome(*(None if array is None else array[rows] for array in self.arrays()))  # type: ignore[arg-type]

    def arrays(self) -> tuple[np.ndarray | None, ...]:
        """Return the fields in order, loss first."""
        return tuple(getattr(self, f.name) for f in fields(self))

    @property
    def means(self) -> dict[str, float]:
        """The means over the examples of what the objective's `scores` returned, by name."""
        names = () if self.named is None else self.named.dtype.names or ()
        return {name: float(self.named[name].mean()) for name in names}  # type: ignore[index]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the arrays that there are, by name, each of plain numbers; `of_columns` makes an outcome of them."""
        found = {f.name: array for f in fields(self) if (array := getattr(self, f.name)) is not None}
        named = found.pop("named", None)
        return found | {f"{NAMED}{name}": np.ascontiguousarray(named[name]) for name in self.means}

    @staticmethod
    def of_columns(columns: Mapping[str, np.ndarray]) -> Outcome:
        """Make an outcome of the arrays that `columns` returned. Raises TypeError or ValueError for others."""
        named = {name.removeprefix(NAMED): array for name, array in columns.items() if name.startswith(NAMED)}
        return Outcome(**{n: a for n, a in columns.items() if not n.startswith(NAMED)}, named=joined_names(named))


NAMED = "named:"
"""Begins the names of columns that the objective's `scores` returned."""


def joined_names(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Join arrays [n] to one array, float64 [n] with a field for each name; None if there are none."""
    if not arrays:
        return None
    found = np.empty(len(next(iter(arrays.values()))), [(name, np.float64) for name in arrays])
    for name, array in arrays.items():
        found[name] = array
    return found


NO_OUTCOME = Outcome(np.zeros(0, np.float32))
"""The outcome of no examples."""


def join_outcomes(parts: Sequence[Outcome]) -> Outcome:
    """Concatenate the outcomes of parts of a split."""
    parts = [part for part in parts if len(part)] or [NO_OUTCOME]

    def joined(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return None if columns[0] is None else np.concatenate(cast(Sequence[np.ndarray], columns))

    return Outcome(*map(joined, zip(*(part.arrays() for part in parts), strict=True)))  # type: ignore[arg-type]


def test_sets(splits: Iterable[str]) -> list[str]:
    """Select the splits used for reporting only: `test`, or `test_NAME` for each of several test sets."""
    return [name for name in splits if name == "test" or name.startswith("test_")]


def judged(splits: Iterable[str]) -> list[str]:
    """Select the splits whose figures a report shows: the test sets, or select if there are none."""
    return test_sets(splits) or ["select"]


def save_outcomes(outcomes: dict[str, Outcome], file: Path) -> None:
    """Write outcomes by name to an .npz file, atomically."""
    arrays: dict[str, Any] = {
        f"{name}.{key}": array for name, outcome in outcomes.items() for key, array in outcome.columns().items()
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
        outcomes = {name: Outcome.of_columns(columns) for name, columns in found.items()}
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
    """Compute count, mean confidence and accuracy of each non-empty bin of confidence. Requires `outcome.confidence`."""
    assert outcome.confidence is not None
    assert outcome.correct is not None
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

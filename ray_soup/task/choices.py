"""Which figure makes a choice on held-out data, as the recipe key `select_by` says. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ray_soup.task.outcomes import Outcome, Score


def cost(of: Score | Outcome, select_by: str) -> float:
    """Return the figure by which a learning run stops and a comparison chooses its soup: the lower, the better."""
    if select_by == "accuracy" and of.accuracy is not None:
        return -of.accuracy
    metric = of.mean_metric if isinstance(of, Score) else of.metric
    return -metric if select_by == "metric" and metric is not None else of.nll


def cost_in(line: Mapping[str, Any], select_by: str) -> float:
    """Return the same figure from a line of a learning curve."""
    value = None if select_by in ("auto", "nll") else line.get(f"select_{select_by}")
    return float(line["select_nll"]) if value is None else -float(value)


def figures_on_select(of: Score | Outcome) -> dict[str, float]:
    """Return the figures on select, for the curve."""
    metric = of.mean_metric if isinstance(of, Score) else of.metric
    found = {"select_nll": of.nll, "select_accuracy": of.accuracy, "select_metric": metric}
    return {name: value for name, value in found.items() if value is not None}


def gains(outcome: Outcome, select_by: str) -> tuple[np.ndarray, np.ndarray | float]:
    """Return what each example adds to the figure that ranks ingredients, and the most that it could add.

    The figure is the accuracy, or the NLL where accuracy has no meaning, unless `select_by` names another one.

    Returns:
        The gains [n], higher is better, and their limits [n], or one limit for all.
    """
    if select_by == "metric" and outcome.scores is not None:
        return outcome.scores.astype(np.float64), np.inf
    if select_by != "nll" and outcome.correct is not None:
        limit = 1 if outcome.weight is None else outcome.weight
        return outcome.correct.astype(np.int64), limit
    loss = outcome.loss.astype(np.float64)
    return -loss, 0.0 if (loss >= 0).all() else np.inf


def gain(score: Score, select_by: str) -> float:
    """Return the sum of the gains of examples that were scored together."""
    if select_by == "metric" and score.metric is not None:
        return score.metric
    return score.correct if select_by != "nll" and score.correct is not None else -score.loss


def ranking(held_out: Mapping[int, Outcome], select_by: str = "auto") -> list[int]:
    """Return ingredients from best to worst: by the figure that ranks, then by NLL, then in the given order."""
    total = {k: gains(outcome, select_by)[0].sum() for k, outcome in held_out.items()}
    return sorted(held_out, key=lambda k: (-total[k], held_out[k].nll, k))

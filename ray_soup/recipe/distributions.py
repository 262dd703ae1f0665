"""Distributions of hyperparameters, as in {loguniform: [1e-6, 1e-4]}, and what can be wrong with one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ray_soup.recipe.plain import shown

RANGES = ("loguniform", "uniform", "randint")
DISTRIBUTIONS = (*RANGES, "choice", "grid")
MOST_VALUES = 10_000  # of a choice or a grid, and points of a grid: one trial each

Refuse = Callable[[Any], "str | None"]
"""Returns what a key expects if it refuses a value, otherwise None."""


def is_distribution(value: Any) -> bool:
    """Return whether a value is meant as a distribution."""
    return isinstance(value, dict) and len(value) == 1 and next(iter(value)) in DISTRIBUTIONS


def fault_of(value: Any, refuse: Refuse, kinds: tuple[str, ...] = DISTRIBUTIONS) -> str | None:
    """Return what is wrong with a value or the distribution of a key, as the end of a message; None if nothing is.

    Both ends of a range, and every value of a choice or a grid, must be values that the key itself accepts.
    """
    lists = [f"{kind}: [low, high]" for kind in kinds if kind in RANGES]
    lists += [f"{kind}: [value, ...]" for kind in kinds if kind not in RANGES]
    if not isinstance(value, dict):
        expected = refuse(value)
        return f"Expected {expected}, or a distribution: {', '.join(lists)}." if expected else None
    if len(value) != 1 or next(iter(value)) not in kinds:
        return f"Expected a value or one distribution: {', '.join(lists)}."
    ((kind, given),) = value.items()
    if kind not in RANGES:
        return _fault_of_values(kind, given, refuse)
    if not isinstance(given, list) or len(given) != 2 or not all(_is_number(bound) for bound in given):
        return f"Expected {kind}: [low, high] with two numbers."
    return _fault_of_range(kind, given[0], given[1], refuse)


def _fault_of_values(kind: str, given: Any, refuse: Refuse) -> str | None:
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_VALUES:
        return f"Expected {kind}: [value, ...] with 1 to {MOST_VALUES:,} values."
    for value in given:
        if expected := refuse(value):
            return f"{kind}: {shown(value)} cannot be a value of this key. Expected {expected}."
    return None


def _fault_of_range(kind: str, low: float, high: float, refuse: Refuse) -> str | None:
    whole = kind == "randint"
    if whole and not (float(low).is_integer() and float(high).is_integer()):
        return "Expected randint: [low, high] with two integers."
    if not low < high:
        return f"Expected {kind}: [low, high] with low < high{' (high is excluded)' if whole else ''}."
    if kind == "loguniform" and low <= 0:
        return "Expected loguniform: [low, high] with low above 0."
    # high is excluded; a bound that a key excludes, as in an lr above 0, may be the end of a range
    ends = (low, high - 1) if whole else (math.nextafter(low, high), math.nextafter(high, low))
    for bound, end in zip((low, high), ends, strict=True):
        if expected := refuse(end):
            hint = " For integers use randint." if "an integer" in expected and not whole else ""
            return f"{kind}: values up to {shown(bound)} do not fit this key. Expected {expected}.{hint}"
    return None


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300


def points(space: dict[str, Any]) -> int:
    """Return the number of points of the grids in a search space; 1 if there is none."""
    return math.prod(len(value["grid"]) for value in space.values() if isinstance(value, dict) and "grid" in value)

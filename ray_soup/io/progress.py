"""Progress callbacks, and generators that report progress while they work.

A long-running function either calls a callback, or is a generator that yields its progress and returns its result.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

ProgressCallback = Callable[[str, int, int], None]
"""Called with what is being done, the units done so far, and the units in total."""

WHOLE_RUN = "whole run"
"""What is being done when a long command reports on all of its work: seconds so far, and their estimated total."""

CountCallback = Callable[[int, int], None]
"""Called with the units done so far and the units in total."""

NOTE = "note: "
"""Begins what is being done if it is a sentence for the user, which is shown once and begins no phase."""


def tell(progress: ProgressCallback, sentence: str) -> None:
    """Tell the user something that has happened, in a sentence."""
    progress(f"{NOTE}{sentence[:1].upper()}{sentence[1:]}", 0, 0)


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore the progress: the default of every function that takes a ProgressCallback.

    In a notebook, functions `shown_in_notebooks` show their progress instead.
    """


def no_count(done: int, total: int) -> None:
    """Ignore the progress: the default of every function that takes a CountCallback."""


def drain(work: Generator[Any, None, T]) -> T:
    """Run a generator to its end and return its value."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            value: T = stop.value
            return value


def labelled(what: str, work: Generator[tuple[int, int], None, T]) -> Generator[tuple[str, int, int], None, T]:
    """Turn a generator of (done, total) into one of (what, done, total) with the same value."""
    while True:
        try:
            done, total = next(work)
        except StopIteration as stop:
            value: T = stop.value
            return value
        yield what, done, total

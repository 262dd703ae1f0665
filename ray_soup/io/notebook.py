"""Progress in a notebook: a line below the cell, with a bar, which is replaced while a function works."""

from __future__ import annotations

import functools
import html
import inspect
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from ray_soup.io.pace import Display, Pace, duration
from ray_soup.io.progress import no_progress
from ray_soup.io.redact import printable, redact

P = ParamSpec("P")
T = TypeVar("T")

LEAST_S = 0.25
"""Seconds between two updates of the line."""


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")  # it is imported in every kernel
    shell = None if module is None else module.get_ipython()
    return getattr(shell, "kernel", None) is not None


class NotebookDisplay(Display):
    """A Display in the output of the cell that runs."""

    tick_s = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._handle: Any = None
        self._shown = 0.0

    def show(self, phase: Pace, now: float) -> None:
        """Replace the line by one about the current phase."""
        if self._handle is None or now - self._shown >= LEAST_S:
            self._shown = now
            self._put(f"{phase.what}: {self.text(phase, now)}", phase.share())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, traceback)
        self._put(f"{'Done' if kind is None else 'Stopped'} after {duration(time.monotonic() - self._began)}.", None)

    def tell(self, sentence: str) -> None:
        """Print a sentence below the line."""
        print(printable(redact(sentence)))

    def _put(self, text: str, share: float | None) -> None:
        from IPython.display import display  # type: ignore[import-not-found]

        line = printable(redact(text))
        bar = "" if share is None else f'<progress value="{share:.3f}" aria-label="share of this phase"></progress> '
        bundle = {"text/plain": line, "text/html": f"<div>{bar}{html.escape(line)}</div>"}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def shown_in_notebooks(function: Callable[P, T]) -> Callable[P, T]:
    """Show the progress of a function in a notebook, unless its argument `progress` is given."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def shown(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.arguments["progress"] is not no_progress or not in_notebook():
            return function(*args, **kwargs)
        with NotebookDisplay() as bound.arguments["progress"]:
            return function(*bound.args, **bound.kwargs)

    return shown

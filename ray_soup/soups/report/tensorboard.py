"""Learning curves as TensorBoard event files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_soup.soups.state import LearnState


def scalars(board: Path) -> Callable[[int, int, LearnState], None]:
    """Return a callback for the end of every epoch that writes the learning curve to TensorBoard event files.

    The first call replaces the folder `board` and writes the whole curve of the state, so a resumed run has all of it; later
    calls append the new points. The x axis is the step.

    Args:
        board: the folder of the event files.

    Returns:
        A callback of (step, steps, state), which closes the files once step >= steps.
    """
    writer: Any = None
    written = 0

    def after_epoch(step: int, steps: int, state: LearnState) -> None:
        nonlocal writer, written
        if writer is None:
            from tensorboardX import SummaryWriter

            shutil.rmtree(board, ignore_errors=True)
            writer = SummaryWriter(str(board))
        for line in state.curve[written:]:
            for name in ("fit_nll", "select_nll", "select_accuracy", "lr"):
                if name in line:
                    writer.add_scalar(name, line[name], line["steps"])
        written = len(state.curve)
        writer.flush()
        if step >= steps:
            writer.close()

    return after_epoch

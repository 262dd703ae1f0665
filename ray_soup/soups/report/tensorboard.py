"""Learning curves as TensorBoard event files."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_soup.io.claims import CLAIM, discard
from ray_soup.io.disk import writing

if TYPE_CHECKING:
    from ray_soup.soups.state import LearnState


def scalars(board: Path, own: Path | None = None) -> Callable[[int, int, LearnState], None]:
    """Return a callback for the end of every epoch that writes the learning curve to TensorBoard event files.

    The first call replaces the folder `board` and writes the whole curve of the state, so a resumed run has all of it; later
    calls append the new points. The x axis is the step.

    Args:
        board: the folder of the event files.
        own: a folder of this run on the same disk, in which the new folder is made before it gets its name; None: beside it.

    Returns:
        A callback of (step, steps, state), which closes the files once step >= steps. It raises SoupError if they cannot be
        written.
    """
    writer: Any = None
    written = 0

    def after_epoch(step: int, steps: int, state: LearnState) -> None:
        nonlocal writer, written
        with writing(board):
            if writer is None:
                from tensorboardX.event_file_writer import EventsWriter  # has no thread, unlike SummaryWriter

                board.parent.mkdir(parents=True, exist_ok=True)
                new = (own or board.parent) / f"{CLAIM}{board.name}"
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                writer = EventsWriter(str(new / "events"))
                discard(board, new.parent)
                new.rename(board)  # the open file moves with it
            for line in state.curve[written:]:
                for name in ("fit_nll", "select_nll", "select_accuracy", "select_metric", "lr"):
                    if name in line:
                        writer.write_event(_event(name, line[name], int(line["steps"])))
            written = len(state.curve)
            writer.flush()
            if step >= steps:
                writer.close()

    return after_epoch


def _event(name: str, value: float, step: int) -> Any:
    """Return a point of a curve as TensorBoard stores it."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    return Event(wall_time=time.time(), step=step, summary=scalar(name, value))

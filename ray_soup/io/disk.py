"""Write to local files, and choose how many threads read them."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_at(file: IO[bytes], values: np.ndarray[Any, Any], offset: int) -> None:
    """Write an array into an open file; any thread may call this.

    Args:
        file: open for writing; its position is neither used nor moved.
        values: any dtype and shape; written in row-major order.
        offset: where to write, in bytes from the beginning of the file.
    """
    view = np.ascontiguousarray(values).view(np.uint8).data.cast("B")
    while view:
        written = os.pwrite(file.fileno(), view, offset)
        view, offset = view[written:], offset + written


def reading_threads(nbytes: int = 1) -> int:
    """Choose how many threads to read with if each one holds `nbytes` bytes.

    This is the number of cores that the CPU affinity of this process and its container's limit allow, or fewer, so that the
    threads together hold at most 1 GB.
    """
    cores = float(len(os.sched_getaffinity(0)))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, int(quota) / int(period))
    return max(1, min(math.ceil(cores), (1 << 30) // nbytes))

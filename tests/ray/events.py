"""Waiting for an observable event in a child process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray_soup.io.disk import files_below


def wait_for(event: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 240) -> None:
    """Return once `event()` is true; fail if the process ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not event():
        assert process.poll() is None, process.stderr.read() if process.stderr else f"exit code {process.returncode}"
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.05)


def appeared(folder: Path, pattern: str) -> list[Path]:
    """Return the files at any depth below a folder whose paths end as the pattern says, while others come and go."""
    return [file for file in files_below(folder) if file.match(pattern)]

"""Waiting for an observable event in a child process."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any


def wait_for(event: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 240) -> None:
    """Return once `event()` is true; fail if the process ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not event():
        assert process.poll() is None, process.stderr.read() if process.stderr else f"exit code {process.returncode}"
        assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
        time.sleep(0.05)

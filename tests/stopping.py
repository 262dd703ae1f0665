"""Sending a signal to a running command."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from tests.conftest import children_called, kill_tree

SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
WITHIN_S = 90
"""Seconds for a command to end: it takes less than 5, but more if this machine is busy. A test without them would hang."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let child processes receive Ctrl-C, which a shell makes its background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a command, and end it and everything it has started when the test fails."""
    with interruptible():
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process)


def freeze(process: subprocess.Popen[str], name: str) -> None:
    """Suspend those of its actors whose title contains `name`, so that it waits for them."""
    found = children_called(name, process.pid)
    assert found
    for child in found:
        child.suspend()
    time.sleep(0.5)  # until it has sent the next call, and waits


def stop(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal, and check the exit code, the sentence, and that no process is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, said = process.communicate(timeout=WITHIN_S)
    assert process.returncode == 128 + number, said
    assert said.endswith(f"ray-soup: {SAID[number]}. Rerun the same command to resume.\n")
    assert "Traceback" not in said
    left = psutil.wait_procs(children, timeout=240)[1]  # on a busy machine Ray's own agents take a minute to notice
    assert not [child for child in left if is_running(child)]


def is_running(process: psutil.Process) -> bool:
    """Return whether a process runs, and is not a zombie that nobody waits for."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

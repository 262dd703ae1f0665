"""A run that stops, as by SIGSTOP, right before one of its writes to OUT, in a process of its own.

This module is also a program: for each line of its standard input it forks a process that runs a command and stops before a
write. It prints the number of each process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent


class Stopped:
    """A process that has stopped, or has ended because it made fewer writes."""

    def __init__(self, pid: int, report: Path) -> None:
        self._pid, self._report = pid, report

    def wait(self, seconds: float = 300) -> bool:
        """Wait until it has stopped or ended; return whether it has stopped."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._report.exists():
                return False
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(self._pid).status() == psutil.STATUS_STOPPED:
                    return True
            time.sleep(0.02)
        raise AssertionError(f"process {self._pid} has neither stopped nor ended")

    def wake(self) -> None:
        os.kill(self._pid, signal.SIGCONT)

    def end(self) -> dict[str, Any]:
        """Wait until it has ended; return its exit code `code`, its last sentence `said`, and the number of its `writes`."""
        assert not self.wait()
        found: dict[str, Any] = json.loads(self._report.read_text())
        return found


class Starter:
    """Starts runs that stop before a write."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder, self._count = process, folder, 0

    def start(self, command: str, out: str, at: int = -1, lease_s: float = 1) -> Stopped:
        """Start a command of `commands_of` that writes to `out`, and stops before write number `at`, or never.

        It takes over a folder whose holder was silent for `lease_s` seconds.
        """
        self._count += 1
        report = self._folder / f"report_{self._count}.json"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = {"command": command, "out": out, "at": at, "report": str(report), "lease_s": lease_s}
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        return Stopped(int(self._process.stdout.readline()), report)


@contextmanager
def starter(zoo: Path, folder: Path) -> Iterator[Starter]:
    """Start the program of this module; `folder` is an empty one."""
    command = [sys.executable, "-m", "tests.stopped", str(zoo), str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Starter(process, folder)
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


# The program


def _counted(function: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        count()
        return function(*arguments, **options)

    return call


def _work(line: dict[str, Any], zoo: Path, scratch: Path) -> None:
    """Run a command that stops before a write, and report how it ended."""
    import obstore
    import pytest

    from ray_soup.errors import explain
    from ray_soup.io import lease, storage
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.run import run
    from tests.conftest import values
    from tests.disk_sweep import in_this_process, without_data
    from tests.faults import FaultyDisk, faulty

    writes = 0

    def count() -> None:
        nonlocal writes
        if threading.current_thread() is not threading.main_thread():
            return  # a heartbeat, which comes at any time
        writes += 1
        if writes - 1 == line["at"]:
            os.kill(os.getpid(), signal.SIGSTOP)

    class StoppingDisk(FaultyDisk):
        def write(self, what: str, path: Any) -> None:
            if self.concerns(path):
                count()

    overwrite = line["command"] == "overwrite"
    small = values(zoo, ingredients=without_data(zoo).ingredients, learn__epochs=1, learn__batch_size=150)
    recipe = without_data(zoo) if line["command"] == "uniform" else make_recipe(small)
    said, code, complete = "", 0, False
    with in_this_process(beat_s=0.3), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "LEASE_S", line["lease_s"])
        out = line["out"]
        if storage.is_remote(out):
            for owner, name in ((obstore, "put"), (obstore, "copy"), (storage, "upload"), (storage, "remove")):
                patch.setattr(owner, name, _counted(getattr(owner, name), count))
            disk = FaultyDisk([scratch / "nowhere"])
        else:
            disk = StoppingDisk([Path(out)])
        try:
            with faulty(disk):
                complete = run(recipe, out, overwrite=overwrite).was_complete
        except Exception as error:
            said, code = explain(error)
    report = {"code": code, "said": said, "writes": writes, "complete": complete}
    temporary = Path(line["report"]).with_suffix(".new")
    temporary.write_text(json.dumps(report))
    temporary.rename(line["report"])


def main() -> None:
    """Fork a process for each line; see the module."""
    import tests.disk_sweep  # noqa: F401 - once for all processes

    zoo, scratch = map(Path, sys.argv[1:])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for text in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
            continue
        sys.stdin.close()
        os.dup2(2, 1)
        try:
            _work(json.loads(text), zoo, scratch)
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()

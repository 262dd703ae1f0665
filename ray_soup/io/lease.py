"""A lease on an output folder: one run at a time, on any machine that sees the same disk or storage."""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.disk import json_text, json_value, writing
from ray_soup.io.progress import ProgressCallback, no_progress

BEAT_S = 5
"""Seconds between two heartbeats."""
LEASE_S = 30
"""Seconds without a heartbeat after which a run is presumed dead and may be taken over."""
LEASE_FILE = "state/lease"
"""Path of the lease below the output folder."""
DAMAGED: dict[str, Any] = {"host": "an unknown machine", "pid": 0, "run": "", "beat": 0}
"""Stands for a lease whose content cannot be read."""


def _no_beat() -> None: ...


class Lease:
    """A file that marks a run as active, rewritten by a heartbeat every BEAT_S seconds.

    A lease that has not changed for LEASE_S seconds belongs to a run that is presumed dead, and may be taken over. The
    random run id in the file is a fencing token: `check` detects that another run has taken over. A damaged lease may be
    that of an active run, which rewrites it with its next heartbeat.

    Args:
        file: path or URI, OUT/state/lease. The owner of a local file also holds a file lock, which ends with its process.
        progress: called while this run waits for another run's heartbeat.
        beat: called after each heartbeat, in the thread of the heartbeat.
    """

    def __init__(self, file: str, progress: ProgressCallback = no_progress, beat: Callable[[], None] = _no_beat) -> None:
        self._file, self._progress, self._beat = file, progress, beat
        self._place = file.removesuffix(f"/{LEASE_FILE}")
        self._mine: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex, "beat": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Lease:
        """Take the lease. Raises RecipeError if another run is active."""
        other = self._read()
        for waited in range(LEASE_S):
            if other is None or self._is_dead(other):
                break
            self._progress(f"waiting for a heartbeat of the run on {other['host']}", waited, LEASE_S)
            time.sleep(1)
            now = self._read()
            if now is not None and now != other:
                self._refuse(now)
            other = now
        self._write()
        if storage.is_remote(self._file):
            time.sleep(1)  # of two runs that start at the same time, the last writer keeps the lease
        now = self._other()
        if now is not None:
            self._refuse(now)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the heartbeat and release the lease."""
        self._stop.set()
        self._thread.join()
        with suppress(SoupError, OSError):  # a lease that is left behind counts as that of a dead run
            if self._other() is None:
                storage.remove(self._file)

    def check(self) -> None:
        """Check that this run still holds the lease, before it writes. Raises SoupError if another run has taken over."""
        other = self._other()
        if other is not None:
            raise SoupError(
                f"This run sent no heartbeat for {LEASE_S} s, so process {other['pid']} on {other['host']} took over "
                f"{self._place}. This run writes nothing more there. Wait for the other run, or choose another folder."
            )

    def _other(self) -> dict[str, Any] | None:
        """Return the lease if it belongs to another run; a damaged one may be this run's own."""
        found = self._read()
        return None if found is None or found["run"] in ("", self._mine["run"]) else found

    def _read(self) -> dict[str, Any] | None:
        """Return the lease; None if there is none, DAMAGED if the file holds anything else. Raises SoupError."""
        try:
            if not storage.is_remote(self._file) and os.path.exists(self._file) and not os.path.isfile(self._file):
                raise OSError("it is not a file")
            found = json_value(storage.read_bytes(self._file))
        except FileNotFoundError:
            return None
        except ValueError:
            return DAMAGED
        except OSError as error:
            raise SoupError(f"{self._file} cannot be read ({error.strerror or error}). Remove it, and rerun.") from error
        types = {"host": str, "pid": int, "run": str, "beat": int}
        whole = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in types.items())
        return found if whole and 0 < found["pid"] < 1 << 31 else DAMAGED

    def _write(self) -> None:
        self._mine["beat"] += 1
        with writing(Path(self._file)):
            storage.write_bytes(json_text(self._mine).encode(), self._file)

    def _is_dead(self, other: dict[str, Any]) -> bool:
        """Return whether its process ran on this machine and has ended; for a local file, this run's file lock proves it."""
        here = other["host"] == self._mine["host"]
        return here and not (storage.is_remote(self._file) and psutil.pid_exists(other["pid"]))

    def _refuse(self, other: dict[str, Any]) -> None:
        raise RecipeError(
            f"Another run is using {self._place}: process {other['pid']} on {other['host']}. Wait for it, or choose another "
            "folder."
        )

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(SoupError, OSError):  # the disk may recover by the next heartbeat; the final upload must succeed
                if self._other() is not None:  # this process was suspended, and presumed dead
                    return
                self._write()
                self._beat()

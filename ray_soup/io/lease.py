"""A lease on an output folder: one run at a time, on any machine that sees the same disk or storage.

A lease that has had no heartbeat for LEASE_S seconds belongs to a run that is presumed dead and may be taken over. Presuming
can be wrong: the process may be suspended, or cut off. So no write relies on the time: a run writes through a claim that its
successor has made void, see io/claims.py for disks and io/remote_claims.py for remote storage.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.claims import DAMAGED, DiskClaim, Record, state_of
from ray_soup.io.conditional import Conflict
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.io.remote_claims import RemoteClaim, state_in

BEAT_S = 5
"""Seconds between two heartbeats."""
LEASE_S = 30
"""Seconds without a heartbeat after which a run is presumed dead and may be taken over."""
_ACTIVE: set[str] = set()
"""The runs of this process that hold a lease."""


def _no_beat() -> None: ...


def state_folder(out: str) -> str:
    """Return the path or URI where the last run in OUT, which may be active, killed or finished, keeps its state."""
    return state_in(out.rstrip("/")) if storage.is_remote(out) else str(state_of(Path(out)))


class Lease:
    """Marks a run as active, by a heartbeat every BEAT_S seconds, and gives it a folder of its own in OUT/state.

    Args:
        out: the folder, whose state/ exists, or the URI.
        progress: called while this run waits for another run's heartbeat.
        beat: called after heartbeats, in a thread of its own: heartbeats do not wait for it.
    """

    def __init__(self, out: str, progress: ProgressCallback = no_progress, beat: Callable[[], None] = _no_beat) -> None:
        self._out, self._progress, self._beat = out, progress, beat
        self.claim: DiskClaim | RemoteClaim = RemoteClaim(out) if storage.is_remote(out) else DiskClaim(Path(out))
        self.record: Record = {
            "host": socket.gethostname(), "pid": os.getpid(), "run": uuid.uuid4().hex, "beat": 1,
            "space": _space(), "started": psutil.Process().create_time(),
        }  # fmt: skip
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._beaten, self._is_ending = threading.Event(), False
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._is_lost = False

    @property
    def folder(self) -> str:
        """The path or URI below which this run writes its state."""
        return self.claim.folder

    def __enter__(self) -> Lease:
        """Take the lease. Raises RecipeError if another run is active, SoupError if the lease cannot be read or written."""
        other = self._read()
        if other is not None and other["run"] in _ACTIVE:
            self._refuse(other)
        for waited in range(LEASE_S):
            if other is None or self._is_dead(other):
                break
            self._progress(f"waiting for a heartbeat of the run on {other['host']}", waited, LEASE_S)
            time.sleep(1)
            now = self._read()
            if now is not None and now != other:
                self._refuse(now)
            other = now
        if not self.claim.take(self.record, other):
            self._refuse(self._read() or DAMAGED)
        _ACTIVE.add(self.record["run"])
        self._thread.start()
        self._follower.start()
        try:
            with self.explaining({}):
                self.claim.inherit(self.record)
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what follows a heartbeat, then stop the heartbeat and release the lease."""
        self._is_ending = True
        self._beaten.set()
        self._follower.join()
        self._stop.set()
        self._thread.join()
        with suppress(SoupError, OSError):  # a lease that is left behind counts as that of a dead run
            if not self.is_lost():
                self.claim.release(self.record)
            elif isinstance(self.claim, RemoteClaim):
                self.claim.remove_own()
        _ACTIVE.discard(self.record["run"])

    def is_lost(self) -> bool:
        """Return whether another run has taken over. Raises SoupError or OSError if that cannot be found out."""
        self._is_lost = self._is_lost or self.claim.other(self.record) is not None
        return self._is_lost

    def check(self) -> None:
        """Check that this run still holds the lease. Raises SoupError if another run has taken over."""
        if self.is_lost():
            raise self.lost()

    def publish(self, files: Mapping[str, str], removed: Sequence[str]) -> None:
        """Give objects below `folder` their names in a URI, as `RemoteClaim.publish` does. Raises SoupError."""
        assert isinstance(self.claim, RemoteClaim)
        try:
            self.claim.publish(self.record, files, removed)
        except Conflict as error:
            raise self.lost() from error

    @contextmanager
    def explaining(self, names: Mapping[str, str], more: str = "") -> Iterator[None]:
        """Say in errors of this context that another run has taken over, if it has: whatever failed, failed because of that.

        Args:
            names: what to replace in the texts of other errors, and by what: files get the names that they have afterwards.
            more: is appended to a text about a disk in which something is replaced.
        """
        lost = False
        try:
            yield
        except BaseException as error:
            with suppress(SoupError, OSError):
                lost = isinstance(error, Exception) and self.is_lost()
            if lost:
                raise self.lost() from error
            text = str(error)
            for name, shown in names.items():
                text = text.replace(name, shown)
            if isinstance(error, SoupError) and text != str(error):
                raise type(error)(text + more * isinstance(error.__cause__, OSError)) from error
            raise

    def lost(self) -> SoupError:
        """Return the error for a run that another one has replaced."""
        other = self.claim.other(self.record) or DAMAGED
        who = f"process {other['pid']} on {other['host']}" if other["pid"] else "another run"
        return SoupError(
            f"This run sent no heartbeat for {LEASE_S} s, so {who} took over {self._out}. This run writes nothing more "
            "there. Wait for the other run, or choose another folder."
        )

    def _read(self) -> Record | None:
        try:
            return self.claim.read()
        except OSError as error:
            raise SoupError(
                f"The lease of {self._out} cannot be read ({error.strerror or error}). Remove it, and rerun."
            ) from error

    def _is_dead(self, other: Record) -> bool:
        """Return whether its process ran on this machine and has ended."""
        if (other["host"], other.get("space", _space())) != (self.record["host"], _space()):
            return False
        if other["pid"] == os.getpid():
            return other["run"] not in _ACTIVE
        try:
            process = psutil.Process(other["pid"])
            started, ended = process.create_time(), process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            return True
        return ended or abs(started - other.get("started", started)) > 1

    def _refuse(self, other: Record) -> None:
        who = f": process {other['pid']} on {other['host']}" if other["pid"] else ""
        raise RecipeError(f"Another run is using {self._out}{who}. Wait for it, or choose another folder.")

    def _renew(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(SoupError, OSError):  # the disk may recover by the next heartbeat; the final upload must succeed
                if self.is_lost():  # this process was suspended, and presumed dead
                    return
                self.record["beat"] += 1
                self.claim.renew(self.record)
                self._beaten.set()

    def _follow(self) -> None:
        while self._beaten.wait() and not self._is_ending:
            self._beaten.clear()
            with suppress(SoupError, OSError):
                self._beat()


def _space() -> str:
    """Return what names this process's namespace of process ids: containers, and other machines, may have one host name."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"

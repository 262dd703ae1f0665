"""A run's claim on an output folder on a disk: the folder OUT/state/run-N/ID, which has its lease and its whole state.

A run changes OUT only by operations on paths through its own folder: what it writes is finished there and then renamed into
place, and what it removes is renamed into its folder first. A run that takes over renames the folder of its predecessor.
After that no path through it exists: the next operation of the predecessor fails, even if it was suspended right before it.
No file lock is needed, so this holds on a network disk, too. ID is random: a later run may get the same N, but no run's path
ever exists again.

    claim       mkdir a folder with ID/lease in it, then rename it to run-N, N one more than the last: it exists once, so of
                several runs that want to follow the same one, exactly one does
    take over   rename the folder of run N-1 to run-N/ID/before-(N-1)-..., then move its content into run-N/ID
    release     move the content of run-N/ID to OUT/state, where a finished or interrupted run keeps it
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray_soup.errors import SoupError
from ray_soup.io.disk import files_below, json_value, write_json, writing

Record = dict[str, Any]
RUN = re.compile(r"run-([0-9]+)")
"""Names of the folders in state/ of runs that hold OUT, or were killed."""
CLAIM = ".claim-"
"""Begins the names of folders that become one of them, or have been one."""
LEASE = "lease"
STALE_S = 60
"""Seconds after which nothing makes a claim of such a folder any more."""
BEFORE = "before-"
HELD = ("lock", LEASE)
"""What earlier versions of ray_soup kept in state/ while a run held OUT."""
APPENDED = ("tensorboard", "wandb")
"""Folders of OUT with files that a run holds open and appends to."""
DAMAGED: Record = {"host": "an unknown machine", "pid": 0, "run": "", "beat": 0}
"""Stands for a lease whose content cannot be read."""


def record_in(data: bytes) -> Record:
    """Return the lease in a file; DAMAGED if it is anything else."""
    with suppress(ValueError):
        found = json_value(data)
        types = {"host": str, "pid": int, "run": str, "beat": int}
        whole = isinstance(found, dict) and all(type(found.get(key)) is kind for key, kind in types.items())
        if whole and 0 < found["pid"] < 1 << 31:
            return dict(found)
    return DAMAGED


def _runs(state: Path) -> list[tuple[int, bool, Path]]:
    """Return of each run in a folder state/ its number, whether it has a lease, and its folder; in order."""
    found = []
    for name in os.listdir(state) if state.is_dir() else []:
        if number := RUN.fullmatch(name):
            with suppress(FileNotFoundError, NotADirectoryError):  # it has just ended
                inside = [folder for folder in (state / name).iterdir() if folder.is_dir()]
                found += [(int(number[1]), os.path.lexists(folder / LEASE), folder) for folder in inside]
    return sorted(found)


def state_of(out: Path) -> Path:
    """Return the folder with the state of the last run in OUT, whether it holds OUT, was killed, or has ended."""
    runs = _runs(out / "state")
    return runs[-1][2] if runs else out / "state"


class DiskClaim:
    """The claim of one run on the folder `out`."""

    def __init__(self, out: Path) -> None:
        self._out, self._state = out, out / "state"
        self.folder = ""
        """The run's own folder, once it has one."""

    def read(self) -> Record | None:
        """Return the lease of the last run that holds the folder, or was killed; None if there is none. Raises OSError.

        Without such a run, this is the lease of a run of an earlier version of ray_soup.
        """
        runs = _runs(self._state)
        file = (runs[-1][2] if runs else self._state) / LEASE
        if file.exists() and not file.is_file():
            raise OSError(f"{file}: it is not a file")
        try:
            return record_in(file.read_bytes())
        except FileNotFoundError:
            if not runs:
                return None
            return DAMAGED if file.parent.exists() else self.read()

    def take(self, record: Record, seen: Record | None) -> bool:
        """Claim the folder after the run with the lease `seen`; return False if another run was faster."""
        number = next((number for number, *_ in reversed(_runs(self._state))), 0) + 1
        new, place = self._state / f"{CLAIM}{record['run']}", self._state / f"run-{number}"
        own = place / record["run"][:12]
        try:
            new.mkdir()
            (new / own.name).mkdir()
            write_json(new / own.name / LEASE, record)
            _remove_empty(place)
            new.rename(place)
        except (OSError, SoupError):
            shutil.rmtree(new, ignore_errors=True)
            if place.exists():  # it is not empty, so nothing can be renamed over it
                return False
            raise
        self.folder = str(own)
        *lower, last = _runs(self._state) or [(0, False, place)]
        if last[2] != own or (lower and _run_in(lower[-1][2]) != (seen or {}).get("run")):
            with suppress(FileNotFoundError):
                self._vanish()
            return False
        return True

    def inherit(self, record: Record) -> None:
        """Take away the folders of earlier runs, and move what they and finished ones kept into this run's.

        Raises OSError if another run has taken away this one's.
        """
        mine = Path(self.folder)
        last = int(mine.parent.name.partition("-")[2])
        for number, _, folder in _runs(self._state):
            if number <= last and folder != mine:
                with suppress(FileNotFoundError):
                    folder.rename(mine / f"{BEFORE}{number}-{folder.name}")
                _remove_empty(folder.parent)
        killed = False
        while before := max(mine.glob(f"{BEFORE}*"), key=_order, default=None):
            _move_content(before, mine)
            shutil.rmtree(before)
            killed = True
        for name in HELD:
            (self._state / name).unlink(missing_ok=True)
        for left in self._state.glob(f"{CLAIM}*"):
            if left.stat().st_mtime < mine.stat().st_mtime - STALE_S:  # its process was killed
                shutil.rmtree(left, ignore_errors=True)
        _move_content(self._state, mine)
        if killed:
            for file in _appended(self._out, mine):
                _detach(file, mine)
        if not mine.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(mine))

    def renew(self, record: Record) -> None:
        """Write a heartbeat. Raises SoupError."""
        write_json(Path(self.folder, LEASE), record)

    def other(self, record: Record) -> Record | None:
        """Return the lease of the run that took over; None if this run holds the folder."""
        try:
            found = record_in(Path(self.folder, LEASE).read_bytes())
        except FileNotFoundError:
            return self.read() or DAMAGED
        return None if found["run"] in ("", record["run"]) else found

    def release(self, record: Record) -> None:
        """Move the state to where ended runs keep it, and give up the claim."""
        mine = Path(self.folder)
        for entry in list(mine.iterdir()):
            if entry.name != LEASE and not entry.name.startswith(CLAIM):
                entry.rename(self._state / entry.name)
        self._vanish()

    def _vanish(self) -> None:
        """Remove this run's folder, which is gone for others at once."""
        mine = Path(self.folder)
        gone = self._state / f"{CLAIM}{mine.name}-ended"
        mine.rename(gone)
        _remove_empty(mine.parent)
        shutil.rmtree(gone, ignore_errors=True)


def _run_in(folder: Path) -> str:
    """Return the ID in the lease of a run's folder; the empty string if it cannot be read."""
    with suppress(OSError):
        return str(record_in((folder / LEASE).read_bytes())["run"])
    return ""


def _remove_empty(place: Path) -> None:
    """Remove a folder run-N unless a run has it."""
    with suppress(OSError):
        place.rmdir()


def _order(before: Path) -> tuple[int, bool]:
    """Return what sorts the folders of earlier runs: their number, then whether they have a lease."""
    return int(before.name.split("-")[1]), os.path.lexists(before / LEASE)


def _move_content(source: Path, target: Path) -> None:
    """Move the entries of a folder that `target` lacks, except those of runs."""
    for entry in list(source.iterdir()):
        is_run = RUN.fullmatch(entry.name) or entry.name.startswith(CLAIM)
        if not is_run and not os.path.lexists(target / entry.name):
            entry.rename(target / entry.name)


def _appended(out: Path, mine: Path) -> Iterator[Path]:
    """Yield the files that an earlier process may hold open and append to."""
    for folder in (*(out / name for name in APPENDED), mine / "tune"):
        yield from (file for file in files_below(folder) if not file.is_symlink())


def _detach(file: Path, mine: Path) -> None:
    """Replace a file by a copy of it, so that a process that holds it open writes to it no more."""
    copy = mine / f"{CLAIM}copy"
    shutil.copy2(file, copy)
    copy.replace(file)


def discard(path: Path, own: Path) -> None:
    """Remove a file, a link or a folder of OUT, if it exists, by way of the run's own folder. Raises SoupError."""
    gone = own / f"{CLAIM}{secrets.token_hex(4)}"
    with writing(path):
        try:
            path.rename(gone)
        except FileNotFoundError:
            if not own.exists():
                raise
            return
        shutil.rmtree(gone) if gone.is_dir() and not gone.is_symlink() else gone.unlink()

"""A run's claim on an output folder in remote storage: the object OUT/state/lease, which is only ever swapped.

A run writes its state below a prefix that is its own, OUT/state/run-ID/. A successor copies the state to a prefix of its own
and reads the old one no more, so whatever a suspended predecessor may still write there, nobody sees.

The files of OUT have fixed names, so they become visible in two steps. The run uploads them below its prefix, and then swaps
the lease for one that lists the moves: from where, to which name, and which version of that name they replace. Only if that
succeeds, it makes the moves, each on the condition that the version is still the listed one. A successor finds the list in
the lease and makes the same moves before anything else, so that the condition of a move that its predecessor makes later no
longer holds. The list comes first because a name that does not exist can be defended only by giving it its file.

    claim       create the lease, or swap it: of several runs that saw the same version, one succeeds
    take over   swap the lease, finish the moves in it, copy the state, swap the lease for one that names the new prefix
    publish     upload, swap the lease for one with the moves, make them, swap the lease for one without
    release     swap the lease for one that says so; the prefix with the state stays, and the next run adopts it

What remains: object storage deletes without a condition, and so it copies over another object, as is done with those of more
than 64 MB (conditional.SMALL). A run that is suspended between its last look and the deletion of a file of the run that it
replaces (--overwrite), or the replacement of such a large file, can still delete or replace a later file of that name.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray_soup.io import conditional, storage
from ray_soup.io.claims import DAMAGED, Record, record_in
from ray_soup.io.conditional import Conflict, Version
from ray_soup.io.disk import json_text

LEASE_FILE = "state/lease"
"""Path of the lease below the output folder."""
LAST = ("run.json", "manifest.json")
"""The files of OUT that say that it is complete."""


def state_in(uri: str) -> str:
    """Return the URI below which the last run in the output folder `uri` keeps its state."""
    found = conditional.read(f"{uri}/{LEASE_FILE}")
    folder = record_in(found[0]).get("folder") if found is not None else None
    return f"{uri}/state/{folder}" if folder else f"{uri}/state"


class RemoteClaim:
    """The claim of one run on the output folder `uri`."""

    def __init__(self, uri: str) -> None:
        self._uri, self._file = uri, f"{uri}/{LEASE_FILE}"
        self._seen: Version | None = None
        self._before: Record | None = None
        self._changing = threading.RLock()  # the heartbeat changes the lease, too
        self.folder = ""
        """The URI of the run's own prefix, once it has one."""

    def read(self) -> Record | None:
        """Return the lease; None if there is none, or if it was released."""
        found = conditional.read(self._file)
        self._before, self._seen = (None, None) if found is None else (record_in(found[0]), found[1])
        return None if self._before is None or self._before.get("released") else self._before

    def take(self, record: Record, seen: Record | None) -> bool:
        """Claim the folder after the run with the lease `seen`, the last one read; return False if another was faster."""
        before = self._before or DAMAGED
        old = str(before.get("folder", "")) if before["run"] else self._newest()
        name = old if old and before.get("released") else f"run-{record['run'][:12]}"
        self.folder = f"{self._uri}/state/{name}"
        record.update(folder=old, moves=before.get("moves"))
        try:
            self._swap(record)
        except Conflict:
            found = conditional.read(self._file)
            if found is None or record_in(found[0])["run"] != record["run"]:
                return False
            self._seen = found[1]  # an attempt whose answer was lost has succeeded
        return True

    def inherit(self, record: Record) -> None:
        """Finish the publication of an earlier run, if it did not, and make its state this run's. Raises SoupError."""
        self._finish_moves(record)
        name, old = self.folder.rpartition("/")[2], record["folder"]
        if name != old:
            self._adopt(f"{self._uri}/state/{old}".rstrip("/"))
        self._change(record, folder=name, moves=None)

    def _newest(self) -> str:
        """Return the name of the prefix that was written last: what a lease named that can no longer be read."""
        found = storage.walk(f"{self._uri}/state")
        written = [(stat.version, name.partition("/")[0]) for name, stat in found.items() if name.startswith("run-")]
        return max(written, default=(0, ""))[1]

    def _adopt(self, old: str) -> None:
        """Copy the state of an earlier run to this run's prefix."""
        for name in storage.walk(old):
            if name != "lease" and not name.startswith(("out/", "evaluated/", "run-")):
                with suppress(
                    Conflict, FileNotFoundError
                ):  # an earlier attempt copied it, or an actor of that run removed it
                    conditional.copy(f"{old}/{name}", f"{self.folder}/{name}", None)

    def _swap(self, record: Record) -> None:
        data = json_text(record).encode()
        with self._changing:
            if self._seen is None:
                self._seen = conditional.create(data, self._file)
            else:
                self._seen = conditional.swap(data, self._file, self._seen)

    def _change(self, record: Record, **values: Any) -> None:
        """Swap the lease for one with other values. Raises Conflict if another run took over."""
        with self._changing:
            record.update(values)
            try:
                self._swap(record)
            except Conflict:  # it was damaged, or an attempt whose answer was lost has succeeded
                found = conditional.read(self._file)
                self._seen = found[1] if found is not None else None
                if found is not None and record_in(found[0])["run"] not in ("", record["run"]):
                    raise
                self._swap(record)

    def renew(self, record: Record) -> None:
        """Write a heartbeat. Raises SoupError."""
        self._change(record)

    def other(self, record: Record) -> Record | None:
        """Return the lease of the run that took over; None if this run holds the folder."""
        found = conditional.read(self._file)
        other = DAMAGED if found is None else record_in(found[0])
        return None if other["run"] in ("", record["run"]) else other

    def publish(self, record: Record, files: Mapping[str, str], removed: Sequence[str]) -> None:
        """Give uploaded files their names in OUT, those in LAST last, and delete others.

        Args:
            record: the lease of this run.
            files: for each name below OUT, the path of the object below the run's own prefix.
            removed: names below OUT to delete.

        Raises Conflict if another run took over.
        """
        listed = {
            name: {"from": f"{self.folder}/{source}", "was": conditional.version(f"{self._uri}/{name}")}
            for name, source in files.items()
        }
        self._change(record, moves={"files": listed, "removed": list(removed)})
        self._finish_moves(record)
        self._change(record, moves=None)

    def _finish_moves(self, record: Record) -> None:
        """Make the moves that the lease lists; those that have been made change nothing."""
        moves = record.get("moves") or {"files": {}, "removed": []}
        for name in sorted(moves["files"], key=lambda name: name in LAST):
            move = moves["files"][name]
            self._move(record, move["from"], f"{self._uri}/{name}", move["was"])
        for name in moves["removed"]:
            self._check(record)
            storage.remove(f"{self._uri}/{name}")

    def _move(self, record: Record, source: str, target: str, was: Version | None) -> None:
        while True:
            try:
                return conditional.copy(source, target, was)
            except FileNotFoundError:  # a successor that finished this move removed the source
                return self._check(record)
            except (
                Conflict
            ):  # it has been made, or what is there is older than this claim: seen before the look at the lease
                was = conditional.version(target)
            self._check(record)
            with suppress(FileNotFoundError):  # one of the two was removed just now
                if conditional.same(source, target):
                    return None

    def _check(self, record: Record) -> None:
        if self.other(record) is not None:
            raise Conflict(f"another run took over {self._uri}")

    def release(self, record: Record) -> None:
        """Say in the lease that this run has ended; remove the lease if it leaves nothing."""
        if set(storage.walk(f"{self._uri}/state")) - {"lease"}:
            self._change(record, released=True)
        else:
            storage.remove(self._file)

    def remove_own(self) -> None:
        """Delete what this run wrote below its prefix after another run took over, and copied what it needs."""
        found = conditional.read(self._file)
        folder = record_in(found[0]).get("folder") if found is not None else None
        if folder and self.folder != f"{self._uri}/state/{folder}":
            for name in storage.walk(self.folder):
                storage.remove(f"{self.folder}/{name}")

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import claims, conditional, lease, storage
from ray_soup.io.conditional import Conflict
from ray_soup.io.lease import Lease, state_folder
from ray_soup.io.remote import Stat
from ray_soup.io.remote_claims import RemoteClaim

DEADLINE_S = 30
OTHER = {"host": "another-host", "pid": 1, "run": "theirs", "beat": 7}


@pytest.fixture(params=["local", "remote"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An output folder, local or in a bucket; heartbeats are quick."""
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    if request.param == "remote":
        return f"{request.getfixturevalue('s3')}/out"
    (tmp_path / "out" / "state").mkdir(parents=True)
    return str(tmp_path / "out")


def file_of(out: str) -> str:
    """Where the lease of the run that holds the folder is."""
    return f"{out}/state/lease" if storage.is_remote(out) else f"{state_folder(out)}/lease"


def leave(out: str, content: bytes) -> None:
    """Write the lease of a run that was killed."""
    storage.write_bytes(content, f"{out}/state/lease" if storage.is_remote(out) else f"{out}/state/run-1/theirs/lease")


def take_over(out: str, content: bytes) -> None:
    """Take over as a run would from the one that holds the folder."""
    if storage.is_remote(out):
        storage.write_bytes(content, f"{out}/state/lease")
        return
    before = Path(state_folder(out))
    number = int(before.parent.name.partition("-")[2])
    successor = before.parent.with_name(f"run-{number + 1}") / "theirs"
    successor.mkdir(parents=True)
    (successor / "lease").write_bytes(content)
    before.rename(successor / f"before-{number}-{before.name}")
    before.parent.rmdir()


def test_a_lease_sends_heartbeats_and_is_released(out: str) -> None:
    beats, thrice = [], threading.Event()

    def beat() -> None:
        beats.append(json.loads(storage.read_bytes(file_of(out))))
        if len(beats) == 3:
            thrice.set()

    with Lease(out, beat=beat) as held:
        assert thrice.wait(DEADLINE_S)
        held.check()
    numbers = [b["beat"] for b in beats]
    assert numbers == sorted(numbers)
    assert numbers[0] >= 2
    assert {(b["host"], b["pid"]) for b in beats} == {(socket.gethostname(), os.getpid())}
    assert not storage.exists(file_of(out))  # nothing else was left


def test_heartbeats_go_on_while_what_follows_them_takes_long(out: str) -> None:
    begun, go_on, returned = threading.Event(), threading.Event(), list[bool]()

    def upload() -> None:
        begun.set()
        returned.append(go_on.wait(DEADLINE_S))

    def beat() -> int:
        return json.loads(storage.read_bytes(file_of(out)))["beat"]

    with Lease(out, beat=upload):
        assert begun.wait(DEADLINE_S)
        first, end = beat(), time.monotonic() + DEADLINE_S
        while beat() < first + 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert returned == []
        go_on.set()
    assert returned  # the lease is released only after it


def test_a_lease_with_a_heartbeat_is_refused(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        other = Lease(out)
    message = rf"Another run is using {out}: process {os.getpid()} on another-host\. Wait for it"
    with other, pytest.raises(RecipeError, match=message), Lease(out):
        pass
    with Lease(out):  # it has been released
        pass


def test_a_lease_without_a_heartbeat_is_taken_over(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2)
    leave(out, json.dumps(OTHER).encode())
    said: list[tuple[str, int, int]] = []
    with Lease(out, lambda *news: said.append(news)) as held:
        assert said == [("waiting for a heartbeat of the run on another-host", n, 2) for n in range(2)]
        held.check()
        assert json.loads(storage.read_bytes(file_of(out)))["run"] != "theirs"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"host": "h"}', b"null"])
def test_a_damaged_lease_is_taken_over_if_no_heartbeat_follows(
    out: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1)
    leave(out, content)
    said: list[str] = []
    with Lease(out, lambda what, done, total: said.append(what)) as held:
        assert said == ["waiting for a heartbeat of the run on an unknown machine"]
        held.check()


def test_the_damaged_lease_of_an_active_run_is_repaired_and_a_second_run_refused(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        first = Lease(out)
    monkeypatch.setattr(lease, "BEAT_S", 0.5)
    with first:
        storage.write_bytes(b"{", file_of(out))
        lease._ACTIVE.clear()  # as if the second were another process
        with pytest.raises(RecipeError, match=r"Another run is using .* on another-host"), Lease(out):
            pass
        first.check()


def test_what_is_no_file_is_no_lease(tmp_path: Path) -> None:
    """A FIFO would block the reader for ever."""
    (tmp_path / "state" / "run-1" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "state" / "run-1" / "a" / "lease")
    with pytest.raises(SoupError, match=r"cannot be read \(.*/state/run-1/a/lease: it is not a file\)\. Remove it"):
        Lease(str(tmp_path)).__enter__()


def test_a_run_of_this_machine_whose_process_has_ended_is_taken_over_at_once(out: str) -> None:
    mine = {**OTHER, "host": socket.gethostname(), "pid": (1 << 31) - 1}
    leave(out, json.dumps(mine).encode())
    said: list[str] = []
    with Lease(out, lambda what, done, total: said.append(what)):
        assert said == []


def test_a_run_on_another_machine_with_the_same_name_is_waited_for(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of its namespace is the same on every Linux: that of the machine's start is not."""
    monkeypatch.setattr(lease, "LEASE_S", 1)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Path, "read_text", lambda self: "another start")
        space = lease._space()
    mine = {**OTHER, "host": socket.gethostname(), "pid": (1 << 31) - 1, "space": space}
    leave(out, json.dumps(mine).encode())
    said: list[str] = []
    with Lease(out, lambda what, done, total: said.append(what)):
        assert said == [f"waiting for a heartbeat of the run on {socket.gethostname()}"]


@pytest.mark.parametrize("left", ["nothing", "a lease", "the lease of a live run"])
def test_a_folder_of_an_earlier_version_is_resumed_unless_its_run_is_active(
    out: str, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    """It kept the state in OUT/state itself, and its lease there, without `space` and `started`."""
    monkeypatch.setattr(lease, "LEASE_S", 1 if left == "a lease" else 2)
    storage.write_bytes(b"steps", f"{out}/state/soups/learn.pt")
    if left != "nothing":
        storage.write_bytes(json.dumps(OTHER).encode(), f"{out}/state/lease")
    said: list[str] = []

    def beats(what: str, done: int, total: int) -> None:
        said.append(what)
        if left == "the lease of a live run":
            storage.write_bytes(json.dumps({**OTHER, "beat": 8}).encode(), f"{out}/state/lease")

    if left == "the lease of a live run":
        with pytest.raises(RecipeError, match=f"Another run is using {out}: process 1 on another-host"), Lease(out, beats):
            pass
        return
    with Lease(out, beats) as held:
        assert said == ["waiting for a heartbeat of the run on another-host"] * (left == "a lease")
        assert storage.read_bytes(f"{held.folder}/soups/learn.pt") == b"steps"
    assert storage.read_bytes(f"{state_folder(out)}/soups/learn.pt") == b"steps"
    assert storage.is_remote(out) or not storage.exists(f"{out}/state/lease")


def test_a_run_that_was_taken_over_notices_and_leaves_the_lease_alone(out: str) -> None:
    other = json.dumps(OTHER).encode()
    with Lease(out) as held:
        held._stop.set()  # as if this process were suspended
        held._thread.join()
        take_over(out, other)
        message = f"sent no heartbeat for 30 s, so process 1 on another-host took over {out}"
        with pytest.raises(SoupError, match=message):
            held.check()
        with pytest.raises(SoupError):
            held.claim.renew(held.record)
    assert storage.read_bytes(file_of(out)) == other


def test_the_heartbeat_of_a_run_that_was_taken_over_ends(out: str) -> None:
    other = json.dumps(OTHER).encode()
    taken = threading.Event()

    def beat() -> None:
        if not taken.is_set():
            take_over(out, other)  # right after this run's own heartbeat
            taken.set()

    with Lease(out, beat=beat) as held:
        assert taken.wait(DEADLINE_S)
        held._thread.join(DEADLINE_S)
        assert not held._thread.is_alive()
    assert storage.read_bytes(file_of(out)) == other


def test_failed_heartbeats_do_not_end_the_run(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, recovered = [], threading.Event()

    def fail(*_: object) -> None:
        failures.append(1)
        if len(failures) < 3:
            raise SoupError("the storage is down")
        recovered.set()

    with Lease(out) as held:
        monkeypatch.setattr(held.claim, "renew", fail)
        assert recovered.wait(DEADLINE_S)
        held.check()


def test_the_state_of_a_killed_run_is_the_next_ones(out: str) -> None:
    """Also if the next one was killed, too, before it had all of it."""
    first = Lease(out)
    first.__enter__()
    storage.write_bytes(b"steps", f"{first.folder}/soups/learn.pt")
    first._stop.set()  # it is killed
    first._thread.join()
    lease._ACTIVE.clear()
    second = Lease(out)
    assert second.claim.take(second.record, second.claim.read())
    assert storage.read_bytes(f"{state_folder(out)}/lease" if not storage.is_remote(out) else file_of(out)) != b""
    lease._ACTIVE.clear()
    with Lease(out) as third:
        assert storage.read_bytes(f"{third.folder}/soups/learn.pt") == b"steps"
        assert third.folder not in (first.folder, second.folder)
    assert storage.read_bytes(f"{state_folder(out)}/soups/learn.pt") == b"steps"
    with Lease(out) as fourth:
        assert storage.read_bytes(f"{fourth.folder}/soups/learn.pt") == b"steps"


# Claims on a disk: every order of the steps of several runs


class Run:
    """A run that claims a folder in steps, writes through its own folder, one operation at a time, and releases it."""

    def __init__(self, out: Path, name: str) -> None:
        self.name, self.claim = name, claims.DiskClaim(out)
        self.steps = self._steps(out)
        self.holds, self.wrote = False, list[str]()

    def _steps(self, out: Path) -> Iterator[None]:
        seen = self.claim.read()
        yield  # any time may pass here: the other is presumed dead, rightly or not
        record = {"host": "h", "pid": 1, "run": self.name, "beat": 1}
        if not self.claim.take(record, seen):
            return
        yield
        self.claim.inherit(record)
        self.holds = True
        for number in range(2):
            yield
            file = Path(self.claim.folder, "file")
            file.write_text(f"{self.name} {number}")
            yield  # suspended right before the rename
            file.replace(out / "result")
            self.wrote.append(f"{self.name} {number}")
        yield
        self.claim.release(record)

    def step(self) -> bool:
        """Make one step; return whether there are more. A run whose folder was taken away ends."""
        try:
            next(self.steps)
        except (StopIteration, OSError, SoupError):
            return False
        return True


@settings(max_examples=60, deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=5, max_size=40))
@example(order=[0] * 4 + [1] * 8 + [2] * 4 + [0, 2])  # a is suspended, b takes over and ends, c begins, a wakes
def test_in_any_order_of_steps_only_the_last_run_that_took_over_writes(order: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "state").mkdir()
        runs = [Run(out, name) for name in "abc"]
        took: list[str] = []
        for one in (runs[number] for number in order):
            held, before = one.holds, len(one.wrote)
            one.step()
            if one.holds and not held:
                took.append(one.name)
            if len(one.wrote) > before:
                assert one.name == took[-1], (order, took)
                assert (out / "result").read_text() == one.wrote[-1]


# Conditional writes


def test_conditional_writes_of_an_object(s3: str) -> None:
    target = f"{s3}/a"
    assert (conditional.read(target), conditional.version(target)) == (None, None)
    first = conditional.create(b"one", target)
    assert conditional.read(target) == (b"one", first)
    with pytest.raises(Conflict):
        conditional.create(b"two", target)
    second = conditional.swap(b"two", target, first)
    assert conditional.version(target) == second
    for stale in (lambda: conditional.swap(b"three", target, first), lambda: conditional.swap(b"x", f"{s3}/none", first)):
        with pytest.raises(Conflict):
            stale()
    conditional.copy(target, f"{s3}/b", None)
    with pytest.raises(Conflict):
        conditional.copy(target, f"{s3}/b", None)
    with pytest.raises(Conflict):
        conditional.copy(target, f"{s3}/b", first)
    assert conditional.same(target, f"{s3}/b")
    assert not conditional.same(target, storage_with(b"other", f"{s3}/c"))


def test_an_object_that_storage_cannot_copy_passes_through_this_machine(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional, "LARGEST", 1 << 20)
    source = storage_with(bytes(range(256)) * (1 << 17), f"{s3}/source")
    conditional.copy(source, f"{s3}/copy", None)
    assert conditional.same(source, f"{s3}/copy")
    with pytest.raises(Conflict):
        conditional.copy(source, f"{s3}/copy", None)


def test_a_claim_whose_answer_was_lost_is_a_claim(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create = conditional.create

    def lost(data: bytes, target: str) -> conditional.Version:
        create(data, target)
        return create(data, target)

    monkeypatch.setattr(conditional, "create", lost)
    with Lease(f"{s3}/out") as held:
        held.check()


def test_the_prefix_that_was_written_last_is_found(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last file may be older than that of another prefix."""
    times = {"run-a/a": 3, "run-a/b": 1, "run-b/a": 2, "begun.json": 4}
    monkeypatch.setattr(storage, "walk", lambda folder: {name: Stat(1, time) for name, time in times.items()})
    assert RemoteClaim(f"{s3}/out")._newest() == "run-a"


@pytest.fixture
def publishing(s3: str) -> Iterator[Lease]:
    """The lease of a run that has uploaded a file, and is to replace an old one."""
    with Lease(f"{s3}/out") as held:
        storage_with(b"new", f"{held.folder}/out/run.json")
        storage_with(b"old", f"{s3}/out/run.json")
        yield held


def move(held: Lease, target: str) -> None:
    """Give the file its name on the condition that there is none, which does not hold."""
    assert isinstance(held.claim, RemoteClaim)
    held.claim._move(held.record, f"{held.folder}/out/run.json", target, None)


def test_a_file_that_vanishes_while_it_is_compared_is_published(
    s3: str, publishing: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, same = f"{s3}/out/run.json", conditional.same

    def vanishing(first: str, second: str) -> bool:
        storage.remove(second)
        return same(first, second)

    monkeypatch.setattr(conditional, "same", vanishing)
    move(publishing, target)
    assert storage.read_bytes(target) == b"new"


def test_a_move_that_is_repeated_does_not_replace_the_file_of_a_successor(
    s3: str, publishing: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The successor takes over, and publishes its file, right after each look of this run at the lease."""
    assert isinstance(publishing.claim, RemoteClaim)
    target, check = f"{s3}/out/run.json", publishing.claim._check

    def taken_over(record: claims.Record) -> None:
        check(record)
        storage_with(json.dumps(OTHER).encode(), f"{s3}/out/state/lease")
        storage_with(b"theirs", target)

    monkeypatch.setattr(publishing.claim, "_check", taken_over)
    with pytest.raises(Conflict):
        move(publishing, target)
    assert storage.read_bytes(target) == b"theirs"


def storage_with(data: bytes, target: str) -> str:
    storage.write_bytes(data, target)
    return target

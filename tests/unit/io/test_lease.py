from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import lease, storage
from ray_soup.io.lease import LEASE_FILE, Lease

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
    return f"{out}/{LEASE_FILE}"


def test_a_lease_sends_heartbeats_and_is_released(out: str) -> None:
    beats, thrice = [], threading.Event()

    def beat() -> None:
        beats.append(json.loads(storage.read_bytes(file_of(out))))
        if len(beats) == 3:
            thrice.set()

    with Lease(file_of(out), beat=beat) as held:
        assert thrice.wait(DEADLINE_S)
        held.check()
    assert [b["beat"] for b in beats[:3]] == [2, 3, 4]
    assert {(b["host"], b["pid"]) for b in beats} == {(socket.gethostname(), os.getpid())}
    assert not storage.exists(file_of(out))


def test_a_lease_with_a_heartbeat_is_refused(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        other = Lease(file_of(out))
    message = rf"Another run is using {out}: process {os.getpid()} on another-host\. Wait for it"
    with other, pytest.raises(RecipeError, match=message), Lease(file_of(out)):
        pass
    with Lease(file_of(out)):  # it has been released
        pass


def test_a_lease_without_a_heartbeat_is_taken_over(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 2)
    storage.write_bytes(json.dumps(OTHER).encode(), file_of(out))
    said: list[tuple[str, int, int]] = []
    with Lease(file_of(out), lambda *news: said.append(news)) as held:
        assert said == [("waiting for a heartbeat of the run on another-host", n, 2) for n in range(2)]
        held.check()
        assert json.loads(storage.read_bytes(file_of(out)))["run"] != "theirs"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"host": "h"}', b"null"])
def test_a_damaged_lease_is_taken_over_if_no_heartbeat_follows(
    out: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 1)
    storage.write_bytes(content, file_of(out))
    said: list[str] = []
    with Lease(file_of(out), lambda what, done, total: said.append(what)) as held:
        assert said == ["waiting for a heartbeat of the run on an unknown machine"]
        held.check()


def test_the_damaged_lease_of_an_active_run_is_repaired_and_a_second_run_refused(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-host")
        first = Lease(file_of(out))
    monkeypatch.setattr(lease, "BEAT_S", 0.5)
    with first:
        storage.write_bytes(b"{", file_of(out))
        with pytest.raises(RecipeError, match=r"Another run is using .* on another-host"), Lease(file_of(out)):
            pass
        first.check()


def test_what_is_no_file_is_no_lease(tmp_path: Path) -> None:
    """A FIFO would block the reader for ever."""
    (tmp_path / "state").mkdir()
    os.mkfifo(tmp_path / LEASE_FILE)
    with pytest.raises(SoupError, match=rf"{LEASE_FILE} cannot be read \(it is not a file\)\. Remove it"):
        Lease(file_of(str(tmp_path))).__enter__()


def test_a_run_of_this_machine_whose_process_has_ended_is_taken_over_at_once(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.psutil, "pid_exists", lambda pid: pid != 1)
    mine = {**OTHER, "host": socket.gethostname()}
    storage.write_bytes(json.dumps(mine).encode(), file_of(out))
    said: list[str] = []
    with Lease(file_of(out), lambda what, done, total: said.append(what)):
        assert said == []


def test_a_run_that_was_taken_over_notices_and_leaves_the_lease_alone(out: str) -> None:
    other = json.dumps(OTHER).encode()
    with Lease(file_of(out)) as held:
        held._stop.set()  # as if this process were suspended
        held._thread.join()
        storage.write_bytes(other, file_of(out))
        message = f"sent no heartbeat for 30 s, so process 1 on another-host took over {out}"
        with pytest.raises(SoupError, match=message):
            held.check()
    assert storage.read_bytes(file_of(out)) == other


def test_the_heartbeat_of_a_run_that_was_taken_over_ends(out: str) -> None:
    other = json.dumps(OTHER).encode()
    taken = threading.Event()

    def beat() -> None:
        if not taken.is_set():
            storage.write_bytes(other, file_of(out))  # right after this run's own heartbeat
            taken.set()

    with Lease(file_of(out), beat=beat) as held:
        assert taken.wait(DEADLINE_S)
        held._thread.join(DEADLINE_S)
        assert not held._thread.is_alive()
    assert storage.read_bytes(file_of(out)) == other


def test_failed_heartbeats_do_not_end_the_run(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, recovered = [], threading.Event()

    def fail(data: bytes, target: str) -> None:
        failures.append(target)
        if len(failures) < 3:
            raise SoupError("the storage is down")
        recovered.set()

    with Lease(file_of(out)) as held:
        monkeypatch.setattr(storage, "write_bytes", fail)
        assert recovered.wait(DEADLINE_S)
        held.check()

"""The address of a cluster, and the temporary folder of a local Ray."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ray_soup.actors import ray_session
from ray_soup.actors.ray_session import LONGEST_FOLDER, connect, parse_address, temporary_folder
from ray_soup.errors import RecipeError


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head.my-cluster.svc:1", ("head.my-cluster.svc", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("localhost:6379", ("localhost", 6379)),
    ],
)
def test_an_address_has_a_host_and_a_port(address: str, found: tuple[str, int]) -> None:
    assert parse_address(address) == found


MALFORMED = (
    "head", "head:", ":6379", "head:x", "head:0", "head:65536", "a b:1", "head:6379/x", "::1:6379", "é:1:2", "x" * 10_000,
    "10.0.0.1:-1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://10.0.0.1:8265", "is a URL, as of a dashboard; expected HOST:PORT"),
        ("https://me:pass@host", "is a URL"),
        ("ray://10.0.0.1:10001", "is the address of Ray Client; expected HOST:PORT.*ray job submit"),
        *((address, "is not valid; expected HOST:PORT") for address in MALFORMED),
    ],
)
def test_a_malformed_address_is_refused(address: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=said):
        parse_address(address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # other tests share this process, and its Ray
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RecipeError, match=said) as refused, connect():
        pass
    assert len(str(refused.value)) < 600


def test_a_dead_cluster_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # other tests share this process, and its Ray
    monkeypatch.setenv("RAY_ADDRESS", address)
    with (
        pytest.raises(RecipeError, match=f"RAY_ADDRESS={address}: no Ray cluster answers there .Connection refused"),
        connect(),
    ):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "no-such-host.invalid:6379")
    with pytest.raises(RecipeError, match="no Ray cluster answers there"), connect():
        pass


def test_a_server_that_is_not_ray_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(ray_session, "CONNECT_S", 0.1)
    never = threading.Event()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.init", lambda *_, **__: never.wait(60))
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(RecipeError, match="something answers there, but not a Ray cluster"), connect():
            pass
    never.set()


def test_a_slow_start_is_tried_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def slow(*_: object, **__: object) -> None:
        tries.append(1)
        raise Exception("The current node timed out during startup.\nMore")

    monkeypatch.setattr("ray.init", slow)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ray_session.SoupError, match="could not be started on this machine: The current node timed out"),
        connect(),
    ):
        pass
    assert len(tries) == 2


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("length", [150, 40_000])
def test_a_long_temporary_folder_is_replaced_or_refused(
    name: str, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    long = str(tmp_path / ("x" * length))
    monkeypatch.setenv(name, long)
    if name == "TMPDIR":
        found = temporary_folder()
        assert found is not None
        assert len(found) <= LONGEST_FOLDER
        return
    with pytest.raises(RecipeError, match=f"RAY_TMPDIR=.* with a path of at most {LONGEST_FOLDER} bytes") as refused:
        temporary_folder()
    assert len(str(refused.value)) < 500


def test_a_temporary_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/x")
    with pytest.raises(RecipeError, match="RAY_TMPDIR=/proc/x: the temporary folder of Ray must be one that can be written"):
        temporary_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert temporary_folder() is None

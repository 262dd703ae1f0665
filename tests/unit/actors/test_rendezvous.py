"""The rendezvous of a group: it serves processes that know the secret, on one address, until it is closed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import psutil
import pytest
from torch.distributed import TCPStore

from ray_soup.actors.rendezvous import Member, Rendezvous

HOST, SECRET, SOON = "127.0.0.1", b"of this run", timedelta(seconds=10)


@pytest.fixture
def place() -> Iterator[Rendezvous]:
    opened = Rendezvous(HOST, SECRET)
    yield opened
    opened.close()


def member(place: Rendezvous, secret: bytes = SECRET, deadline: timedelta = SOON) -> Member:
    return Member(HOST, place.port, secret, deadline)


def test_members_share_keys_and_wait_for_those_of_others(place: Rendezvous) -> None:
    first, second = member(place), member(place)
    every_byte = bytes(range(256))
    later = threading.Timer(0.2, second.set, ("b", every_byte))
    first.set("a", "text")
    later.start()
    first.wait(["a", "b"])
    assert (first.get("b"), second.get("a")) == (every_byte, b"text")
    assert (first.add("n", 2), second.add("n", 3), first.get("n")) == (2, 5, b"5")
    assert first.check(["a", "b", "n"])
    assert not first.clone().check(["a", "c"])
    with pytest.raises(TimeoutError, match="a member of the group did not arrive within 0 s"):
        member(place, deadline=timedelta(seconds=0.1)).get("c")


def test_processes_of_another_run_are_refused_and_disturb_nobody(place: Rendezvous) -> None:
    first = member(place)
    with pytest.raises(PermissionError, match=rf"the rendezvous at {HOST}:{place.port} belongs to another run"):
        member(place, b"of another run")
    with socket.create_connection((HOST, place.port)) as stranger:
        stranger.sendall(b'\x00\x00\x00\x0f["set","a","x"]')
        while stranger.recv(4096):  # the challenge, and then the end
            pass
    with pytest.raises(RuntimeError):
        TCPStore(HOST, place.port, 2, timeout=timedelta(seconds=0.5)).set("a", "x")
    with socket.create_connection((HOST, place.port)):  # says nothing, and stays
        assert not member(place).check(["a"])
        first.set("a", "text")
        assert member(place).get("a") == b"text"


def test_it_listens_on_its_own_address_and_not_after_it_is_closed(place: Rendezvous) -> None:
    first = member(place)
    mine = psutil.Process()
    connections = getattr(mine, "net_connections", None) or mine.connections  # the name before psutil 6
    listening = [c.laddr for c in connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert (HOST, place.port) in listening
    assert {address.ip for address in listening if address.port == place.port} == {HOST}
    place.close()
    with pytest.raises(ConnectionError, match="lost the rendezvous"):
        first.get("a")
    with pytest.raises(ConnectionError, match="does not answer"):
        member(place)

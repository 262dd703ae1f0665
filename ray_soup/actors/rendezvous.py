"""Where the members of a group meet: a store of keys on the first member, open to processes of the same run only.

`torch.distributed.TCPStore` would accept anyone who reaches its port, and list all its keys. Here, both sides prove that
they know the run's secret before anything else is read (`multiprocessing.connection`, a challenge with HMAC), messages are
JSON and never pickles, the socket is bound to one address, and it is closed as soon as everyone has joined.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch.distributed as dist

SECRET = secrets.token_bytes(32)
"""Known to the processes of one run only: a driver hands its own to its actors."""


def share_secret(secret: bytes) -> None:
    """Make this process part of the run that has this secret."""
    global SECRET  # noqa: PLW0603 - one run per process
    SECRET = secret


class Rendezvous:
    """A store of keys at the address `host`, for processes that know `secret`.

    `port` is where it listens.
    """

    def __init__(self, host: str, secret: bytes) -> None:
        self._secret = secret
        self._data: dict[str, str] = {}
        self._changed = threading.Condition()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listening = socket.create_server((host, 0), family=family)
        self.port = int(self._listening.getsockname()[1])
        self._links: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening and end all connections."""
        for link in (self._listening, *self._links):
            _end(link)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                link, _ = self._listening.accept()
                self._links.append(link)
                threading.Thread(target=self._serve, args=(link,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Answer one member; end the connection of a process that is none."""
        answers: dict[str, Callable[..., Any]] = {
            "set": self._set, "add": self._add, "get": self._get, "check": self._check,
        }  # fmt: skip
        with contextlib.suppress(OSError, EOFError, AuthenticationError), Connection(os.dup(peer.fileno())) as link:
            deliver_challenge(link, self._secret)
            answer_challenge(link, self._secret)
            while True:
                what, *arguments = json.loads(link.recv_bytes())
                link.send_bytes(json.dumps(answers[what](*arguments)).encode())
        _end(peer)

    def _set(self, key: str, value: str) -> None:
        with self._changed:
            self._data[key] = value
            self._changed.notify_all()

    def _add(self, key: str, amount: int) -> int:
        with self._changed:
            total = int(self._data.get(key, "0")) + amount
            self._data[key] = str(total)
            self._changed.notify_all()
        return total

    def _check(self, keys: list[str]) -> bool:
        return all(key in self._data for key in keys)

    def _get(self, keys: list[str], seconds: float) -> list[str] | None:
        """Return the values of keys as soon as all are set; None if that takes longer."""
        with self._changed:
            found = self._changed.wait_for(lambda: self._check(keys), seconds)
            return [self._data[key] for key in keys] if found else None


class Member(dist.Store):  # type: ignore[name-defined,misc]
    """A member's connection to the rendezvous at `host` and `port`, as the store that torch forms a group with.

    Raises OSError if the rendezvous does not answer or belongs to another run, TimeoutError if a member does not arrive.
    """

    def __init__(self, host: str, port: int, secret: bytes, deadline: timedelta) -> None:
        super().__init__()
        self._place, self._secret, self._deadline = (host, port), secret, deadline
        self._lock = threading.Lock()
        where = f"the rendezvous at {host}:{port}"
        try:
            with socket.create_connection(self._place, timeout=deadline.total_seconds()) as link:
                link.settimeout(None)
                self._link = Connection(os.dup(link.fileno()))
            answer_challenge(self._link, secret)
            deliver_challenge(self._link, secret)
        except AuthenticationError as error:
            raise PermissionError(f"{where} belongs to another run") from error
        except (OSError, EOFError) as error:
            raise ConnectionError(f"{where} does not answer: {str(error) or 'it closed the connection'}") from error

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            with self._lock:
                self._link.send_bytes(json.dumps([what, *arguments]).encode())
                return json.loads(self._link.recv_bytes())
        except (OSError, EOFError) as error:
            raise ConnectionError(f"lost the rendezvous at {self._place[0]}:{self._place[1]}") from error

    # What torch calls

    def set(self, key: str, value: str | bytes) -> None:
        """Set a key."""
        self._ask("set", key, value if isinstance(value, str) else value.decode("latin-1"))

    def get(self, key: str) -> bytes:
        """Return the value of a key, once it is set. Raises TimeoutError after the deadline."""
        return self._values([key], self._deadline)[0]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter and return it."""
        return int(self._ask("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are set."""
        return bool(self._ask("check", keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set. Raises TimeoutError after the timeout or the deadline."""
        self._values(keys, timeout or self._deadline)

    def clone(self) -> Member:
        """Connect again, for another thread."""
        return Member(*self._place, self._secret, self._deadline)

    def _values(self, keys: Sequence[str], most: timedelta) -> list[bytes]:
        began = time.monotonic()
        found = self._ask("get", list(keys), most.total_seconds())
        if found is None:
            raise TimeoutError(f"a member of the group did not arrive within {time.monotonic() - began:.0f} s")
        return [value.encode("latin-1") for value in found]


def _end(link: socket.socket) -> None:
    """Close a socket, and wake the thread that waits for it."""
    with contextlib.suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()

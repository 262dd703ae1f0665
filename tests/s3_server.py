"""An S3 server in a process of its own, which can be told to fail for a while. It runs as `python -m tests.s3_server`."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.ports import answers, free_port

FAULTS = ("500", "503", "stall", "cut", "half")
"""Answers 500 or 503, gives no answer, closes the connection without one, or in the middle of one."""
STALL_S = 30.0
"""Seconds for which a connection without an answer stays open at most."""


class S3Server:
    """Serves 127.0.0.1:`port` of this network namespace, and `address`:`port` of the namespace called `netns`, if given."""

    def __init__(self, folder: Path, netns: str = "", address: str = "") -> None:
        self.port = free_port()
        self.address = address
        self._faults = folder / "s3-faults.json"
        self._log = folder / "s3.log"
        command = [sys.executable, "-m", "tests.s3_server", str(self.port), str(self._faults), netns, address]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=Path(__file__).parent.parent)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        started = time.monotonic()
        while True:
            if answers(self.port):
                return
            if self._process.poll() is not None or time.monotonic() - started > 180:
                raise OSError(f"no S3 server: {self._log.read_text()}")
            time.sleep(0.1)

    @property
    def environment(self) -> dict[str, str]:
        """The environment that points s3:// here, for processes of this network namespace."""
        return self._environment("127.0.0.1")

    @property
    def environment_there(self) -> dict[str, str]:
        """The same for processes of the other one."""
        return self._environment(self.address)

    def _environment(self, address: str) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": f"http://{address}:{self.port}",
            "AWS_ACCESS_KEY_ID": "key-id-of-the-test",
            "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def bucket(self, name: str) -> str:
        """Create an empty bucket, and return its URI."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request, timeout=180).close()
        return f"s3://{name}"

    def fail(self, fault: str, seconds: float) -> None:
        """Let every request that begins within the next `seconds` fail; see FAULTS."""
        new = self._faults.with_suffix(".new")
        new.write_text(json.dumps({"fault": fault, "until": time.time() + seconds}))
        new.replace(self._faults)

    def close(self) -> None:
        """End the server."""
        self._process.kill()
        self._process.wait()


class _Failing:
    """A WSGI application that fails while the file says so, and is `app` otherwise."""

    def __init__(self, app: Callable[..., Iterable[bytes]], faults: Path) -> None:
        self._app, self._faults = app, faults

    def _fault(self) -> str:
        with suppress(OSError, ValueError):
            wanted = json.loads(self._faults.read_text())
            if time.time() < wanted["until"]:
                return str(wanted["fault"])
        return ""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        fault = self._fault()
        if not fault:
            return self._app(environ, start_response)
        connection: socket.socket = environ["werkzeug.socket"]
        if fault == "stall":
            time.sleep(STALL_S)
        if fault in ("stall", "cut"):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if fault == "half":
            return self._half(environ, start_response, connection)
        start_response(
            "503 Slow Down" if fault == "503" else "500 Internal Server Error", [("Content-Type", "application/xml")]
        )
        code = "SlowDown" if fault == "503" else "InternalError"
        return [f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as told</Message></Error>".encode()]

    def _half(
        self, environ: dict[str, Any], start_response: Callable[..., Any], connection: socket.socket
    ) -> Iterable[bytes]:
        """Do what is asked, and answer with the first half of the body; without a body, with nothing."""
        body = b"".join(self._app(environ, start_response))
        if len(body) > 1:
            yield body[: len(body) // 2]
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _listen(address: str, port: int) -> socket.socket:
    """Listen there; what is accepted later belongs to the network namespace of this moment."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(128)
    return listener


def _enter(path: str) -> None:
    """Enter a network namespace. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as file:
        if libc.setns(file.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)


def serve(port: int, faults: Path, netns: str, address: str) -> None:
    """Serve until the process is killed."""
    import threading

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None: ...

    listeners = []
    if netns:
        _enter(f"/run/netns/{netns}")
        listeners.append(_listen(address, port))
        _enter(f"/proc/{os.getppid()}/ns/net")
    listeners.append(_listen("127.0.0.1", port))
    app = _Failing(DomainDispatcherApplication(create_backend_app), faults)  # type: ignore[arg-type]
    servers = [
        make_server("127.0.0.1", port, app, threaded=True, request_handler=Quiet, fd=one.fileno()) for one in listeners
    ]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])

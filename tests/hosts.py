"""Two hosts: two network namespaces joined by a veth pair, with a Ray node in each.

They share this machine's disk, or no disk at all: then a host sees the disk of this machine as it was and cannot write to
it, and has /tmp, its home folder and its shared memory to itself. An S3 server in a process of its own serves both.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ray_soup.errors import SoupError
from ray_soup.io import storage
from ray_soup.io.cache import content_key
from ray_soup.mixing.coefficients import Coefficients, load_coefficients
from ray_soup.soups.state import load_state
from tests.conftest import ROOT, ray_soup, steps_saved
from tests.s3_server import S3Server

PORT = 6380  # in a new network namespace every port is free


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


PRIVATE = """
set -e
mount --make-rprivate /
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /mnt
mkdir /mnt/home
for kept in "$@"; do
    mkdir -p "/mnt${kept#/tmp}"
    mount --bind "$kept" "/mnt${kept#/tmp}"
    mount -o remount,bind,ro "/mnt${kept#/tmp}"
done
if [ -d "$NUMBA_CACHE_DIR" ]; then cp -r "$NUMBA_CACHE_DIR" /mnt/numba; fi
mount --move /mnt /tmp
mount -o remount,bind,ro /
"""
"""Makes the disk read-only and /tmp, which is the home folder too, private, apart from the code that lies below it."""


def code_below_tmp() -> list[str]:
    """Return the folders below /tmp that hold this interpreter, its packages and these tests, outermost ones only."""
    found = {os.path.realpath(path) for path in (ROOT, sys.prefix, sys.base_prefix, *sys.path) if path}
    below = sorted(path for path in found if path.startswith("/tmp/") and os.path.isdir(path))
    return [path for path in below if not any(path.startswith(f"{other}/") for other in below)]


@dataclass
class Hosts:
    """Host 0 is the head and runs the driver; host 1 is a worker node."""

    folder: Path
    """Belongs to the test: logs, and with a shared disk everything."""
    environment: dict[str, str]
    names: tuple[str, str] = field(default_factory=lambda: tuple(f"rs{secrets.token_hex(4)}{side}" for side in "ab"))
    addresses: tuple[str, str] = ("10.97.0.1", "10.97.0.2")
    cpus: tuple[int, int] = (1, 1)
    """CPUs of each host."""
    private: bool = False
    """Whether the hosts share no disk."""
    server: S3Server | None = None
    """What s3:// is, for hosts that share no disk; in this process `server.environment` points there."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    holders: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """A process on each host that keeps its namespaces."""

    def connect(self) -> None:
        """Create the hosts. Raises OSError without permission."""
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.names
        ip("link", "add", "veth", "netns", a, "type", "veth", "peer", "name", "veth", "netns", b)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth")
            for device in ("lo", "veth"):
                ip("-n", name, "link", "set", device, "up")
        for host in range(2):
            self._hold(host)
        if self.private:
            self.server = S3Server(self.folder, self.names[0], self.addresses[0])
            self.environment |= self.server.environment_there

    def _hold(self, host: int) -> None:
        """Start the process that keeps the namespaces of a host, which is called host0 or host1."""
        script = f"hostname host{host}\n{PRIVATE if self.private else ''}\necho ready\nexec sleep infinity"
        command = ["ip", "netns", "exec", self.names[host], "unshare", "--uts", "--mount", "sh", "-c", script, "sh"]
        holder = subprocess.Popen(
            [*command, *code_below_tmp()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.processes.append(holder)
        self.holders.append(holder)
        assert holder.stdout is not None
        said = holder.stdout.readline()
        if said != b"ready\n":
            raise OSError(f"host {host}: {said.decode()}{holder.stdout.read().decode()}".strip())

    def path(self, host: int, path: str | Path) -> Path:
        """Return the path at which this process finds a path of a host."""
        return Path(f"/proc/{self.holders[host].pid}/root{path}") if self.private else Path(path)

    def link(self, up: bool) -> None:
        """Join the hosts, or cut the link between them."""
        ip("-n", self.names[1], "link", "set", "veth", "up" if up else "down")

    def bytes_on_link(self) -> int:
        """Bytes in both directions since the link was created, with all headers."""
        files = [f"/sys/class/net/veth/statistics/{way}_bytes" for way in ("rx", "tx")]
        found = subprocess.run(["ip", "netns", "exec", self.names[0], "cat", *files], capture_output=True, check=True)
        return sum(map(int, found.stdout.split()))

    def start(self, host: int, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process on a host, in a new session."""
        own = {"RAY_SOUP_CACHE": str(self.folder / f"cache{host}")}
        if self.private:
            own = {
                "RAY_SOUP_CACHE": "/tmp/cache", "NUMBA_CACHE_DIR": "/tmp/numba", "HOME": "/tmp/home", "RAY_TMPDIR": "/tmp",
                "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1",
            }  # fmt: skip
        there = ["nsenter", f"--target={self.holders[host].pid}", "--net", "--uts", "--mount"]
        with open(self.folder / log, "ab") as file:
            process = subprocess.Popen(
                [*there, "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *command],
                env={**self.environment, **own, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_ray(self, host: int) -> None:
        """Start the node of a host, and wait until it is part of the cluster."""
        head = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == 0 else [f"--address={self.address}"]
        options = [
            f"--node-ip-address={self.addresses[host]}", f"--num-cpus={self.cpus[host]}", "--object-store-memory=80000000",
            f"--temp-dir={'/tmp' if self.private else self.folder}/{host}", "--disable-usage-stats", "--block",
        ]  # fmt: skip
        script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        log = self.folder / f"ray{host}.log"
        log.unlink(missing_ok=True)
        self.start(host, [sys.executable, "-c", script, "start", *head, *options], log.name)
        wait_for(lambda: "Ray runtime started" in log.read_text(), 180, lambda: f"no Ray on host {host}: {log.read_text()}")

    @property
    def address(self) -> str:
        return f"{self.addresses[0]}:{PORT}"

    def learn(
        self, recipe: dict[str, Any], out: Path | str, verb: str = "learn", **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start `ray-soup learn`, or another verb with a recipe and OUT, on the head."""
        file = Path("/tmp" if self.private else self.folder) / f"{_name(out)}.yaml"
        self.path(0, file).write_text(yaml.safe_dump(recipe))
        return self.command(ray_soup(verb, str(file), str(out)), out, **environment)

    def command(self, command: list[str], out: Path | str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command on the head, connected to the cluster; `log(out)` is what it says.

        Actors of an earlier command have ended by then.
        """
        wait_for(lambda: not any(self.actors()), 120, lambda: "actors of an earlier command are left")
        return self.start(0, command, f"{_name(out)}.log", RAY_ADDRESS=self.address, **environment)

    def actors(self) -> tuple[int, ...]:
        """Count the actors on each host."""
        pids = [set(map(int, ip("netns", "pids", name).split())) for name in self.names]
        found = [p.pid for p in psutil.process_iter(["cmdline"]) if "RemoteShard" in " ".join(p.info["cmdline"] or [])]
        return tuple(sum(pid in own for pid in found) for own in pids)

    def log(self, out: Path | str) -> str:
        """Return what the commands with this OUT have said."""
        return (self.folder / f"{_name(out)}.log").read_text()

    def learning(self, process: subprocess.Popen[bytes], out: Path | str) -> None:
        """Wait until the command has saved two epochs, in OUT or its mirror, and is still learning."""
        for _ in range(2):
            saved = self._steps(out)
            wait_for(
                lambda saved=saved: self._steps(out) > saved or process.poll() is not None, 300,
                lambda: f"not learning: {self.log(out)}",
            )  # fmt: skip
        assert process.poll() is None, self.log(out)

    def _steps(self, out: Path | str) -> int:
        """Return the steps in the state that was saved last."""
        if isinstance(out, Path):
            return steps_saved(self.path(0, out))
        mirrors = self.path(0, f"/tmp/cache/out/{content_key(out)}").glob("*/state/learn.pt")
        with contextlib.suppress(OSError, SoupError, ValueError):
            return load_state(max(mirrors, key=lambda file: file.stat().st_mtime_ns)).steps
        return 0

    def finish(self, process: subprocess.Popen[bytes], out: Path | str, timeout: float = 400) -> Coefficients:
        """Wait for the end of a command, which must succeed, and return the coefficients of its soup."""
        assert process.wait(timeout) == 0, self.log(out)
        if isinstance(out, Path):
            return load_coefficients(self.path(0, out / "coefficients.safetensors"))
        copy = self.folder / "coefficients.safetensors"
        copy.write_bytes(storage.read_bytes(f"{out}/coefficients.safetensors"))
        return load_coefficients(copy)

    def close(self) -> None:
        """Kill everything on the hosts, and remove them."""
        if self.server is not None:
            self.server.close()
        for process in reversed(self.processes):
            kill_group(process)
        for name in self.names:
            with contextlib.suppress(OSError):
                for pid in ip("netns", "pids", name).split():  # Ray workers lead other process groups
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)

    def kill(self, host: int) -> None:
        """Kill everything on a host, which stays."""
        for pid in map(int, ip("netns", "pids", self.names[host]).split()):
            if pid != self.holders[host].pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _name(out: Path | str) -> str:
    return str(out).rstrip("/").rpartition("/")[2]


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(what: Callable[[], Any], seconds: float, why: Callable[[], str]) -> None:
    start = time.monotonic()
    while not what():
        assert time.monotonic() - start < seconds, why()
        time.sleep(0.05)


@contextlib.contextmanager
def two_hosts(cpus: tuple[int, int] = (1, 1), *, private: bool = False, **more: str) -> Iterator[Hosts]:
    """Start two hosts with a Ray node each.

    Args:
        cpus: how many CPUs they have.
        private: whether they share no disk, but an S3 server.
        more: environment variables of all processes on them.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter", "hostname"))):
        pytest.skip("two hosts need root, iproute2, unshare, nsenter and hostname")
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # the path of a Ray socket may have 107 bytes
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }  # fmt: skip
    hosts = Hosts(folder, {**environment, **more}, cpus=cpus, private=private)
    try:
        try:
            hosts.connect()
        except OSError as error:
            pytest.skip(f"two hosts need network namespaces: {error}")
        hosts.start_ray(0)
        hosts.start_ray(1)
        yield hosts
    finally:
        hosts.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def storage_of(hosts: Hosts) -> Iterator[str]:
    """Create a bucket on the S3 server of `hosts`, and let this process find s3:// there; the value is its URI."""
    assert hosts.server is not None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.server.environment.items():
            patch.setenv(name, value)
        yield hosts.server.bucket(f"b{time.monotonic_ns()}")

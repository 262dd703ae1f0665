"""What `chaos` disturbs: a cluster of simulated nodes, and a command that is restarted until it is done."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.s3_server import S3Server

IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip
"""With these settings Ray gives up a node that it cannot reach after seconds."""
NODE: dict[str, Any] = {"object_store_memory": 80_000_000}


class Nodes:
    """A Ray cluster of a head without CPUs and of nodes that come and go, all on this machine.

    The environment of this process must say how its parts know each other (RAY_AUTH_TOKEN), before Ray is imported.
    """

    def __init__(self, count: int, cpus: int) -> None:
        from ray.cluster_utils import Cluster

        self._cpus = cpus
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **NODE})
        self.alive: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> None:
        """Add a node, and wait until the cluster has it."""
        self.alive.append(self.cluster.add_node(num_cpus=self._cpus, **NODE))

    def raylet(self, node: Any) -> psutil.Process:
        """Return the process on which all others of a node depend."""
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def actors(self) -> list[psutil.Process]:
        """Return the actors of all nodes that run, sorted by process id."""
        found = []
        for node in self.alive:
            with contextlib.suppress(psutil.Error):
                for child in self.raylet(node).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if "RemoteShard" in " ".join(child.cmdline()) and child.status() != psutil.STATUS_STOPPED:
                            found.append(child)
        return sorted(found, key=lambda process: process.pid)

    def drain(self, node: Any, seconds: float) -> None:
        """Announce that a node ends in `seconds`, as for a spot node."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        due_ms = int((time.time() + seconds) * 1000)
        GcsClient(address=self.address).drain_node(node.node_id, reason, "a spot node", due_ms)

    def remove(self, node: Any, number: signal.Signals) -> None:
        """End a node for good: with SIGKILL everything on it at once, with SIGTERM by its raylet. Once is enough."""
        if node not in self.alive:
            return
        self.alive.remove(node)
        with contextlib.suppress(psutil.Error):
            raylet = self.raylet(node)
            children = raylet.children(recursive=True)
            raylet.send_signal(number)
            if number == signal.SIGTERM:
                psutil.wait_procs([raylet], timeout=10)
            for process in (raylet, *children):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        """End everything."""
        for node in list(self.alive):
            self.remove(node, signal.SIGKILL)
        self.cluster.shutdown()


class Run:
    """A `ray-soup learn` command with OUT in remote storage, restarted whenever it ends before its soup is complete.

    Attributes:
        starts: how often the command was started.
        given_up: what it said when it ended by itself, with exit code 1.
    """

    def __init__(self, folder: Path, out: str, environment: dict[str, str]) -> None:
        from ray_soup.io.mirror import Mirror

        self.out, self.starts, self.given_up = out, 0, list[str]()
        self._mirrors = Mirror(out).folder.parent  # each start has one of its own
        self._log = folder / f"{out.rpartition('/')[2]}.log"
        self._command = [sys.executable, "-m", "ray_soup.cli", "learn", str(folder / "recipe.yaml"), out]
        self._environment = {**os.environ, **environment}
        self.start()

    def start(self) -> None:
        """Start the command."""
        self.starts += 1
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )

    def keep_going(self) -> bool:
        """Restart the command if it has ended; return False once it is done.

        Raises RuntimeError if it failed without an error message of ray-soup.
        """
        code = self.process.poll()
        if code == 0:
            return False
        if code is not None:
            said = self.log().strip().rpartition("\n")[2]
            if code == 1:
                self.given_up.append(said)
            if code not in (-signal.SIGKILL, 1, 143) or (code > 0 and not said.startswith("ray-soup: ")):
                raise RuntimeError(f"exit code {code}: {self.log()}")
            if "Unexpected error" in said:
                raise RuntimeError(said)
            self.start()
        return True

    def log(self) -> str:
        """Return what the command has printed since it was last started."""
        return self._log.read_text()

    def saved(self) -> int:
        """Return the steps in the last state that was saved on this machine; 0 before the first one."""
        from ray_soup.errors import SoupError
        from ray_soup.soups.state import load_state

        try:
            states = self._mirrors.glob("*/state/learn.pt")
            return load_state(max(states, key=lambda file: file.stat().st_mtime_ns)).steps
        except (OSError, SoupError, ValueError):
            return 0

    def end(self) -> None:
        """Kill the command."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def write_inputs(folder: Path, bucket: str, recipe: dict[str, Any]) -> None:
    """Write ingredients and data to a bucket, and the recipe, completed by them, to `folder`."""
    import yaml

    from ray_soup.io import storage
    from tests import tiny

    (folder / "inputs" / "zoo").mkdir(parents=True)
    tiny.write_data(folder / "inputs")
    tiny.write_zoo(folder / "inputs" / "zoo", 8)
    for file in (folder / "inputs").rglob("*.*"):
        storage.upload(file, f"{bucket}/{file.relative_to(folder / 'inputs')}")
    named = {
        "ingredients": f"{bucket}/zoo/*.safetensors",
        "model": tiny.SPEC,
        "data": {"fit": f"{bucket}/heldout.npz", "select": 0.25, "test": f"{bucket}/test.npz"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**named, **recipe}))


def storage_at(server: S3Server, name: str) -> str:
    """Create a bucket, let this process find s3:// there, and return its URI."""
    os.environ.update(server.environment)
    return server.bucket(name)

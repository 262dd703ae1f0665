"""A cluster of two hosts: two network namespaces joined by a veth pair, with a Ray node in each. They share only the disk.

Skipped without root or network namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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

import numpy as np
import psutil
import pytest
import yaml

from ray_soup.mixing.coefficients import Coefficients, load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import ROOT, ray_soup, steps_saved, values

pytestmark = pytest.mark.slow

PORT = 6380  # in a new network namespace every port is free


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass
class Hosts:
    """Host 0 is the head and runs the driver; host 1 is a worker node."""

    folder: Path
    environment: dict[str, str]
    names: tuple[str, str] = field(default_factory=lambda: tuple(f"rs{secrets.token_hex(4)}{side}" for side in "ab"))
    addresses: tuple[str, str] = ("10.97.0.1", "10.97.0.2")
    cpus: tuple[int, int] = (1, 1)
    """CPUs of each host."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        a, b = self.names
        ip("link", "add", "veth", "netns", a, "type", "veth", "peer", "name", "veth", "netns", b)
        for name, address in zip(self.names, self.addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth")
            for device in ("lo", "veth"):
                ip("-n", name, "link", "set", device, "up")

    def link(self, up: bool) -> None:
        ip("-n", self.names[1], "link", "set", "veth", "up" if up else "down")

    def bytes_on_link(self) -> int:
        """Bytes in both directions since the link was created, with all headers."""
        files = [f"/sys/class/net/veth/statistics/{way}_bytes" for way in ("rx", "tx")]
        found = subprocess.run(["ip", "netns", "exec", self.names[0], "cat", *files], capture_output=True, check=True)
        return sum(map(int, found.stdout.split()))

    def start(self, host: int, command: list[str], log: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a process on a host, in a new session. The hosts are called host0 and host1."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"host{host}", *command]
        cache = str(self.folder / f"cache{host}")
        with open(self.folder / log, "ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *named],
                cwd=ROOT,
                env={**self.environment, "RAY_SOUP_CACHE": cache, **environment},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_ray(self, host: int) -> None:
        head = ["--head", f"--port={PORT}", "--include-dashboard=false"] if host == 0 else [f"--address={self.address}"]
        options = [
            f"--node-ip-address={self.addresses[host]}", f"--num-cpus={self.cpus[host]}", "--object-store-memory=80000000",
            f"--temp-dir={self.folder / str(host)}", "--disable-usage-stats", "--block",
        ]  # fmt: skip
        script = "import sys; from ray.scripts.scripts import main; sys.exit(main())"
        self.start(host, [sys.executable, "-c", script, "start", *head, *options], f"ray{host}.log")
        log = self.folder / f"ray{host}.log"
        wait_for(lambda: "Ray runtime started" in log.read_text(), 60, lambda: f"no Ray on host {host}: {log.read_text()}")

    @property
    def address(self) -> str:
        return f"{self.addresses[0]}:{PORT}"

    def learn(self, recipe: dict[str, Any], out: Path, verb: str = "learn", **environment: str) -> subprocess.Popen[bytes]:
        """Start `ray-soup learn`, or another verb, on the head."""
        file = out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(recipe))
        return self.start(0, ray_soup(verb, str(file), str(out)), f"{out.name}.log", RAY_ADDRESS=self.address, **environment)

    def actors(self) -> tuple[int, ...]:
        """Count the actors on each host."""
        pids = [set(map(int, ip("netns", "pids", name).split())) for name in self.names]
        found = [p.pid for p in psutil.process_iter(["cmdline"]) if "RemoteShard" in " ".join(p.info["cmdline"] or [])]
        return tuple(sum(pid in own for pid in found) for own in pids)

    def log(self, out: Path) -> str:
        return (self.folder / f"{out.name}.log").read_text()

    def learning(self, process: subprocess.Popen[bytes], out: Path) -> None:
        """Wait until the command has saved two epochs and is still learning."""
        for _ in range(2):
            saved = steps_saved(out)
            wait_for(
                lambda saved=saved: steps_saved(out) > saved or process.poll() is not None, 60,
                lambda: f"not learning: {self.log(out)}",
            )  # fmt: skip
        assert process.poll() is None, self.log(out)

    def finish(self, process: subprocess.Popen[bytes], out: Path, timeout: float = 120) -> Coefficients:
        assert process.wait(timeout) == 0, self.log(out)
        return load_coefficients(out / "coefficients.safetensors")

    def close(self) -> None:
        for process in reversed(self.processes):
            kill_group(process)
        for name in self.names:
            with contextlib.suppress(OSError):
                for pid in ip("netns", "pids", name).split():  # Ray workers lead other process groups
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                ip("netns", "delete", name)


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
def two_hosts(cpus: tuple[int, int] = (1, 1), **more: str) -> Iterator[Hosts]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("two hosts need root, iproute2, unshare and hostname")
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))  # the path of a Ray socket may have 107 bytes
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    hosts = Hosts(folder, {**environment, **more}, cpus=cpus)
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


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts for tests that do not break them."""
    with two_hosts() as pair:
        yield pair


REPLICAS = {"learn": {"batch_size": 8, "epochs": 22}, "actors": {"replicas": 2, "shards": 1, "cpus": 1}}
# Ray gives up a node that it cannot reach after a minute; with these settings, after seconds.
IMPATIENT = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3",
}  # fmt: skip


@pytest.fixture(scope="module")
def on_one_host(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> np.ndarray:
    """Coefficients of the recipe REPLICAS on a local Ray."""
    return local(values(zoo, **REPLICAS), tmp_path_factory.mktemp("local") / "out")


def local(recipe: dict[str, Any], out: Path) -> np.ndarray:
    run(make_recipe(recipe), out)
    return load_coefficients(out / "coefficients.safetensors").values


def test_replicas_across_hosts_are_bit_identical_to_one_host_and_send_little(
    hosts: Hosts, zoo: Path, tmp_path: Path, on_one_host: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start-up costs the same in a run of 22 epochs and in one of 2, so the difference is the traffic of the steps.

    The long run comes first, with empty caches, so that caching can only raise the figure. Includes Ray's own heartbeats.
    """
    sent, steps, records = {}, {}, {}
    for epochs in (22, 2):
        out = tmp_path / f"{epochs}"
        before = hosts.bytes_on_link()
        recipe = values(zoo, **{**REPLICAS, "learn": {"batch_size": 8, "epochs": epochs}})
        found = hosts.finish(hosts.learn(recipe, out), out)
        sent[epochs] = hosts.bytes_on_link() - before
        records[epochs] = json.loads((out / "run.json").read_text())
        steps[epochs] = records[epochs]["steps"]
        if epochs == 22:
            np.testing.assert_array_equal(found.values, on_one_host)
    count, blocks = found.values.shape
    before = hosts.bytes_on_link()
    time.sleep(3)  # the duration of the measurement
    idle = (hosts.bytes_on_link() - before) / 3
    per_step = (sent[22] - sent[2]) / (steps[22] - steps[2])  # one of the two actors is on the other host
    allowed = 16 * count * blocks + 4096
    with capsys.disabled():
        print(
            f"\nlink, bytes per actor and step: {per_step:,.0f}; allowed 16 x {count} x {blocks} + 4,096 = {allowed:,}; "
            f"run.json counts {records[22]['wire_bytes_per_step']:,}. Runs of {steps[22]} and {steps[2]} steps: "
            f"{sent[22]:,} and {sent[2]:,}; idle: {idle:,.0f} per second."
        )
    assert 12 * count * blocks < per_step <= allowed


def test_shards_across_hosts_agree_with_one_host(hosts: Hosts, zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe = values(zoo, learn__epochs=3, actors={"replicas": 1, "shards": 2, "cpus": 1})
    found = hosts.finish(hosts.learn(recipe, tmp_path / "two"), tmp_path / "two").values
    expected = local(recipe, tmp_path / "one")
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.abs(found - 1 / 8).max() > 0.01


def test_the_files_of_a_model_are_written_from_both_hosts(hosts: Hosts, zoo: Path, tmp_path: Path, cluster: None) -> None:
    """By actors that build no model if there is no data, otherwise by those that learned; with the bits of one process."""
    of_learning = values(zoo, learn__epochs=1, actors={"replicas": 2, "shards": 1, "cpus": 1}, shard_size=2_000)
    for verb, recipe in (("uniform", {**of_learning, "method": "uniform", "data": {}}), ("learn", of_learning)):
        out, alone = tmp_path / verb, tmp_path / f"{verb}-alone"
        hosts.finish(hosts.learn(recipe, out, verb), out)
        run(make_recipe(recipe), alone)
        found, expected = (sorted(folder.glob("model-0*")) for folder in (out, alone))
        assert len(found) > 2
        assert [file.read_bytes() for file in found] == [file.read_bytes() for file in expected]
        digests = [json.loads((folder / "run.json").read_text())["ingredients"] for folder in (out, alone)]
        assert digests[0] == digests[1]
    code = f"""
from ray_soup.actors.on_ray import BakingPool
from ray_soup.actors.ray_session import connect
from ray_soup.io.progress import no_progress
from ray_soup.recipe import load_recipe
from ray_soup.soups.session import open_inputs

recipe = load_recipe({str(tmp_path / "uniform.yaml")!r})
with connect():
    for _ in range(5):  # while Ray's view of a node is old, it may place an actor elsewhere
        pool = BakingPool(recipe, open_inputs(recipe).ingredients)
        pool.setup(no_progress)
        found = sorted(pool._nodes.values())
        pool.close()
        if len(set(found)) == 2:
            break
    print("bakers on", *found)
"""
    process = hosts.start(0, [sys.executable, "-c", code], "bakers.log", RAY_ADDRESS=hosts.address)
    log = hosts.folder / "bakers.log"
    assert process.wait(120) == 0, log.read_text()
    assert "bakers on host0 host1" in log.read_text()


def test_a_link_cut_for_ten_seconds_changes_no_bit(hosts: Hosts, zoo: Path, tmp_path: Path, on_one_host: np.ndarray) -> None:
    out = tmp_path / "out"
    process = hosts.learn(values(zoo, **REPLICAS), out)
    hosts.learning(process, out)
    hosts.link(up=False)
    try:
        time.sleep(10)  # the duration of the cut
        assert process.poll() is None, hosts.log(out)
    finally:
        hosts.link(up=True)
    np.testing.assert_array_equal(hosts.finish(process, out).values, on_one_host)


def test_after_a_permanent_cut_with_room_left_no_bit_changes(zoo: Path, tmp_path: Path, on_one_host: np.ndarray) -> None:
    """The lost actor is re-created on the host of the other one."""
    out = tmp_path / "out"
    with two_hosts(cpus=(2, 1), **IMPATIENT) as hosts:
        process = hosts.learn(values(zoo, **REPLICAS), out)
        hosts.learning(process, out)
        assert hosts.actors() == (1, 1)
        hosts.link(up=False)
        np.testing.assert_array_equal(hosts.finish(process, out).values, on_one_host)


def test_after_a_permanent_cut_without_room_the_run_stops_and_can_be_resumed(
    zoo: Path, tmp_path: Path, on_one_host: np.ndarray
) -> None:
    """On one actor instead of two: the same optimization up to rounding, not bit-identical."""
    out = tmp_path / "out"
    with two_hosts(**IMPATIENT) as hosts:
        process = hosts.learn(values(zoo, **REPLICAS), out, RAY_SOUP_DEADLINE_S="15")
        hosts.learning(process, out)
        hosts.link(up=False)
        assert process.wait(90) == 1, hosts.log(out)
        assert re.search(r"actor [01] on host1 .*Rerun the same command to resume", hosts.log(out)), hosts.log(out)
        found = hosts.finish(hosts.learn(values(zoo, **REPLICAS), out), out)
    off = np.linalg.norm(found.values - on_one_host) / np.linalg.norm(on_one_host)
    assert off <= 1e-3
    assert json.loads((out / "run.json").read_text())["mesh"]["replicas"] == 1

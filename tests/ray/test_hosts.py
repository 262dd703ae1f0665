"""A cluster of two hosts, with a shared disk and without one. Skipped without root or network namespaces."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.benchmarks.chaos_parts import IMPATIENT
from tests.conftest import ROOT, put, values
from tests.hosts import Hosts, storage_of, two_hosts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts for tests that do not break them."""
    with two_hosts() as pair:
        yield pair


@pytest.fixture(scope="module")
def apart(zoo: Path) -> Iterator[Hosts]:
    """Two hosts that share no disk. They give up a node that they cannot reach after seconds."""
    with two_hosts(private=True, **IMPATIENT) as pair:
        yield pair


REPLICAS = {"learn": {"batch_size": 8, "epochs": 22}, "actors": {"replicas": 2, "shards": 1, "cpus": 1}}


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

    The long run comes first, with empty caches, so that caching can only raise the figure. Ray's own
    heartbeats, which come every second, are left out.
    """
    sent, took, steps, records = {}, {}, {}, {}
    for epochs in (22, 2):
        out = tmp_path / f"{epochs}"
        before, begun = hosts.bytes_on_link(), time.monotonic()
        recipe = values(zoo, **{**REPLICAS, "learn": {"batch_size": 8, "epochs": epochs}})
        found = hosts.finish(hosts.learn(recipe, out), out)
        sent[epochs], took[epochs] = hosts.bytes_on_link() - before, time.monotonic() - begun
        records[epochs] = json.loads((out / "run.json").read_text())
        steps[epochs] = records[epochs]["steps"]
        if epochs == 22:
            np.testing.assert_array_equal(found.values, on_one_host)
    count, blocks = found.values.shape
    before = hosts.bytes_on_link()
    time.sleep(3)  # the duration of the measurement
    idle = (hosts.bytes_on_link() - before) / 3
    heartbeats = idle * (took[22] - took[2])
    per_step = (sent[22] - sent[2] - heartbeats) / (steps[22] - steps[2])  # one of the two actors is on the other host
    allowed = 16 * count * blocks + 4096
    with capsys.disabled():
        print(
            f"\nlink, bytes per actor and step: {per_step:,.0f}; allowed 16 x {count} x {blocks} + 4,096 = {allowed:,}; "
            f"run.json counts {records[22]['wire_bytes_per_step']:,}. Runs of {steps[22]} and {steps[2]} steps: "
            f"{sent[22]:,} and {sent[2]:,}; idle: {idle:,.0f} per second."
        )
    assert 12 * count * blocks < per_step <= allowed


def test_shards_across_hosts_agree_with_one_host(hosts: Hosts, zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe = values(zoo, learn__epochs=3, actors={"replicas": 1, "shards": 2, "cpus": 1, "wait_s": 120})
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
from ray_soup.soups.inputs import open_inputs

recipe = load_recipe({str(hosts.folder / "uniform.yaml")!r})
with connect():
    for _ in range(5):  # while Ray's view of a node is old, it may place an actor elsewhere
        pool = BakingPool(recipe, open_inputs(recipe).ingredients)
        pool.setup(no_progress)
        found = sorted(info.node for team in pool._teams for info in team.infos)
        pool.close()
        if len(set(found)) == 2:
            break
    print("bakers on", *found)
"""
    process = hosts.start(0, [sys.executable, "-c", code], "bakers.log", RAY_ADDRESS=hosts.address)
    log = hosts.folder / "bakers.log"
    assert process.wait(400) == 0, log.read_text()
    assert "bakers on host0 host1" in log.read_text()


@pytest.mark.parametrize("deadline_s", [600, 12])
def test_a_link_cut_for_eighteen_seconds_changes_no_bit(
    hosts: Hosts, zoo: Path, tmp_path: Path, on_one_host: np.ndarray, deadline_s: int
) -> None:
    """The run waits until the host answers again, or continues without it."""
    out = tmp_path / f"{deadline_s}"
    recipe = values(zoo, **REPLICAS, actors__wait_s=240)  # an actor may take longer to start than the shorter deadline
    process = hosts.learn(recipe, out, RAY_SOUP_DEADLINE_S=str(deadline_s))
    hosts.learning(process, out)
    hosts.link(up=False)
    try:
        time.sleep(18)  # the duration of the cut
        assert process.poll() in (None, 0), hosts.log(out)
    finally:
        hosts.link(up=True)
    np.testing.assert_array_equal(hosts.finish(process, out).values, on_one_host)
    assert ("Lost actor" in hosts.log(out)) == (deadline_s < 18), hosts.log(out)


def test_hosts_without_a_shared_disk_see_nothing_of_each_other(apart: Hosts, zoo: Path) -> None:
    """Nothing that a test has written either, and neither can write to the disk of this machine."""
    for host in range(2):
        seen = apart.start(host, ["sh", "-c", f"hostname > /tmp/name; ls {zoo}; touch {ROOT}/new"], f"seen{host}.log")
        seen.wait(120)
        said = (apart.folder / f"seen{host}.log").read_text()
        assert "No such file or directory" in said
        assert "Read-only file system" in said
    assert [apart.path(host, "/tmp/name").read_text() for host in range(2)] == ["host0\n", "host1\n"]


def test_without_a_shared_disk_no_bit_changes(apart: Hosts, zoo: Path, on_one_host: np.ndarray) -> None:
    with storage_of(apart) as bucket:
        put(zoo, f"{bucket}/zoo")
        out = f"{bucket}/out"
        process = apart.learn(there(bucket), out)
        np.testing.assert_array_equal(apart.finish(process, out).values, on_one_host)


def test_a_host_that_is_cut_off_for_good_changes_no_bit(apart: Hosts, zoo: Path, on_one_host: np.ndarray) -> None:
    """The run continues with the actor that is left, without a restart, although the cluster has no room for another."""
    with storage_of(apart) as bucket:
        put(zoo, f"{bucket}/zoo")
        out = f"{bucket}/cut"
        process = apart.learn(there(bucket, actors__wait_s=240), out, RAY_SOUP_DEADLINE_S="20")  # as above
        apart.learning(process, out)
        apart.link(up=False)
        try:
            np.testing.assert_array_equal(apart.finish(process, out).values, on_one_host)
        finally:
            apart.kill(1)
            apart.link(up=True)
            apart.start_ray(1)
    assert "Lost actor" in apart.log(out)


def there(bucket: str, **changes: Any) -> dict[str, Any]:
    """Return the recipe REPLICAS with the zoo in a bucket."""
    return {
        **values(Path("/nowhere"), **REPLICAS, **changes),
        "ingredients": f"{bucket}/zoo/zoo/*.safetensors",
        "data": {"fit": f"{bucket}/zoo/heldout.npz", "select": 0.25, "test": f"{bucket}/zoo/test.npz"},
    }

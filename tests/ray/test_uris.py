"""Every command that makes something, on two hosts that share no disk: ingredients, data and OUT are in a bucket."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import pytest
import yaml

from ray_soup.io import storage
from ray_soup.io.hashing import sha256_file
from ray_soup.io.progress import drain
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.finished import verify
from ray_soup.tune.records import Hyperparameters, ManifestEntry
from ray_soup.tune.resume import resume
from ray_soup.tune.train import train
from tests.conftest import put, values
from tests.hosts import Hosts, kill_group, storage_of, two_hosts, wait_for

DRIVER = """
import sys
import time

from ray_soup.actors import placement
from ray_soup.actors.ray_session import connect
from ray_soup.io.mirror import Mirror
from ray_soup.recipe import load_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import bake_copy
from ray_soup.soups.run import run
from ray_soup.tune.finetune import finetune
from ray_soup.tune.search import search

(bucket, *steps), taken = sys.argv[1:], Mirror.take_baked


def counted(self, staging):
    print("uploaded by actors:", len(self.baked), flush=True)
    return taken(self, staging)


Mirror.take_baked = counted
placement.SETTLE_S = 60.0  # the actors of the step before have ended, so that both hosts take part from the beginning
recipe = {name: load_recipe(f"/tmp/{name}.yaml") for name in ("zoo", "soup")}
with connect():
    for step in steps:
        began = time.monotonic()
        if step == "made":
            finetune(recipe["zoo"], f"{bucket}/made")
        if step == "learned":
            run(recipe["soup"], f"{bucket}/learned")
        if step == "baked":
            bake_copy(f"{bucket}/learned", f"{bucket}/baked")
        if step == "compared":
            compare(recipe["soup"], f"{bucket}/compared")
        if step == "searched":
            search(recipe["soup"], f"{bucket}/searched")
        print(f"{step}: {time.monotonic() - began:.1f} s", flush=True)
"""
"""The functions behind the commands, in one process: each command would start a driver of its own."""


def drive(hosts: Hosts, bucket: str, *steps: str, cache: str) -> subprocess.Popen[bytes]:
    """Start a driver on the head, which has nothing of what an earlier one had."""
    return hosts.command([sys.executable, "-c", DRIVER, bucket, *steps], "driver", RAY_SOUP_CACHE=f"/tmp/{cache}")


def drive_and_kill(hosts: Hosts, bucket: str, *steps: str, cache: str, found: str) -> None:
    """Start a driver, and kill it with SIGKILL once the bucket has a file whose path matches `found`."""
    driver = drive(hosts, bucket, *steps, cache=cache)
    wait_for(
        lambda: any(fnmatch(name, found) for name in storage.walk(bucket)) or driver.poll() is not None, 1000,
        lambda: hosts.log("driver"),
    )  # fmt: skip
    assert driver.poll() is None, hosts.log("driver")
    kill_group(driver)


def trained_alone(recipe: Recipe, entry: ManifestEntry, file: Path) -> str:
    """Train a checkpoint of a zoo in this process; the value is its SHA-256."""
    names = Hyperparameters.__annotations__
    hyper = cast(Hyperparameters, {name: value for name, value in entry.items() if name in names})
    return drain(train(recipe, hyper, recipe.finetune.init, str(file)))["sha256"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_hosts_that_share_no_disk_make_everything_in_a_bucket(zoo: Path, tmp_path: Path, one_thread: None) -> None:
    """Also after a driver was killed whose disk is lost: a zoo and a search resume from the bucket, bit for bit."""
    with two_hosts(private=True) as hosts, storage_of(hosts) as bucket:
        put(zoo, f"{bucket}/data")
        data = {"fit": f"{bucket}/data/heldout.npz", "train": f"{bucket}/data/train.npz"}
        tuned = {"trials": 3, "epochs": 12, "init": f"{bucket}/data/zoo/model_0.safetensors"}
        of_zoo = values(zoo, data=data, finetune=tuned)
        of_soup = values(
            zoo, ingredients=f"{bucket}/made", data={"fit": data["fit"], "select": 0.25}, shard_size=2_000,
            learn={"batch_size": 8, "epochs": 2}, actors={"replicas": 2, "shards": 1, "cpus": 1},
            search={"learn.lr": {"grid": [1e-9]}, "scheduler": "none"},
        )  # fmt: skip
        for name, recipe in (("zoo", of_zoo), ("soup", of_soup)):
            hosts.path(0, f"/tmp/{name}.yaml").write_text(yaml.safe_dump(recipe))
        drive_and_kill(hosts, bucket, "made", cache="a", found="made/state/*trials/*.state")
        steps = ("made", "learned", "baked", "compared", "searched")
        drive_and_kill(hosts, bucket, *steps, cache="b", found="searched/state/*trials/*.pt")
        driver = drive(hosts, bucket, "searched", cache="c")
        assert driver.wait(1000) == 0, hosts.log("driver")

        entries = resume(f"{bucket}/made").entries
        digests = [sha256_file(f"{bucket}/made/{entry['file']}") for entry in entries]
        assert digests == [entry["sha256"] for entry in entries]
        assert digests[0] == trained_alone(make_recipe(of_zoo), entries[0], tmp_path / "alone.safetensors")
        for out in steps[1:]:
            assert "bit-identical" in "".join(verify(f"{bucket}/{out}")), out
        files = {out: json.loads(storage.read_bytes(f"{bucket}/{out}/run.json"))["files"] for out in steps[1:]}
        rows = storage.read_bytes(f"{bucket}/compared/results.jsonl").decode()
        assert '"model_name": "trained"' in rows
        shards = [name for name in files["learned"] if name.startswith("model-")]
        assert len(shards) > 2
        for out in ("baked", "searched"):  # the best trial is the recipe itself
            assert [files[out][name] for name in shards] == [files["learned"][name] for name in shards]
        uploads = [line for line in hosts.log("driver").splitlines() if line.startswith("uploaded")]
        assert uploads == [f"uploaded by actors: {len(shards)}"] * 4
        assert not [
            name for name in storage.walk(bucket) if re.search(r"/state/([^/]+/)?(actors|trials|tune|out|evaluated)/", name)
        ]

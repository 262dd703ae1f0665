"""Folders that ray_soup 0.1 wrote are still read: a finished soup, and a run that was killed.

ray_soup 0.1.0 wrote the files in version_0_1/; `@ROOT@` stands for the folder they were in. The report was omitted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_soup.soups.records import finished_record, read_results
from ray_soup.soups.state import load_state
from tests import tiny
from tests.system.command import call

FIXTURE = Path(__file__).with_name("version_0_1")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Put the folders of version 0.1 in place: with this folder's paths, and the file times that they remember."""
    root = tmp_path / "old"
    shutil.copytree(FIXTURE, root)
    tiny.write_data(root)
    for file in root.rglob("*"):
        if file.suffix in (".json", ".yaml", ".jsonl", ".md"):
            file.write_text(file.read_text().replace("@ROOT@", str(root)))
    record = json.loads((root / "finished" / "run.json").read_text())
    record["files"] = {name: digest(root / "finished" / name) for name in record["files"]}
    (root / "finished" / "run.json").write_text(json.dumps(record))
    for ingredient in json.loads((root / "finished" / "state" / "begun.json").read_text())["ingredients"]:
        for path, _, time_ns in ingredient:
            os.utime(path, ns=(time_ns, time_ns))
    return root


THEN = (
    "blocks=tensor", "learn.lr=0.01", "learn.cosine_lr=true", "learn.average=false", "learn.whiten=0.0", "learn.screen=false"
)  # fmt: skip
"""What were the defaults."""


def run(*arguments: str) -> Any:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_finished_soup_is_read_verified_and_baked(old: Path) -> None:
    record = finished_record(old / "finished")
    assert "version" not in record
    assert read_results(old / "finished")[0]["model_name"] == record["method"] == "mehl+"
    assert len(run("verify", str(old / "finished"))["verified"]) == 5
    run("bake", str(old / "finished"), str(old / "again"))
    assert digest(old / "again" / "model.safetensors") == digest(old / "finished" / "model.safetensors")


def test_the_command_of_a_finished_soup_finds_it_complete(old: Path) -> None:
    before = digest(old / "finished" / "run.json")
    found = run("learn", str(old / "recipe.yaml"), str(old / "finished"), "learn.epochs=1", *THEN)
    assert found["run"]["method"] == "mehl+"
    assert digest(old / "finished" / "run.json") == before


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_state(old: Path, cluster: None) -> None:
    state = load_state(old / "interrupted" / "state" / "learn.pt")
    raw = torch.load(old / "interrupted" / "state" / "learn.pt", weights_only=True)
    assert "version" not in raw
    assert state.steps == raw["steps"] > 0
    refused = call("learn", str(old / "recipe.yaml"), str(old / "interrupted"))
    assert refused.exit_code == 2
    assert "it has the defaults of version 0.1, which have changed" in refused.output
    for key in THEN:
        assert key in " ".join(refused.output.split())
    found = run("learn", str(old / "recipe.yaml"), str(old / "interrupted"), *THEN)
    curve = found["run"]["curve"]
    assert curve[: len(state.curve)] == state.curve
    assert len(curve) > len(state.curve)
    assert len(run("verify", str(old / "interrupted"))["verified"]) == 5

"""The demo, as a user starts it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, ray_soup


def call(*arguments: str) -> dict:
    done = subprocess.run(ray_soup(*arguments, "--json"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    shown = call("demo", str(out))
    assert [row["model_name"] for row in shown["results"]] == ["best_single", "uniform", "mehl", "mehl+"]
    assert all(Path(path).exists() for path in shown["files"].values())
    assert len(list((out / "zoo").glob("*.safetensors"))) == 12
    soups = {row["model_name"]: row for row in shown["results"]}
    for method in ("mehl", "mehl+"):
        assert json.loads((out / method / "run.json").read_text())["mesh"]["shards"] == 2
        assert soups[method]["select_nll"] <= soups["uniform"]["select_nll"] * 1.005  # learning starts at the uniform soup
    call("verify", str(out / "mehl+"))
    wide = call("learn", str(out / "recipe.yaml"), str(tmp_path / "wide"), "directions.dtype=float32")["results"][0]
    assert abs(wide["select_nll"] / soups["mehl+"]["select_nll"] - 1) <= 0.005
    assert call("demo", str(out))["results"] == shown["results"]

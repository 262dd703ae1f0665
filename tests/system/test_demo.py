"""The demo, as a user runs it, with half of its data and a recipe in its folder that fine-tunes fewer models."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from ray_soup.tune import demo
from tests.conftest import ROOT, ray_soup
from tests.system.command import call as here


def call(*arguments: str) -> dict:
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_runs_end_to_end(tmp_path: Path, cluster: None) -> None:
    out = tmp_path / "demo"
    demo._recipe_in(str(out))
    demo.write_digits(out / "data")
    for file in (out / "data").iterdir():
        arrays = np.load(file)
        np.savez(file, **{name: array[: len(array) // 2] for name, array in arrays.items()})
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    recipe["finetune"] |= {"trials": 6, "epochs": {"randint": [3, 6]}, "trunk": {"epochs": 8}}
    recipe["precision"] = "float32"  # auto measures which is faster, each command for itself
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(ray_soup("demo", str(out), "--json"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    table = {row["model_name"]: row for row in shown["run"]["table"]}
    assert set(table) >= {
        "mean single",
        "best_single",
        "ensemble",
        "uniform",
        "greedy",
        "learned",
        "learned+",
        "mehl",
        "mehl+",
    }
    assert len(list((out / "zoo").glob("*.safetensors"))) == 6
    assert shown["run"]["mesh"]["shards"] == 2
    for method in ("learned", "learned+", "mehl", "mehl+"):  # learning starts at the uniform soup
        assert table[method]["select_nll"] <= table["uniform"]["select_nll"] * 1.005
    greedy = next(note for note in shown["run"]["notes"] if note.startswith("Greedy"))
    assert float(greedy.split("evaluated its candidates on ")[1].split("%")[0]) <= 60, greedy
    assert (out / "soups" / "report.html").stat().st_size > 100_000
    call("verify", str(out / "soups"))
    plus = call("learn", str(out / "recipe.yaml"), str(tmp_path / "plus"))["results"][0]
    assert plus["select_nll"] == table["mehl+"]["select_nll"]
    wide = call("learn", str(out / "recipe.yaml"), str(tmp_path / "wide"), "directions.dtype=float32")["results"][0]
    assert abs(wide["select_nll"] / plus["select_nll"] - 1) <= 0.005
    assert call("demo", str(out))["run"] == shown["run"]

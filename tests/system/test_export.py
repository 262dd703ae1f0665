"""Results taken out of a finished soup: as text, to trackers, and to the Hugging Face Hub."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file

from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests.conftest import ROOT, ray_soup, values
from tests.hub_server import TOKEN, Hub

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A uniform soup without data, which needs no actors."""
    folder = tmp_path_factory.mktemp("export") / "out"
    run(make_recipe(values(zoo, method="uniform", data={})), folder)
    return folder


def export(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ray_soup("export", str(out), *options), cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def test_a_soup_is_pushed_to_the_hub_without_paths_of_this_machine(out: Path, tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub")
    with hub.serving():
        environment = hub.environment(tmp_path, HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
        refused = export(out, "--push", "someone/soup", **{**environment, "HF_TOKEN": "hf_" + "x" * 34})
        assert refused.returncode == 2
        assert "refused to write to someone/soup (HTTP status 401). Set HF_TOKEN" in refused.stderr
        assert export(out, "--push", "soup", **environment).returncode == 2
        done = export(out, "--push", "someone/soup", "--private", "--json", **environment)
        assert done.returncode == 0, done.stderr
        again = export(out, "--push", "someone/soup", **environment)
        assert again.returncode == 0, again.stderr
        repo = hub.root / "models" / "someone/soup"
        commit = (repo / "refs" / "main").read_text()
        assert json.loads(done.stdout)["push"] == f"http://127.0.0.1:{hub.port}/someone/soup/commit/{commit}"
        assert (repo / "visibility").read_text() == "private"
        names = HfApi(endpoint=f"http://127.0.0.1:{hub.port}").list_repo_files("someone/soup")
        assert {*names} == {
            "model.safetensors", "coefficients.safetensors", "coefficients.parquet", "results.jsonl", "README.md"
        }  # fmt: skip
        for name in names:
            pushed = (repo / "commits" / commit / name).read_bytes()
            assert pushed == (out / name).read_bytes()
            assert str(out.parent).encode() not in pushed
        assert (
            load_file(repo / "commits" / commit / "model.safetensors").keys() == load_file(out / "model.safetensors").keys()
        )
        (repo / "commits" / commit / "model-00001-of-00002.safetensors").write_bytes(b"of an earlier soup")
        assert export(out, "--push", "someone/soup", **environment).returncode == 0
        now = (repo / "refs" / "main").read_text()
        assert {f.name for f in (repo / "commits" / now).iterdir()} == {*names}
        (out / "README.md").write_text("changed")
        changed = export(out, "--push", "someone/soup", **environment)
        assert changed.returncode == 2
        assert "README.md was changed" in changed.stderr


def test_trackers_receive_the_figures_the_recipe_and_the_files(soup: Path, tmp_path: Path) -> None:
    environment = {
        "WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path), "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
    }  # fmt: skip
    for _ in range(2):  # the second time, the run is updated
        done = export(soup, "--wandb", "--mlflow", "--csv", "--to", str(tmp_path / "x.csv"), **environment)
        assert done.returncode == 0, done.stderr
    (rows,) = ([*csv.DictReader((tmp_path / "x.csv").open())],)
    results: list[dict[str, Any]] = [json.loads(line) for line in (soup / "results.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == [row["name"] for row in results] == ["mehl+", "best_single"]
    assert float(rows[0]["test_nll"]) == results[0]["test_nll"]
    (metric,) = (tmp_path / "mlruns").glob("*/*/metrics/test_nll")
    assert float(metric.read_text().split()[1]) == results[0]["test_nll"]
    assert (metric.parents[1] / "params" / "learn.lr").read_text() == "0.05"
    assert (metric.parents[1] / "artifacts" / "results.jsonl").read_bytes() == (soup / "results.jsonl").read_bytes()
    curve = (metric.parents[1] / "metrics" / "curve" / "select_nll").read_text().splitlines()
    assert len(curve) == len(json.loads((soup / "run.json").read_text())["curve"])
    assert len({file.name for file in (tmp_path / "wandb").rglob("run-*.wandb")}) == 1

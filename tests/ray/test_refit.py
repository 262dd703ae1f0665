"""Runs on Ray with learn.refit, learn.average, learn.whiten and start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_soup.actors.messages import Mesh
from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.records import read_results
from ray_soup.soups.run import run
from tests.conftest import values
from tests.ray.test_learn import learned

KEYS = {"learn__refit": True, "learn__average": True, "learn__whiten": 1.0}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_comparison_marks_and_chooses_by_figures_before_the_refit(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        values(zoo, learn={"batch_size": 150, "epochs": 2, "model_batch": 8, "refit": True, "average": True, "whiten": 1.0})
    )
    soup = compare(recipe, tmp_path / "out", CompareOptions(trained=False))
    rows = {row["model_name"]: row for row in soup.record["table"]}
    refitted = {name for name, row in rows.items() if row.get("refit_steps")}
    assert {"mehl", "mehl+"} <= refitted <= {"mehl", "mehl+", "learned", "learned+"}
    best = min(
        (name for name in rows if name not in ("mean single", "ensemble", "best_single")),
        key=lambda n: rows[n]["select_nll"],
    )
    assert soup.record["chosen"] == best
    assert soup.record["improvement"]["select_nll"] == pytest.approx(
        rows[best]["select_nll"] - rows["best_single"]["select_nll"]
    )
    assert sum("steps of the refit learned on fit and select" in note for note in soup.notes) == len(refitted)
    for name in ("report.html", "README.md"):
        text = (soup.out / name).read_text()
        assert "†‡" in text
        assert "‡ before the refit" in text
    assert len(verify(soup.out)) == 5
    bake_copy(soup.out, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (soup.out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_begins_where_a_finished_soup_ended(zoo: Path, soup: Path, tmp_path: Path) -> None:
    """Up to the compression of the directions: figures of the finished soup are those of its file."""
    before = read_results(soup)[0]
    found = run(make_recipe(values(zoo, start=str(soup), learn__epochs=1)), tmp_path / "out")
    about = found.record["start"]
    assert (about["out"], about["ingredients"]) == (str(soup), 8)
    assert about["select_nll"] == pytest.approx(before["select_nll"], rel=1e-2)
    assert found.record["curve"][0]["select_nll"] == pytest.approx(
        min(about["select_nll"], about["uniform_select_nll"]), rel=1e-6
    )
    assert about["used"] == (about["select_nll"] <= about["uniform_select_nll"])
    assert any("learning began from" in note for note in found.notes)
    assert len(verify(found.out)) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_meshes_agree(zoo: Path, tmp_path: Path) -> None:
    found = {}
    for mesh in (Mesh(1, 1), Mesh(1, 2)):
        file = tmp_path / f"{mesh.shards}.pt"
        found[mesh.shards], state = learned(zoo, file, mesh, learn__epochs=2, learn__model_batch=8, **KEYS)
        assert state.before is not None
    assert np.linalg.norm(found[1] - found[2]) <= 1e-4 * np.linalg.norm(found[2])
    assert np.abs(found[1] - 1 / 8).max() > 0.01

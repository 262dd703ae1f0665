"""W&B (offline) and MLflow (files) follow a run that is interrupted and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups import live
from ray_soup.soups.run import run
from tests.conftest import values

pytestmark = pytest.mark.slow


def test_a_learned_soup_that_was_interrupted_is_one_run_of_each_tracker(
    zoo: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "CLOSE_STOPPED_S", 120.0)  # both have been opened and closed before the run is resumed
    monkeypatch.setattr(live, "CLOSE_S", 240.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    recipe = make_recipe(values(zoo, learn__epochs=4, loggers=["wandb", "mlflow"]))

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", interrupt)
    soup = run(recipe, tmp_path / "out")
    curve, row = soup.record["curve"], soup.rows[0]  # type: ignore[typeddict-item]
    (status,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    assert "status: 3\n" in status.read_text()  # finished
    found = [line.split() for line in (status.parent / "metrics" / "curve" / "select_nll").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in found] == [(one["select_nll"], one["steps"]) for one in curve]
    assert float((status.parent / "metrics" / "test_nll").read_text().split()[1]) == row["test_nll"]
    assert (status.parent / "artifacts" / "report.html").read_bytes() == (tmp_path / "out" / "report.html").read_bytes()
    assert (status.parent / "params" / "learn.epochs").read_text() == "4"
    files = list((tmp_path / "out" / "wandb").rglob("run-*.wandb"))
    assert (len(files), len({file.name for file in files})) == (2, 1)  # two parts of one run

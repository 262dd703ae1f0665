"""A search over the learning rate of a soup of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.records import finished_record
from ray_soup.tune.search import search
from tests.adapters import CONFIGS, values, write_adapters, write_texts

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def test_a_search_over_adapters_writes_the_best_trial(tmp_path: Path) -> None:
    write_adapters(tmp_path, CONFIGS[:3])
    write_texts(tmp_path)
    recipe = make_recipe(values(
        tmp_path, method="mehl+", learn={"epochs": 1, "batch_size": 8}, search={"learn.lr": {"grid": [0.1]}}, baseline="none"
    ))  # fmt: skip
    soup = search(recipe, tmp_path / "out")
    trials = finished_record(tmp_path / "out")["search"]["trials"]
    assert [trial["learn.lr"] for trial in trials] == ["auto", 0.1]
    assert not any(trial.get("error") for trial in trials)
    best = min(trials, key=lambda trial: trial["select_nll"])
    assert soup.record["search"]["best"] == best["trial"]
    assert soup.rows[0]["select_nll"] == pytest.approx(best["select_nll"], rel=1e-5)
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()

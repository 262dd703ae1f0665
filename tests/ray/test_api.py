"""The commands as functions."""

from __future__ import annotations

from pathlib import Path

import pytest

import ray_soup
from tests.conftest import ROOT, values


@pytest.mark.usefixtures("cluster")
def test_the_commands_are_functions(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    monkeypatch.syspath_prepend(str(ROOT))
    keys = {**values(zoo), "ingredients": "zoo/*.safetensors", "data": {"fit": "heldout.npz"}}
    uniform = ray_soup.uniform(keys, tmp_path / "uniform", **{"data.test": "test.npz"})
    assert uniform.rows[0]["model_name"] == "uniform"
    assert "test_nll" in uniform.rows[0]
    learned = ray_soup.learn(ray_soup.Recipe(**values(zoo)), str(tmp_path / "mehl"), "mehl", learn={"epochs": 1})
    assert learned.record["steps"] == 8
    again = ray_soup.bake(learned.out, tmp_path / "again")
    assert (again.out / "model.safetensors").read_bytes() == (learned.out / "model.safetensors").read_bytes()
    with pytest.raises(ray_soup.SoupError, match="unknown key"):
        ray_soup.greedy(keys, tmp_path / "greedy", lear={"epochs": 1})

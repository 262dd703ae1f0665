"""The commands as functions."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import ray
import yaml

import ray_soup
from tests.conftest import ROOT, values


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
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


EXAMPLES = (
    "load_recipe", "inspect", "uniform", "verify", "load_results", "load_coefficients", "load_model", "bake", "evaluate",
    "learn",
)  # fmt: skip
"""Functions whose docstrings have examples, in the order in which these build on each other."""


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_examples_in_docstrings_run(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with four checkpoints, data and a recipe; in the Ray that is running, as after the user's `ray.init`."""
    (tmp_path / "zoo").mkdir()
    for name in (*(f"zoo/model_{k}.safetensors" for k in range(4)), "heldout.npz", "test.npz"):
        (tmp_path / name).symlink_to(zoo / name)
    recipe = values(zoo, ingredients="zoo/*.safetensors", data={"fit": "heldout.npz", "test": "test.npz"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    before = ray.get_runtime_context().get_job_id()
    for name in EXAMPLES:
        (example,) = doctest.DocTestFinder(recurse=False).find(getattr(ray_soup, name), name, globs={"ray_soup": ray_soup})
        result = doctest.DocTestRunner().run(example)
        assert (result.attempted > 0, result.failed) == (True, 0), name
    assert ray.is_initialized()
    assert ray.get_runtime_context().get_job_id() == before

"""A run with weights in bfloat16, on actors that share a model, compared with the library's own figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.run import run
from tests.ray.test_language_models import by_library, values
from tests.unit.actors.test_bfloat16 import near, of_library

__all__ = ["near"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_polished_soup_of_two_shards_has_the_figures_of_the_library(near: Path, tmp_path: Path) -> None:
    learn = {"micro_batch": 1, "batch_size": 8, "epochs": 1, "screen": False}
    changes = {"precision": "auto", "learn": learn, "baseline": "none"}
    recipe = values(near, **changes, polish={"epochs": 1, "lr": 1e-3}, actors={"replicas": 1, "shards": 2, "cpus": 1})
    low = make_recipe({**recipe, "model": recipe["model"] + "&dtype=bfloat16"})
    out = run(low, tmp_path / "out").out
    verify(out)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["dtype"], record["precision"], record["mesh"]["shards"]) == ("bfloat16", "weights in bfloat16", 2)
    assert "written model files, in bfloat16." in (tmp_path / "out" / "README.md").read_text()
    losses, counts = np.array([*by_library(of_library(out), near, "test").values()]).sum(axis=0)
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])
    assert row["test_nll"] == pytest.approx(losses / counts, rel=1e-5)
    with pytest.raises(RecipeError, match=r"model was transformers:.*&dtype=bfloat16 and is now transformers:"):
        run(make_recipe(recipe), tmp_path / "out")

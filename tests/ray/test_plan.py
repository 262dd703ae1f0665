"""The plan of a run compared with what the run reports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import actor_bytes
from ray_soup.errors import RecipeError
from ray_soup.io.cache import cache_folder
from ray_soup.mixing import directions
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.model_batch import fitting_model_batch
from ray_soup.soups.plan import lines, plan
from ray_soup.soups.run import run
from tests.conftest import values


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_plan_agrees_with_the_run(zoo: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "learn": {"batch_size": 100, "epochs": 1, "model_batch": 3, "models_epochs": 2},
        "directions": {"dtype": "bfloat16"},
        "actors": {"replicas": 1, "shards": 2, "cpus": 1},
    }
    recipe = make_recipe(values(zoo, **changes))
    run(recipe, tmp_path / "first")  # compiles its loops, which takes memory
    found = plan(recipe)
    assert found["store_is_there"], _stores(recipe)
    assert found["seconds"]["store"] == 0
    record = run(recipe, tmp_path / "out").record
    for key in ("steps", "image_passes", "model_batch", "parameters"):
        assert found[key] == record[key], key
    assert {k: v for k, v in found["mesh"].items() if k != "gpus"} == record["mesh"]
    assert found["examples"] == record["examples"]
    assert found["memory_bytes_per_actor"] == pytest.approx(record["peak_memory_bytes"], rel=0.1)
    text = dict(lines(found))
    assert text["steps"].startswith(f"{record['steps']}, ")
    assert f"{record['mesh']['shards']} shards" in text["actors"]


def _stores(recipe: Recipe) -> str:
    """Describe the stores in this process's cache, the one that was expected, and the room on the disk."""
    inputs, folder = open_inputs(recipe), cache_folder() / "directions"
    key = directions._key(inputs.ingredients, inputs.layout, recipe.directions.dtype)
    there = {f"{entry.name}/{file.name}": file.stat().st_size for entry in folder.iterdir() for file in entry.glob("*")}
    return f"{key} of {[i.identity_here() for i in inputs.ingredients]} in {folder}: {there}, {shutil.disk_usage(folder)}"


def test_auto_divides_the_ingredients_into_equal_parts_if_memory_is_short(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    recipe = make_recipe(values(zoo, directions={"dtype": "float32"}))
    parameters, mesh = 100_000_000, Mesh(2, 1)
    for room, expected in ((72, 72), (71, 36), (36, 36), (35, 24), (1, 1), (0.1, 1)):
        memory = 2 * actor_bytes(recipe, parameters, 1, 1) + 2 * 4 * parameters * (room - 1)
        monkeypatch.setattr(ray, "cluster_resources", lambda memory=memory: {"memory": memory, "CPU": 2.0})
        assert fitting_model_batch(recipe, parameters, 72, mesh) == expected, room


def test_a_method_that_learns_nothing_has_no_plan(zoo: Path) -> None:
    with pytest.raises(RecipeError, match="uniform learns nothing"):
        plan(make_recipe(values(zoo, method="uniform")))

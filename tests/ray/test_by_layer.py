"""Runs with one layer of the model in memory at a time, compared with runs that hold it whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from ray_soup.recipe import load_recipe, make_recipe
from ray_soup.soups.finished import evaluate, verify
from ray_soup.soups.run import run
from tests.conftest import values
from tests.learning import whole_and_stopped
from tests.unit.actors.test_by_layer import deep  # noqa: F401 - a fixture

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def recipe_of(folder: Path, by_layer: bool, **changes: Any) -> dict[str, Any]:
    actors = {"replicas": 2, "shards": 1, "cpus": 1, "by_layer": by_layer}
    return values(folder, model="tests.unit.actors.test_by_layer:build", learn__lr=0.05, actors=actors, **changes)


def test_a_soup_learned_by_layer_is_the_same_up_to_rounding(deep: Path, tmp_path: Path) -> None:  # noqa: F811
    changes = {"learn__model_batch": 3, "learn__micro_batch": 32}
    whole, layered = (
        run(make_recipe(recipe_of(deep, by_layer, **changes)), tmp_path / str(by_layer)) for by_layer in (False, True)
    )
    assert layered.record["steps"] == whole.record["steps"]
    assert layered.record["curve"][0] == pytest.approx(whole.record["curve"][0], rel=1e-5)
    assert layered.rows[0]["select_nll"] == pytest.approx(whole.rows[0]["select_nll"], rel=1e-3)
    assert layered.rows[1] == whole.rows[1]  # the best single ingredient
    assert load_recipe(layered.out / "recipe.yaml").actors.by_layer
    assert len(verify(layered.out)) > 4
    file = str(layered.out / "model.safetensors")
    figures = [evaluate(make_recipe(recipe_of(deep, by_layer)), file, "test") for by_layer in (False, True)]
    assert figures[0] == figures[1]
    assert figures[0]["test_nll"] == layered.rows[0]["test_nll"]


def test_a_run_by_layer_goes_on_with_the_same_bits(deep: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = make_recipe(recipe_of(deep, True))
    whole, again = whole_and_stopped(recipe, tmp_path)
    files = [load_file(soup.out / "coefficients.safetensors") for soup in (whole, again)]
    assert files[0].keys() == files[1].keys()
    assert all((files[0][name] == files[1][name]).all() for name in files[0])
    assert np.abs(files[0]["coefficients"].numpy() - 0.2).max() > 1e-3


def test_a_greedy_soup_is_the_same_bit_for_bit(deep: Path, tmp_path: Path) -> None:  # noqa: F811
    soups = [
        run(make_recipe(recipe_of(deep, by_layer, method="greedy")), tmp_path / str(by_layer)) for by_layer in (False, True)
    ]
    models = [(soup.out / "model.safetensors").read_bytes() for soup in soups]
    assert models[0] == models[1]
    assert soups[0].record["greedy"] == soups[1].record["greedy"]

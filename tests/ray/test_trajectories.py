"""One run at a constant learning rate, from its folder to a soup: compared, stopped, resumed, verified and baked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from ray_soup.cli import main
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import Recipe, dump_recipe, for_method, make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run
from tests import tiny
from tests.conftest import values
from tests.trajectories import write_run

COUNT = 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Recipe:
    folder = tmp_path_factory.mktemp("trajectory")
    tiny.write_data(folder)
    write_run(folder / "run", COUNT)
    learn = {"batch_size": 150, "epochs": 2, "lr": 0.1}
    return make_recipe(values(folder, ingredients=f"{folder}/run?per_trial=all", learn=learn))


@pytest.fixture(scope="module")
def compared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Soup:
    return compare(recipe, tmp_path_factory.mktemp("compared") / "out", CompareOptions(drop_top=(1,), trained=False))


def test_a_comparison_of_one_run_has_rows_and_paired_tests_for_schedules_and_the_last_step(compared: Soup) -> None:
    table = {row["model_name"]: row for row in compared.record["table"]}
    new = ["last", "schedule:uniform", "schedule:cosine", "schedule:minus_sqrt", "ema"]
    at = list(table).index("last")
    assert list(table)[at : at + len(new)] == new  # equidistant steps: a linear decay is schedule:uniform
    assert list(table)[at - 1] == "mehl+"
    individual = {row["model_name"]: row for row in compared.rows[:COUNT]}
    assert table["last"]["test_nll"] == pytest.approx(individual["checkpoint-90"]["test_nll"], rel=1e-6)
    for name in new[1:]:
        chosen = compared.record["schedules"][name]
        assert chosen["steps"] == [65, 70, 75, 80, 85, 90][-chosen["window"] :]
        best = min(line["select_nll"] for line in chosen["tried"])
        assert table[name]["select_nll"] == pytest.approx(best, rel=1e-6)  # of the written model
        assert table[name]["ingredients_used"] == chosen["window"]
    tested = {test["model_name"] for test in compared.record["tests"] if test["against"] == "best_single"}
    assert set(new) <= tested
    assert not {row["model_name"] for row in compared.record["eliminations"]} & set(new)
    assert compared.record["chosen"] not in ("last", "best_single")
    assert (compared.out / "schedule-cosine.coefficients.safetensors").exists()
    assert len(verify(compared.out)) == 5


def test_the_command_makes_the_soup_of_the_table_and_says_which_steps_it_mixed(
    recipe: Recipe, compared: Soup, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    arguments = ["schedule", f"{tmp_path}/recipe.yaml", f"{tmp_path}/out", "--method", "schedule:minus_sqrt"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    chosen = compared.record["schedules"]["schedule:minus_sqrt"]
    steps = chosen["steps"]
    assert f"mixed the last {chosen['window']} of 6 steps, {steps[0]} to 90; the window is the best of 5 on" in done.output
    assert "6 steps of" in done.output
    assert "learning rate" in done.output
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["schedule"] == chosen
    assert record["trajectory"]["steps"] == [65, 70, 75, 80, 85, 90]
    ours = load_coefficients(tmp_path / "out" / "coefficients.safetensors")
    of_table = load_coefficients(compared.out / "schedule-minus_sqrt.coefficients.safetensors")
    np.testing.assert_array_equal(ours.values, of_table.values)
    assert record["trajectory"]["weights"] == ours.values[:, 0].tolist()
    assert len(verify(tmp_path / "out")) == 5
    again = bake_copy(tmp_path / "out", tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", again.out))
    assert all((first[name] == second[name]).all() for name in first)


def test_a_search_for_a_window_that_is_stopped_ends_with_the_same_soup(
    recipe: Recipe, compared: Soup, tmp_path: Path
) -> None:
    class Stopping:
        def __call__(self, what: str, done: int, total: int) -> None:
            if what == "trying schedule:cosine" and done == 2:
                raise KeyboardInterrupt

    one = for_method(recipe, "schedule:cosine")
    with pytest.raises(KeyboardInterrupt):
        run(one, tmp_path / "out", Stopping())
    assert json.loads((tmp_path / "out" / "run.json").read_text())["exit"] == 130
    resumed = run(one, tmp_path / "out")
    chosen: dict[str, Any] = compared.record["schedules"]["schedule:cosine"]
    assert resumed.record["schedule"] == chosen  # type: ignore[typeddict-item]
    of_table = load_coefficients(compared.out / "schedule-cosine.coefficients.safetensors")
    np.testing.assert_array_equal(load_coefficients(resumed.out / "coefficients.safetensors").values, of_table.values)


def test_learning_refuses_a_schedule_and_names_the_command(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(for_method(recipe, "ema")))
    done = CliRunner().invoke(main, ["learn", f"{tmp_path}/recipe.yaml", f"{tmp_path}/out"])
    assert done.exit_code == 2
    assert "the recipe has ema. Run `ray-soup schedule`, or choose a method with --method." in done.output

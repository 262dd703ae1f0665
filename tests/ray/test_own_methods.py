"""Methods of the user's and foreign rows, through the commands: run, comparison, verify and bake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from ray_soup.cli import main
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.run import run
from tests.conftest import values

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
OWN = "tests.own_methods"
COUNT = 3


def small(zoo: Path, folder: Path, method: str, **changes: object) -> dict[str, object]:
    """A recipe for three ingredients of the zoo, copied into `folder`."""
    (folder / "zoo").mkdir(exist_ok=True)
    for k in range(COUNT):
        shutil.copy(zoo / "zoo" / f"model_{k}.safetensors", folder / "zoo")
    paths = {"ingredients": f"{folder}/zoo/*.safetensors", "learn": {"batch_size": 448, "epochs": 1}}
    return values(zoo, **{"method": f"{OWN}:{method}", **paths, **changes})


def test_a_method_that_returns_a_model_is_verified_and_rebuilt_by_calling_it_again(zoo: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", small(zoo, tmp_path, "median")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["learn", str(tmp_path / "r.yaml"), str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads((out / "run.json").read_text())
    assert record["own_method"]["returned"] == "model"
    assert not (out / "coefficients.safetensors").exists()
    zoo_states = [load_file(file) for file in sorted((tmp_path / "zoo").iterdir())]
    expected = torch.stack([state["head.weight"] for state in zoo_states]).median(dim=0).values
    assert torch.equal(load_file(out / "model.safetensors")["head.weight"], expected)
    assert verify(out)[-1] == f"19 tensors are bit-identical to those that {OWN}:median returns for these ingredients"
    bake_copy(out, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert len(verify(tmp_path / "again")) == 3
    evaluated = CliRunner().invoke(main, ["evaluate", str(tmp_path / "r.yaml"), str(out), "--json"])
    row = json.loads((out / "results.jsonl").read_text().splitlines()[0])
    assert json.loads(evaluated.stdout)["test_nll"] == row["test_nll"]
    state = zoo_states[1] | {"head.bias": zoo_states[1]["head.bias"] + 1}
    save_file(state, tmp_path / "zoo" / "model_1.safetensors")
    with pytest.raises(IngredientError, match="The ingredient model_1 is not the one that the model was made of"):
        verify(out)


def test_a_function_that_draws_other_numbers_or_needs_data_is_found_out(zoo: Path, tmp_path: Path) -> None:
    noisy = run(make_recipe({**small(zoo, tmp_path, "noise"), "data": {}}), tmp_path / "noisy")
    with pytest.raises(SoupError, match=r"differs from the one that tests\.own_methods:noise returns now"):
        verify(noisy.out)
    chooses = run(make_recipe(small(zoo, tmp_path, "better_of_two")), tmp_path / "chooses")
    said = f"{OWN}:better_of_two was not called again, because it evaluates models: "
    said += "model.safetensors has the digest in run.json"
    assert verify(chooses.out)[-1] == said
    copy = bake_copy(chooses.out, tmp_path / "copy")
    assert said in copy.notes[-1]
    assert verify(tmp_path / "copy")[-1] == said


def test_own_methods_and_foreign_models_are_rows_of_a_comparison(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(load_file(zoo / "zoo" / "model_1.safetensors"), tmp_path / "copy.safetensors")
    rows = {"copy": str(tmp_path / "copy.safetensors"), "best": str(zoo / "zoo" / "model_2.safetensors")}
    recipe = make_recipe(small(zoo, tmp_path, "median", compare={"rows": rows}))
    options = CompareOptions(seeds=2, trained=False)

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ray_soup.soups.compare.foreign_results", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe, tmp_path / "out", options)
    soup = compare(recipe, tmp_path / "out", options)
    table = {row["model_name"]: row for row in soup.record["table"]}
    assert list(table)[-2:] == ["copy", "best"]
    assert f"{OWN}:median" in table
    of = {row["model_name"]: row for row in soup.rows}
    for name, ingredient in (("copy", "model_1"), ("best", "model_2")):
        assert of[name]["test_nll"] == pytest.approx(of[ingredient]["test_nll"], rel=1e-6)
        assert table[name]["select_nll_sd"] > 0
    alone = run(recipe, tmp_path / "alone")
    assert of[f"{OWN}:median"]["test_nll"] == pytest.approx(alone.rows[0]["test_nll"], rel=1e-6)
    tested = {test["model_name"] for test in soup.record["tests"] if test["against"] == "best_single"}
    assert {f"{OWN}:median", *rows} <= tested
    assert soup.record["chosen"] not in (*rows, f"{OWN}:median")
    assert len(verify(soup.out)) == 5
    save_file(load_file(zoo / "zoo" / "model_0.safetensors"), tmp_path / "copy.safetensors")
    with pytest.raises(RecipeError, match=r"was started with files under compare\.rows that have changed"):
        compare(recipe, tmp_path / "out", options)


def test_coefficients_of_a_method_are_those_of_the_comparison_and_pass_verification(zoo: Path, tmp_path: Path) -> None:
    soup = run(make_recipe(small(zoo, tmp_path, "descent", blocks="tensor")), tmp_path / "out")
    assert len(verify(soup.out)) == 5
    assert soup.record["own_method"]["returned"] == "coefficients"
    assert soup.rows[0]["steps"] == 1
    assert np.isfinite(soup.rows[0]["test_nll"])
    again = bake_copy(soup.out, tmp_path / "again")
    assert (again.out / "model.safetensors").read_bytes() == (soup.out / "model.safetensors").read_bytes()

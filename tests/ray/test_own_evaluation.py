"""The recipe's function `evaluate` in whole runs: each row has the figures of its own model; nothing is computed twice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result

from ray_soup.actors.on_ray import RayPool
from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.run import run
from tests.conftest import values
from tests.unit.soups.test_own_evaluation import Module
from tests.unit.soups.test_own_evaluation import module as module

ON_TEST = """
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file
from tests.tiny import build

def evaluate(folder):
    # an evaluation loop as users have it
    with open({calls!r}, "a") as file:
        file.write(folder + "\\n")
    {deed}
    model, data = build(), np.load({test!r})
    model.load_state_dict(load_file(Path(folder, "model.safetensors")))
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(data["images"]))
    labels = torch.from_numpy(data["labels"])
    right, loss = (logits.argmax(1) == labels).float(), torch.nn.functional.cross_entropy(logits, labels)
    return {{"accuracy": right.mean().item(), "own loss": loss.item()}}
"""
pytestmark = pytest.mark.usefixtures("cluster")


def tiny_recipe(zoo: Path, module: Module, **changes: object) -> Recipe:
    learn = {"batch_size": 150, "epochs": 2, "model_batch": 4}
    return make_recipe(values(zoo, learn=learn, evaluate=module.spec, ingredients=f"{zoo}/zoo/model_[0-3].*", **changes))


@pytest.fixture
def calls(module: Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that lists the calls; the module is found although the current folder is another one."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "calls"


def write(module: Module, zoo: Path, calls: Path, deed: str = "pass") -> None:
    module(ON_TEST.format(calls=str(calls), test=str(zoo / "test.npz"), deed=deed))


def called(calls: Path) -> int:
    return len(calls.read_text().splitlines())


@pytest.mark.slow
def test_every_row_of_a_comparison_has_the_figures_of_its_own_model(
    zoo: Path, tmp_path: Path, module: Module, calls: Path
) -> None:
    """Those of the actors, on the same file. An interrupted comparison calls the function for the other rows only."""
    recipe = tiny_recipe(zoo, module)
    interrupted = f"if len(open({str(calls)!r}).readlines()) == 4: raise KeyboardInterrupt"
    write(module, zoo, calls, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "out", CompareOptions(seeds=2))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["exit"] == 130
    soup = compare(recipe, tmp_path / "out", CompareOptions(seeds=2))
    assert called(calls) == 13 + 1  # 3 methods without a seed, 4 and `trained` with 2 seeds; the fourth call twice
    assert {Path(line).name for line in calls.read_text().splitlines()} == {"evaluated"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["state", "tensorboard"]

    soups = [row for row in soup.rows if "seed" in row]
    assert len(soups) == 13
    for row in soups:
        assert row["evaluate_accuracy"] == pytest.approx(row["test_accuracy"], abs=1e-7), row
        assert row["evaluate_own loss"] == pytest.approx(row["test_nll"], rel=1e-5), row
    table = {row["model_name"]: row for row in soup.record["table"]}
    assert {name for name, row in table.items() if "evaluate_accuracy" not in row} == {"mean single", "ensemble"}
    of_seeds = [row["evaluate_own loss"] for row in soups if row["model_name"] == "mehl"]
    assert table["mehl"]["evaluate_own loss"] == pytest.approx(np.mean(of_seeds))
    assert table["mehl"]["evaluate_own loss_sd"] == pytest.approx(np.std(of_seeds, ddof=1))
    assert verify(soup.out)


@pytest.mark.slow
def test_a_soup_is_not_lost_if_the_function_fails(
    zoo: Path, tmp_path: Path, module: Module, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is mended, the same command finishes without learning; the best single ingredient has values too."""
    recipe = tiny_recipe(zoo, module, method="mehl+")
    write(module, zoo, calls, "1 / 0")
    with pytest.raises(
        RecipeError, match=rf"evaluate: {module.spec} raised ZeroDivisionError.*\n.*{module.name}.py, line 11"
    ):
        run(recipe, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["exit"], module.spec in record["error"]) == (2, True)
    assert not (tmp_path / "out" / "model.safetensors").exists()

    def learn_again(*arguments: object) -> None:
        raise AssertionError("it learns again")

    write(module, zoo, calls)
    with monkeypatch.context() as patch:
        patch.setattr(RayPool, "step", learn_again)
        soup = run(recipe, tmp_path / "out")
    assert called(calls) == 1 + 2
    ours, single = soup.rows
    assert single["model_name"] == "best_single"
    for row in (ours, single):
        assert row["evaluate_accuracy"] == pytest.approx(row["test_accuracy"], abs=1e-7)
        assert row["evaluate_own loss"] == pytest.approx(row["test_nll"], rel=1e-5)
    assert ours["evaluate_own loss"] != single["evaluate_own loss"]
    assert run(recipe, tmp_path / "out").was_complete
    again = bake_copy(tmp_path / "out", tmp_path / "again")
    assert again.rows == soup.rows
    assert called(calls) == 3
    check_evaluate(zoo, tmp_path, module, recipe, ours)


def check_evaluate(zoo: Path, tmp_path: Path, module: Module, recipe: Recipe, row: dict[str, float]) -> None:
    """`ray-soup evaluate` calls it for a folder, and says so if it does not."""
    changes = {"evaluate": module.spec, "ingredients": str(recipe.ingredients)}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**values(zoo), **changes}))

    def evaluate(model: str, *options: str) -> Result:
        done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "r.yaml"), model, *options])
        assert done.exit_code == 0, done.output
        return done

    own = {key: value for key, value in row.items() if key.startswith("evaluate_")}
    found = json.loads(evaluate(str(tmp_path / "out"), "--json").stdout.splitlines()[-1])
    assert {key: found[key] for key in own} == own
    assert found["test_nll"] == pytest.approx(row["test_nll"], rel=1e-6)
    assert re.search(rf"own loss +{own['evaluate_own loss']:.4g}\b", evaluate(str(tmp_path / "out")).stdout)
    for model in (f"{zoo}/zoo/model_0.safetensors", f"{tmp_path}/out/model.safetensors"):
        done = evaluate(model)
        assert (
            f"evaluate: {module.spec} was not called: it takes the folder of a model, and {model} is not one." in done.stderr
        )
        assert "own loss" not in done.stdout


@pytest.mark.slow
def test_models_with_other_names_in_their_values_are_refused(zoo: Path, tmp_path: Path, module: Module, calls: Path) -> None:
    """A mean over seeds would be one of fewer values, and nobody would see it."""
    write(module, zoo, calls, f"if len(open({str(calls)!r}).readlines()) == 2: return {{'accuracy': 1, 'f1': 1}}")
    with pytest.raises(
        RecipeError, match=f"evaluate: {module.spec} returned 'f1' for best_single and not for greedy; expected"
    ):
        run(tiny_recipe(zoo, module, method="greedy"), tmp_path / "out")


@pytest.mark.slow
def test_a_soup_in_remote_storage_is_evaluated_in_a_local_folder(zoo: Path, module: Module, calls: Path, s3: str) -> None:
    from ray_soup.io import storage

    write(module, zoo, calls)
    recipe = make_recipe({**values(zoo, evaluate=module.spec, method="uniform"), "data": {}})
    soup = run(recipe, f"{s3}/out")
    assert "://" not in calls.read_text()
    assert not any("evaluat" in name for name in storage.walk(f"{s3}/out"))
    row = json.loads(storage.read_bytes(f"{s3}/out/results.jsonl"))
    assert row["evaluate_accuracy"] == soup.rows[0]["evaluate_accuracy"] > 0.8

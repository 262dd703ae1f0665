"""Adapters in run folders, with figures of the user's own, packed rows and checkpointed layers."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.run import run
from tests.adapters import CONFIGS, values, write_adapters, write_texts
from tests.system.command import call, write_recipe

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
HARNESS = """
import os
from pathlib import Path
import numpy as np, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.ray.test_language_models import by_library

def evaluate(folder):
    # by the libraries, as a user has it
    assert "adapter_config.json" in os.listdir(folder), os.listdir(folder)
    model, words = AutoPeftModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = np.sum([*by_library(model, Path({made!r}), "test").values()], axis=0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()  # transformers finds the base by itself
    ids = torch.tensor([words("some words")["input_ids"]])
    with torch.inference_mode():
        same = torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-5)
    return {{"nll": float(total / count), "same": float(same)}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of the Trainer; two of them saved an adapter at the end."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder, CONFIGS[:4])
    write_texts(folder)
    for k in range(4):
        run_folder = folder / "trained" / f"run{k}"
        for step, source in ((10, (k + 1) % 4), (20, k)):
            shutil.copytree(folder / "runs" / str(source), run_folder / f"checkpoint-{step}")
            state = {"best_model_checkpoint": f"/elsewhere/run{k}/checkpoint-20", "global_step": step}
            (run_folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
            torch.save({}, run_folder / f"checkpoint-{step}" / "optimizer.pt")
    return folder


@pytest.fixture
def harness(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"harness_{time.monotonic_ns()}"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{name}.py").write_text(HARNESS.format(made=str(made)), encoding="utf-8")
    importlib.invalidate_caches()
    return f"{name}:evaluate"


def recipe_of(made: Path, **changes: Any) -> dict[str, Any]:
    learn = {"epochs": 2, "batch_size": 8, "lr": 0.1, **changes.pop("learn", {})}
    return values(made, method="mehl+", ingredients=str(made / "trained"), learn=learn, **changes)


def test_figures_of_ones_own_are_those_of_the_soup_and_of_the_best_single_adapter(
    made: Path, harness: str, tmp_path: Path
) -> None:
    recipe = make_recipe(recipe_of(made, evaluate=harness))
    soup = run(recipe, tmp_path / "soup")
    record = json.loads((tmp_path / "soup" / "run.json").read_text(encoding="utf-8"))
    assert [i["path"] for i in record["ingredients"]] == [str(made / f"trained/run{k}/checkpoint-20") for k in range(4)]
    assert any("4 runs, of each the best by trainer_state.json" in note for note in record["notes"])
    assert record["preprocessing"] == {"length": 64, "source": "recipe", "cut": {"fit": 0.272727, "test": 0.285714}}
    assert "Texts of up to 64 tokens" in (tmp_path / "soup" / "README.md").read_text(encoding="utf-8")
    for row in soup.rows:  # the soup, and the best single adapter
        assert row["evaluate_nll"] == pytest.approx(row["test_nll"], rel=1e-5)
        assert row["evaluate_same"] == 1
    assert len(soup.rows) == 2
    found = evaluate(recipe, str(tmp_path / "soup"), "test")
    assert found["evaluate_nll"] == pytest.approx(found["test_nll"], rel=1e-5) == soup.rows[0]["test_nll"]
    assert found["preprocessing"]["length"] == 64
    verify(tmp_path / "soup")
    bake_copy(tmp_path / "soup", tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "recipe.yaml", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "soup" / name).read_bytes(), name


def test_a_comparison_evaluates_each_soup_of_adapters(made: Path, harness: str, tmp_path: Path) -> None:
    soup = compare(make_recipe(recipe_of(made, evaluate=harness)), tmp_path / "all")
    assert len(soup.record["table"]) > 5
    for row in soup.record["table"]:
        if "evaluate_nll" in row:
            assert row["evaluate_nll"] == pytest.approx(row["test_nll"], rel=1e-5), row["model_name"]
    assert sum("evaluate_nll" in row for row in soup.record["table"]) > 5
    verify(tmp_path / "all")


def test_a_truncated_soup_is_evaluated_as_it_is_written(made: Path, harness: str, tmp_path: Path) -> None:
    recipe = make_recipe(recipe_of(made, evaluate=harness, adapter={"rank": 2}))
    ours, single = run(recipe, tmp_path / "soup").rows
    for row in (ours, single):
        assert row["evaluate_nll"] == pytest.approx(row["test_nll"], rel=1e-5)
    alone = make_recipe({**recipe_of(made, evaluate=harness), "method": "uniform", "data": {}})
    assert run(alone, tmp_path / "uniform").rows[0]["evaluate_same"] == 1  # without data, the function alone evaluates


def test_packed_rows_and_checkpointed_layers_learn_the_same(made: Path, tmp_path: Path) -> None:
    plain = run(make_recipe(recipe_of(made)), tmp_path / "plain").rows
    recipe = recipe_of(made, learn={"gradient_checkpointing": True})
    recipe["model"] = f"transformers:{made}/base?length=64&pack=true"
    file = write_recipe(tmp_path, recipe)
    assert call("learn", file, tmp_path / "soup").exit_code == 0
    found = [json.loads(line) for line in (tmp_path / "soup" / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    for one, other in zip(plain, found, strict=True):
        for key in ("fit_nll", "select_nll", "test_nll"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=1e-4), key
    kept = yaml.safe_load((tmp_path / "soup" / "recipe.yaml").read_text(encoding="utf-8"))
    assert kept["learn"]["gradient_checkpointing"] is True
    assert call("verify", tmp_path / "soup").exit_code == 0
    for command in (["plan", file], ["inspect", made / "trained", "--model", recipe["model"]]):
        result = call(*command)
        assert result.exit_code == 0, result.output
    assert "of each the best by trainer_state.json" in result.output

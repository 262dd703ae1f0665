"""Soups of LoRA adapters that are merged into their base, through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.records import finished_record, read_results
from ray_soup.soups.run import run
from tests.adapters import values, write_adapters, write_texts
from tests.ray.test_adapters import LEARN
from tests.ray.test_language_models import by_library
from tests.system.command import call, write_recipe
from tests.unit.task.language_models import llama

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
MERGE = {"merge": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of a base that ties its embeddings; one changes the embeddings, one has a head of its own."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = [
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]},
    ]
    write_adapters(folder, configs, lambda: llama(tied=True))
    write_texts(folder)
    return folder


def figure(made: Path, soup: Path, name: str = "test") -> float:
    """NLL per token of a whole model as transformers computes it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(soup).eval()
    total = np.sum([*by_library(model, made, name).values()], axis=0)
    return float(total[0] / total[1])


def test_transformers_loads_the_soup_with_the_figure_that_was_reported(made: Path, tmp_path: Path) -> None:
    recipe = write_recipe(made, values(made, learn=LEARN, method="mehl+", adapter=MERGE))
    result = call("learn", recipe, tmp_path / "soup")
    assert result.exit_code == 0, result.output
    assert "Wrote" in result.output and f"{tmp_path}/soup/model.safetensors" in result.output  # noqa: PT018
    rows = read_results(tmp_path / "soup")
    assert figure(made, tmp_path / "soup") == pytest.approx(rows[0]["test_nll"], rel=1e-5)
    single = {row["model_name"]: row for row in rows}["best_single"]
    run(make_recipe(values(made, learn=LEARN, method="mehl+")), tmp_path / "exact")
    exact = {row["model_name"]: row for row in read_results(tmp_path / "exact")}
    assert single == exact["best_single"]  # the base is back before the ingredient is evaluated
    assert rows[0]["test_nll"] == pytest.approx(exact["mehl+"]["test_nll"], rel=1e-5)
    lines = call("verify", tmp_path / "soup")
    assert lines.exit_code == 0, lines.output
    found = call("evaluate", recipe, tmp_path / "soup", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["test_nll"] == pytest.approx(rows[0]["test_nll"], rel=1e-6)


def test_a_comparison_measures_merged_models_and_learns_from_the_base(made: Path, tmp_path: Path) -> None:
    """Also if it is interrupted between two rows."""
    recipe = values(made, learn={**LEARN, "epochs": 1})
    merged = make_recipe({**recipe, "adapter": MERGE})

    def stop(what: str, done: int, total: int) -> None:
        if "5/" in what:
            raise KeyboardInterrupt

    from ray_soup.soups.compare import compare

    with pytest.raises(KeyboardInterrupt):
        compare(merged, tmp_path / "merged", progress=stop)
    compare(merged, tmp_path / "merged")
    compare(make_recipe(recipe), tmp_path / "exact")
    found, exact = (
        {row["model_name"]: row for row in finished_record(tmp_path / name)["table"]} for name in ("merged", "exact")
    )
    assert found.keys() == exact.keys()
    for name, row in found.items():
        assert row["test_nll"] == pytest.approx(exact[name]["test_nll"], rel=1e-5), name
    chosen = finished_record(tmp_path / "merged")["chosen"]
    assert figure(made, tmp_path / "merged") == pytest.approx(found[chosen]["test_nll"], rel=1e-5)

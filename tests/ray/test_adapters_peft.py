"""A comparison of adapters has rows for PEFT's own merges, made by PEFT and measured like the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.records import finished_record, read_results
from tests.adapters import values, write_adapters, write_texts
from tests.system.command import call, write_recipe

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    configs = [
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    ]
    write_adapters(folder, configs)
    write_texts(folder)
    return folder


def test_a_comparison_has_rows_of_peft_and_resumes_with_them(made: Path, tmp_path: Path) -> None:
    keys = values(made, learn={"epochs": 1, "batch_size": 8, "lr": 0.1})

    def stop(what: str, done: int, total: int) -> None:
        if what == "merging with PEFT" and done == 3:
            raise KeyboardInterrupt

    kept: list[dict[str, int]] = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(make_recipe(keys), tmp_path / "all", progress=stop)
        files = (tmp_path / "all" / "state" / "soups").glob("peft_*.json")
        kept.append({file.name: file.stat().st_mtime_ns for file in files})
    assert kept[0].keys() == {"peft_cat.json", "peft_linear.json", "peft_svd.json"}
    assert kept[0] == kept[1]
    result = call("compare", write_recipe(made, keys), tmp_path / "all")
    assert result.exit_code == 0, result.output
    record, rows = finished_record(tmp_path / "all"), {row["model_name"]: row for row in read_results(tmp_path / "all")}
    names = [f"peft:{how}" for how in ("linear", "cat", "svd", "ties")]
    assert [row["model_name"] for row in record["table"]][-4:] == names
    assert all(name in result.output for name in names)
    assert rows["peft:cat"]["test_nll"] == pytest.approx(rows["uniform"]["test_nll"], rel=1e-5)
    assert rows["peft:cat"]["select_nll"] == pytest.approx(rows["uniform"]["select_nll"], rel=1e-5)
    assert len({rows[name]["test_nll"] for name in names}) == 4
    tests = {(test["model_name"], test["against"]): test for test in record["tests"]}
    for name in names:
        change = tests[name, "best_single"]
        assert change["nll"] == pytest.approx(rows[name]["test_nll"] - rows["best_single"]["test_nll"], abs=1e-9)
    assert record["chosen"] not in names
    assert json.dumps(record["notes"]).count("no row") == 1  # of `trained`, which is for whole models
    for name in ("report.html", "README.md"):
        assert "own merges with equal weights" in (tmp_path / "all" / name).read_text(encoding="utf-8"), name

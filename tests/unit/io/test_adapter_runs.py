"""Adapters in the folders that training scripts leave: of each run one is used, by the rules for whole models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.adapters import AdapterIngredient
from ray_soup.io.find import check_apart, open_ingredients
from tests.adapters import CONFIGS, make_adapter
from tests.unit.task.language_models import llama

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for k in range(3):
        make_adapter(llama(), folder / str(k), k, bin_file=k == 1, **CONFIGS[3])
    return [folder / str(k) for k in range(3)]


def run_of(folder: Path, adapters: list[Path], best: int | None = None, at_the_end: bool = False) -> None:
    """What the Trainer of transformers leaves of a PEFT model: its states are beside the adapters."""
    for step, adapter in zip((9, 10, 100), adapters, strict=True):
        checkpoint = folder / f"checkpoint-{step}"
        shutil.copytree(adapter, checkpoint)
        named = None if best is None else f"/elsewhere/{folder.name}/checkpoint-{best}"
        (checkpoint / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": named, "global_step": step}))
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({}, checkpoint / name)
    if at_the_end:
        shutil.copytree(adapters[0], folder, dirs_exist_ok=True)
        torch.save({}, folder / "training_args.bin")


@pytest.mark.parametrize("spec", ["runs", "runs/*", "runs/*/"])
def test_each_run_contributes_one_adapter(adapters: list[Path], tmp_path: Path, spec: str) -> None:
    run_of(tmp_path / "runs" / "a", adapters, best=10)
    run_of(tmp_path / "runs" / "b", adapters)
    notes: list[str] = []
    found = open_ingredients(str(tmp_path / spec), (), notes)
    assert all(isinstance(one, AdapterIngredient) for one in found)
    chosen = [tmp_path / "runs" / "a" / "checkpoint-10", tmp_path / "runs" / "b" / "checkpoint-100"]
    assert [one.path.rstrip("/") for one in found] == [*map(str, chosen)]
    assert found[0].files[0].endswith("checkpoint-10/adapter_model.bin")
    assert [note.partition(", such as")[0].partition(": ")[2] for note in notes] == [
        "one run, of it the best by trainer_state.json",
        "one run, of it the last step",
    ]
    assert "2 others left out" in notes[0]
    with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
        check_apart(str(tmp_path / "runs"), str(tmp_path / "runs" / "soup"))


def test_an_adapter_that_was_saved_at_the_end_stands_for_its_run(adapters: list[Path], tmp_path: Path) -> None:
    for name in "ab":
        run_of(tmp_path / "runs" / name, adapters, best=10, at_the_end=True)
    for spec in ("runs", "runs/*/"):
        notes: list[str] = []
        found = open_ingredients(str(tmp_path / spec), (), notes)
        assert [one.path.rstrip("/") for one in found] == [str(tmp_path / "runs" / name) for name in "ab"]
        assert "of each the model saved at the end" in notes[0]
    found = open_ingredients(str(tmp_path / "runs" / "a" / "checkpoint-*"))
    assert [one.name for one in found] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_a_step_with_an_adapter_and_a_whole_model_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    for name in "ab":
        run_of(tmp_path / name, adapters)
    (tmp_path / "b" / "checkpoint-100" / "model.safetensors").write_bytes(b"a whole model")
    with pytest.raises(IngredientError, match=r"checkpoint-100 contains two models: model\.safetensors, and an adapter"):
        open_ingredients(str(tmp_path))

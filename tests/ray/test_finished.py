"""Operations on finished soups: bake and verify, and what they refuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.hashing import sha256_file
from ray_soup.mixing.coefficients import load_coefficients, save_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.records import finished_record, write_run_record
from ray_soup.soups.run import run
from tests.conftest import values


@pytest.fixture
def operations(tmp_path: Path) -> list[Callable[[Path], Any]]:
    """The operations that need a finished soup with its ingredients; they write to tmp_path/new."""
    return [verify, lambda out: bake_copy(out, tmp_path / "new")]


def test_a_soup_baked_again_is_bit_identical_and_verifies(soup: Path, tmp_path: Path) -> None:
    bake_copy(soup, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (soup / "model.safetensors").read_bytes()
    assert len(verify(tmp_path / "again")) == 5


def test_verify_finds_one_flipped_bit_in_any_file(soup: Path, tmp_path: Path) -> None:
    assert any("bit-identical" in line for line in verify(soup))
    for name in ("model.safetensors", "coefficients.safetensors", "recipe.yaml", "results.jsonl", "README.md"):
        copy = tmp_path / name
        shutil.copytree(soup, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(SoupError, match=f"{name} was changed: its SHA-256 is") as error:
            verify(copy)
        assert error.value.exit_code == 1


def test_verify_recomputes_the_model(soup: Path, tmp_path: Path) -> None:
    """Coefficients whose digest was changed with them do not pass."""
    copy = tmp_path / "copy"
    shutil.copytree(soup, copy)
    coefficients = load_coefficients(copy / "coefficients.safetensors")
    coefficients.values[0, 0] += 0.5
    coefficients.values[1, 0] -= 0.5
    save_coefficients(coefficients, copy / "coefficients.safetensors")
    record = finished_record(copy)
    record["files"]["coefficients.safetensors"] = sha256_file(str(copy / "coefficients.safetensors"))
    write_run_record(record, copy / "run.json")
    with pytest.raises(SoupError, match="differs from the one computed from coefficients and ingredients"):
        verify(copy)


def test_an_ingredient_that_changed_is_named(
    zoo: Path, tmp_path: Path, operations: list[Callable[[Path], Any]], cluster: None
) -> None:
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    recipe = {**values(zoo), "ingredients": str(tmp_path / "zoo"), "method": "uniform", "data": {}}
    run(make_recipe(recipe), tmp_path / "out")
    state = load_file(tmp_path / "zoo" / "model_3.safetensors")
    state["head.bias"] += 1
    save_file(state, tmp_path / "zoo" / "model_3.safetensors")
    for operation in operations:
        with pytest.raises(IngredientError, match=r"model_3\.safetensors has changed since the soup was made"):
            operation(tmp_path / "out")
    assert not (tmp_path / "new").exists()


def test_an_unfinished_folder_is_no_soup(tmp_path: Path, operations: list[Callable[[Path], Any]]) -> None:
    (tmp_path / "out").mkdir()
    for operation in operations:
        with pytest.raises(RecipeError, match=r"is not a finished soup: no run\.json found"):
            operation(tmp_path / "out")
    assert not (tmp_path / "new").exists()


def test_an_evaluation_says_which_of_two_models_in_a_file_it_used(zoo: Path, tmp_path: Path, cluster: None) -> None:
    first, second = (load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in (0, 1))
    both = {f"net.{name}": tensor for name, tensor in first.items()} | {f"ema.{n}": t for n, t in second.items()}
    save_file({**both, "criterion.weight": first["unused"].clone()}, tmp_path / "both.safetensors")
    recipe = make_recipe(values(zoo))
    plain = evaluate(recipe, str(zoo / "zoo" / "model_0.safetensors"), "test")
    found = evaluate(recipe, str(tmp_path / "both.safetensors"), "test")
    assert found["test_nll"] == plain["test_nll"]
    assert "notes" not in plain
    said = " ".join(found["notes"])
    assert "both.safetensors: it contains the whole model under `net.` and under `ema.`. The first was used" in said
    assert "1 tensor (criterion.*) outside `net.` was left out" in said

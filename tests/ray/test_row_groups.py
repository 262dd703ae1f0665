"""Runs whose blocks are groups of rows: from the recipe to a folder that is verified, rebuilt and evaluated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup import mix_state_dicts
from ray_soup.actors.messages import Mesh
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import load_recipe, make_recipe
from ray_soup.soups.finished import bake_copy, evaluate, verify
from tests.conftest import values
from tests.learning import whole_and_stopped
from tests.ray.test_learn import learned
from tests.tiny import Tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
ROWS = {"tensor": 3}


def test_a_soup_of_rows_resumes_with_the_same_bits_and_proves_its_file(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(values(zoo, blocks=ROWS, learn__lr=0.05, learn__model_batch=5, baseline="none"))
    whole, again = whole_and_stopped(recipe, tmp_path)
    assert again.record["curve"] == whole.record["curve"]
    for name in ("coefficients.safetensors", "model.safetensors"):
        one, other = (load_file(soup.out / name) for soup in (whole, again))
        assert one.keys() == other.keys()
        assert all((one[tensor] == other[tensor]).all() for tensor in one)
    found = load_coefficients(whole.out / "coefficients.safetensors")
    assert whole.record["blocks"] == len(found.blocks)
    assert found.blocks[:4] == ("embed.weight[0:7]", "embed.weight[7:15]", "embed.weight[15:23]", "embed.bias[0:7]")
    assert found.cuts["blocks.0.0.weight"] == (15 * 23, 30 * 23)
    rows = found.values[:, :3]
    assert np.abs(rows - rows.mean(axis=1, keepdims=True)).max() > 1e-3
    assert whole.record["curve"][0]["select_nll"] > whole.rows[0]["select_nll"]

    assert any("bit-identical" in line for line in verify(whole.out))
    copy = bake_copy(whole.out, tmp_path / "copy")
    assert load_recipe(copy.out / "recipe.yaml").blocks == ROWS
    assert (copy.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()
    assert evaluate(recipe, str(copy.out), "test")["test_nll"] == whole.rows[0]["test_nll"]


def test_meshes_and_shards_agree_on_rows(zoo: Path, tmp_path: Path) -> None:
    found = {}
    for number, mesh in enumerate((Mesh(1, 1), Mesh(1, 2), Mesh(2, 1))):
        found[number], _ = learned(zoo, tmp_path / f"{number}.pt", mesh, learn__model_batch=8, blocks=ROWS)
    for number in (1, 2):
        assert np.linalg.norm(found[number] - found[0]) <= 1e-4 * np.linalg.norm(found[0])
    assert np.abs(found[0] - 1 / 8).max() > 0.01


def test_state_dicts_in_memory_are_mixed_by_rows(zoo: Path) -> None:
    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in range(4)]
    data = np.load(zoo / "heldout.npz")
    batches = [(torch.from_numpy(data["images"]), torch.from_numpy(data["labels"]))]
    soup = mix_state_dicts(Tiny(), states, batches, "learned+", blocks=ROWS, learn={"epochs": 1})
    made, weight = soup.coefficients, "head.weight"
    assert len(made.cuts[weight]) == 2
    c = made.at(weight, np.arange(230))
    exact = sum(c[k] * states[k][weight].double().numpy().ravel() for k in range(4))
    np.testing.assert_allclose(soup.state_dict()[weight].numpy().ravel(), exact, rtol=1e-6, atol=1e-8)

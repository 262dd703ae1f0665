"""A soup of state dicts in memory compared with the soup of the same files."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ray_soup
from tests import tiny
from tests.conftest import values
from tests.unit.soups.test_in_memory import loader, states


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "one_thread")
@pytest.mark.parametrize("method", ["mehl+", "learned", "greedy"])
def test_the_soup_in_memory_is_bit_identical_to_the_soup_of_the_files(
    conv_zoo: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coefficients, tensors and figures; nothing is left behind and the model is unchanged."""
    recipe = {**values(conv_zoo, model="tests.tiny:build_conv"), "learn": {"epochs": 2}}
    del recipe["blocks"]
    filed = ray_soup.learn(recipe, tmp_path / "out", method)
    model = tiny.build_conv()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = set(os.listdir(tempfile.gettempdir()))
    soup = ray_soup.mix_state_dicts(
        model, states(conv_zoo), loader(conv_zoo, "heldout"), method, select=0.25, test=loader(conv_zoo, "test"),
        learn={"epochs": 2}, precision="float32",
    )  # fmt: skip
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - left if name.startswith("ray_soup")}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    expected = ray_soup.load_coefficients(filed.out / "coefficients.safetensors")
    np.testing.assert_array_equal(soup.coefficients.values, expected.values)
    assert all(torch.equal(t, soup.state_dict()[n]) for n, t in load_file(filed.out / "model.safetensors").items())
    assert {key: filed.rows[0][key] for key in soup.figures} == soup.figures
    assert soup.figures["test_accuracy"] > 0.8
    of_names = ("than the best single ingredient", "the best ingredient on select")  # which have other names in memory
    assert {note for note in soup.notes if not any(part in note for part in of_names)} <= set(filed.notes)
    assert "BatchNorm layers were re-estimated on" in "".join(soup.notes) or len(soup.coefficients.used()) == 1
    model.load_state_dict(soup.state_dict())

"""What a session finds out about its inputs: which soups get re-estimated running statistics, and on what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh, SetupInfo
from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import Inputs, open_inputs
from ray_soup.soups.rows import open_rows
from ray_soup.soups.session import Session
from ray_soup.task.data import Split, calibration_batches
from tests.conftest import values
from tests.ray.own_loops import image_folders


def test_a_model_of_another_program_must_have_been_trained_as_the_ingredients(tmp_path: Path) -> None:
    """Also where only the files state how that was; they may all be silent."""
    import timm

    states = {name: timm.create_model("test_resnet", num_classes=3).state_dict() for name in ("zoo/0", "zoo/1", "row")}
    (tmp_path / "zoo").mkdir()
    data = image_folders(tmp_path)["fit"]

    def opened(zoo: dict[str, Any], row: dict[str, Any]) -> Inputs:
        for (name, state), args in zip(states.items(), (zoo, zoo, row), strict=True):
            torch.save({"state_dict": state, "args": args}, tmp_path / f"{name}.pt")
        rows = {"compare": {"rows": {"other": str(tmp_path / "row.pt")}}}
        recipe = make_recipe({
            "model": "timm:test_resnet?classes=3", "ingredients": str(tmp_path / "zoo"), "data": {"fit": data}, **rows
        })  # fmt: skip
        inputs = open_inputs(recipe)
        open_rows(recipe, inputs)
        return inputs

    small, large = {"img_size": 48}, {"img_size": 64}
    for zoo, row, adopted in ((small, small, {"img_size": "48"}), (small, {}, {"img_size": "48"}), ({}, {}, {})):
        inputs = opened(zoo, row)
        assert inputs.adopted == inputs.started.get("adopted", {}) == adopted
    with pytest.raises(
        RecipeError, match=r"^compare\.rows\.other: .*img_size 48 and .*row\.pt with 64; one value must be used"
    ):
        opened(small, large)
    with pytest.raises(
        RecipeError, match=r"(?s)^compare\.rows\.other: .*row\.pt was trained with img_size 64, which neither.*=64$"
    ):
        opened({}, large)


@pytest.mark.slow
def test_frozen_batchnorm_layers_are_left_alone(conv_zoo: Path, tmp_path: Path) -> None:
    """With `auto`: layers are frozen if all ingredients have the same running statistics."""
    (tmp_path / "zoo").mkdir()
    for k, file in enumerate(sorted((conv_zoo / "zoo").glob("*.safetensors"))):
        state = load_file(file)
        frozen = {name: torch.ones_like(tensor) for name, tensor in state.items() if "running" in name}
        save_file({**state, **frozen}, tmp_path / "zoo" / f"{k}.safetensors")
    every = ("norm", "norm1d")
    for folder, buffers, recalibrated in (
        (tmp_path, "auto", ()), (tmp_path, "recalibrate", every), (conv_zoo, "auto", every), (conv_zoo, "first", ()),
    ):  # fmt: skip
        recipe = make_recipe(
            values(conv_zoo, model="tests.tiny:build_conv", ingredients=str(folder / "zoo"), buffers=buffers)
        )
        inputs = open_inputs(recipe)
        assert inputs.layout.tracking == every
        assert inputs.recalibrated(recipe) == recalibrated
        mesh, setup = Mesh(1, 1), SetupInfo({"fit": 597, "test": 600}, None, {}, "", "")
        pool = InProcessPool(recipe, inputs.ingredients, mesh, 1)
        session = Session(recipe, inputs, pool, setup, mesh, 1, 4)
        session = session.with_soup(splits=session.cut(1))
        assert [len(batch) for batch in session.calibration(150)] == ([61, 61] if recalibrated else [])


def test_running_statistics_are_estimated_on_whole_batches_of_fit_alone() -> None:
    fit = Split("fit", np.arange(0, 200, 2, dtype=np.int32))
    for size, most, lengths in ((30, 1000, [30, 30, 30]), (30, 64, [30, 30]), (128, 1000, [100]), (128, 40, [40])):
        batches = calibration_batches(fit, size, 1, most)
        assert [len(b) for b in batches] == lengths
        rows = np.concatenate([b.rows for b in batches])
        assert len(set(rows.tolist())) == len(rows)
        assert set(rows.tolist()) <= set(fit.rows.tolist())

"""What a session finds out about its inputs: which soups get re-estimated running statistics, and on what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh, SetupInfo
from ray_soup.recipe import make_recipe
from ray_soup.soups.session import Session, open_inputs
from ray_soup.task.data import Split, calibration_batches
from tests.conftest import values


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

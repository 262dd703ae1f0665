"""The model and the data of one actor: they must fit together, and micro-batches hold the images asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split
from tests.conftest import InProcess, values
from tests.unit.task.test_sources import ODD

UNFIT: dict[str, tuple[Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]], str]] = {
    **ODD,
    "other channels": (
        lambda x, y: {"images": np.stack([x] * 3, 1), "labels": y},
        r"returned torch.float32 \[3, 10\] for one example of .*odd\.npz, .* \[3, 8, 8\]; expected float logits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", UNFIT)
def test_data_that_do_not_fit_the_model_stop_the_start(zoo: Path, tmp_path: Path, fault: str) -> None:
    change, said = UNFIT[fault]
    with np.load(zoo / "test.npz") as arrays:
        np.savez(tmp_path / "odd.npz", **change(arrays["images"], arrays["labels"]))
    data = {"fit": str(zoo / "heldout.npz"), "test": str(tmp_path / "odd.npz")}
    with pytest.raises(RecipeError, match=said):
        InProcess(make_recipe(values(zoo, data=data)))


@pytest.mark.parametrize("count", [0, 5, 7, 30])
def test_micro_batches_that_load_ahead_are_those_asked_for(zoo: Path, count: int) -> None:
    replica = InProcess(make_recipe(values(zoo, learn__micro_batch=7))).shards[0].replica
    rows = np.random.default_rng(count).permutation(600)[:count].astype(np.int32)
    found = list(replica.micro_batches(Split("test", rows)))
    assert [len(labels) for _, labels in found] == [7] * (count // 7) + ([count % 7] if count % 7 else [])
    expected = replica.examples["test"].batch(rows, torch.device("cpu"))
    for column, whole in zip(zip(*found, strict=True), expected, strict=False):
        assert torch.equal(torch.cat(column), whole)

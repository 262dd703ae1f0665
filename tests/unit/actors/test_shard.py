"""One actor's work, in this process."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError
from ray_soup.io.progress import no_progress
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.data import Split
from tests.conftest import InProcess, values

FIT = Split("fit", np.arange(61, dtype=np.int32))


def coordinates(count: int, blocks: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal((count, blocks))).astype(np.float32)


def test_the_parameters_that_scale_the_logits_are_found(zoo: Path) -> None:
    assert InProcess(make_recipe(values(zoo))).open_all("tensor").output == ("head.weight", "head.bias")


class Squared(torch.nn.Module):
    """Doubling no layer doubles the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.float().flatten(1)) ** 2


def test_a_model_whose_logits_no_layer_scales_has_no_output_layer(zoo: Path, tmp_path: Path) -> None:
    for k in range(2):
        torch.manual_seed(k)
        torch.save(Squared().state_dict(), tmp_path / f"m{k}.pt")
    recipe = make_recipe(values(zoo, ingredients=str(tmp_path), model="tests.unit.actors.test_shard:Squared"))
    assert InProcess(recipe).open_all("tensor").output == ()


def test_micro_batches_change_a_step_by_rounding_only(zoo: Path) -> None:
    found = {}
    for size in (7, 128):
        pool = InProcess(make_recipe(values(zoo, learn__micro_batch=size)))
        x = coordinates(8, pool.open_all("layer").partition.count)
        pool.begin(np.arange(8), x, "float32")
        (found[size],) = pool.step(x, 1.0, FIT)
    assert found[7].loss == pytest.approx(found[128].loss, rel=1e-6)
    assert found[7].by_factor == pytest.approx(found[128].by_factor, rel=1e-4)
    scale = np.abs(found[128].gradient).max()
    np.testing.assert_allclose(found[7].gradient, found[128].gradient, atol=1e-5 * scale)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of a shape to bfloat16."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += kwargs["dtype"] == torch.bfloat16
        return function(*args, **(kwargs or {}))


def test_a_step_in_bfloat16_casts_the_weights_for_each_micro_batch_and_is_their_sum(zoo: Path) -> None:
    """Casts do not outlast a forward pass: torch up to 2.9 would use one without a gradient in a layer that runs again."""
    pool = InProcess(make_recipe(values(zoo, learn__micro_batch=20)))
    x = coordinates(8, pool.open_all("layer").partition.count)
    pool.begin(np.arange(8), x, "bfloat16")
    with Casts(dict(zip(pool.layout.names, pool.layout.shapes, strict=True))["head.weight"]) as casts:
        (whole,) = pool.step(x, 1.5, FIT)
    assert casts.count == 4
    parts = [pool.step(x, 1.5, Split("fit", rows))[0] for rows in np.split(FIT.rows, [20, 40, 60])]
    assert whole.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-12)
    assert whole.by_factor == pytest.approx(sum(part.by_factor for part in parts), rel=1e-5)
    scale = np.abs(whole.gradient).max()
    np.testing.assert_allclose(whole.gradient, sum(part.gradient for part in parts), atol=1e-5 * scale)


def test_ingredients_that_do_not_move_keep_their_place(zoo: Path) -> None:
    """A step in a model batch gives the gradient of its ingredients in a step of all of them."""
    pool = InProcess(make_recipe(values(zoo, directions={"dtype": "float32"})))
    x = coordinates(8, pool.open_all("layer").partition.count)
    pool.begin(np.arange(8), x, "float32")
    (everything,) = pool.step(x, 1.0, FIT)
    chosen = np.array([1, 5, 6])
    pool.begin(chosen, x, "float32")
    (some,) = pool.step(x[chosen], 1.0, FIT)
    scale = np.abs(everything.gradient).max()
    np.testing.assert_allclose(some.gradient, everything.gradient[chosen], atol=1e-5 * scale)
    assert some.loss == pytest.approx(everything.loss, rel=1e-6)


def test_a_step_is_bit_identical_after_other_work(zoo: Path) -> None:
    """An evaluation of a checkpoint in between overwrites the model's parameters and buffers."""
    pool = InProcess(make_recipe(values(zoo)))
    x = coordinates(8, pool.open_all("tensor").partition.count)
    pool.begin(np.arange(8), x, "float32")
    (before,) = pool.step(x, 1.0, FIT)
    pool.evaluate_file(str(zoo / "zoo" / "model_3.safetensors"), [FIT])
    (after,) = pool.step(x, 1.0, FIT)
    np.testing.assert_array_equal(after.gradient, before.gradient)
    assert (after.loss, after.by_factor) == (before.loss, before.by_factor)


def test_the_gram_matrix_is_a_sum_over_replicas(zoo: Path) -> None:
    found = {}
    for size in (1, 3):
        pool = InProcess(make_recipe(values(zoo)), size)
        pool.open_all("tensor")
        found[size] = pool.gram()
    assert found[1].shape == (8, 8)
    np.testing.assert_allclose(found[3], found[1], rtol=1e-6, atol=1e-9)


def test_a_file_that_differs_from_the_drivers_is_named_with_the_node(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    recipe = make_recipe(values(zoo, ingredients=str(tmp_path / "zoo")))
    pool = InProcessPool(recipe, open_inputs(recipe).ingredients, Mesh(1, 1), 1)
    file = tmp_path / "zoo" / "model_3.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + b"more")
    node = re.escape(socket.gethostname())
    with pytest.raises(
        RecipeError, match=rf"model_3\.safetensors has {size + 4:,} bytes instead of {size:,} .* on the node {node}"
    ):
        pool.setup(no_progress)

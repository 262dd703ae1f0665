"""blocks: auto learns whole tensors first, and then groups of their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_soup.errors import SoupError
from ray_soup.mixing.blocks import Layout, partition
from ray_soup.recipe import Learn, make_recipe
from ray_soup.soups.granularity import stages
from ray_soup.soups.together import moving_together, tensor_of_each
from tests.learning import Learner, same, stopping

LAYOUT = Layout(("1.weight", "1.bias", "2.weight", "3"), ((8, 3), (8,), (4, 8), ()))
TENSOR = tensor_of_each(partition(LAYOUT, {"tensor": 2}), LAYOUT.sizes)


def test_groups_of_rows_belong_to_their_tensor() -> None:
    assert TENSOR is not None
    assert TENSOR.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert tensor_of_each(partition(LAYOUT, "tensor"), LAYOUT.sizes) is None


@given(st.integers(0, 100), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.01, "auto"]))
def test_the_gradient_equals_autograd_and_groups_stay_together(seed: int, whiten: float, lr: float | str) -> None:
    assert TENSOR is not None
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((5, 7, 4))
    directions = vectors - vectors.mean(axis=0)
    norms, gram = np.linalg.norm(directions, axis=2), np.einsum("jbe,kbe->bjk", directions, directions)
    chosen, start = np.array([0, 2, 3]), random.standard_normal((5, 4))
    y = start[:, TENSOR] * norms
    of = moving_together(Learn(lr=lr, whiten=whiten), norms, gram if whiten else None, chosen, y, TENSOR)
    np.testing.assert_allclose(of.to_y(of.from_y(y[chosen])), y[chosen], rtol=1e-9, atol=1e-9)
    z, weight = random.standard_normal((3, 4)), random.standard_normal((3, 7))
    x = of.x(z)
    np.testing.assert_array_equal(x[:, [0, 2, 4]], x[:, [1, 3, 5]])
    jacobian = np.stack([(of.x(z + step) - of.x(z - step)) / 2e-4 for step in 1e-4 * np.eye(12).reshape(12, 3, 4)])
    expected = (jacobian * weight * np.cos(x)).sum(axis=(1, 2)).reshape(3, 4)
    np.testing.assert_allclose(of.gradient(z, weight * np.cos(x)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("blocks", "found"), [("auto", 2), ({"tensor": 4}, 1)])
def test_only_auto_takes_the_turns_twice(blocks: object, found: int) -> None:
    recipe = make_recipe({"method": "mehl+", "model": "tests.tiny:build", "blocks": blocks})
    assert stages(recipe, {"tensor": 4}) == found
    assert stages(recipe, "tensor") == 1
    assert stages(recipe.model_copy(update={"start": "OUT"}), {"tensor": 4}) == 1


def test_learning_begins_as_with_whole_tensors_goes_on_with_rows_and_resumes_bit_for_bit(zoo: Path, tmp_path: Path) -> None:
    learn = {"epochs": 2, "batch_size": 64, "model_batch": 3}
    whole = Learner(zoo, blocks="tensor", learn=learn)
    expected = whole.learn(tmp_path / "tensors")
    rows = Learner(zoo, blocks={"tensor": 2}, learn=learn)
    tensor = tensor_of_each(rows.store.partition, rows.pool.inputs.layout.sizes)
    found = rows.learn(tmp_path / "rows", tensor=tensor)
    half = len(expected.curve)
    assert len(found.curve) == 2 * half - 1
    for one, other in zip(expected.curve, found.curve[:half], strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    assert {line["turn"] for line in found.curve[half:]}.isdisjoint({line["turn"] for line in expected.curve})
    assert min(line["select_nll"] for line in found.curve) <= min(line["select_nll"] for line in expected.curve) * 1.0001
    for at in (1, found.steps // 2 + 1):
        file = tmp_path / f"stopped at {at}"
        with pytest.raises(KeyboardInterrupt):
            rows.learn(file, stopping(at), tensor=tensor)
        same(rows.learn(file, tensor=tensor), found)


def test_a_refit_takes_both_halves_again(zoo: Path, tmp_path: Path) -> None:
    rows = Learner(zoo, blocks={"tensor": 2}, learn={"epochs": 1, "refit": True})
    tensor = tensor_of_each(rows.store.partition, rows.pool.inputs.layout.sizes)
    found = rows.learn(tmp_path / "state", tensor=tensor)
    assert found.before is not None
    assert torch.isfinite(found.y).all()
    assert found.turn == 2


def test_a_state_of_learning_without_whole_tensors_first_is_refused(zoo: Path, tmp_path: Path) -> None:
    rows = Learner(zoo, blocks={"tensor": 2}, learn={"epochs": 1})
    tensor = tensor_of_each(rows.store.partition, rows.pool.inputs.layout.sizes)
    with pytest.raises(KeyboardInterrupt):
        rows.learn(tmp_path / "state", stopping(1))
    with pytest.raises(SoupError, match="belongs to another recipe"):
        rows.learn(tmp_path / "state", tensor=tensor)

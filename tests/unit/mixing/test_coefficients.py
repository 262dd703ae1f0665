from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import (
    MEAN,
    Affine,
    Coefficients,
    Parametrization,
    Softmax,
    load_coefficients,
    save_coefficients,
    save_table,
    to_coefficients,
    to_x,
)


def test_columns_sum_to_one_for_every_x() -> None:
    for scale in (1e-6, 1.0, 1e3):
        x = scale * np.random.default_rng(0).standard_normal((72, 150))
        assert np.abs(to_coefficients(x).sum(axis=0) - 1).max() <= 1e-12 * max(1.0, scale)
    np.testing.assert_array_equal(to_coefficients(np.zeros((4, 2))), np.full((4, 2), 0.25))


def test_coefficients_mix_ingredients_as_x_mixes_directions() -> None:
    """center + sum_k x_k d_k = sum_k c_k theta_k."""
    random = np.random.default_rng(0)
    theta, x = random.standard_normal((5, 30)), random.standard_normal((5, 1))
    center = theta.mean(axis=0)
    np.testing.assert_allclose(center + (x * (theta - center)).sum(axis=0), (to_coefficients(x) * theta).sum(axis=0))


def test_a_direction_of_length_zero_has_x_zero() -> None:
    y, norms = np.ones((2, 2)), np.array([[2.0, 0.0], [4.0, 1.0]])
    np.testing.assert_array_equal(to_x(y, norms), [[0.5, 0.0], [0.25, 1.0]])


def x_in_torch(of: Parametrization, y: torch.Tensor) -> torch.Tensor:
    return y.softmax(dim=0) if of.learns_factor else y / torch.from_numpy(of.norms)


@pytest.mark.parametrize("kind", [Affine, Softmax])
def test_the_gradient_of_a_parametrization_is_that_of_autograd(kind: type[Affine] | type[Softmax]) -> None:
    random = np.random.default_rng(0)
    of = kind(1 + random.random((5, 3)))
    y, by_x = random.standard_normal((5, 3)), random.standard_normal((5, 3))
    y_torch = torch.from_numpy(y).requires_grad_()
    x = x_in_torch(of, y_torch)
    x.backward(torch.from_numpy(by_x))
    np.testing.assert_allclose(of.x(y), x.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(of.gradient(y, by_x), y_torch.grad.numpy(), rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(of.coefficients(y).sum(axis=0), 1, atol=1e-12)
    np.testing.assert_allclose(of.coefficients(np.zeros((5, 3))), 0.2, rtol=1e-15)


def test_save_then_load_is_the_identity(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2))
    c = Coefficients(values, ("a", "b/c.pt", "d"), ("x", "y"), {"x.w": 0, "y.w": 1, "z": MEAN}, "first", {"t": "x.w"})
    save_coefficients(c, tmp_path / "c.safetensors")
    loaded = load_coefficients(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.values, values)
    assert {**loaded.__dict__, "values": 0} == {**c.__dict__, "values": 0}
    np.testing.assert_array_equal(loaded.of("z"), np.full(3, 1 / 3))
    np.testing.assert_array_equal(loaded.of("y.w"), values[:, 1])


def test_factor_and_statistics_are_saved_too(tmp_path: Path) -> None:
    statistics = {"norm.running_mean": np.array([1.5, -2.0], np.float32), "norm.num_batches_tracked": np.asarray(7)}
    c = Coefficients(np.eye(2), ("a", "b"), ("x", "y"), {"head.w": 1}, "average", {}, 1.25, ("head.w",), statistics)
    save_coefficients(c, tmp_path / "c.safetensors")
    loaded = load_coefficients(tmp_path / "c.safetensors")
    assert (loaded.factor, loaded.factored) == (1.25, ("head.w",))
    np.testing.assert_array_equal(loaded.of("head.w"), [0.0, 1.25])
    assert loaded.statistics.keys() == statistics.keys()
    for name, array in statistics.items():
        assert loaded.statistics[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.statistics[name], array)


def test_a_file_that_holds_no_coefficients_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    save_file({"w": torch.zeros(1)}, tmp_path / "e.safetensors")
    with pytest.raises(RecipeError, match=r"d\.safetensors cannot be read"):
        load_coefficients(tmp_path / "d.safetensors")
    with pytest.raises(RecipeError, match=r"missing\.safetensors cannot be read"):
        load_coefficients(tmp_path / "missing.safetensors")
    with pytest.raises(RecipeError, match=r"e\.safetensors has the format None; expected 'ray_soup\.coefficients/1'"):
        load_coefficients(tmp_path / "e.safetensors")


def test_the_table_has_a_row_per_ingredient_and_block(tmp_path: Path) -> None:
    c = Coefficients(np.random.default_rng(0).standard_normal((3, 2)), ("a", "b", "c"), ("x", "y"), {})
    save_table(c, tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet")
    rows = table.to_pylist()
    assert table.column_names == ["ingredient", "block", "coefficient"]
    assert len(rows) == c.values.size
    for row in rows:
        k, b = c.ingredients.index(row["ingredient"]), c.blocks.index(row["block"])
        assert row["coefficient"] == c.values[k, b]

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import (
    MEAN,
    Affine,
    Coefficients,
    Parametrization,
    Softmax,
    check_covers,
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
    values = to_coefficients(np.random.default_rng(0).standard_normal((3, 2)))
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


def with_values(values: Any, **metadata: Any) -> dict[str, Any]:
    return {"values": np.asarray(values), **metadata}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a sum of 2": (with_values([[1.0, 0.5], [1.0, 0.5]]), "sum to 1 only within 1.0e"),
    "a sum that is off by 1e-9": (with_values([[0.5, 0.5], [0.5, 0.5 + 1e-9]]), "sum to 1 only within 1.0e-09"),
    "integers": (with_values([[1, 0], [0, 1]]), r"found int64 \[2, 2\]; expected float64"),
    "float32": (with_values(np.full((2, 2), 0.5, np.float32)), r"found float32 \[2, 2\]"),
    "NaN": (with_values([[np.nan, 0.5], [0.5, 0.5]]), "not finite"),
    "infinity": (with_values([[np.inf, 0.5], [-np.inf, 0.5]]), "not finite"),
    "another K": (with_values(np.full((3, 2), 1 / 3)), r"found float64 \[3, 2\]; expected float64 \[2, 2\]"),
    "other blocks": (with_values(np.full((2, 3), 0.5)), r"found float64 \[2, 3\]"),
    "one dimension": (with_values([0.5, 0.5]), r"found float64 \[2\]"),
    "no ingredients": (with_values(np.zeros((0, 2)), ingredients=()), "ingredients: Tuple should have at least 1 item"),
    "an ingredient named twice": (with_values(np.full((2, 2), 0.5), ingredients=("a", "a")), "named twice"),
    "a block that does not exist": (with_values(np.full((2, 2), 0.5), block_of={"w": 2}), "w is in block 2 of 2"),
    "a negative block": (with_values(np.full((2, 2), 0.5), block_of={"w": -2}), "w is in block -2"),
    "a policy nobody knows": (with_values(np.full((2, 2), 0.5), buffers="sum"), "buffers: Input should be"),
    "a factor of zero": (with_values(np.full((2, 2), 0.5), factor=0.0), r"factor\.value: Input should be greater than 0"),
    "a factor that is NaN": (with_values(np.full((2, 2), 0.5), factor=math.nan), r"factor\.value: "),
    "a factor for no tensor": (with_values(np.full((2, 2), 0.5), factored=("v",)), "the factor is for a tensor v"),
    "infinite statistics": (with_values(np.full((2, 2), 0.5), statistics={"m": np.array([np.inf])}), "statistics/m"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_coefficients_that_describe_no_soup_are_refused_when_they_are_read(tmp_path: Path, fault: str) -> None:
    changes, said = WRONG[fault]
    right = Coefficients(np.eye(2), ("a", "b"), ("x", "y"), {"w": 0, "v.w": 1})
    save_coefficients(replace(right, **changes), tmp_path / "c.safetensors")
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/c\.safetensors cannot be read as coefficients \(.*{said}"):
        load_coefficients(tmp_path / "c.safetensors")


@pytest.mark.parametrize("content", ["[", "[[", '{"a": 1}', "3", "[1, 2]", "[" * 100_000], ids=lambda text: text[:8])
@pytest.mark.parametrize("key", ["ingredients", "blocks", "block_of", "tied", "factor"])
def test_damaged_names_are_refused(tmp_path: Path, key: str, content: str) -> None:
    """Each is text that JSON or the type of the names refuses; `block_of` may be any object of integers."""
    file, c = tmp_path / "c.safetensors", Coefficients(np.eye(2), ("a", "b"), ("x", "y"), {"w": 0})
    save_coefficients(c, file)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {"coefficients": opened.get_tensor("coefficients")}
    save_file(tensors, file, {**metadata, key: content})
    if (key, content) in (("block_of", '{"a": 1}'), ("factor", '{"a": 1}')):
        assert load_coefficients(file).factor == 1.0
        return
    with pytest.raises(RecipeError, match=r"c\.safetensors cannot be read as coefficients"):
        load_coefficients(file)


def test_coefficients_of_another_model_are_refused(tmp_path: Path) -> None:
    c = Coefficients(np.eye(2), ("a", "b"), ("x",), {"w": 0}, statistics={"m": np.zeros(3, np.float32)})
    check_covers(c, {"w": (2, 2), "m": (3,), "counter": ()}, tmp_path)
    for shapes, said in (
        ({"m": (3,)}, "a tensor w"),
        ({"w": (1,)}, "statistics m"),
        ({"w": (1,), "m": (4,)}, "statistics m"),
    ):
        with pytest.raises(RecipeError, match=f"{tmp_path} is for another model: it has .*{said}"):
            check_covers(c, shapes, tmp_path)


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

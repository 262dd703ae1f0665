from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ray_soup.coefficients import (
    MEAN,
    Coefficients,
    learning_rate,
    load_coefficients,
    make_optimizer,
    save_coefficients,
    to_coefficients,
    to_x,
    without_noise,
)
from ray_soup.errors import RecipeError
from ray_soup.recipe import Learn


def test_columns_sum_to_one_whatever_x_is() -> None:
    for scale in (1e-6, 1.0, 1e3):
        x = scale * np.random.default_rng(0).standard_normal((72, 150))
        assert np.abs(to_coefficients(x).sum(axis=0) - 1).max() <= 1e-12 * max(1.0, scale)
    np.testing.assert_array_equal(to_coefficients(np.zeros((4, 2))), np.full((4, 2), 0.25))


def test_coefficients_are_those_of_the_ingredients() -> None:
    """center + sum_k x_k d_k = sum_k c_k theta_k."""
    random = np.random.default_rng(0)
    theta, x = random.standard_normal((5, 30)), random.standard_normal((5, 1))
    center = theta.mean(axis=0)
    np.testing.assert_allclose(center + (x * (theta - center)).sum(axis=0), (to_coefficients(x) * theta).sum(axis=0))


def test_a_direction_of_length_zero_gets_nothing() -> None:
    y, norms = np.ones((2, 2)), np.array([[2.0, 0.0], [4.0, 1.0]])
    np.testing.assert_array_equal(to_x(y, norms), [[0.5, 0.0], [0.25, 1.0]])


def test_save_then_load_is_the_identity(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 2))
    c = Coefficients(values, ("a", "b/c.pt", "d"), ("x", "y"), {"x.w": 0, "y.w": 1, "z": MEAN}, "first", {"t": "x.w"})
    save_coefficients(c, tmp_path / "c.safetensors")
    loaded = load_coefficients(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.values, values)
    assert {**loaded.__dict__, "values": 0} == {**c.__dict__, "values": 0}
    np.testing.assert_array_equal(loaded.of("z"), np.full(3, 1 / 3))
    np.testing.assert_array_equal(loaded.of("y.w"), values[:, 1])
    (tmp_path / "d.safetensors").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match=r"d\.safetensors cannot be read"):
        load_coefficients(tmp_path / "d.safetensors")


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    learn = Learn(lr=0.1, warmup=0.2)
    rates = [learning_rate(learn, step, 50) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 0.1 * np.arange(1, 11) / 10)
    assert max(rates) == rates[10] == 0.1
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 0.001
    assert {learning_rate(Learn(lr=0.1, cosine_lr=False), step, 50) for step in range(50)} == {0.1}


def test_noise_moves_nothing() -> None:
    gradient = np.array([[1.0, 1e-8, 0.01], [0.5, -1e-8, 0.0]])
    kept = without_noise(gradient)
    np.testing.assert_array_equal(kept[:, 1], 0)
    np.testing.assert_array_equal(kept[:, [0, 2]], gradient[:, [0, 2]])
    for optimizer in ("adamw", "sgd"):
        y = torch.zeros(2, 3, dtype=torch.float64)
        stepper = make_optimizer(Learn(optimizer=optimizer), y)
        y.grad = torch.from_numpy(kept)
        stepper.step()
        assert (y[:, 1] == 0).all()
        assert (y[:, 0] < 0).all()

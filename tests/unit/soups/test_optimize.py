from __future__ import annotations

import numpy as np
import torch

from ray_soup.mixing.coefficients import Affine, Softmax
from ray_soup.recipe import Learn
from ray_soup.soups.optimize import learning_rate, make_optimizer, parametrization, without_noise


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    learn = Learn(lr=0.1, cosine_lr=True, warmup=0.2)
    rates = [learning_rate(learn, 0.1, step, 50) for step in range(50)]
    np.testing.assert_allclose(rates[:10], 0.1 * np.arange(1, 11) / 10)
    assert max(rates) == rates[10] == 0.1
    assert (np.diff(rates[10:]) < 0).all()
    assert rates[-1] < 0.001
    assert {learning_rate(Learn(cosine_lr=False), 0.1, step, 50) for step in range(50)} == {0.1}


def test_blocks_whose_gradient_is_noise_do_not_move() -> None:
    gradient = np.array([[1.0, 1e-8, 0.01], [0.5, -1e-8, 0.0]])
    kept = without_noise(gradient)
    np.testing.assert_array_equal(kept[:, 1], 0)
    np.testing.assert_array_equal(kept[:, [0, 2]], gradient[:, [0, 2]])
    for optimizer in ("adamw", "sgd"):
        y = torch.zeros(2, 3, dtype=torch.float64)
        stepper = make_optimizer(Learn(optimizer=optimizer), 0.01, y)
        y.grad = torch.from_numpy(kept)
        stepper.step()
        assert (y[:, 1] == 0).all()
        assert (y[:, 0] < 0).all()


def test_the_parametrization_is_softmax_or_affine() -> None:
    norms = np.ones((2, 3))
    assert isinstance(parametrization(True, norms), Softmax)
    assert parametrization(False, norms).norms is norms
    assert isinstance(parametrization(False, norms), Affine)

"""learn.lr: auto, a rate that fits how far the ingredients differ and how many coordinates move."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import Affine
from ray_soup.recipe import Learn, dump_recipe, for_method, make_recipe
from ray_soup.soups.coordinates import LENGTH, Relative, largest_rate, moving_coordinates
from ray_soup.soups.report import figures
from ray_soup.soups.whitening import whitened
from tests.conftest import values
from tests.learning import Learner, assert_learns_as_autograd, same, stopping


def test_coordinates_and_back_is_the_identity_and_the_gradient_equals_autograd() -> None:
    random = np.random.default_rng(0)
    norms, y = random.uniform(0.01, 10, (5, 3)), random.standard_normal((5, 3))
    found = moving_coordinates(Learn(lr="auto"), False, norms, None, np.array([0, 2, 3]), y)
    assert isinstance(found, Relative)
    z, weight = random.standard_normal((3, 3)), random.standard_normal((3, 3))
    np.testing.assert_allclose(found.from_y(found.to_y(z)), z, rtol=1e-12)
    moving = torch.from_numpy(z).requires_grad_()
    x = moving * torch.from_numpy(norms.mean(axis=0)) / torch.from_numpy(norms[[0, 2, 3]])
    (torch.from_numpy(weight) * x.sin()).sum().backward()
    np.testing.assert_allclose(found.x(z), x.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.gradient(z, weight * np.cos(found.x(z))), moving.grad.numpy(), rtol=1e-9)


def test_the_first_step_moves_a_block_in_proportion_to_how_far_the_ingredients_differ_in_it() -> None:
    norms = np.array([[1.0, 100.0, 0.0], [3.0, 300.0, 0.0]])
    found = Relative(Affine(norms), moving_coordinates(Learn(lr="auto"), False, norms, None, np.arange(2), norms).spread)
    step = np.full((2, 3), largest_rate(Learn(lr="auto"), 6))
    assert np.linalg.norm(step) == pytest.approx(LENGTH)
    moved = np.abs(found.x(step)) * norms
    np.testing.assert_allclose(moved, np.array([[2.0, 200.0, 0.0]] * 2) * LENGTH / np.sqrt(6))


@pytest.mark.slow
@pytest.mark.parametrize("whiten", [False, True])
def test_learning_at_a_fitting_rate_equals_autograd(zoo: Path, tmp_path: Path, whiten: bool) -> None:
    learner = Learner(zoo, method="mehl", blocks="layer", learn__whiten=whiten, learn__lr="auto", learn__wd=0.1)
    norms = learner.store.norms
    matrices = np.broadcast_to(np.eye(8), (norms.shape[1], 8, 8))
    if whiten:
        matrices = whitened(norms, learner.pool.gram_of_blocks(), np.zeros_like(norms), True).matrices
    matrices = matrices * norms.mean(axis=0)[:, None, None]
    assert_learns_as_autograd(learner, tmp_path / "s.pt", matrices, LENGTH / np.sqrt(norms.size))


@pytest.mark.slow
def test_a_stopped_run_at_a_fitting_rate_is_bit_identical(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first turn and in the second, whose start is where the first one ended."""
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    changes: dict[str, Any] = {"learn__model_batch": 5, "learn__epochs": 1, "learn__lr": "auto"}
    learner = Learner(zoo, 2, learn__average=True, **changes)
    whole = learner.learn(tmp_path / "whole.pt")
    assert whole.y.any()
    for at in (3, 11):
        file = tmp_path / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            learner.learn(file, stopping(at))
        same(learner.learn(file), whole)


def test_the_value_is_for_adamw_on_the_hyperplane(zoo: Path) -> None:
    recipe = make_recipe(values(zoo, learn__lr="auto"))
    assert "lr: auto" in dump_recipe(recipe)
    assert for_method(recipe, "mehl").learn.lr == "auto"
    assert for_method(recipe, "learned+").learn.lr == 0.05
    for changes, found in (
        ({"method": "learned+"}, "method: learned+"),
        ({"learn__optimizer": "sgd"}, "learn.optimizer: sgd"),
    ):
        with pytest.raises(RecipeError, match=re.escape(f"learn.lr: found auto with {found}")):
            make_recipe(values(zoo, learn__lr="auto", **changes))


def test_a_trial_at_a_fitting_rate_is_not_drawn_on_the_plane_of_rates() -> None:
    first = {"learn.lr": "auto", "learn.model_batch": 8, "select_nll": 0.1}
    second = {"learn.lr": 0.1, "learn.model_batch": 4, "select_nll": 0.2}
    assert "0.2000" in figures.search_plane([first, second])
    assert figures.on_plane([first, {**second, "select_nll": None}], "select_nll") == []

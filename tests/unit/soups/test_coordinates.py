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
from ray_soup.soups.coordinates import FIXED, LENGTH, MOST, POWER, Relative, largest_rate, moving_coordinates
from ray_soup.soups.report import figures
from ray_soup.soups.whitening import whitened
from tests.conftest import values
from tests.learning import Learner, assert_learns_as_autograd, same, stopping


def unit_of(apart: np.ndarray) -> np.ndarray:
    """The unit of the coordinates in each block, float64 [B], where ingredients are this far apart."""
    return apart**POWER * np.sqrt(np.mean(apart**2)) ** (1 - POWER)


def test_coordinates_and_back_is_the_identity_and_the_gradient_equals_autograd() -> None:
    random = np.random.default_rng(0)
    norms, y = random.uniform(0.01, 10, (5, 3)), random.standard_normal((5, 3))
    found = moving_coordinates(Learn(lr="auto"), False, norms, None, np.array([0, 2, 3]), y)
    assert isinstance(found, Relative)
    z, weight = random.standard_normal((3, 3)), random.standard_normal((3, 3))
    np.testing.assert_allclose(found.from_y(found.to_y(z)), z, rtol=1e-12)
    moving = torch.from_numpy(z).requires_grad_()
    x = moving * torch.from_numpy(unit_of(np.median(norms, axis=0))) / torch.from_numpy(norms[[0, 2, 3]])
    (torch.from_numpy(weight) * x.sin()).sum().backward()
    np.testing.assert_allclose(found.x(z), x.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.gradient(z, weight * np.cos(found.x(z))), moving.grad.numpy(), rtol=1e-9)


def test_the_first_step_moves_a_block_the_farther_the_more_the_ingredients_differ_in_it() -> None:
    norms = np.array([[1.0, 100.0, 0.0], [3.0, 300.0, 0.0]])
    found = Relative(Affine(norms), moving_coordinates(Learn(lr="auto"), False, norms, None, np.arange(2), norms).unit)
    rate = largest_rate(Learn(lr="auto"), 600)
    assert np.linalg.norm(np.full(600, rate)) == pytest.approx(LENGTH)
    assert largest_rate(Learn(lr="auto"), 6) == MOST < LENGTH / np.sqrt(6)
    step = np.full((2, 3), rate)
    moved = np.abs(found.x(step)) * norms
    units = unit_of(np.array([2.0, 200.0, 0.0]))
    np.testing.assert_allclose(moved, np.array([units] * 2) * rate)
    assert 2.0 < units[0] < units[1] < 200.0


def test_one_ingredient_far_from_all_others_does_not_change_the_unit() -> None:
    """Nor do the inner products tell another distance than the parameters themselves."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((9, 40))
    found = []
    for scale in (1.0, 1000.0):
        vectors[-1] *= scale
        directions = vectors - vectors.mean(axis=0)
        gram, norms = (directions @ directions.T)[None], np.linalg.norm(directions, axis=1)[:, None]
        of = moving_coordinates(Learn(lr="auto"), False, norms, gram, np.arange(9), np.zeros((9, 1)))
        pairs = [np.linalg.norm(a - b) for n, a in enumerate(vectors) for b in vectors[:n]]
        np.testing.assert_allclose(of.unit, np.sqrt(np.median(np.square(pairs)) / 2), rtol=1e-6)
        found.append(of.unit)
    assert found[1] < 1.5 * found[0]


def test_copies_do_not_make_the_unit_vanish_or_jump() -> None:
    """Of six ingredients, five are equal: most pairs are at distance 0."""
    vectors = np.zeros((6, 10))
    vectors[0] = 1e-3
    directions = vectors - vectors.mean(axis=0)
    of = moving_coordinates(
        Learn(lr="auto"), False, np.linalg.norm(directions, axis=1)[:, None], (directions @ directions.T)[None],
        np.arange(6), np.zeros((6, 1)),
    )  # fmt: skip
    assert 0 < of.unit[0] < np.linalg.norm(vectors[0])


@pytest.mark.slow
@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_learning_at_a_fitting_rate_equals_autograd(zoo: Path, tmp_path: Path, whiten: float) -> None:
    learner = Learner(zoo, method="mehl", blocks="layer", learn__whiten=whiten, learn__lr="auto", learn__wd=0.1)
    norms = learner.store.norms
    apart = np.median(norms, axis=0)
    matrices = np.broadcast_to(np.eye(8), (norms.shape[1], 8, 8))
    if whiten:
        gram = learner.pool.gram_of_blocks()
        matrices = whitened(norms, gram, np.zeros_like(norms), True, whiten).matrices
        one, other = np.triu_indices(8, 1)
        squares = gram[:, one, one] + gram[:, other, other] - 2 * gram[:, one, other]
        apart = np.median(np.sqrt(squares / 2), axis=1)
    matrices = matrices * unit_of(apart)[:, None, None]
    assert_learns_as_autograd(learner, tmp_path / "s.pt", matrices, min(LENGTH / np.sqrt(norms.size), MOST))


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


def test_the_value_is_for_the_hyperplane_and_fits_a_rate_to_adamw_only(zoo: Path) -> None:
    recipe = make_recipe(values(zoo, learn__lr="auto"))
    assert "lr: auto" in dump_recipe(recipe)
    assert for_method(recipe, "mehl").learn.lr == "auto"
    assert for_method(recipe, "learned+").learn.lr == 0.05
    with pytest.raises(RecipeError, match=re.escape("learn.lr: found auto with method: learned+")):
        make_recipe(values(zoo, learn__lr="auto", method="learned+"))
    sgd = Learn(optimizer="sgd")
    assert largest_rate(sgd, 6) == FIXED
    assert isinstance(moving_coordinates(sgd, False, np.ones((3, 2)), None, np.arange(3), np.zeros((3, 2))), Affine)


def test_a_trial_at_a_fitting_rate_is_not_drawn_on_the_plane_of_rates() -> None:
    first = {"learn.lr": "auto", "learn.model_batch": 8, "select_nll": 0.1}
    second = {"learn.lr": 0.1, "learn.model_batch": 4, "select_nll": 0.2}
    assert "0.2000" in figures.search_plane([first, second])
    assert figures.on_plane([first, {**second, "select_nll": None}], "select_nll") == []

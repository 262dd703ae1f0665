"""learn.whiten: coordinates in which the directions of a block are orthonormal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.recipe import dump_recipe, for_method, make_recipe
from ray_soup.soups.state import load_state
from ray_soup.soups.turns import model_batches
from ray_soup.soups.whitening import FLOOR, Whitened, whitened
from tests.conftest import values
from tests.learning import Learner, assert_learns_as_autograd, same, stopping

Directions = list[np.ndarray]
"""The directions of each block, float64 [m, n] each."""


def of(directions: Directions, y: np.ndarray | None = None, sum_to_zero: bool = False) -> Whitened:
    norms = np.stack([np.linalg.norm(d, axis=1) for d in directions], axis=1)
    gram = np.stack([d @ d.T for d in directions])
    return whitened(norms, gram, np.zeros_like(norms) if y is None else y, sum_to_zero)


def moved(whitened: Whitened, directions: Directions, z: np.ndarray) -> list[np.ndarray]:
    """How far z moves the parameters of each block."""
    return [x @ d for x, d in zip(whitened.x(z).T, directions, strict=True)]


def random_directions(seed: int = 0, count: int = 5) -> Directions:
    random = np.random.default_rng(seed)
    return [random.standard_normal((count, n)) * random.uniform(0.01, 10, (count, 1)) for n in (40, 7, 200)]


def test_a_unit_of_z_moves_the_soup_by_one_in_every_direction() -> None:
    directions = random_directions()
    found = of(directions)
    z = np.random.default_rng(1).standard_normal((5, 3))
    lengths = [np.linalg.norm(move) for move in moved(found, directions, z)]
    np.testing.assert_allclose(lengths, np.linalg.norm(z, axis=0), rtol=1e-9)


def test_the_gradient_equals_autograd() -> None:
    directions, random = random_directions(), np.random.default_rng(2)
    found = of(directions, random.standard_normal((5, 3)))
    z, weight = random.standard_normal((5, 3)), random.standard_normal((5, 3))
    moving = torch.from_numpy(z).requires_grad_()
    y = torch.from_numpy(found.rest) + torch.einsum("bij,jb->ib", torch.from_numpy(found.matrices), moving)
    x = y / torch.from_numpy(found.norms)
    (torch.from_numpy(weight) * x.sin()).sum().backward()
    np.testing.assert_allclose(found.x(z), x.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.gradient(z, weight * np.cos(found.x(z))), moving.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_a_step_does_not_depend_on_a_linear_mixing_of_the_directions() -> None:
    """A step down the gradient moves the parameters in the same way, whatever basis of their span the directions are."""
    random = np.random.default_rng(3)
    directions = [d / np.linalg.norm(d, axis=1, keepdims=True) for d in random_directions()]
    mixing = np.eye(5) + 0.2 * random.standard_normal((5, 5))
    gradients = [random.standard_normal(d.shape[1]) for d in directions]
    steps = []
    for basis in (directions, [mixing @ d for d in directions], [d[::-1] for d in directions]):
        found, z = of(basis), np.zeros((5, 3))
        by_x = np.stack([d @ g for d, g in zip(basis, gradients, strict=True)], axis=1)
        steps.append(moved(found, basis, z - 0.1 * found.gradient(z, by_x)))
    for other in steps[1:]:
        for one, same_step in zip(steps[0], other, strict=True):
            np.testing.assert_allclose(same_step, one, rtol=1e-7, atol=1e-9)


def test_a_turn_begins_where_y_is() -> None:
    """Also with directions that sum to zero, equal ones, and a block in which one of them is zero."""
    directions = random_directions(4)
    directions[0] -= directions[0].mean(axis=0)
    directions[1][2] = directions[1][0]
    directions[2][4] = 0
    y = np.random.default_rng(5).standard_normal((5, 3))
    found = of(directions, y)
    z = found.from_y(y)
    np.testing.assert_allclose(found.to_y(z), y, rtol=1e-12)
    np.testing.assert_allclose(of(directions).to_y(np.zeros((5, 3))), 0)
    assert np.isfinite(found.matrices).all()
    for block in (0, 1, 2):  # what z does not express has no effect
        assert (
            np.linalg.norm((found.rest[:, block] / np.where(found.norms, found.norms, np.inf)[:, block]) @ directions[block])
            < 1e-6
        )


def test_near_duplicates_do_not_blow_up() -> None:
    directions = random_directions(6)
    for d in directions:
        d[1] = d[0] * (1 + 1e-4 * np.random.default_rng(7).standard_normal(d.shape[1]))
        d[3] *= 1e6  # one that has diverged does not hide the others
    found = of(directions)
    largest = [np.linalg.eigvalsh(d @ d.T / np.outer(n, n)).max() for d, n in zip(directions, found.norms.T, strict=True)]
    assert (np.linalg.norm(found.matrices, 2, axis=(1, 2)) <= 1.001 / np.sqrt(FLOOR * np.array(largest))).all()
    z = np.zeros((5, 3))
    z[2] = 1
    assert min(np.linalg.norm(move) for move in moved(found, directions, z)) > 0.9


def test_the_sum_of_all_directions_is_no_direction() -> None:
    """What compression leaves of it is not whitened."""
    directions = random_directions(8)
    for d in directions:
        d -= d.mean(axis=0)
    exact = of(directions, sum_to_zero=True)
    rounded = of(
        [d + 1e-3 * np.abs(d).mean() * np.random.default_rng(9).standard_normal(d.shape) for d in directions],
        sum_to_zero=True,
    )
    ones = exact.norms
    for found in (exact, rounded):
        z = found.gradient(np.zeros((5, 3)), found.norms * found.norms)
        assert np.abs(z).max() < 1e-6 * np.abs(ones**2).max()


@pytest.mark.parametrize("blocks", ["tensor", "layer"])
def test_the_products_of_blocks_are_those_of_the_ingredients_and_sum_to_the_products(zoo: Path, blocks: str) -> None:
    learner = Learner(zoo, 2, blocks=blocks)
    found = learner.pool.gram_of_blocks()
    assert found.shape == (learner.store.partition.count, 8, 8)
    np.testing.assert_allclose(found.sum(axis=0), learner.pool.gram(), rtol=1e-5, atol=1e-6 * found.max())
    np.testing.assert_allclose(np.sqrt(np.einsum("bkk->kb", found)), learner.store.norms, rtol=1e-4)


@pytest.mark.slow
def test_learning_on_whitened_coordinates_equals_autograd(zoo: Path, tmp_path: Path) -> None:
    learner = Learner(zoo, method="mehl", blocks="layer", learn__whiten=1.0, learn__lr=0.05, learn__wd=0.1)
    norms = learner.store.norms
    matrices = whitened(norms, learner.pool.gram_of_blocks(), np.zeros_like(norms), True).matrices
    assert_learns_as_autograd(learner, tmp_path / "s.pt", matrices, 0.05)


@pytest.mark.slow
def test_a_stopped_run_on_whitened_coordinates_is_bit_identical(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second turn, whose start is where the first one ended; and in a refit. The sums are kept with the state."""
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    changes: dict[str, Any] = {"learn__model_batch": 5, "learn__models_epochs": 2, "learn__epochs": 1, "learn__lr": 0.1}
    learner = Learner(zoo, 2, learn__whiten=1.0, learn__average=True, learn__refit=True, **changes)
    whole = learner.learn(tmp_path / "whole.pt")
    assert whole.y.any()
    assert len(model_batches(8, 5, 1, 2)) == 4
    for at in (11, 27, whole.steps - 3):
        file = tmp_path / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            learner.learn(file, stopping(at))
        assert load_state(file, shape=tuple(whole.y.shape)).gram.shape == (whole.y.shape[1], 8, 8)
        with monkeypatch.context() as patch:
            patch.setattr(learner.pool, "gram_of_blocks", None)
            same(learner.learn(file), whole)
    other = Learner(zoo, 1, learn__whiten=1.0, learn__average=True, learn__refit=True, **changes).learn(tmp_path / "one.pt")
    np.testing.assert_allclose(other.y.numpy(), whole.y.numpy(), rtol=1e-3, atol=1e-4)


def test_the_key_is_for_methods_on_the_hyperplane(zoo: Path) -> None:
    assert "whiten: 0.0" in dump_recipe(make_recipe(values(zoo)))
    recipe = make_recipe(values(zoo, learn__whiten=1.0))
    assert "whiten: 1.0" in dump_recipe(recipe)
    assert for_method(recipe, "mehl").learn.whiten
    assert not for_method(recipe, "learned+").learn.whiten
    with pytest.raises(RecipeError, match=r"learn\.whiten: found 1 with method: learned\+, which has no directions"):
        make_recipe(values(zoo, method="learned+", learn__whiten=1.0))

"""Trials that follow one another in a process share their actors, and learn what each of them learns alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import SoupError
from ray_soup.io.ingredient import Ingredient
from ray_soup.recipe import Recipe, make_recipe, with_changes
from ray_soup.soups.model_batch import requested_model_batch
from ray_soup.soups.state import load_state
from ray_soup.tune import trainable
from tests.conftest import values


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[InProcessPool]:
    """Trials without Tune and Ray; the value lists the pools that they make."""
    pools: list[InProcessPool] = []

    def pool(recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, cpus: float) -> InProcessPool:
        pools.append(InProcessPool(recipe, ingredients, mesh, int(cpus)))
        return pools[-1]

    def trial_mesh(recipe: Recipe, parameters: int, ingredients: int) -> tuple[Mesh, float, int]:
        return Mesh(1, 1), 1, requested_model_batch(recipe, ingredients)

    monkeypatch.setattr(trainable, "RayPool", pool)
    monkeypatch.setattr(trainable, "trial_mesh", trial_mesh)
    monkeypatch.setattr(trainable, "recording", lambda pool, method: nullcontext())
    monkeypatch.setattr(trainable.tune, "report", lambda metrics, checkpoint: None)
    monkeypatch.setattr(trainable, "_KEPT", [])
    return pools


@pytest.mark.filterwarnings("ignore:overflow")  # of the trial that fails
def test_trials_share_actors_that_suit_them_and_learn_what_they_learn_alone(
    zoo: Path, tmp_path: Path, made: list[InProcessPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(values(zoo))

    def learned(name: str, **config: Any) -> np.ndarray:
        file = tmp_path / f"{name}.pt"
        trainable._learn(with_changes(recipe, config), file, lambda: None)
        found: np.ndarray = load_state(file).y.numpy()
        return found

    fast = {"learn.lr": 0.05}
    other = {
        "learn.lr": 0.02,
        "learn.model_batch": 4,
        "learn.seed": 7,
        "learn.epochs": 1,
        "learn.wd": 0.1,
        "learn.whiten": 0.0,
    }
    first = learned("first", **fast)
    together = learned("together", **other)

    def stop(metrics: dict[str, Any], checkpoint: None) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(trainable.tune, "report", stop)
        with pytest.raises(SystemExit):  # as Tune stops a trial
            learned("stopped", **{"learn.lr": 0.5})
    np.testing.assert_array_equal(learned("again", **fast), first)
    assert len(made) == 1

    learned("batches", **{"learn.batch_size": 100})  # which actors read
    assert len(made) == 2
    assert not made[0].shards
    with pytest.raises(SoupError, match="The loss is not finite"):
        learned("failed", **{"learn.batch_size": 100, "learn.lr": 1e300})
    assert not made[1].shards
    np.testing.assert_array_equal(learned("alone", **other), together)
    assert len(made) == 3
    with pytest.raises(SoupError, match="does not exist"):  # before it has actors of its own
        learned("missing", ingredients=["none.safetensors"])
    assert not made[2].shards
    assert not trainable._KEPT

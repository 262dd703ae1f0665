"""learn.average: the point that an epoch leads to is the mean of its iterates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.recipe import dump_recipe, for_method, make_recipe
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.state import PLAIN_VERSION, VERSION, LearnState, load_state
from tests.conftest import values
from tests.learning import Learner, same, stopping


@pytest.mark.parametrize("method", ["mehl+", "learned+"])
def test_what_is_evaluated_and_kept_is_the_mean_of_the_iterates_of_an_epoch(zoo: Path, tmp_path: Path, method: str) -> None:
    changes: dict[str, Any] = {"method": method, "learn__epochs": 3, "learn__lr": 0.1, "learn__cosine_lr": False}
    learner = Learner(zoo, learn__average=True, **changes)
    iterates: list[tuple[np.ndarray, float]] = []

    def note(step: int, steps: int, state: LearnState) -> None:
        assert state.moving is not None
        iterates.append((state.moving.numpy().copy(), state.factor.item()))

    state = learner.learn(tmp_path / "average.pt", note)
    plain = Learner(zoo, learn__average=False, **changes).learn(tmp_path / "plain.pt")
    assert [line["steps"] for line in state.curve] == [0, 8, 16, 24]
    means = [[np.mean([one[n] for one in iterates[first : first + 8]], axis=0) for n in (0, 1)] for first in (0, 8, 16)]
    kept = min(range(1, 4), key=lambda n: state.curve[n]["select_nll"])
    assert state.curve[kept]["select_nll"] < state.curve[0]["select_nll"]
    np.testing.assert_allclose(state.y.numpy(), means[kept - 1][0], rtol=1e-12, atol=1e-15)
    assert state.factor.item() == pytest.approx(means[kept - 1][1], rel=1e-12)
    of = parametrization(method == "learned+", learner.store.norms)
    learner.pool.begin(np.arange(8), np.zeros_like(learner.store.norms, np.float32), "float32")
    for line, (mean, factor) in zip(state.curve[1:], means, strict=True):
        score = learner.pool.evaluate(of.x(mean).astype(np.float32), float(factor), learner.splits["select"])
        assert line["select_nll"] == pytest.approx(score.nll, rel=1e-9)
    first = [line["fit_nll"] for line in plain.curve[1:]]
    assert [line["fit_nll"] for line in state.curve[1:]] == first, "the optimizer continues from its own point"
    assert [line["select_nll"] for line in state.curve[1:]] != [line["select_nll"] for line in plain.curve[1:]]


@pytest.mark.parametrize("at", [6, 8, 11])
def test_a_run_that_was_stopped_has_the_same_mean(
    conv_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In the middle of an epoch, after its last step, and in the next turn; running statistics are re-estimated, too."""
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    changes: dict[str, Any] = {"learn__model_batch": 2, "learn__batch_size": 112, "learn__lr": 0.1}
    learner = Learner(conv_zoo, calibrated=112, learn__average=True, model="tests.tiny:build_conv", **changes)
    whole = learner.learn(tmp_path / "whole.pt")
    assert whole.steps == 16
    assert whole.image_passes == 4 * 448 + 2 * 4 * 112  # at the start of a turn, twice after its first epoch, after its last
    with pytest.raises(KeyboardInterrupt):
        learner.learn(tmp_path / "cut.pt", stopping(at))
    saved = load_state(tmp_path / "cut.pt")
    assert saved.steps == at - 1
    assert saved.total is not None
    same(learner.learn(tmp_path / "cut.pt"), whole)
    assert whole.y.any()


def test_a_state_without_a_mean_is_what_earlier_versions_wrote(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    for average, version in ((False, PLAIN_VERSION), (True, VERSION)):
        file = tmp_path / f"{average}.pt"
        with pytest.raises(KeyboardInterrupt):
            Learner(zoo, learn__average=average).learn(file, stopping(3))
        found = torch.load(file, weights_only=True)
        assert found["version"] == version
        assert ("total" in found, "total_factor" in found) == (average, average)


def test_the_key_is_dumped_and_carries_over_to_every_method(zoo: Path) -> None:
    assert "average: false" in dump_recipe(make_recipe(values(zoo)))
    recipe = make_recipe(values(zoo, learn__average=True))
    assert "average: true" in dump_recipe(recipe)
    assert for_method(recipe, "learned").learn.average

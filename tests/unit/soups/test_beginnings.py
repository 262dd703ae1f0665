"""learn.screen: learning begins at the mean of the best ingredients where the uniform soup is spoiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ray_soup.mixing.coefficients import Affine
from ray_soup.soups.beginnings import means_of_the_best
from ray_soup.soups.report.statistics import is_better
from ray_soup.soups.start import began_note, began_record
from ray_soup.soups.state import load_state
from ray_soup.task.outcomes import Outcome
from tests.learning import Learner, same, stopping


@pytest.fixture
def broken(zoo: Path, tmp_path: Path) -> list[str]:
    """Six good ingredients, and two with weights as large as theirs that have learned nothing."""
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(6)]
    random = torch.Generator().manual_seed(0)
    for k in (6, 7):
        state = load_file(zoo / "zoo" / f"model_{k}.safetensors")
        state = {n: t.std() * torch.randn(t.shape, generator=random) if t.ndim > 1 else t for n, t in state.items()}
        paths.insert(0, str(tmp_path / f"broken_{k}.safetensors"))
        save_file(state, paths[0])
    return paths


def test_means_of_the_best() -> None:
    norms = np.random.default_rng(0).uniform(1, 2, (7, 3))
    order, names = [4, 0, 6, 2, 1, 5, 3], list("abcdefg")
    found = means_of_the_best(order, names, norms)
    assert [begin.about["mean_of"] for begin in found] == [["e", "a", "g", "c"], ["e", "a"], ["e"]]
    for begin in found:
        c = Affine(norms).coefficients(begin.y)
        expected = np.isin(np.arange(7), [names.index(name) for name in begin.about["mean_of"]])
        np.testing.assert_allclose(c, np.repeat(expected[:, None], 3, axis=1) / expected.sum(), atol=1e-12)


def test_learning_begins_without_broken_ingredients_and_a_stopped_run_is_bit_identical(
    broken: list[str], zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    learner = Learner(zoo, ingredients=broken, learn__epochs=1)
    names = learner.pool.inputs.names
    begins = means_of_the_best([2, 3, 4, 5, 6, 7, 0, 1], names, learner.store.norms)
    whole = learner.learn(tmp_path / "whole.pt", starts=begins)
    assert whole.began["used"]
    assert whole.curve[0]["select_nll"] == pytest.approx(whole.began["select_nll"], rel=1e-6)
    assert whole.began["select_nll"] < whole.began["uniform_select_nll"]
    record = began_record(begins, whole)
    assert record["used"]
    assert not any("broken" in name for name in record["mean_of"])
    assert "learning began from" in began_note("mehl+", begins, whole)[0]
    for at in (1, whole.steps - 1):
        file = tmp_path / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            learner.learn(file, stopping(at), starts=begins)
        assert load_state(file).start is not None
        same(learner.learn(file, starts=begins), whole)


def test_worse_means_change_nothing(zoo: Path, tmp_path: Path) -> None:
    learner = Learner(zoo, learn__epochs=1)
    far = means_of_the_best(range(8), learner.pool.inputs.names, 30 * learner.store.norms)  # far beyond the ingredients
    found, plain = (learner.learn(tmp_path / f"{len(begins)}.pt", starts=begins) for begins in (far, []))
    assert not found.began["used"]
    assert torch.equal(found.y, plain.y)
    assert found.curve == plain.curve
    assert began_note("mehl+", far, found) == []


@settings(deadline=None, max_examples=20)  # each takes ten bootstraps
@given(st.integers(2, 200), st.floats(-1, 1), st.integers(0, 10**6))
def test_only_one_of_two_is_better(count: int, shift: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (Outcome(random.exponential(size=count) + by, random.random(count) < 0.5) for by in (0, shift))
    for select_by in ("auto", "nll", "accuracy", "metric"):
        assert not is_better(a, a, select_by)
        assert not (is_better(a, b, select_by) and is_better(b, a, select_by))
    certain = Outcome(np.minimum(a.loss, b.loss) - 1 - random.random(count))  # better on each example
    assert is_better(certain, a, "nll")
    assert not is_better(a, certain, "nll")

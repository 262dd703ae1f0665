"""Candidates of a greedy search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.in_memory import mix_state_dicts
from ray_soup.task.data import Split
from tests.conftest import InProcess, values
from tests.tiny import TinyConv, digits


def test_a_candidate_is_the_same_on_any_actor(zoo: Path) -> None:
    """On an actor that has mixed nothing yet, one that went through the search, and one that went another way."""
    recipe = make_recipe(values(zoo, method="greedy"))
    split = [Split("fit", np.arange(200, dtype=np.int32))]
    old, new, fresh = InProcess(recipe), InProcess(recipe), InProcess(recipe)
    old.try_candidate((4,), 1, split)
    old.try_candidate((4,), 2, split)
    old.try_candidate((4, 2), 0, split)
    old.try_candidate((4, 2, 0), 7, split)
    new.try_candidate((3,), 5, split)
    correct = fresh.try_candidate((4, 2, 0), 7, split)
    assert old.try_candidate((4, 2, 0), 7, split) == new.try_candidate((4, 2, 0), 7, split) == correct
    theta = old.shards[0].replica.theta
    assert torch.equal(theta, new.shards[0].replica.theta)
    assert torch.equal(theta, fresh.shards[0].replica.theta)
    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in (4, 2, 0, 7)]
    for name, start, stop in old.layout.spans():
        mean = torch.stack([s[name].double().view(-1) for s in states]).mean(0).float()
        torch.testing.assert_close(theta[start:stop], mean, rtol=1e-6, atol=1e-9)


def test_a_search_that_starts_over_forgets_its_sum(zoo: Path) -> None:
    recipe, split = make_recipe(values(zoo, method="greedy")), [Split("fit", np.arange(50, dtype=np.int32))]
    pool, fresh = InProcess(recipe), InProcess(recipe)
    pool.try_candidate((4,), 2, split)
    pool.forget()
    pool.try_candidate((4, 2), 0, split)
    fresh.try_candidate((4, 2), 0, split)
    assert torch.equal(pool.shards[0].replica.theta, fresh.shards[0].replica.theta)


class Counting(TinyConv):
    """BatchNorm layers, and a counter of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))


def test_integers_that_differ_are_those_of_the_first_ingredient_beside_re_estimated_statistics(
    conv_zoo: Path, tmp_path: Path
) -> None:
    """The first by position, as in the soup that is written, in whatever order the search kept ingredients."""
    for k in range(4):
        state = load_file(conv_zoo / "zoo" / f"model_{k}.safetensors")
        save_file({**state, "steps": torch.tensor(10 * k)}, tmp_path / f"model_{k}.safetensors")
    changes = {"ingredients": str(tmp_path), "model": "tests.unit.actors.test_candidates:Counting"}
    pool = InProcess(make_recipe(values(conv_zoo, method="greedy", **changes)))
    (note,) = pool.inputs.notes
    assert note.startswith("Integer buffers differ between ingredients and have no mean: steps, as in")
    assert pool.inputs.recalibrated(pool.shards[0].recipe) == ("norm", "norm1d")
    split = Split("fit", np.arange(61, dtype=np.int32))
    pool.try_candidate((3, 1), 2, [split], [split])
    model = pool.shards[0].replica.model
    assert model.steps == 10
    states = [load_file(tmp_path / f"model_{k}.safetensors") for k in (1, 2, 3)]
    averaged = torch.stack([state["norm.running_mean"] for state in states]).mean(0)
    assert not torch.allclose(model.norm.running_mean, averaged, atol=1e-4)  # it was re-estimated


def test_a_soup_of_integers_that_differ_is_made_in_memory(conv_zoo: Path) -> None:
    loaded = [load_file(conv_zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    states = [{**state, "steps": torch.tensor(5 + k)} for k, state in enumerate(loaded)]
    images, labels = (torch.from_numpy(array[600:800]) for array in digits())
    soup = mix_state_dicts(Counting(), states, [(images, labels)], method="uniform")
    assert soup.state_dict()["steps"] == 5
    assert any(note.startswith("Integer buffers differ") for note in soup.notes)


@pytest.mark.parametrize("out_dtype", ["keep", "float16"])
def test_a_mixture_is_bit_for_bit_the_model_that_bake_writes(zoo: Path, tmp_path: Path, out_dtype: str) -> None:
    """With weights of any sign, some of them zero, and whatever was mixed before."""
    recipe = make_recipe(values(zoo, method="greedy", out_dtype=out_dtype))
    pool, split = InProcess(recipe, 2), [Split("fit", np.arange(149, dtype=np.int32))]
    weights = np.array([0.5, 0, -0.25, 0.125, 0, 0.5, 0.125, 0])
    pool.try_candidate((4,), 2, split)
    found = pool.try_mixture(weights, split)
    layout = pool.layout
    coefficients = Coefficients(weights[:, None], pool.inputs.names, ("model",), dict.fromkeys(layout.names, 0))
    bake(coefficients, list(pool.inputs.ingredients), tmp_path / "model.safetensors", out_dtype=out_dtype)
    state = load_file(tmp_path / "model.safetensors")
    for shard in pool.shards:
        model = shard.replica.model.state_dict()
        assert all(torch.equal(model[name], tensor.to(model[name].dtype)) for name, tensor in state.items())
    (outcome,) = pool.evaluate_file(str(tmp_path / "model.safetensors"), split)
    assert found.nll == pytest.approx(outcome.nll, rel=1e-6)
    assert found.correct == outcome.correct.sum()
    fresh = InProcess(recipe)
    pool.try_candidate((4, 2), 0, split)
    fresh.try_candidate((4, 2), 0, split)
    assert torch.equal(pool.shards[0].replica.theta, fresh.shards[0].replica.theta)


def test_running_statistics_of_a_mixture_are_re_estimated(conv_zoo: Path) -> None:
    recipe = make_recipe(values(conv_zoo, model="tests.tiny:build_conv", method="greedy"))
    pool, split = InProcess(recipe), Split("fit", np.arange(61, dtype=np.int32))
    pool.try_candidate((0,), 2, [split], [split])
    by_candidate = {n: t.clone() for n, t in pool.shards[0].replica.model.state_dict().items() if t.is_floating_point()}
    pool.try_mixture(np.array([0.5, 0, 0.5, 0]), [split], [split])
    for name, tensor in pool.shards[0].replica.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, by_candidate[name], rtol=1e-5, atol=1e-6)
    pool.try_mixture(np.array([0, 1.0, 0, 0]), [split], [split])  # one ingredient keeps its own
    state = load_file(conv_zoo / "zoo" / "model_1.safetensors")
    assert all(torch.equal(t, state[n]) for n, t in pool.shards[0].replica.model.state_dict().items())

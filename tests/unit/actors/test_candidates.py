"""Candidates of a greedy search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ray_soup.recipe import make_recipe
from ray_soup.task.data import Split
from tests.conftest import InProcess, values


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

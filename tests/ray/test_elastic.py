"""A run whose actors come and go: the same bits on four of them, on one, and on those that are there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_soup.actors import placement, recovery
from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.learn import learn
from ray_soup.soups.state import LearnState, ignore_state
from ray_soup.task.data import cut_splits
from tests.conftest import values
from tests.ray.others import all_cpus, held

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


def learned(pool: RayPool, recipe: Recipe, file: Path, after_step: Callable[..., Any], told: list[str]) -> LearnState:
    """What a run learns with this pool, which is set up here."""

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("note: "):
            told.append(what.removeprefix("note: "))

    setup = pool.setup(progress)
    store = pool.open_store(tuple(range(8)), recipe.blocks, progress)
    splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
    return learn(recipe, pool, store.norms, splits, 5, file, after_step)


def reach(pool: RayPool, actors: int) -> None:
    """Call the pool until this many actors serve it."""
    deadline = time.monotonic() + 300
    while pool.counts.actors < actors:
        assert time.monotonic() < deadline
        pool.peak_memory()


def test_a_run_on_four_actors_then_on_one_then_on_three_has_the_bits_of_any_other(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors are killed while another program takes their room, which it gives back in part later."""
    import ray

    monkeypatch.setattr(recovery, "SLOW", math.inf)  # an actor that is slow on a busy machine keeps its replicas
    cpus, found, told, served = all_cpus() / 4, dict[str, LearnState](), dict[str, list[str]](), list[int]()
    recipe = make_recipe(values(zoo, learn__epochs=4, actors={"replicas": 4, "cpus": cpus}))
    ingredients = open_inputs(recipe).ingredients
    for name in ("four", "one", "changing"):
        deadline = time.monotonic() + 180
        while placement.teams_with_room(recipe, 1, cpus) < 4:  # the actors of the run before have ended
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pool, told[name] = RayPool(recipe, ingredients, Mesh(4, 1), cpus), []
        with ExitStack() as stack:
            stack.callback(pool.close)
            holders = [stack.enter_context(ExitStack()) for _ in range(3)]

            def change(step: int, *_: object, pool: RayPool = pool, holders: list[ExitStack] = holders) -> None:
                served.append(pool.counts.actors)
                if step == 5:
                    reach(pool, 4)
                elif step == 10:
                    for actor in set(pool.handles) - {pool.handles[0]}:
                        ray.kill(actor)
                    for holder in holders:
                        holder.enter_context(held(cpus))
                elif step == 20:
                    for holder in holders[1:]:
                        holder.close()
                    reach(pool, 3)

            if name == "one":
                for holder in holders:
                    holder.enter_context(held(cpus))
            after_step = change if name == "changing" else ignore_state
            found[name] = learned(pool, recipe, tmp_path / f"{name}.pt", after_step, told[name])
            assert name != "one" or pool.counts.actors == 1
            if name == "changing":
                assert (pool.counts.lost, pool.counts.actors) == (3, 3)
    assert {served[8], served[15], served[-1]} == {4, 1, 3}
    for name in ("one", "changing"):
        np.testing.assert_array_equal(found[name].y, found["four"].y)
        assert found[name].curve == found["four"].curve
    assert found["four"].y.any()
    assert told["one"] == [
        "1 actor serves all 4 replicas, one after another: the cluster has no room for 3 more now. They start when it has; "
        "the result does not change."
    ]
    assert any("replicas 1, 2 and 3 moved to actor " in sentence for sentence in told["changing"])
    assert sum("has joined the run and serves" in sentence for sentence in told["changing"]) >= 2

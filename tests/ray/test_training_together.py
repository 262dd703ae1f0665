"""Actors that train all weights together: the steps of one actor, and the same bits after one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ray_soup.actors.messages import Mesh, TrainingJob
from ray_soup.actors.on_ray import RayPool
from ray_soup.io.progress import no_progress
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.data import Split
from tests.conftest import InProcess, values

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


@pytest.fixture(params=[Mesh(2, 1), Mesh(1, 2)], ids=["replicas", "shards"])
def pool(request: pytest.FixtureRequest, conv_zoo: Path, cluster: None) -> Iterator[RayPool]:
    recipe = make_recipe(values(conv_zoo, model="tests.tiny:build_conv", learn__micro_batch=16))
    pool = RayPool(recipe, open_inputs(recipe).ingredients, request.param, 1)
    pool.setup(no_progress)
    yield pool
    pool.close()


def test_two_actors_take_the_steps_of_one_and_survive_a_loss(pool: RayPool, conv_zoo: Path, tmp_path: Path) -> None:
    import ray

    fit, select = Split("fit", np.arange(0, 449, dtype=np.int32)), Split("fit", np.arange(449, 597, dtype=np.int32))
    calibration = tuple(Split("fit", np.arange(n, n + 64, dtype=np.int32)) for n in range(0, 192, 64))
    start = str(conv_zoo / "zoo" / "model_0.safetensors")
    job = TrainingJob(
        "training", start, str(tmp_path / "two"), "task", 0.003, 0.0, 3, 101, 1, "float32", fit, select, calibration
    )
    two = pool.train(job, no_progress)
    alone = InProcess(make_recipe(values(conv_zoo, model="tests.tiny:build_conv", learn__micro_batch=16)))
    one = alone.train(replace(job, stem=str(tmp_path / "one")), no_progress)
    for ours, theirs in zip(two.curve, one.curve, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert (two.epoch, two.steps, two.image_passes) == (one.epoch, one.steps, one.image_passes)
    assert two.epoch >= 0
    a, b = load_file(two.difference), load_file(one.difference)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=1e-4)

    killed: list[int] = []

    def killing(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", 7) and not killed:
            killed.append(done)
            ray.kill(pool.handles[1])

    again = pool.train(replace(job, stem=str(tmp_path / "killed")), killing)
    assert killed
    assert replace(again, difference="") == replace(two, difference="")
    c = load_file(again.difference)
    assert all(torch.equal(c[name], a[name]) for name in a)

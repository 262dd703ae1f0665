"""What only a pool on Ray has: placement on the nodes of a cluster, and replicas of several shards."""

from __future__ import annotations

import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from ray_soup.actors import placement
from ray_soup.actors.messages import Mesh
from ray_soup.actors.on_ray import RayPool
from ray_soup.actors.placement import resolve_mesh
from ray_soup.errors import IngredientError, RecipeError, explain
from ray_soup.io.progress import no_progress
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.data import Split
from tests.conftest import children_called, values
from tests.ray.others import all_cpus, held

pytestmark = pytest.mark.usefixtures("cluster")


def test_a_mesh_that_the_cluster_cannot_place_is_refused(zoo: Path) -> None:
    """Room for one replica is enough."""
    recipe = make_recipe(values(zoo, actors={"replicas": 50, "shards": 2, "cpus": 1}))
    assert resolve_mesh(recipe, 1000, 8) == (Mesh(50, 2), 1)
    recipe = make_recipe(values(zoo, actors={"replicas": 2, "shards": 50, "cpus": 1}))
    with pytest.raises(RecipeError, match="a replica of 50 shards needs 50 CPUs and 0 GPUs; the cluster has"):
        resolve_mesh(recipe, 1000, 8)
    recipe = make_recipe(values(zoo, actors={"gpus": 1}))
    with pytest.raises(RecipeError, match="an actor needs 1 CPUs and 1 GPUs; the cluster has"):
        resolve_mesh(recipe, 1000, 8)


@pytest.mark.parametrize(
    ("actors", "cluster", "expected"),
    [
        ({}, {"CPU": 1}, (1, 1, 1)),
        ({}, {"CPU": 3}, (3, 1, 1)),
        ({}, {"CPU": 8}, (4, 1, 2)),
        ({"cpus": 4}, {"CPU": 8}, (2, 1, 4)),
        ({"gpus": 1}, {"CPU": 8, "GPU": 2}, (2, 1, 1)),
        ({}, {"CPU": 8, "memory": 4e9}, (1, 4, 2)),
        ({"replicas": 2}, {"CPU": 8, "memory": 4e9}, (2, 2, 2)),
        ({"replicas": 2, "shards": 2, "cpus": 1}, {"CPU": 8, "memory": 4e9}, (2, 2, 1)),
    ],
)
def test_auto_fills_the_cluster_with_as_few_shards_as_fit_into_memory(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, actors: dict, cluster: dict, expected: tuple[int, int, float]
) -> None:
    """For 50 M parameters and 8 ingredients in int8."""
    monkeypatch.setattr(placement, "_cluster_resources", lambda: {"memory": 1e12, **cluster})
    mesh, cpus = resolve_mesh(make_recipe(values(zoo, actors=actors)), 50_000_000, 8)
    assert (mesh.replicas, mesh.shards, cpus) == expected


@pytest.mark.slow
def test_a_file_that_a_node_does_not_see_is_named_with_the_node(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    recipe = make_recipe(values(zoo, ingredients=str(tmp_path / "zoo")))
    pool = RayPool(recipe, open_inputs(recipe).ingredients, Mesh(1, 1), 1)
    node = re.escape(socket.gethostname())
    try:
        (tmp_path / "zoo" / "model_3.safetensors").rename(tmp_path / "model_3")
        with pytest.raises(RecipeError, match=rf"model_3\.safetensors does not exist on the node {node}"):
            pool.setup(no_progress)
        (tmp_path / "model_3").rename(tmp_path / "zoo" / "model_3.safetensors")
        with pytest.raises(RecipeError, match=rf"/nothing does not exist on the node {node}.*a shared disk, or a URI"):
            pool.setup(no_progress, (str(tmp_path / "nothing"),))
    finally:
        pool.close()


@pytest.mark.slow
def test_a_shard_that_dies_while_it_starts_is_re_created(zoo: Path) -> None:
    import ray

    recipe = make_recipe(values(zoo))
    pool, killed = RayPool(recipe, open_inputs(recipe).ingredients, Mesh(1, 2), 1), list[str]()

    def kill(what: str, done: int, total: int) -> None:
        if not killed:
            killed.append(what)
            ray.kill(pool.handles[1])

    try:
        assert pool.setup(kill).sizes == {"fit": 597, "test": 600}
        assert killed == ["starting actors"]
        assert len(pool.open_store(tuple(range(8)), "tensor", no_progress).sha256) == 8
    finally:
        pool.close()


@pytest.mark.slow
def test_cpus_that_others_hold_do_not_count(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "SETTLE_S", 2.0)
    total = int(all_cpus())
    recipe = make_recipe(values(zoo, actors={"replicas": total, "cpus": 1}))

    def wait_for_room_for(teams: int) -> None:
        deadline = time.monotonic() + 120
        while placement.teams_with_room(recipe, 1, 1) != teams:  # Ray's view is a moment old
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for_room_for(total)
    with held(total - 1):
        wait_for_room_for(1)
        assert resolve_mesh(recipe, 1000, 8, now=True) == (Mesh(total, 1), 1)
        assert resolve_mesh(make_recipe(values(zoo, actors={"cpus": 1})), 1000, 8, now=True)[0] == Mesh(total, 1)
        two = make_recipe(values(zoo, actors={"replicas": 1, "shards": total, "cpus": 1}))
        with pytest.raises(
            RecipeError, match=rf"has {total} and 0, but only 1 CPUs and 0 GPUs are free: .* the other {total - 1}"
        ):
            resolve_mesh(two, 1000, 8, now=True)
    wait_for_room_for(total)


def test_errors_of_an_actor_come_out_as_themselves_and_its_death_is_named(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(values(zoo))
    pool = RayPool(recipe, open_inputs(recipe).ingredients, Mesh(1, 1), 1)
    try:
        pool.setup(no_progress)
        with pytest.raises((RecipeError, IngredientError), match=r"nothing\.safetensors") as missing:
            pool.evaluate_file(str(tmp_path / "nothing.safetensors"), [Split("fit", np.arange(3, dtype=np.int32))])
        assert "Traceback" not in str(missing.value)
        with pytest.raises(AttributeError) as odd:  # a fault of our code: the store is not open
            pool.gram()
        assert "Traceback" not in str(odd.value)
        sentence, code = explain(odd.value)
        assert code == 1
        assert sentence.startswith("Unexpected error at ray_soup.actors.shard:")
        (process,) = children_called("RemoteShard")
        process.kill()
        process.wait(20)
        loss = pool._collect({0: pool.handles[0].reset_peak.remote()}, {})
        assert loss is not None
        assert "its process ended unexpectedly: most often the kernel kills it for lack of memory" in loss.reason
    finally:
        pool.close()

"""The mesh that fits what is free, and messages that say who holds the rest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ray_soup.actors import placement
from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import patience_s, resolve_mesh, room_for
from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe, make_recipe
from tests.conftest import values


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, float]]]:
    """A cluster: all its resources, and what is free at each look; the last entry stays."""
    found: dict[str, list[dict[str, float]]] = {"all": [{"CPU": 8, "memory": 1e12}], "free": []}

    def look(which: str) -> dict[str, float]:
        looks = found[which]
        return looks.pop(0) if len(looks) > 1 else looks[0]

    monkeypatch.setattr(placement, "_cluster_resources", lambda: look("all"))
    monkeypatch.setattr(placement, "free_resources", lambda: look("free"))
    monkeypatch.setattr(placement, "SETTLE_S", 0.0)
    monkeypatch.setattr(placement.time, "sleep", lambda seconds: None)
    return found


def recipe(**actors: object) -> Recipe:
    return make_recipe(values(Path("/x"), actors=actors))


def test_auto_splits_no_actor_over_two_gpus(cluster_of: dict) -> None:
    cluster_of["all"] = cluster_of["free"] = [{"CPU": 64, "GPU": 8, "memory": 1e12}]
    assert resolve_mesh(recipe(gpus=0.3), 1000, 8, now=True) == (Mesh(24, 1), 1)


def test_auto_takes_what_the_cluster_has_and_one_replica_must_be_free(cluster_of: dict) -> None:
    cluster_of["free"] = [{"CPU": 2, "memory": 1e12}]
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(4, 1), 2)
    assert resolve_mesh(recipe(), 1000, 8) == (Mesh(4, 1), 2)
    assert resolve_mesh(recipe(replicas=9, cpus=1), 1000, 8, now=True) == (Mesh(9, 1), 1)


def test_auto_takes_what_an_autoscaling_cluster_may_have(cluster_of: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of["free"] = [{"CPU": 8, "memory": 1e12}]
    monkeypatch.setattr(placement, "largest_resources", lambda: {"CPU": 32, "memory": 4e12})
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(16, 1), 2)
    assert resolve_mesh(recipe(), 1000, 8, now=True, kept=(Mesh(3, 1), 2)) == (Mesh(3, 1), 2)


def test_auto_gives_every_rank_an_example_in_every_step(cluster_of: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of["free"] = [{"CPU": 8, "memory": 1e12}]
    monkeypatch.setattr(placement, "largest_resources", lambda: {"CPU": 3200, "memory": 4e14})
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(61, 1), 2)
    assert resolve_mesh(recipe(shards=2), 1000, 8, now=True) == (Mesh(30, 2), 2)
    assert resolve_mesh(recipe(replicas=100), 1000, 8, now=True) == (Mesh(100, 1), 2)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (None, {"CPU": 8, "memory": 1e12}),
        ({"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8, "memory": 1e12}),
        ({"CPU": 4, "memory": sys.maxsize}, {"CPU": 8, "memory": 1e12}),  # less than there is, and without a limit
    ],
)
def test_the_limits_of_an_autoscaler_count(
    cluster_of: dict, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int] | None, expected: dict[str, float]
) -> None:
    from ray._private.state import state

    monkeypatch.setattr(state, "get_max_resources_from_cluster_config", lambda: limits)
    assert placement.largest_resources() == expected


@pytest.mark.parametrize("actors", [{}, {"replicas": 8, "cpus": 1}])
def test_a_cluster_that_others_hold_is_described(cluster_of: dict, actors: dict) -> None:
    cluster_of["free"] = [{"CPU": 0, "memory": 1e12}]
    with pytest.raises(RecipeError, match="the cluster has 8 and 0, but only 0 CPUs and 0 GPUs are free: other programs"):
        resolve_mesh(recipe(**actors), 1000, 8, now=True)


def test_a_cluster_that_is_too_small_is_described_as_such(cluster_of: dict) -> None:
    cluster_of["free"] = [{"CPU": 8, "memory": 1e12}]
    with pytest.raises(RecipeError, match=r"needs 9 CPUs and 0 GPUs; the cluster has 8 and 0\. Request fewer"):
        resolve_mesh(recipe(shards=9, cpus=1), 1000, 8, now=True)


def test_teams_that_fit_into_resources() -> None:
    have = {"CPU": 8.0, "GPU": 3.0}
    assert placement.whole_teams(recipe(), 1, 2, have) == 4
    assert placement.whole_teams(recipe(), 3, 1, have) == 2
    assert placement.whole_teams(recipe(gpus=1), 2, 1, have) == 1
    assert placement.whole_teams(recipe(), 1, 0, have) == sys.maxsize


def test_the_memory_of_an_actor_depends_on_those_that_fit_and_not_on_the_mesh(
    cluster_of: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert placement.memory_of_each(recipe(), Mesh(2, 1)) == 1e12 / 2
    assert placement.memory_of_each(recipe(), Mesh(16, 1)) == 1e12 / 4


def test_a_run_waits_for_others_to_end(cluster_of: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.autoscaler.sdk as sdk

    monkeypatch.setattr(sdk, "request_resources", lambda bundles: None)
    cluster_of["free"] = [{"CPU": 0}, {"CPU": 0}, {"CPU": 8}]
    said: list[str] = []
    mesh, _ = resolve_mesh(
        recipe(wait_s=30, replicas=8, cpus=1), 1000, 8, lambda what, done, total: said.append(what), now=True
    )
    assert mesh == Mesh(8, 1)
    assert set(said) == {"waiting for CPUs"}


def test_actors_that_have_just_ended_become_free(cluster_of: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "SETTLE_S", 60.0)
    cluster_of["free"] = [{"CPU": 0}, {"CPU": 4}, {"CPU": 8, "memory": 1e12}]
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(4, 1), 2)


def test_what_waits_for_resources_waits_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SOUP_DEADLINE_S", "50")
    assert patience_s(recipe()) == 50
    assert patience_s(recipe(wait_s=70)) == 70


def test_bundles_fit_into_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 5.0, "memory": 100.0})
    assert room_for([{"CPU": 1}]) == 5
    assert room_for([{"CPU": 1}] * 2) == 2
    assert room_for([{"CPU": 1, "memory": 60}]) == 1
    assert room_for([{"CPU": 0.1}]) == 50
    assert room_for([{"CPU": 1, "GPU": 1}]) == 0


def test_a_run_waits_for_its_own_actors_to_end_and_leaves_no_request_behind(
    cluster_of: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without actors.wait_s, and also if they do not end."""
    asked: list[Any] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    monkeypatch.setattr(placement, "SETTLE_S", 20.0)
    monkeypatch.setattr(placement, "settle", lambda now: None)
    cluster_of["free"] = [{"CPU": 0}, {"CPU": 0}, {"CPU": 8}]
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(4, 1), 2)
    assert asked == [[{"CPU": 2}], []]
    monkeypatch.setattr(placement, "SETTLE_S", 0.01)
    cluster_of["free"] = [{"CPU": 0}]
    with pytest.raises(RecipeError, match="other programs on the cluster hold the other 8 CPUs"):
        resolve_mesh(recipe(), 1000, 8, now=True)
    assert len(asked) > 2
    assert asked[-1] == []

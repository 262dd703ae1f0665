"""The mesh that fits what is free, and messages that say who holds the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_soup.actors import placement
from ray_soup.actors.messages import Mesh
from ray_soup.actors.placement import has_room, missing_bundles, patience_s, resolve_mesh, room_for
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


def test_auto_takes_what_is_free(cluster_of: dict) -> None:
    cluster_of["free"] = [{"CPU": 4, "memory": 1e12}]
    assert resolve_mesh(recipe(), 1000, 8, now=True) == (Mesh(2, 1), 2)
    assert resolve_mesh(recipe(), 1000, 8) == (Mesh(4, 1), 2)


@pytest.mark.parametrize("actors", [{}, {"replicas": 8, "cpus": 1}])
def test_a_cluster_that_others_hold_is_described(cluster_of: dict, actors: dict) -> None:
    cluster_of["free"] = [{"CPU": 0, "memory": 1e12}]
    with pytest.raises(RecipeError, match="the cluster has 8 and 0, but only 0 CPUs and 0 GPUs are free: other programs"):
        resolve_mesh(recipe(**actors), 1000, 8, now=True)
    assert not has_room(recipe(**actors), Mesh(1, 1), 1)
    assert missing_bundles(recipe(**actors), 2, 1) == [{"CPU": 1, "GPU": 0}] * 2


def test_a_cluster_that_is_too_small_is_described_as_such(cluster_of: dict) -> None:
    cluster_of["free"] = [{"CPU": 8, "memory": 1e12}]
    with pytest.raises(RecipeError, match=r"need 9 CPUs and 0 GPUs; the cluster has 8 and 0\. Request fewer"):
        resolve_mesh(recipe(replicas=9, cpus=1), 1000, 8, now=True)


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
    assert has_room(recipe(), Mesh(4, 1), 2)


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

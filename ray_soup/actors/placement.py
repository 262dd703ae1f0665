"""Placement of actors: the connection to Ray, the mesh that fits the cluster, and waiting for nodes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.hyperplane import ITEMSIZE
from ray_soup.recipe import Recipe

DEADLINE_S = float(os.environ.get("RAY_SOUP_DEADLINE_S", "600"))  # of one answer, or one heartbeat of a stream
PROCESS_BYTES = 1_200_000_000  # of an actor's process, without the model's parameters


@contextmanager
def connect() -> Iterator[None]:
    """Connect to Ray for as long as the context lasts.

    Uses the Ray session that is already open, or the cluster at RAY_ADDRESS; otherwise starts Ray locally, without a
    dashboard.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    else:
        ray.init(
            num_cpus=max(2, len(os.sched_getaffinity(0))),  # a mesh of two shards runs on one core too
            include_dashboard=False,
            object_store_memory=100_000_000,  # nothing large goes through it
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


def resolve_mesh(
    recipe: Recipe, parameters: int, ingredients: int, progress: ProgressCallback = no_progress
) -> tuple[Mesh, float]:
    """Resolve the recipe's `auto` on this cluster: return the mesh and the CPUs per actor.

    `auto` is one actor per GPU, or per two cores (per core if there are fewer than four), and as few shards as fit into
    memory. Waits for nodes up to `actors.wait_s` seconds; then raises RecipeError if the cluster cannot place the mesh.
    """
    found: list[tuple[Mesh, float]] = []

    def missing() -> list[dict[str, float]]:
        found[:] = [_mesh_now(recipe, parameters, ingredients)]
        return missing_bundles(recipe, *found[0])

    def complaint() -> str:
        have, (mesh, cpus), gpus = _cluster_resources(), found[0], recipe.actors.gpus
        return (
            f"actors: {mesh.replicas} replicas x {mesh.shards} shards with {cpus:g} CPUs and {gpus:g} GPUs each need "
            f"{mesh.size * cpus:g} CPUs and {mesh.size * gpus:g} GPUs; the cluster has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g}. Request fewer resources (actors.gpus=0 runs on CPUs), or set actors.wait_s to wait "
            "for nodes that are still starting."
        )

    wait_for_nodes(missing, complaint, recipe.actors.wait_s, progress)
    return found[0]


def wait_for_nodes(
    missing: Callable[[], list[dict[str, float]]],
    complaint: Callable[[], str],
    wait_s: float,
    progress: ProgressCallback,
    error: type[SoupError] = RecipeError,
) -> None:
    """Request missing resources from an autoscaling cluster until none are missing.

    Args:
        missing: returns the bundles of resources that the cluster lacks.
        complaint: returns the message for the error.
        wait_s: seconds to wait before `error` is raised.
        progress: called with the seconds waited.
        error: the class of the error.
    """
    from ray.autoscaler.sdk import request_resources

    started, asking = time.monotonic(), False
    while bundles := missing():
        waited = time.monotonic() - started
        if waited >= wait_s:
            raise error(complaint())
        request_resources(bundles=[{k: v for k, v in bundle.items() if v} for bundle in bundles])
        asking = True
        progress("waiting for nodes", int(waited), int(wait_s))
        time.sleep(min(2.0, wait_s))
    if asking:
        request_resources(bundles=[])  # from now on, the actors keep the nodes


def _mesh_now(recipe: Recipe, parameters: int, ingredients: int) -> tuple[Mesh, float]:
    """Return the mesh and the CPUs per actor for the cluster in its current state."""
    have = _cluster_resources()
    cores, gpus, memory = int(have.get("CPU", 0)), have.get("GPU", 0.0), have.get("memory", 0.0)
    wanted = recipe.actors
    cpus = wanted.cpus if wanted.cpus != "auto" else 1 if cores < 4 or wanted.gpus else 2
    most = max(1, int(min(cores // cpus if cpus else cores, gpus / wanted.gpus if wanted.gpus else float("inf"))))
    shards = wanted.shards
    if shards == "auto":
        fixed = 2 if wanted.replicas == "auto" else wanted.replicas
        shards = 1
        while (
            fixed * shards * actor_bytes(recipe, parameters, ingredients, shards) > memory
            and (shards + 1) * (1 if wanted.replicas == "auto" else wanted.replicas) <= most
        ):
            shards += 1
    replicas = wanted.replicas if wanted.replicas != "auto" else max(1, most // shards)
    return Mesh(replicas, shards), cpus


def actor_bytes(recipe: Recipe, parameters: int, model_batch: int, shards: int, fixed: float = PROCESS_BYTES) -> float:
    """Estimate the memory of an actor in bytes.

    Every shard holds all parameters and the whole gradient; center, base and the directions of a model batch are split
    among the shards.
    """
    return fixed + parameters * 8 + parameters * (8 + ITEMSIZE[recipe.directions.dtype] * model_batch) / shards


def memory_of_each(mesh: Mesh) -> float:
    """Return the bytes of memory that the cluster has for each actor of a mesh."""
    return _cluster_resources().get("memory", float("inf")) / mesh.size


def has_room(recipe: Recipe, mesh: Mesh, cpus: float) -> bool:
    """Return whether the cluster is large enough for this mesh."""
    have = _cluster_resources()
    return mesh.size * cpus <= have.get("CPU", 0) and mesh.size * recipe.actors.gpus <= have.get("GPU", 0)


def missing_bundles(recipe: Recipe, mesh: Mesh, cpus: float) -> list[dict[str, float]]:
    """Return the bundles of all actors of this mesh if the cluster is too small for it, otherwise none."""
    return [] if has_room(recipe, mesh, cpus) else [{"CPU": cpus, "GPU": recipe.actors.gpus}] * mesh.size


def free_resources() -> dict[str, float]:
    """Return the CPUs and GPUs of the cluster that are not in use."""
    import ray

    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: amount for name, amount in free.items() if name in ("CPU", "GPU")}


def _cluster_resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources

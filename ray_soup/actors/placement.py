"""Placement of actors: the mesh that fits what is free on the cluster, and waiting for nodes and for other runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.environment import deadline_s
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.hyperplane import ITEMSIZE
from ray_soup.recipe import Recipe

SETTLE_S = 5.0  # until the CPUs and GPUs of actors that have just ended count as free
PROCESS_BYTES = 1_200_000_000  # of an actor's process, without the model's parameters

MOMENTS_BYTES = 8  # of the optimizer that trains all weights, per parameter


class NoRoom(SoupError):
    """What a run has submitted to Ray has not started, because other programs hold the resources."""


def resolve_mesh(
    recipe: Recipe, parameters: int, ingredients: int, progress: ProgressCallback = no_progress, now: bool = False
) -> tuple[Mesh, float]:
    """Resolve the recipe's `auto` on this cluster: return the mesh and the CPUs per actor.

    `auto` is one actor per GPU, or per two cores (per core if there are fewer than four), and as few shards as fit into
    memory. Waits for nodes up to `actors.wait_s` seconds; then raises RecipeError if the cluster cannot place the mesh.

    Args:
        recipe: the recipe.
        parameters: elements of the parameter vector.
        ingredients: how many directions an actor holds.
        progress: called with the seconds waited.
        now: count what is free now; otherwise everything counts, as for trials of Ray Tune, which wait for each other.
    """
    found: list[tuple[Mesh, float]] = []
    settle(now)

    def missing() -> list[dict[str, float]]:
        have = free_resources() if now else _cluster_resources()
        found[:] = [_mesh_now(recipe, parameters, ingredients, have)]
        mesh, cpus = found[0]
        return [] if _fits(mesh.size, cpus, recipe.actors.gpus, have) else _bundles(recipe, mesh.size, cpus)

    def complaint() -> str:
        have, free, (mesh, cpus), gpus = _cluster_resources(), free_resources(), found[0], recipe.actors.gpus
        needs = (
            f"actors: {mesh.replicas} replicas x {mesh.shards} shards with {cpus:g} CPUs and {gpus:g} GPUs each need "
            f"{mesh.size * cpus:g} CPUs and {mesh.size * gpus:g} GPUs; the cluster has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g}"
        )
        if now and _fits(mesh.size, cpus, gpus, have):
            return f"{needs}, but {_held_by_others(have, free)}"
        return (
            f"{needs}. Request fewer resources (actors.gpus=0 runs on CPUs), or set actors.wait_s to wait for nodes that "
            "are still starting."
        )

    wait_for_nodes(missing, complaint, recipe.actors.wait_s, progress)
    return found[0]


def _held_by_others(have: dict[str, float], free: dict[str, float]) -> str:
    """Describe how much of the cluster is free, and what to do about it."""
    held = {name: have.get(name, 0) - free.get(name, 0) for name in ("CPU", "GPU")}
    return (
        f"only {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are free: other programs on the cluster hold the "
        f"other {held['CPU']:g} CPUs and {held['GPU']:g} GPUs {_ADVICE}"
    )


def held_by_others(bundles: list[dict[str, float]]) -> str:
    """Describe how much is free of what these equal bundles need, and what to do about it."""
    import ray

    have, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    found = ", ".join(f"{name} {free.get(name, 0):g} of {have.get(name, 0):g}" for name in bundles[0])
    return f"the cluster has only {found} free: other programs, or processes that are slow to start, hold the rest {_ADVICE}"


_ADVICE = (
    "(`ray list actors` names them). Rerun when they have ended, set actors.wait_s to wait for them, or request fewer "
    "resources in `actors:`."
)


def room_for(bundles: list[dict[str, float]]) -> int:
    """Return how many times these equal bundles fit into what is free on the cluster, all nodes together."""
    import ray

    free = ray.available_resources()  # type: ignore[no-untyped-call]
    return min(int((free.get(name, 0) + 1e-6) / (amount * len(bundles))) for name, amount in bundles[0].items())


def patience_s(recipe: Recipe) -> float:
    """Return the seconds that what was submitted to Ray may wait for resources. Raises RecipeError as `deadline_s` does."""
    return max(deadline_s(), recipe.actors.wait_s)


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
        what = "GPUs" if any(bundle.get("GPU") for bundle in bundles) else "CPUs"
        progress(f"waiting for {what}", int(waited), int(wait_s))
        time.sleep(min(2.0, wait_s))
    if asking:
        request_resources(bundles=[])  # from now on, the actors keep the nodes


def _mesh_now(recipe: Recipe, parameters: int, ingredients: int, have: dict[str, float]) -> tuple[Mesh, float]:
    """Return the mesh and the CPUs per actor for a cluster with the resources `have`."""
    cores, gpus, memory = int(have.get("CPU", 0)), have.get("GPU", 0.0), have.get("memory", 0.0)
    wanted = recipe.actors
    cpus = wanted.cpus if wanted.cpus != "auto" else 1 if cores < 4 or wanted.gpus else 2
    most = max(1, int(min(cores // cpus if cpus else cores, gpus / wanted.gpus if wanted.gpus else float("inf"))))
    shards = wanted.shards
    if wanted.by_layer:
        shards = 1
    elif shards == "auto":
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

    By layer, it holds about an eighth of the parameters, and a layer, with their gradients; `plan` measures this. Otherwise
    every shard holds all parameters and the whole gradient; center, base and the directions of a model batch are split
    among the shards. To train all weights, it also holds two moments of each.
    """
    if recipe.actors.by_layer:
        return fixed + parameters
    whole = 8 if recipe.polish is None else 8 + MOMENTS_BYTES
    return fixed + parameters * whole + parameters * (8 + ITEMSIZE[recipe.directions.dtype] * model_batch) / shards


def memory_of_each(mesh: Mesh) -> float:
    """Return the bytes of memory that the cluster has for each actor of a mesh; infinite without a cluster."""
    import ray

    if not ray.is_initialized():
        return float("inf")
    return _cluster_resources().get("memory", float("inf")) / mesh.size


def has_room(recipe: Recipe, mesh: Mesh, cpus: float) -> bool:
    """Return whether this mesh can be placed now."""
    settle(True)
    return _fits(mesh.size, cpus, recipe.actors.gpus, free_resources())


def missing_bundles(recipe: Recipe, actors: int, cpus: float) -> list[dict[str, float]]:
    """Return the bundles of this many actors if the cluster has no room for them now, otherwise none."""
    return [] if _fits(actors, cpus, recipe.actors.gpus, free_resources()) else _bundles(recipe, actors, cpus)


def _fits(actors: int, cpus: float, gpus: float, have: dict[str, float]) -> bool:
    return actors * cpus <= have.get("CPU", 0) + 1e-6 and actors * gpus <= have.get("GPU", 0) + 1e-6


def _bundles(recipe: Recipe, actors: int, cpus: float) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": recipe.actors.gpus}] * actors


def settle(now: bool = True) -> None:
    """Wait up to SETTLE_S seconds, until everything is free: actors that have just ended may still count."""
    until = time.monotonic() + SETTLE_S
    while now and time.monotonic() < until:
        have, free = _cluster_resources(), free_resources()
        if all(free.get(name, 0) >= have.get(name, 0) for name in ("CPU", "GPU")):
            return
        time.sleep(0.2)


def free_resources() -> dict[str, float]:
    """Return the CPUs, GPUs and memory that are free; within a placement group, those of the cluster.

    The actors of a placement group use what it has reserved, which does not count as free.
    """
    import ray

    have = _cluster_resources()
    if ray.util.get_current_placement_group() is not None:
        return have
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return {name: free.get(name, 0.0) if name != "memory" else amount for name, amount in have.items()}


def _cluster_resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return {name: amount for name, amount in resources.items() if name in ("CPU", "GPU", "memory")}

"""Placement of actors: the mesh that fits what is free on the cluster, and waiting for nodes and for other runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress

from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.environment import deadline_s
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.store_format import ITEMSIZE
from ray_soup.recipe import Recipe
from ray_soup.task.model_spec import in_bfloat16

SETTLE_S = 5.0  # until the CPUs and GPUs of actors that have just ended count as free
PROCESS_BYTES = 1_200_000_000  # of an actor's process, without the model's parameters
LIBRARY_BYTES = 340_000_000  # of these: of the library that a model comes from

MOMENTS_BYTES = 8  # of the optimizer that trains all weights, per parameter


class NoRoom(SoupError):
    """What a run has submitted to Ray has not started, because other programs hold the resources."""


def resolve_mesh(
    recipe: Recipe,
    parameters: int,
    ingredients: int,
    progress: ProgressCallback = no_progress,
    now: bool = False,
    kept: tuple[Mesh, float] | None = None,
) -> tuple[Mesh, float]:
    """Resolve the recipe's `auto` on this cluster: return the mesh and the CPUs per actor.

    `auto` is one actor per GPU, or per two cores (per core if there are fewer than four), and as few shards as fit into
    memory; on a cluster that grows, for as many nodes as it may have; no more actors than `learn.batch_size`, so that each
    has an example in every step. The mesh is logical: room for one replica is enough.
    Waits for that up to `actors.wait_s` seconds; then raises RecipeError.

    Args:
        recipe: the recipe.
        parameters: elements of the parameter vector.
        ingredients: how many directions an actor holds.
        progress: called with the seconds waited.
        now: there must be room in what is free now; otherwise in the cluster, as for trials of Ray Tune, which wait for each
            other.
        kept: what a run that is resumed was started with: it is kept, and only room for it is waited for.
    """
    found: list[tuple[Mesh, float]] = []
    settle(now)
    wait_s = recipe.actors.wait_s

    def missing() -> list[dict[str, float]]:
        may_have = largest_resources() if now else _cluster_resources()
        found[:] = [kept or _mesh_on(recipe, parameters, ingredients, may_have)]
        mesh, cpus = found[0]
        have = free_resources() if now else _cluster_resources()
        return [] if _fits(mesh.shards, cpus, recipe.actors.gpus, have) else _bundles(recipe, mesh.shards, cpus)

    def complaint() -> str:
        have, free, (mesh, cpus), gpus = _cluster_resources(), free_resources(), found[0], recipe.actors.gpus
        one = "an actor" if mesh.shards == 1 else f"a replica of {mesh.shards} shards"
        needs = (
            f"actors: {one} needs {mesh.shards * cpus:g} CPUs and {mesh.shards * gpus:g} GPUs; the cluster has "
            f"{have.get('CPU', 0):g} and {have.get('GPU', 0):g}"
        )
        if now and _fits(mesh.shards, cpus, gpus, have):
            return f"{needs}, but {_held_by_others(have, free)}"
        return (
            f"{needs}. Request fewer resources (actors.gpus=0 runs on CPUs), or set actors.wait_s to wait for nodes that "
            "are still starting."
        )

    if missing() and now and _fits(found[0][0].shards, found[0][1], recipe.actors.gpus, _cluster_resources()):
        wait_s = max(wait_s, held_s())
    wait_for_nodes(missing, complaint, wait_s, progress)
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
    try:
        while bundles := missing():
            waited = time.monotonic() - started
            if waited >= wait_s:
                raise error(complaint())
            asking = True
            request_resources(bundles=[{k: v for k, v in bundle.items() if v} for bundle in bundles])
            what = "GPUs" if any(bundle.get("GPU") for bundle in bundles) else "CPUs"
            progress(f"waiting for {what}", int(waited), int(wait_s))
            time.sleep(min(2.0, wait_s))
    finally:
        if asking:
            request_resources(bundles=[])  # from now on, the actors keep the nodes


def _mesh_on(recipe: Recipe, parameters: int, ingredients: int, have: dict[str, float]) -> tuple[Mesh, float]:
    """Return the mesh and the CPUs per actor for a cluster that may have the resources `have`."""
    cores, gpus, memory = int(have.get("CPU", 0)), have.get("GPU", 0.0), have.get("memory", 0.0)
    wanted = recipe.actors
    cpus = cpus_of_each(recipe, cores)
    most = max(1, int(min(cores // cpus if cpus else cores, actors_on(gpus, wanted.gpus) if wanted.gpus else sys.maxsize)))
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
    return Mesh(replicas_on(recipe, most, shards), shards), cpus


def replicas_on(recipe: Recipe, actors: int, shards: int) -> int:
    """Return the replicas of a mesh for this many actors; `auto`: no more ranks than a batch has examples."""
    wanted = recipe.actors.replicas
    return wanted if wanted != "auto" else max(1, min(actors, recipe.learn.batch_size) // shards)


def actors_on(devices: float, each: float) -> int:
    """Return for how many actors devices have room; those that need less than a device share one, never parts of two."""
    return int(devices * int(1 / each + 1e-6) if each < 1 else devices / each)


def cpus_of_each(recipe: Recipe, cores: int) -> float:
    """Return the CPUs of an actor on a cluster with this many cores."""
    wanted = recipe.actors
    return wanted.cpus if wanted.cpus != "auto" else 1 if cores < 4 or wanted.gpus else 2


def actor_bytes(recipe: Recipe, parameters: int, model_batch: int, shards: int, fixed: float = PROCESS_BYTES) -> float:
    """Estimate the memory of an actor in bytes.

    By layer, it holds about an eighth of the parameters, and a layer, with their gradients; `plan` measures this. Otherwise
    every shard holds all parameters and the whole gradient; center, base and the directions of a model batch are split
    among the shards. Weights in bfloat16 come on top. To train all weights, it also holds two moments of each.
    """
    if recipe.actors.by_layer:
        return fixed + parameters
    whole = 8 + 2 * in_bfloat16(recipe.model) + (0 if recipe.polish is None else MOMENTS_BYTES)
    return fixed + parameters * whole + parameters * (8 + ITEMSIZE[recipe.directions.dtype] * model_batch) / shards


def memory_of_each(recipe: Recipe, mesh: Mesh) -> float:
    """Return the bytes of memory that the cluster has for each actor of a mesh; infinite without a cluster."""
    import ray

    if not ray.is_initialized():
        return float("inf")
    have = _cluster_resources()
    teams = whole_teams(recipe, mesh.shards, cpus_of_each(recipe, int(have.get("CPU", 0))), have)
    return have.get("memory", float("inf")) / (mesh.shards * max(1, min(mesh.replicas, teams)))


def teams_with_room(recipe: Recipe, shards: int, cpus: float) -> int:
    """Return how many teams of this many actors can be placed now; within a placement group, those that it has room for."""
    import ray

    group = ray.util.get_current_placement_group()
    if group is not None:
        return max(1, sum(bool(bundle) for bundle in group.bundle_specs) // shards)
    return whole_teams(recipe, shards, cpus, free_resources())


def whole_teams(recipe: Recipe, shards: int, cpus: float, have: dict[str, float]) -> int:
    """Return how many teams of this many actors fit into resources, all nodes together; sys.maxsize if they need none."""
    needs = {"CPU": cpus * shards, "GPU": recipe.actors.gpus * shards}
    return min((int((have.get(name, 0) + 1e-6) / need) for name, need in needs.items() if need), default=sys.maxsize)


def leaving_nodes() -> frozenset[str]:
    """Return the identifiers of the nodes that will leave the cluster: drained, preempted, or told to end.

    Ray has no public function for this; Ray Train asks the same one.
    """
    import ray

    state = ray._private.state.state
    with suppress(Exception):  # a head that is busy, or another version of Ray: a loss is noticed later, too
        return frozenset(state.get_draining_nodes())
    return frozenset()


def largest_resources() -> dict[str, float]:
    """Return the CPUs, GPUs and memory that the cluster may have: an autoscaler's limits, but no less than there is now."""
    import ray

    have, most = _cluster_resources(), None
    with suppress(Exception):  # as in leaving_nodes
        most = ray._private.state.state.get_max_resources_from_cluster_config()
    limits = {name: float(most.get(name) or 0) for name in ("CPU", "GPU", "memory")} if most else {}
    return have | {name: limit for name, limit in limits.items() if have.get(name, 0) < limit < sys.maxsize}


def _fits(actors: int, cpus: float, gpus: float, have: dict[str, float]) -> bool:
    return actors * cpus <= have.get("CPU", 0) + 1e-6 and actors * gpus <= have.get("GPU", 0) + 1e-6


def _bundles(recipe: Recipe, actors: int, cpus: float) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": recipe.actors.gpus}] * actors


def held_s() -> float:
    """Return the seconds after which what is held on the cluster is held by others, not by actors that end slowly."""
    return 3 * SETTLE_S


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

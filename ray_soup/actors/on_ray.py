"""A pool of actors on Ray: creating, calling and killing them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_soup.actors import placement
from ray_soup.actors.baker import Baker
from ray_soup.actors.group import GroupLost
from ray_soup.actors.messages import Mesh
from ray_soup.actors.pool import MeshPool
from ray_soup.actors.recovery import RESUME, Hear, Loss
from ray_soup.actors.shard import Shard
from ray_soup.errors import SoupError, first_line
from ray_soup.io.environment import deadline_s
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.recipe import Recipe, with_changes
from ray_soup.task import identity
from ray_soup.task.functions import look_in

if TYPE_CHECKING:
    from ray.exceptions import RayActorError, RayTaskError


class RemoteShard(Shard):
    """A shard in an actor's process, which belongs to the run `run`, as the driver does.

    The recipe's functions are also looked up in `folder`, the driver's current folder.
    """

    def __init__(
        self,
        recipe: Recipe,
        ingredients: Sequence[Ingredient],
        mesh: Mesh,
        rank: int,
        threads: int,
        *,
        folder: str,
        run: str,
    ) -> None:
        look_in(folder)
        identity.in_run(run)
        super().__init__(recipe, ingredients, mesh, rank, threads)

    def serve_training(self) -> tuple[str, int]:
        """Open the rendezvous of all actors that train together on this one, and return its host and port."""
        import ray

        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, self.open_training(host)

    def serve_group(self) -> tuple[str, int]:
        """Open the rendezvous of the replica's group on this shard, and return its host and port."""
        import ray

        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, self.open_group(host)


class RayPool(MeshPool):
    """A mesh of Ray actors with `cpus` CPUs each, and as many threads."""

    def __init__(self, recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, cpus: float) -> None:
        super().__init__(mesh)
        self._recipe, self._ingredients, self._cpus = recipe, ingredients, cpus
        self._groups = [self._placement_group() for _ in range(mesh.replicas)]

    def _placement_group(self) -> Any:
        """Reserve the resources of one replica: its shards stay on one node if a node has room for them."""
        import ray

        if self.mesh.shards == 1 or ray.util.get_current_placement_group() is not None:
            return None
        bundle = {"CPU": self._cpus, "GPU": self._recipe.actors.gpus}
        return ray.util.placement_group([bundle] * self.mesh.shards, "PACK")

    def close(self) -> None:
        """Kill the actors and free their resources."""
        import ray

        super().close()
        for group in self._groups:
            if group is not None:
                ray.util.remove_placement_group(group)

    def _create(self, ranks: list[int]) -> None:
        import ray

        remote, folder, threads = ray.remote(RemoteShard), os.getcwd(), max(1, int(self._cpus))
        for rank in ranks:
            options: dict[str, Any] = {"num_cpus": self._cpus, "num_gpus": self._recipe.actors.gpus, "max_restarts": 0}
            group = self._groups[rank // self.mesh.shards]
            if group is not None:
                options["placement_group"] = group
                options["placement_group_bundle_index"] = rank % self.mesh.shards
            elif ray.util.get_current_placement_group() is None:  # a trial's actors go into its own placement group
                options["scheduling_strategy"] = "SPREAD"
            self.handles[rank] = remote.options(**options).remote(
                self._recipe, self._ingredients, self.mesh, rank, threads, folder=folder, run=identity.RUN
            )

    def _meeting_place(self) -> tuple[str, int] | None:
        if self.mesh.size == 1 or self.mesh.shards > 1:  # a process can be in one group only
            return None
        place: tuple[str, int] = self._ask_once([0], "opening a group", lambda actor, rank: actor.serve_training.remote())[0]
        return place

    def _kill(self, rank: int) -> None:
        import ray

        if self.handles[rank] is not None:
            ray.kill(self.handles[rank])

    def _check_room(self, ranks: list[int], progress: ProgressCallback) -> None:
        placement.wait_for_nodes(
            lambda: [] if self._has_reserved() else placement.missing_bundles(self._recipe, len(ranks), self._cpus),
            lambda: (
                f"{self._described(ranks)}: the cluster has no room for them; {self._room()} {RESUME} when there is room, "
                "with fewer actors, or with actors.wait_s to wait for nodes and for other programs to end."
            ),
            max(self._recipe.actors.wait_s, placement.SETTLE_S),
            progress,
            SoupError,
        )

    def _has_reserved(self) -> bool:
        """Return whether the resources of the actors are reserved by a placement group, so that nobody else takes them."""
        import ray

        return self.mesh.shards > 1 or ray.util.get_current_placement_group() is not None

    def _room(self) -> str:
        free = placement.free_resources()
        return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of the cluster are free."

    def _collect(self, calls: dict[int, Any], answers: dict[int, Any], hear: Hear | None = None) -> Loss | None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        rank_of = {call: rank for rank, call in calls.items()}
        waiting: list[Any] = list(rank_of)
        lost: set[int] = set()
        deadline = deadline_s()
        no_answer = f"no answer within {deadline:g} s"
        ready: list[Any]
        reason = ""
        while waiting:
            count = len(waiting) if hear is None else 1
            ready, waiting = ray.wait(waiting, num_returns=count, timeout=deadline)
            if not ready or (waiting and hear is None):
                lost |= {rank_of[call] for call in waiting}
                waiting, reason = [], no_answer
            for call in ready:
                rank = rank_of[call]
                try:
                    value: Any = ray.get(call if hear is None else next(call))
                except RayActorError as error:
                    if error.actor_init_failed:
                        raise SoupError(f"An actor failed while it was created: {_cause_in(str(error))}.") from error
                    lost.add(rank)
                    reason = _death(error)
                except RayTaskError as error:
                    if not isinstance(error.cause, GroupLost):
                        raise _original(error) from error
                    lost.add(rank)
                    reason = reason or first_line(error.cause)
                else:
                    if hear is not None and isinstance(value, tuple):
                        hear(rank, *value)
                        waiting.append(call)
                    else:
                        answers[rank] = value
        return Loss(frozenset(lost), reason, silent=reason == no_answer) if lost else None


class BakingPool(RayPool):
    """One baker on each node of the cluster, with as many threads as the node allows; they reserve no CPUs.

    Serves `setup`, `bake`, `hash` and `close`.
    """

    def __init__(self, recipe: Recipe, ingredients: Sequence[Ingredient]) -> None:
        import ray

        found = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
        self._places = sorted(node["NodeID"] for node in found)
        super().__init__(with_changes(recipe, {"actors.gpus": 0}), ingredients, Mesh(len(self._places), 1), 0)

    @property
    def nodes(self) -> int:
        """The number of nodes that the actors run on."""
        return self.mesh.size

    def hash(self, progress: ProgressCallback) -> list[str]:
        """Return the SHA-256 of each ingredient, each computed by one actor."""
        size, count = self.mesh.size, len(self._ingredients)
        nbytes = sum(ingredient.nbytes for ingredient in self._ingredients)
        progress("hashing", 0, nbytes)
        answers = self._ask("hash", lambda actor, rank: actor.hash.remote(range(rank, count, size)))
        progress("hashing", nbytes, nbytes)
        return [answers[k % size][k // size] for k in range(count)]

    def _create(self, ranks: list[int]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        remote = ray.remote(Baker)
        for rank in ranks:
            place = NodeAffinitySchedulingStrategy(self._places[rank], soft=True)  # on another node if this one has died
            options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": place}
            self.handles[rank] = remote.options(**options).remote(self._ingredients, None)


def _original(error: RayTaskError) -> BaseException:
    """Return what an actor's code raised; a SoupError that names it if Ray could not send it."""
    cause: BaseException = error.cause
    if type(cause).__module__.startswith("ray."):
        return SoupError(f"An actor failed: {_cause_in(error.traceback_str)}.")
    return cause


def _cause_in(text: str) -> str:
    """Return the last line of a remote traceback that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no reason was given"


def _death(error: RayActorError) -> str:
    """Say how an actor's process ended, in one line."""
    text = str(error)
    unknown = "Some common causes" in text or "potential root causes" in text
    if not unknown and re.search(r"out of memory|OOM|memory pressure|low on memory", text, re.IGNORECASE):
        return "Ray ended its process because the node ran out of memory; use fewer actors or a smaller learn.micro_batch"
    if unknown or "connection error code 2" in text:
        return (
            "its process ended unexpectedly: most often the kernel kills it for lack of memory (see dmesg), or a library "
            "crashes in it"
        )
    return first_line(error)

"""A pool of actors on Ray: creating, calling and killing them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray_soup.actors import placement
from ray_soup.actors.group import GroupLost
from ray_soup.actors.messages import Mesh
from ray_soup.actors.pool import MeshPool
from ray_soup.actors.recovery import RESUME, Loss
from ray_soup.actors.shard import Shard
from ray_soup.errors import SoupError
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.progress import ProgressCallback
from ray_soup.recipe import Recipe
from ray_soup.task.functions import look_in


class RemoteShard(Shard):
    """A shard in an actor's process; the recipe's functions are also looked up in `folder`, the driver's current folder."""

    def __init__(
        self, recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, rank: int, threads: int, *, folder: str
    ) -> None:
        look_in(folder)
        super().__init__(recipe, ingredients, mesh, rank, threads)

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
                self._recipe, self._ingredients, self.mesh, rank, threads, folder=folder
            )

    def _kill(self, rank: int) -> None:
        import ray

        if self.handles[rank] is not None:
            ray.kill(self.handles[rank])

    def _check_room(self, ranks: list[int], progress: ProgressCallback) -> None:
        placement.wait_for_nodes(
            lambda: placement.missing_bundles(self._recipe, self.mesh, self._cpus),
            lambda: (
                f"Lost {self._described(ranks)}, and the cluster has no room left for the mesh. {RESUME} with fewer actors, "
                "or set actors.wait_s to wait for nodes to come back."
            ),
            self._recipe.actors.wait_s,
            progress,
            SoupError,
        )

    def _room(self) -> str:
        return f"The cluster's free resources are {placement.free_resources()}."

    def _collect(
        self, calls: dict[int, Any], answers: dict[int, Any], progress: ProgressCallback | None = None
    ) -> Loss | None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        rank_of = {call: rank for rank, call in calls.items()}
        waiting: list[Any] = list(rank_of)
        lost: set[int] = set()
        no_answer = f"no answer within {placement.DEADLINE_S:.0f} s"
        ready: list[Any]
        reason = ""
        while waiting:
            count = len(waiting) if progress is None else 1
            ready, waiting = ray.wait(waiting, num_returns=count, timeout=placement.DEADLINE_S)
            if not ready or (waiting and progress is None):
                lost |= {rank_of[call] for call in waiting}
                waiting, reason = [], no_answer
            for call in ready:
                rank = rank_of[call]
                try:
                    value: Any = ray.get(call if progress is None else next(call))
                except RayActorError as error:
                    lost.add(rank)
                    reason = _first_line(error)
                except RayTaskError as error:
                    if not isinstance(error.cause, GroupLost):
                        raise error.cause from error
                    lost.add(rank)
                    reason = reason or _first_line(error.cause)
                else:
                    if progress is not None and isinstance(value, tuple):
                        progress(*value)
                        waiting.append(call)
                    else:
                        answers[rank] = value
        return Loss(frozenset(lost), reason, silent=reason == no_answer) if lost else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

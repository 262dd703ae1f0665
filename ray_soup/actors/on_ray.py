"""A pool of actors on Ray: creating, calling and killing them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ray_soup.actors import placement
from ray_soup.actors.baker import Baker
from ray_soup.actors.calls import Call, Hear, Loss, LostAgain, all_lost
from ray_soup.actors.group import GroupLost
from ray_soup.actors.mesh_pool import MeshPool
from ray_soup.actors.messages import Mesh, SetupInfo, Stream
from ray_soup.actors.relays import GROUP, PackedStep, Relays
from ray_soup.actors.rendezvous import SECRET, share_secret
from ray_soup.actors.shard import Shard
from ray_soup.actors.teams import Team
from ray_soup.actors.versions import EVERYWHERE
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

    The recipe's functions are also looked up in `folder`, the driver's current folder. Its
    groups admit only processes that know `secret`.
    """

    def __init__(
        self,
        recipe: Recipe,
        ingredients: Sequence[Ingredient],
        mesh: Mesh,
        shard: int,
        threads: int,
        *,
        folder: str,
        run: str,
        secret: bytes,
    ) -> None:
        look_in(folder)
        identity.in_run(run)
        share_secret(secret)
        super().__init__(recipe, ingredients, mesh, shard, threads)

    def setup(self, seen: tuple[str, ...] = ()) -> Stream[SetupInfo]:
        """Set up the shard, and report the node's identifier too."""
        import ray

        for value in super().setup(seen):
            node_id = ray.get_runtime_context().get_node_id()
            yield replace(value, node_id=node_id) if isinstance(value, SetupInfo) else value

    def serve_training(self, count: int) -> tuple[str, int]:
        """Open the rendezvous of `count` actors that train together on this one, and return its host and port."""
        import ray

        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, self.open_training(host, count)

    def serve_group(self) -> tuple[str, int]:
        """Open the rendezvous of the replica's group on this shard, and return its host and port."""
        import ray

        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, self.open_group(host)


class RayPool(MeshPool):
    """A mesh of Ray actors with `cpus` CPUs each, and as many threads.

    All teams are requested from Ray at once, and each starts when Ray finds room for it; an autoscaling cluster adds nodes
    for those that are waiting.
    """

    def __init__(self, recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, cpus: float) -> None:
        super().__init__(mesh)
        self._recipe, self._ingredients, self._cpus = recipe, ingredients, cpus
        self._relays = Relays(mesh.size)

    def _create(self, team: Team) -> None:
        import ray

        remote, folder, threads = ray.remote(RemoteShard), os.getcwd(), max(1, int(self._cpus))
        options: dict[str, Any] = {"num_cpus": self._cpus, "num_gpus": self._recipe.actors.gpus, "max_restarts": 0}
        if ray.util.get_current_placement_group() is None:  # a trial's actors go into its own placement group
            if self.mesh.shards == 1:
                options["scheduling_strategy"] = "SPREAD"
            else:  # on one node if a node has room for them
                bundle = {"CPU": self._cpus, "GPU": self._recipe.actors.gpus}
                team.reserved = ray.util.placement_group([bundle] * self.mesh.shards, "PACK")
        for shard in range(self.mesh.shards):
            if team.reserved is not None:
                options |= {"placement_group": team.reserved, "placement_group_bundle_index": shard}
            handle = remote.options(**options).remote(
                self._recipe, self._ingredients, self.mesh, shard, threads, folder=folder, run=identity.RUN, secret=SECRET
            )
            team.actors.append(handle)

    def _kill(self, team: Team) -> None:
        import ray

        for actor in team.actors:
            ray.kill(actor)
        if team.reserved is not None:
            ray.util.remove_placement_group(team.reserved)

    def close(self) -> None:
        """Kill the actors and the relays, and free what they held."""
        self._relays.close()
        super().close()

    def _step_in_turns(self, step: PackedStep, ranks: Sequence[int], call: Call, answers: dict[int, Any]) -> Loss | None:
        """Call the ranks of a large mesh through relays: those of whole groups whose relays have started.

        A relay's ranks are called directly if it is lost. The shards of a replica are, too.
        """
        if self.mesh.size <= GROUP or self.mesh.shards > 1:
            return self._in_turns(ranks, call, answers)
        wanted, calls, losses = set(ranks), dict[int, Any](), list[Loss | None]()
        self._relays.use(self.handles)
        for group in dict.fromkeys(rank // GROUP for rank in ranks):
            if wanted.issuperset(self._relays.ranks_of(group)):
                infos = self._team_of[group * GROUP].infos
                node = infos[0].node_id if infos else ""
                pending = self._relays.call(group, step, node, deadline_s())
                if pending is not None:
                    calls[group] = pending
        losses.append(self._in_turns([rank for rank in ranks if rank // GROUP not in calls], call, answers))
        found, late, unheard = self._relays.collect(calls, lambda failed: losses.append(self._collect(failed, answers)))
        answers.update(found)
        if late:
            losses.append(Loss(frozenset(late), f"no answer within {deadline_s():g} s"))
        losses.append(self._in_turns(unheard, call, answers))
        loss = all_lost(losses)
        if loss is None:
            return None
        once = {self._team_of[rank]: rank for rank in loss.keys}  # an actor that is lost counts once, whatever it serves
        return replace(loss, keys=frozenset(once.values()))

    def _meeting_place(self, team: Team, count: int) -> tuple[str, int]:
        answers: dict[int, tuple[str, int]] = {}
        loss = self._collect({0: team.actors[0].serve_training.remote(count)}, answers)
        if loss is not None:
            raise LostAgain(f"{loss.reason} while it opened a group")
        return answers[0]

    def _room_for(self) -> int:
        return placement.teams_with_room(self._recipe, self.mesh.shards, self._cpus)

    def _patience_s(self) -> float:
        return placement.patience_s(self._recipe)

    def _room(self) -> str:
        free = placement.free_resources()
        return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs of the cluster are free."

    def _leaving_nodes(self) -> frozenset[str]:
        return placement.leaving_nodes()

    def _collect(
        self, calls: dict[int, Any], answers: dict[int, Any], hear: Hear | None = None, wait: bool = True
    ) -> Loss | None:
        import ray
        from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError

        key_of = {call: key for key, call in calls.items() if key not in answers}
        waiting: list[Any] = list(key_of)
        lost, alone = set[int](), set[int]()
        deadline = deadline_s()
        ready: list[Any]
        reason = ""
        while waiting:
            count = len(waiting) if hear is None else 1
            ready, waiting = ray.wait(waiting, num_returns=count, timeout=deadline if wait else 0)
            if not wait and not ready:
                break
            if wait and (not ready or (waiting and hear is None)):
                lost |= {key_of[call] for call in waiting}
                waiting, reason = [], f"no answer within {deadline:g} s"
            for call in ready:
                key = key_of[call]
                try:
                    value: Any = ray.get(call if hear is None else next(call))
                except RayActorError as error:
                    if error.actor_init_failed:
                        raise SoupError(f"An actor failed while it was created: {_cause_in(str(error))}.") from error
                    lost.add(key)
                    reason = _death(error)
                except RayTaskError as error:
                    if not isinstance(error.cause, GroupLost):
                        raise _original(error) from error
                    lost.add(key)
                    alone.add(key)
                    reason = reason or first_line(error.cause)
                except (ObjectLostError, NodeDiedError):  # a large answer stays on its node until the driver fetches it
                    lost.add(key)
                    reason = "its node ended before the driver had fetched its answer"
                else:
                    if hear is not None and isinstance(value, tuple):
                        hear(key, *value)
                        waiting.append(call)
                    else:
                        answers[key] = value
        return Loss(frozenset(lost), reason, frozenset(alone)) if lost else None


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

    def setup(self, progress: ProgressCallback, seen: tuple[str, ...] = ()) -> SetupInfo:
        """Start all actors and wait until they are set up."""
        self._seen = seen
        return self._start_all(progress)

    def hash(self, progress: ProgressCallback) -> list[str]:
        """Return the SHA-256 of each ingredient, each computed by one actor."""
        size, count = self.mesh.size, len(self._ingredients)
        nbytes = sum(ingredient.nbytes for ingredient in self._ingredients)
        progress("hashing", 0, nbytes)
        answers = self._ask("hash", lambda actor, rank: actor.hash.remote(range(rank, count, size)))
        progress("hashing", nbytes, nbytes)
        return [answers[k % size][k // size] for k in range(count)]

    def _create(self, team: Team) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        node = self._places[team.number % len(self._places)]
        place = NodeAffinitySchedulingStrategy(node, soft=True)  # on another node if this one has died
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": place}
        team.actors.append(ray.remote(Baker).options(**options).remote(self._ingredients, None))


def _original(error: RayTaskError) -> BaseException:
    """Return what an actor's code raised; a SoupError that names it if Ray could not send it."""
    cause: BaseException = error.cause
    if type(cause).__module__.startswith("ray."):
        return SoupError(f"An actor failed: {_cause_in(error.traceback_str)}.")
    return cause


def _cause_in(text: str) -> str:
    """Return the last line of a remote traceback that is not empty."""
    if "No module named 'ray_soup'" in text:
        return f"its node lacks ray_soup; {EVERYWHERE}"
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

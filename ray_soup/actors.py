"""Start, place, ask and replace the actors. Ray stands here, in search.py and in finetune.py, nowhere else.

What crosses the network in a step: coordinates and positions out, projected gradients back. What Ray lost is made anew and
asked again; what the code got wrong is raised.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ray_soup.checkpoints import Ingredient
from ray_soup.errors import RecipeError, SoupError
from ray_soup.models import look_in
from ray_soup.recipe import Recipe
from ray_soup.shard import GroupLost, Mesh, Partial, Ready, Score, Shard

DEADLINE_S = float(os.environ.get("RAY_SOUP_DEADLINE_S", 600))  # of one answer, or one sign of life while setting up
ATTEMPTS = 5  # at one call, before a run that loses its actors again and again is given up
Watch = Callable[[str, int, int], None]
"""Is told (what is being done, done, in all)."""


@contextmanager
def connect() -> Iterator[None]:
    """Ray as it is: the session that is there, the cluster at RAY_ADDRESS, or a quiet one of our own for as long as this
    lasts."""
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


def resolve_mesh(recipe: Recipe, parameters: int, ingredients: int) -> tuple[Mesh, float]:
    """The mesh and the CPUs of an actor that `auto` stands for on this cluster: an actor for each GPU, or for each two
    cores (for each core where there are less than four); as few shards as fit into memory. Raises RecipeError for what
    the cluster can never place."""
    import ray

    have = ray.cluster_resources()
    cores, gpus, memory = int(have.get("CPU", 0)), have.get("GPU", 0.0), have.get("memory", 0.0)
    asked = recipe.actors
    cpus = asked.cpus if asked.cpus != "auto" else 1 if cores < 4 or asked.gpus else 2
    most = max(1, int(min(cores // cpus if cpus else cores, gpus / asked.gpus if asked.gpus else float("inf"))))
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 1}[recipe.directions.dtype]
    shards = asked.shards
    if shards == "auto":
        fixed = 2 if asked.replicas == "auto" else asked.replicas
        shards = 1
        # parameters and gradient are whole in every actor; base, center and directions are cut into shards
        while (
            fixed * shards * parameters * (8 + (8 + itemsize * ingredients) / shards) > memory / 2
            and (shards + 1) * (1 if asked.replicas == "auto" else asked.replicas) <= most
        ):
            shards += 1
    replicas = asked.replicas if asked.replicas != "auto" else max(1, most // shards)
    mesh = Mesh(replicas, shards)
    if mesh.size * cpus > cores or mesh.size * asked.gpus > gpus:
        raise RecipeError(
            f"actors: {replicas} replicas x {shards} shards with {cpus:g} CPUs and {asked.gpus:g} GPUs each take "
            f"{mesh.size * cpus:g} CPUs and {mesh.size * asked.gpus:g} GPUs; the cluster has {cores} and {gpus:g}."
        )
    return mesh, cpus


class RemoteShard(Shard):
    """A shard in an actor's process."""

    def __init__(self, folder: str, *arguments: Any):
        look_in(folder)
        super().__init__(*arguments)

    def serve_group(self) -> tuple[str, int]:
        import ray

        host = ray.util.get_node_ip_address()
        return host, self.open_group(host)


class Actors:
    """A mesh of actors, and what the driver may ask of them. Every answer comes in the order of ranks."""

    def __init__(self, recipe: Recipe, ingredients: list[Ingredient], mesh: Mesh, cpus: float, learning: bool):
        import ray

        self.mesh, self._learning = mesh, learning
        self._begun: tuple[np.ndarray, np.ndarray] | None = None
        self._groups = [self._placement(recipe, mesh, cpus) for _ in range(mesh.replicas)]
        remote, folder = ray.remote(RemoteShard), os.getcwd()

        def make(rank: int) -> Any:
            options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": recipe.actors.gpus, "max_restarts": 0}
            group = self._groups[rank // mesh.shards]
            if group is not None:
                options["placement_group"] = group
                options["placement_group_bundle_index"] = rank % mesh.shards
            else:
                options["scheduling_strategy"] = "SPREAD"
            return remote.options(**options).remote(folder, recipe, ingredients, mesh, rank, max(1, int(cpus)))

        self._make = make
        self._handles: list[Any] = [None] * mesh.size

    @staticmethod
    def _placement(recipe: Recipe, mesh: Mesh, cpus: float) -> Any:
        """Shards of a replica stay inside a node."""
        import ray

        if mesh.shards == 1 or ray.util.get_current_placement_group() is not None:
            return None
        return ray.util.placement_group([{"CPU": cpus, "GPU": recipe.actors.gpus}] * mesh.shards, "STRICT_PACK")

    def close(self) -> None:
        import ray

        for handle in self._handles:
            if handle is not None:
                ray.kill(handle)
        for group in self._groups:
            if group is not None:
                ray.util.remove_placement_group(group)

    def setup(self, watch: Watch) -> Ready:
        """Start all actors and wait until they are ready; what they know is the same for all of them."""
        return self._start(list(range(self.mesh.size)), watch)[0]

    # What the driver asks

    def begin(self, chosen: np.ndarray, x: np.ndarray) -> None:
        """Start a model batch: ingredients `chosen` [m] move, the others stay at x float32 [K, B]."""
        self._begun = (chosen, x)
        self._ask("begin", lambda actor, rank: actor.begin.remote(chosen, x))

    def step(self, x: np.ndarray, positions: np.ndarray) -> list[Partial]:
        """Partial projected gradients at x float32 [m, B], of one batch of fit split over the actors."""
        parts = np.array_split(positions, self.mesh.size)
        return self._ask("step", lambda actor, rank: actor.step.remote(x, parts[rank]))

    def evaluate(self, x: np.ndarray, split: str, examples: int) -> Score:
        """Score on a split at x float32 [m, B], its examples split over the actors."""
        parts = _spans(examples, self.mesh.size)
        scores = self._ask("evaluate", lambda actor, rank: actor.evaluate.remote(x, split, parts[rank]))
        return sum(scores, Score())

    def evaluate_file(self, path: str, split: str, examples: int) -> Score:
        """Score of the checkpoint at `path`, the examples of the split split over the actors."""
        parts = _spans(examples, self.mesh.size)
        scores = self._ask("evaluate_file", lambda actor, rank: actor.evaluate_file.remote(path, split, parts[rank]))
        return sum(scores, Score())

    def evaluate_files(self, paths: list[str], split: str, examples: int) -> Iterator[Score]:
        """Score of each checkpoint, whole checkpoints spread over the actors: yields them in order."""
        for first in range(0, len(paths), self.mesh.size):
            some = paths[first : first + self.mesh.size]
            yield from self._ask(
                "evaluate_file",
                lambda actor, rank, some=some: actor.evaluate_file.remote(some[rank], split, (0, examples)),
                range(len(some)),
            )

    def peak_memory(self) -> list[int]:
        """Most bytes that each actor has held."""
        return self._ask("peak_memory", lambda actor, rank: actor.peak_memory.remote())

    # How it is asked

    def _ask(self, what: str, call: Callable[[Any, int], Any], ranks: Any = None) -> list[Any]:
        missing = list(range(self.mesh.size)) if ranks is None else list(ranks)
        answers: dict[int, Any] = {}
        wanted = list(missing)
        for _ in range(ATTEMPTS):
            lost, reason = self._collect({rank: call(self._handles[rank], rank) for rank in missing}, answers)
            if not lost:
                return [answers[rank] for rank in wanted]
            replicas = {rank // self.mesh.shards for rank in lost}
            missing = [rank for rank in wanted if rank // self.mesh.shards in replicas]
            self._replace(replicas)
        raise SoupError(f"'{what}' failed {ATTEMPTS} times: actors {sorted(lost)} were lost again and again ({reason}).")

    def _collect(self, refs: dict[int, Any], answers: dict[int, Any]) -> tuple[set[int], str]:
        """Fill in the answers; returns the ranks that were lost, and how."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        rank_of = {ref: rank for rank, ref in refs.items()}
        waiting = list(rank_of)
        lost: set[int] = set()
        reason = ""
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=DEADLINE_S)
            if not ready:
                return lost | {rank_of[ref] for ref in waiting}, f"no answer within {DEADLINE_S:.0f} s"
            rank = rank_of[ready[0]]
            try:
                answers[rank] = ray.get(ready[0])
            except RayActorError as error:
                lost.add(rank)
                reason = _first_line(error)
            except RayTaskError as error:
                if not isinstance(error.cause, GroupLost):
                    raise error.cause from error
                lost.add(rank)
                reason = reason or _first_line(error.cause)
        return lost, reason

    def _replace(self, replicas: set[int]) -> None:
        """Make replicas anew, and bring them to where the model batch began."""
        import ray

        ranks = [r * self.mesh.shards + s for r in sorted(replicas) for s in range(self.mesh.shards)]
        for rank in ranks:
            ray.kill(self._handles[rank])
        self._start(ranks, lambda what, done, total: None)
        if self._begun is not None:
            chosen, x = self._begun
            lost, reason = self._collect({r: self._handles[r].begin.remote(chosen, x) for r in ranks}, {})
            if lost:
                raise SoupError(f"Actors {sorted(lost)} were lost while they were being replaced ({reason}).")

    def _start(self, ranks: list[int], watch: Watch) -> list[Ready]:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        for rank in ranks:
            self._handles[rank] = self._make(rank)
        news = {self._handles[rank].setup.remote(self._learning): rank for rank in ranks}
        ready: dict[int, Ready] = {}
        watch("starting actors", 0, len(ranks))
        while news:
            some, _ = ray.wait(list(news), num_returns=1, timeout=DEADLINE_S)
            if not some:
                raise SoupError(
                    f"Actors {sorted(news.values())} gave no sign of life within {DEADLINE_S:.0f} s of starting. Is the "
                    "cluster busy? It has free: "
                    f"{ {k: v for k, v in ray.available_resources().items() if k in ('CPU', 'GPU')} }."
                )
            try:
                value = ray.get(next(some[0]))  # type: ignore[call-overload]
            except StopIteration:
                del news[some[0]]
                continue
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                raise SoupError(f"Actor {news[some[0]]} was lost while setting up: {_first_line(error)}") from error
            if isinstance(value, Ready):
                ready[news[some[0]]] = value
                watch("starting actors", len(ready), len(ranks))
            else:
                watch(*value)
        if self.mesh.shards > 1:
            self._join(ranks)
        return [ready[rank] for rank in ranks]

    def _join(self, ranks: list[int]) -> None:
        import ray

        firsts = [rank for rank in ranks if rank % self.mesh.shards == 0]
        serving = [self._handles[rank].serve_group.remote() for rank in firsts]
        where = dict(zip(firsts, ray.get(serving, timeout=DEADLINE_S), strict=True))
        joins = [self._handles[rank].join.remote(*where[rank - rank % self.mesh.shards]) for rank in ranks]
        ray.get(joins, timeout=DEADLINE_S)


def _spans(examples: int, parts: int) -> list[tuple[int, int]]:
    cuts = [examples * p // parts for p in range(parts + 1)]
    return list(itertools.pairwise(cuts))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

"""Start, place, ask and replace the actors. Ray stands here, in search.py and in finetune.py, nowhere else.

What crosses the network in a step: coordinates and positions out, projected gradients back. What Ray lost is made anew and
asked again; what the code got wrong is raised.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import numpy as np

from ray_soup.checkpoints import Ingredient
from ray_soup.data import Split
from ray_soup.errors import RecipeError, SoupError
from ray_soup.hyperplane import ITEMSIZE
from ray_soup.models import look_in
from ray_soup.outcomes import Outcome, Score, join
from ray_soup.recipe import Recipe
from ray_soup.running_statistics import Statistics, averaged
from ray_soup.shard import Calibration, GroupLost, Mesh, Partial, Ready, Shard, Taken

DEADLINE_S = float(os.environ.get("RAY_SOUP_DEADLINE_S", 600))  # of one answer, or one sign of life while setting up
NO_ANSWER = "no answer"
FIXED_BYTES = 1_200_000_000  # of an actor's process, without the model's numbers
ATTEMPTS = 5  # at one call, before a run that loses its actors again and again is given up
Watch = Callable[[str, int, int], None]
"""Is told (what is being done, done, in all)."""


def quiet(what: str, done: int, total: int) -> None: ...


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


def resolve_mesh(recipe: Recipe, parameters: int, ingredients: int, watch: Watch = quiet) -> tuple[Mesh, float]:
    """The mesh and the CPUs of an actor that `auto` stands for on this cluster: an actor for each GPU, or for each two
    cores (for each core where there are less than four); as few shards as fit into memory. Waits for nodes as long as
    `actors.wait_s` says; raises RecipeError for what the cluster cannot place."""
    found: list[tuple[Mesh, float]] = []

    def missing() -> list[dict[str, float]]:
        found[:] = [_mesh_now(recipe, parameters, ingredients)]
        return _missing(recipe, *found[0])

    def complaint() -> str:
        import ray

        have, (mesh, cpus), gpus = ray.cluster_resources(), found[0], recipe.actors.gpus
        return (
            f"actors: {mesh.replicas} replicas x {mesh.shards} shards with {cpus:g} CPUs and {gpus:g} GPUs each take "
            f"{mesh.size * cpus:g} CPUs and {mesh.size * gpus:g} GPUs; the cluster has {have.get('CPU', 0):g} and "
            f"{have.get('GPU', 0):g}. Ask for less (actors.gpus=0 works on CPUs), or set actors.wait_s where nodes are "
            "still to come."
        )

    wait_for_nodes(missing, complaint, recipe.actors.wait_s, watch)
    return found[0]


def wait_for_nodes(
    missing: Callable[[], list[dict[str, float]]],
    complaint: Callable[[], str],
    wait_s: float,
    watch: Watch,
    error: type[SoupError] = RecipeError,
) -> None:
    """Until nothing is missing, ask an autoscaling cluster for these bundles; after `wait_s` raises `error`."""
    from ray.autoscaler.sdk import request_resources

    started, asking = time.monotonic(), False
    while bundles := missing():
        waited = time.monotonic() - started
        if waited >= wait_s:
            raise error(complaint())
        request_resources(bundles=[{k: v for k, v in bundle.items() if v} for bundle in bundles])
        asking = True
        watch("waiting for nodes", int(waited), int(wait_s))
        time.sleep(min(2.0, wait_s))
    if asking:
        request_resources(bundles=[])  # the actors keep the nodes from here on


def _mesh_now(recipe: Recipe, parameters: int, ingredients: int) -> tuple[Mesh, float]:
    import ray

    have = ray.cluster_resources()
    cores, gpus, memory = int(have.get("CPU", 0)), have.get("GPU", 0.0), have.get("memory", 0.0)
    asked = recipe.actors
    cpus = asked.cpus if asked.cpus != "auto" else 1 if cores < 4 or asked.gpus else 2
    most = max(1, int(min(cores // cpus if cpus else cores, gpus / asked.gpus if asked.gpus else float("inf"))))
    shards = asked.shards
    if shards == "auto":
        fixed = 2 if asked.replicas == "auto" else asked.replicas
        shards = 1
        while (
            fixed * shards * actor_bytes(recipe, parameters, ingredients, shards) > memory
            and (shards + 1) * (1 if asked.replicas == "auto" else asked.replicas) <= most
        ):
            shards += 1
    replicas = asked.replicas if asked.replicas != "auto" else max(1, most // shards)
    return Mesh(replicas, shards), cpus


def actor_bytes(recipe: Recipe, parameters: int, model_batch: int, shards: int, fixed: float = FIXED_BYTES) -> float:
    """What an actor holds: parameters and gradient whole; center, base and the directions of a model batch by shards."""
    return fixed + parameters * 8 + parameters * (8 + ITEMSIZE[recipe.directions.dtype] * model_batch) / shards


def memory_of_each(mesh: Mesh) -> float:
    """Bytes that the cluster has for each actor of a mesh."""
    import ray

    return ray.cluster_resources().get("memory", float("inf")) / mesh.size


def has_room(recipe: Recipe, mesh: Mesh, cpus: float) -> bool:
    """Whether the cluster is large enough for this mesh."""
    import ray

    have = ray.cluster_resources()
    return mesh.size * cpus <= have.get("CPU", 0) and mesh.size * recipe.actors.gpus <= have.get("GPU", 0)


def _missing(recipe: Recipe, mesh: Mesh, cpus: float) -> list[dict[str, float]]:
    """The bundles of this mesh where the cluster is too small for it, else none."""
    return [] if has_room(recipe, mesh, cpus) else [{"CPU": cpus, "GPU": recipe.actors.gpus}] * mesh.size


class _Lost(Exception):
    """An actor died while it was being started or brought to where the others are."""


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

    _precision = ""

    def __init__(self, recipe: Recipe, ingredients: list[Ingredient], mesh: Mesh, cpus: float):
        import ray

        self.mesh, self._recipe, self._cpus = mesh, recipe, cpus
        self._taken: tuple[tuple[int, ...], str | int] | None = None
        self._begun: tuple[np.ndarray, np.ndarray, str] | None = None
        self._used: Statistics = {}
        self._seen: tuple[str, ...] = ()
        self._nodes: dict[int, str] = {}
        self._held = 0
        self._groups = [self._placement(recipe, mesh, cpus) for _ in range(mesh.replicas)]
        remote, folder = ray.remote(RemoteShard), os.getcwd()

        def make(rank: int) -> Any:
            options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": recipe.actors.gpus, "max_restarts": 0}
            group = self._groups[rank // mesh.shards]
            if group is not None:
                options["placement_group"] = group
                options["placement_group_bundle_index"] = rank % mesh.shards
            elif ray.util.get_current_placement_group() is None:  # inside a trial: in its own placement group
                options["scheduling_strategy"] = "SPREAD"
            return remote.options(**options).remote(folder, recipe, ingredients, mesh, rank, max(1, int(cpus)))

        self._make = make
        self._handles: list[Any] = [None] * mesh.size

    @staticmethod
    def _placement(recipe: Recipe, mesh: Mesh, cpus: float) -> Any:
        """Shards of a replica stay inside a node where one has room for them."""
        import ray

        if mesh.shards == 1 or ray.util.get_current_placement_group() is not None:
            return None
        return ray.util.placement_group([{"CPU": cpus, "GPU": recipe.actors.gpus}] * mesh.shards, "PACK")

    def close(self) -> None:
        import ray

        for handle in self._handles:
            if handle is not None:
                ray.kill(handle)
        for group in self._groups:
            if group is not None:
                ray.util.remove_placement_group(group)

    def setup(self, watch: Watch, seen: tuple[str, ...] = ()) -> Ready:
        """Start all actors and wait until they are ready; what they know is the same for all of them. They must see the
        files `seen`."""
        self._seen = seen
        for _ in range(ATTEMPTS):
            try:
                return self._start(list(range(self.mesh.size)), watch)
            except _Lost as error:
                reason = str(error)
        raise SoupError(f"The actors could not be started, {ATTEMPTS} times: {reason}. The same command goes on.")

    # What the driver asks

    def take(self, subset: tuple[int, ...], blocks: str | int, watch: Watch) -> Taken:
        """Hold directions of the ingredients `subset` around their mean, to learn coefficients for blocks of this kind."""
        self._taken, self._begun, self._used = None, None, {}
        call = (subset, blocks)
        taken = self._ask("take", lambda actor, rank: actor.take.remote(*call), watch=watch)[0]
        self._taken, self._held = call, taken.held
        return taken

    def choose_precision(self) -> str:
        """float32 or bfloat16: what to learn in, on the first actor's hardware. Found once."""
        if not self._precision:
            self._precision = self._ask("choose_precision", lambda actor, rank: actor.choose_precision.remote(), [0])[0]
        return self._precision

    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
        """Start a model batch: ingredients `chosen` [m] move, the others stay at x float32 [K, B]; passes are in
        `precision`."""
        self._begun = (chosen, x, precision)
        self._ask("begin", lambda actor, rank: actor.begin.remote(chosen, x, precision))

    def step(self, x: np.ndarray, factor: float, batch: Split) -> list[Partial]:
        """Partial projected gradients at x float32 [m, B], of one batch split over the actors."""
        parts = batch.parts(self.mesh.size)
        return self._ask("step", lambda actor, rank: actor.step.remote(x, factor, parts[rank]))

    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Score:
        """Score at x float32 [m, B], the examples split over the actors."""
        parts = split.parts(self.mesh.size)
        scores = self._ask("evaluate", lambda actor, rank: actor.evaluate.remote(x, factor, parts[rank]), watch=quiet)
        return sum(scores, Score())

    def recalibrate(self, x: np.ndarray, batches: list[Split]) -> Statistics:
        """Running statistics at x float32 [m, B], of these batches spread over the actors; used by all from here on."""
        size = self.mesh.size
        parts = self._ask(
            "sum_statistics", lambda actor, rank: actor.sum_statistics.remote(x, batches[rank::size]), watch=quiet
        )
        self.use(averaged(parts))
        return self._used

    def use(self, statistics: Statistics) -> None:
        """Have these running statistics from here on."""
        self._used = statistics
        self._ask("use", lambda actor, rank: actor.use.remote(statistics))

    def statistics_of_file(self, path: str, batches: list[Split], watch: Watch = quiet) -> Statistics:
        """Running statistics of the checkpoint at `path`, of these batches spread over the actors."""
        size = self.mesh.size
        return averaged(self._ask(
            "sum_statistics_of_file", lambda actor, rank: actor.sum_statistics_of_file.remote(path, batches[rank::size]),
            watch=watch,
        ))  # fmt: skip

    def gram(self) -> np.ndarray:
        """Inner products of the directions that are held, float64 [K, K]."""
        shards, replicas = self.mesh.shards, self.mesh.replicas
        return sum(self._ask("gram", lambda actor, rank: actor.gram.remote((rank // shards, replicas))))

    def evaluate_file(self, path: str, splits: list[Split], watch: Watch = quiet) -> list[Outcome]:
        """What the checkpoint at `path` does on each split, the examples split over the actors."""
        return self._whole("evaluate_file", splits, path, watch, factored=True)

    def evaluate_member(self, paths: tuple[str, ...], splits: list[Split]) -> list[Outcome]:
        """The same of the last of `paths`, whose logits are added to those of the ones before it."""
        return self._whole("evaluate_member", splits, paths)

    def evaluate_ensemble(self, paths: tuple[str, ...], splits: list[Split]) -> list[Outcome]:
        """What the mean of the logits of all `paths` does."""
        return self._whole("evaluate_ensemble", splits, paths)

    def _whole(self, what: str, splits: list[Split], paths: Any, watch: Watch = quiet, **options: Any) -> list[Outcome]:
        parts = [split.parts(self.mesh.size) for split in splits]
        answers = self._ask(
            what, lambda actor, rank: getattr(actor, what).remote(paths, [p[rank] for p in parts], **options), watch=watch
        )
        return [join(outcomes) for outcomes in zip(*answers, strict=True)]

    def evaluate_files(self, paths: list[str], splits: list[Split]) -> Iterator[list[Outcome]]:
        """What each checkpoint does, whole checkpoints spread over the actors: yields them in order."""
        for first in range(0, len(paths), self.mesh.size):
            some = paths[first : first + self.mesh.size]
            yield from self._ask(
                "evaluate_file",
                lambda actor, rank, some=some: actor.evaluate_file.remote(some[rank], splits, factored=False),
                range(len(some)),
                watch=quiet,
            )

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> int:
        """How many examples the mean of the ingredients `kept` and `candidate` gets right, with running statistics of the
        batches `calibration`; every actor takes each mesh.size-th of the examples."""
        size = self.mesh.size

        def call(actor: Any, rank: int) -> Any:
            mine = [Split(s.source, s.rows[rank::size]) for s in splits]
            return actor.try_candidate.remote(kept, candidate, mine, calibration)

        return sum(self._ask("try_candidate", call))

    def forget(self) -> None:
        """Let go of what was kept for an ensemble or a greedy search."""
        self._ask("forget", lambda actor, rank: actor.forget.remote())

    def calibrate(self, model_batch: int, most: int, watch: Watch) -> Calibration:
        """What the first actor's node takes for the parts of a step with no more than `most` images."""
        return self._ask("calibrate", lambda actor, rank: actor.calibrate.remote(model_batch, most), [0], watch)[0]

    def reset_peak(self) -> None:
        self._ask("reset_peak", lambda actor, rank: actor.reset_peak.remote())

    def peak_memory(self) -> list[int]:
        """Most bytes that each actor has held since `reset_peak`."""
        return self._ask("peak_memory", lambda actor, rank: actor.peak_memory.remote())

    # How it is asked

    def _ask(self, what: str, call: Callable[[Any, int], Any], ranks: Any = None, watch: Watch | None = None) -> list[Any]:
        missing = list(range(self.mesh.size)) if ranks is None else list(ranks)
        answers: dict[int, Any] = {}
        wanted = list(missing)
        for _ in range(ATTEMPTS):
            lost, reason = self._collect({rank: call(self._handles[rank], rank) for rank in missing}, answers, watch)
            if not lost:
                return [answers[rank] for rank in wanted]
            replicas = {rank // self.mesh.shards for rank in lost}
            missing = [rank for rank in wanted if rank // self.mesh.shards in replicas]
            with suppress(_Lost):  # one was lost again on the way: the next call will find it so
                self._replace(replicas)
        raise SoupError(
            f"'{what}' failed {ATTEMPTS} times: {self._named(lost)} lost again and again ({reason}). The same command goes "
            "on."
        )

    def _named(self, ranks: Iterable[int]) -> str:
        """Actors with their nodes and the bytes that they held."""
        known = [f"actor {r} on {self._nodes.get(r, 'no node yet')}" for r in sorted(ranks)]
        return f"{', '.join(known)} (holding {self._held / 1e6:,.0f} MB of directions)"

    def _collect(self, calls: dict[int, Any], answers: dict[int, Any], watch: Watch | None = None) -> tuple[set[int], str]:
        """Fill in the answers; returns the ranks that were lost, and how. With `watch` the calls are streams: it is told
        what they yield before their answer."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        rank_of = {call: rank for rank, call in calls.items()}
        waiting = list(rank_of)
        lost: set[int] = set()
        reason = ""
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1 if watch else len(waiting), timeout=DEADLINE_S)
            if not ready or (waiting and not watch):
                silent = {rank_of[call] for call in waiting}
                waiting, lost, reason = [], lost | silent, f"{NO_ANSWER} within {DEADLINE_S:.0f} s"
            for call in ready:
                rank = rank_of[call]
                try:
                    value: Any = ray.get(next(call) if watch else call)
                    if watch and isinstance(value, tuple):
                        watch(*value)
                        waiting.append(call)
                    else:
                        answers[rank] = value
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
        """Make replicas anew, and bring them to where the model batch began. Raises _Lost."""
        ranks = [r * self.mesh.shards + s for r in sorted(replicas) for s in range(self.mesh.shards)]
        self._start(ranks, quiet)
        if self._taken is not None:
            subset, blocks = self._taken
            self._must(ranks, "being replaced", lambda actor, _: actor.take.remote(subset, blocks), quiet)
        if self._begun is not None:
            begun = self._begun
            self._must(ranks, "being replaced", lambda actor, _: actor.begin.remote(*begun))
        if self._used:
            self._must(ranks, "being replaced", lambda actor, _: actor.use.remote(self._used))

    def _must(self, ranks: list[int], when: str, call: Callable[[Any, int], Any], watch: Watch | None = None) -> list[Any]:
        answers: dict[int, Any] = {}
        lost, reason = self._collect({rank: call(self._handles[rank], rank) for rank in ranks}, answers, watch)
        if lost and reason.startswith(NO_ANSWER):
            import ray

            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise SoupError(
                f"{self._named(lost)}: {reason} while {when}. Is the cluster busy, or has it lost a node? It has free: "
                f"{free}. The same command goes on, with fewer actors where there is less room."
            )
        if lost:
            raise _Lost(f"{self._named(lost)} lost while {when} ({reason})")
        return [answers[rank] for rank in ranks]

    def _start(self, ranks: list[int], watch: Watch) -> Ready:
        """Make these actors, anew where they are there. Raises _Lost where one dies meanwhile."""
        import ray

        for rank in ranks:
            if self._handles[rank] is not None:
                ray.kill(self._handles[rank])
        wait_for_nodes(
            lambda: _missing(self._recipe, self.mesh, self._cpus),
            lambda: (
                f"{self._named(ranks)} lost, and the cluster has no room left for as many. The same command goes on, with "
                "fewer actors; set actors.wait_s to wait for nodes that come back."
            ),
            self._recipe.actors.wait_s,
            watch,
            SoupError,
        )
        for rank in ranks:
            self._handles[rank] = self._make(rank)
        watch("starting actors", 0, len(ranks))
        ready = self._must(ranks, "starting", lambda actor, _: actor.setup.remote(self._seen), watch)
        watch("starting actors", len(ranks), len(ranks))
        self._nodes |= {rank: answer.node for rank, answer in zip(ranks, ready, strict=True)}
        if self.mesh.shards > 1:
            self._join(ranks)
        return ready[0]

    def _join(self, ranks: list[int]) -> None:
        firsts = [rank for rank in ranks if rank % self.mesh.shards == 0]
        where = dict(
            zip(firsts, self._must(firsts, "opening a group", lambda actor, _: actor.serve_group.remote()), strict=True)
        )
        self._must(ranks, "joining", lambda actor, rank: actor.join.remote(*where[rank - rank % self.mesh.shards]))


class _Called:
    """A shard whose methods are asked for as an actor's are, and answer at once."""

    def __init__(self, shard: Shard):
        self._shard = shard

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._shard, name))


class LocalActors(Actors):
    """The same without Ray: replicas in this process, asked one after the other."""

    def __init__(self, recipe: Recipe, ingredients: list[Ingredient], mesh: Mesh, threads: int):
        assert mesh.shards == 1
        self.mesh = mesh
        self.shards = [Shard(recipe, ingredients, mesh, rank, threads) for rank in range(mesh.size)]

    def close(self) -> None:
        self.shards = []

    def setup(self, watch: Watch, seen: tuple[str, ...] = ()) -> Ready:
        return self._ask("setup", lambda actor, rank: actor.setup.remote(seen), watch=watch)[0]

    def _ask(self, what: str, call: Callable[[Any, int], Any], ranks: Any = None, watch: Watch | None = None) -> list[Any]:
        answers = []
        for rank in range(self.mesh.size) if ranks is None else ranks:
            answer = call(_Called(self.shards[rank]), rank)
            if watch is not None:
                for news in answer:
                    if isinstance(news, tuple):
                        watch(*news)
                    else:
                        answer = news
            answers.append(answer)
        return answers


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

"""A pool of shards in this process, called one after the other: the same calls and recovery, without Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_soup.actors.calls import Hear, Loss
from ray_soup.actors.mesh_pool import MeshPool
from ray_soup.actors.messages import Mesh
from ray_soup.actors.shard import Shard
from ray_soup.actors.teams import Team
from ray_soup.io.ingredient import Ingredient
from ray_soup.recipe import Recipe


class HandleKilled(Exception):
    """The shard of a handle was killed."""


class LocalHandle:
    """A shard, called as an actor is: `handle.step.remote(...)` returns a pending call."""

    def __init__(self, shard: Shard) -> None:
        self._shard: Shard | None = shard

    @property
    def shard(self) -> Shard:
        """The shard. Raises HandleKilled."""
        if self._shard is None:
            raise HandleKilled("the shard was killed")
        return self._shard

    def kill(self) -> None:
        """Drop the shard: calls that have not answered are lost."""
        self._shard = None

    def __getattr__(self, name: str) -> _Method:
        return _Method(self, name)


@dataclass(frozen=True)
class _Method:
    handle: LocalHandle
    name: str

    def remote(self, *arguments: Any, **options: Any) -> Callable[[int, Hear | None], Any]:
        """Return a pending call: a function (rank, hear) that runs the method; with `hear`, the method is a stream."""

        def run(rank: int, hear: Hear | None) -> Any:
            reply = getattr(self.handle.shard, self.name)(*arguments, **options)
            if hear is None:
                return reply
            answer = None
            for value in reply:
                if isinstance(value, tuple):
                    hear(rank, *value)
                    _ = self.handle.shard  # may have been killed meanwhile
                else:
                    answer = value
            return answer

        return run


class InProcessPool(MeshPool):
    """Replicas in this process, with `threads` threads. Raises ValueError if a replica has several shards."""

    def __init__(self, recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, threads: int) -> None:
        if mesh.shards != 1:
            raise ValueError(f"mesh: found {mesh.shards} shards; a replica in one process has 1.")
        super().__init__(mesh)
        self._recipe, self._ingredients, self._threads = recipe, ingredients, threads

    @property
    def shards(self) -> list[Shard]:
        """The shards by rank, after `setup`."""
        return [handle.shard for handle in self.handles if handle is not None]

    def _create(self, team: Team) -> None:
        team.actors = [LocalHandle(Shard(self._recipe, self._ingredients, self.mesh, 0, self._threads))]

    def _kill(self, team: Team) -> None:
        for handle in team.actors:
            handle.kill()

    def _collect(
        self, calls: dict[int, Any], answers: dict[int, Any], hear: Hear | None = None, wait: bool = True
    ) -> Loss | None:
        lost, reason = set(), ""
        for key, run in calls.items():
            try:
                answers[key] = run(key, hear)
            except HandleKilled as error:
                lost.add(key)
                reason = str(error)
        return Loss(frozenset(lost), reason) if lost else None

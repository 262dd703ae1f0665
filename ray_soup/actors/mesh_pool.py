"""The calls of a pool of actors, most of them by rank; subclasses of `MeshPool` add a transport: Ray, or this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ray_soup.actors.calls import Call, Loss, of_all, of_each, unheard
from ray_soup.actors.messages import (
    KeptEnsemble,
    Mesh,
    ModelFiles,
    Partial,
    SetupInfo,
    StepTimings,
    StoreInfo,
    TrainingJob,
    TrainingResult,
)
from ray_soup.actors.recovery import RecoveringMesh
from ray_soup.actors.relays import TIMES, PackedStep, group_of, total
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import Blocks
from ray_soup.mixing.running_statistics import Statistics, averaged
from ray_soup.mixing.shard_files import ShardFiles
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome, Score, join_outcomes


class MeshPool(RecoveringMesh):
    """An ActorPool on a mesh of actors; subclasses provide the transport.

    Calls recover from the loss of actors. Raises SoupError after ATTEMPTS attempts at one call.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        self._precision = ""

    @property
    def nodes(self) -> int:
        """The number of nodes that the actors run on."""
        return len({info.node for team in self._serving() for info in team.infos})

    def setup(self, progress: ProgressCallback, seen: tuple[str, ...] = ()) -> SetupInfo:
        """Start the actors that the cluster has room for, and compare the examples of all sources."""
        self._seen = seen
        info = self._start_all(progress)
        compared = self._ask("compare", lambda actor, rank: actor.compare_examples.remote(), [0], of_each(progress))
        digests, contents = compared[0].fit_digests, compared[0].contents
        return replace(info, fit_digests=digests, contents=contents)

    def open_store(self, subset: tuple[int, ...], blocks: Blocks, progress: ProgressCallback) -> StoreInfo:
        """Open the directions of the ingredients `subset` around their mean, for blocks of this kind."""
        self._opened, self._begun, self._used = None, None, None
        call = (subset, blocks)
        info: StoreInfo = self._ask_each("open_store", lambda actor: actor.open_store.remote(*call), of_each(progress))[0]
        self._opened = call
        return info

    def choose_precision(self) -> str:
        """Choose float32 or bfloat16 for learning, on the first actor's hardware, once."""
        if not self._precision:
            self._precision = self._ask("choose_precision", lambda actor, rank: actor.choose_precision.remote(), [0])[0]
        return self._precision

    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
        """Begin a model batch: the ingredients `chosen`, int64 [m], move; the others stay at x, float32 [K, B]."""
        self._begun = (chosen, x, precision)
        self._ask_each("begin", lambda actor: actor.begin.remote(chosen, x, precision))

    def step(self, x: np.ndarray, factor: float, batch: Split) -> list[Partial]:
        """Return the partial projected gradients at x, float32 [m, B], on one batch split over the ranks.

        There is one for each rank; in a mesh of more than GROUP ranks, one for each run of as many, added in their order.
        """
        size = self.mesh.size
        step = PackedStep.of(x, factor, batch.source, batch.rows, size)
        answers = self._ask(
            "step",
            lambda actor, rank: actor.packed_step.remote(step.head, step.part(rank, rank + 1)),
            through=lambda ranks, call, found: self._step_in_turns(step, ranks, call, found),
        )
        groups: dict[int, list[np.ndarray]] = {}  # a rank that a relay has added to the first of its group has times only
        for rank, answer in enumerate(answers):
            groups.setdefault(group_of(rank, size), []).append(np.frombuffer(answer))
        times = self._timed(np.array([numbers[-TIMES:] for group in groups.values() for numbers in group]))
        found, first = list[Partial](), 0
        for group in groups.values():
            parts = [numbers[:-TIMES] for numbers in group if len(numbers) > TIMES]
            slowest = first + int(times[first : first + len(group), 0].argmax())
            added = total(parts) if len(parts) > 1 else parts[0]
            partial = Partial.unpacked(np.concatenate([added, times[slowest]]), x.shape)
            found.append(replace(partial, ranks=len(group)))
            first += len(group)
        return found

    def _step_in_turns(self, step: PackedStep, ranks: Sequence[int], call: Call, answers: dict[int, Any]) -> Loss | None:
        """Call the actors of these ranks for a step, as `_in_turns` does, or let others call them."""
        return self._in_turns(ranks, call, answers)

    def _timed(self, times: np.ndarray) -> np.ndarray:
        """Compare the paces of the actors; let the times of a rank begin where its actor began with this step.

        Takes and returns the times of each rank, float64 [ranks, TIMES].
        """
        spent = dict[Any, np.ndarray]()
        found: np.ndarray = times.copy()
        if len(set(self._team_of)) < self.mesh.replicas:
            for of_rank, actor in zip(found, self.handles, strict=True):
                of_rank += spent.get(actor, 0.0)
                spent[actor] = of_rank
        self._compare_paces(times[:, 0].tolist())
        return found

    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Score:
        """Score the model batch on a split at x float32 [m, B], the examples split over the actors."""
        parts = split.parts(self.mesh.size)
        scores: list[Score] = self._ask(
            "evaluate", lambda actor, rank: actor.evaluate.remote(x, factor, parts[rank]), hear=unheard
        )
        return sum(scores, Score())

    def evaluate_each(self, x: np.ndarray, split: Split) -> Outcome:
        """Evaluate the model batch on a split at x float32 [m, B] example by example, the examples split over the actors."""
        parts = split.parts(self.mesh.size)
        return join_outcomes(self._ask(
            "evaluate_each", lambda actor, rank: actor.evaluate_each.remote(x, parts[rank]), hear=unheard
        ))  # fmt: skip

    def recalibrate(self, x: np.ndarray, batches: list[Split]) -> Statistics:
        """Re-estimate running statistics at x float32 [m, B] on these batches, spread over the actors, and use them."""
        size = self.mesh.size
        parts = self._ask(
            "sum_statistics",
            lambda actor, rank: actor.sum_statistics.remote(x, batches[rank::size]),
            hear=unheard,
        )
        statistics = averaged(parts)
        self.use(statistics)
        return statistics

    def use(self, statistics: Statistics) -> None:
        """Use these running statistics from here on."""
        self._used = statistics
        self._ask_each("use", lambda actor: actor.use.remote(statistics))

    def statistics_of_file(self, path: str, batches: list[Split], progress: ProgressCallback = no_progress) -> Statistics:
        """Re-estimate running statistics of the checkpoint at `path` on these batches, spread over the actors."""
        size = self.mesh.size
        parts = self._ask(
            "sum_statistics_of_file",
            lambda actor, rank: actor.sum_statistics_of_file.remote(path, batches[rank::size]),
            hear=of_all(progress, len(batches)),
        )
        return averaged(parts)

    def gram(self) -> np.ndarray:
        """Return the inner products of the open directions, float64 [K, K]."""
        shards, replicas = self.mesh.shards, self.mesh.replicas
        total: np.ndarray = sum(self._ask("gram", lambda actor, rank: actor.gram.remote((rank // shards, replicas))))
        return total

    def gram_of_blocks(self) -> np.ndarray:
        """Return the inner products of the open directions in each block, float64 [B, K, K]."""
        shards, replicas = self.mesh.shards, self.mesh.replicas
        parts = self._ask("gram_of_blocks", lambda actor, rank: actor.gram_of_blocks.remote((rank // shards, replicas)))
        total: np.ndarray = sum(parts)
        return total

    def evaluate_file(self, path: str, splits: list[Split], progress: ProgressCallback = no_progress) -> list[Outcome]:
        """Evaluate the checkpoint at `path` on each split, the examples split over the actors."""
        parts = self._parts(splits)
        return _joined(self._ask(
            "evaluate_file", lambda actor, rank: actor.evaluate_file.remote(path, parts[rank], factored=True),
            hear=of_all(progress, _count(splits)),
        ))  # fmt: skip

    def evaluate_member(
        self,
        paths: tuple[str, ...],
        splits: list[Split],
        progress: ProgressCallback = no_progress,
        keep: KeptEnsemble = KeptEnsemble(),
    ) -> list[Outcome]:
        """Evaluate the last of the checkpoints `paths`, and add its logits to those of the earlier ones."""
        parts = self._parts(splits)
        return _joined(self._ask(
            "evaluate_member", lambda actor, rank: actor.evaluate_member.remote(paths, parts[rank], rank, keep),
            hear=of_all(progress, _count(splits)),
        ))  # fmt: skip

    def evaluate_ensemble(
        self, paths: tuple[str, ...], splits: list[Split], keep: KeptEnsemble = KeptEnsemble()
    ) -> list[Outcome]:
        """Evaluate the mean of the logits of the checkpoints `paths` on each split."""
        parts = self._parts(splits)
        return _joined(self._ask(
            "evaluate_ensemble", lambda actor, rank: actor.evaluate_ensemble.remote(paths, parts[rank], rank, keep),
            hear=unheard,
        ))  # fmt: skip

    def _parts(self, splits: list[Split]) -> list[list[Split]]:
        """Return the part of each split for each rank, [ranks][splits]."""
        parts = [split.parts(self.mesh.size) for split in splits]
        return [[part[rank] for part in parts] for rank in range(self.mesh.size)]

    def evaluate_files(
        self, paths: list[str], splits: list[Split], progress: ProgressCallback = no_progress
    ) -> Iterator[list[Outcome]]:
        """Evaluate each checkpoint on each split, one checkpoint per actor at a time; yield the outcomes in order."""
        each = _count(splits)
        for first in range(0, len(paths), self.mesh.size):

            def count(what: str, done: int, total: int, before: int = first * each) -> None:
                progress(what, before + done, len(paths) * each)

            yield from self._evaluate_whole(paths[first : first + self.mesh.size], splits, count)

    def _evaluate_whole(self, paths: list[str], splits: list[Split], progress: ProgressCallback) -> list[list[Outcome]]:
        """Let each actor evaluate one checkpoint."""
        return self._ask(
            "evaluate_file", lambda actor, rank: actor.evaluate_file.remote(paths[rank], splits, factored=False),
            range(len(paths)), of_all(progress, len(paths) * _count(splits)),
        )  # fmt: skip

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> Score:
        """Score the mean of the ingredients `kept` and `candidate` on splits.

        Every actor takes each mesh.size-th example.
        """
        size = self.mesh.size

        def call(actor: Any, rank: int) -> Any:
            mine = [Split(s.source, s.rows[rank::size]) for s in splits]
            return actor.try_candidate.remote(kept, candidate, mine, calibration)

        return sum(self._ask("try_candidate", call), Score())

    def try_mixture(self, weights: np.ndarray, splits: list[Split], calibration: Sequence[Split] = ()) -> Score:
        """Score the mixture of all ingredients with these weights, float64 [K], on splits, as `try_candidate` does."""
        size = self.mesh.size

        def call(actor: Any, rank: int) -> Any:
            mine = [Split(s.source, s.rows[rank::size]) for s in splits]
            return actor.try_mixture.remote(weights, mine, calibration)

        return sum(self._ask("try_mixture", call), Score())

    def train(self, job: TrainingJob, progress: ProgressCallback) -> TrainingResult:
        """Train all weights from a written soup on, not by layer.

        All actors do this together; if replicas have several shards, those of one team.
        """

        def call(actor: Any, place: tuple[str, int] | None, seat: int, seats: int) -> Any:
            return actor.train.remote(job, place, seat, seats)

        found: TrainingResult = self._ask_together("train", call, progress)
        return found

    def forget(self) -> None:
        """Free what the actors kept for an ensemble or a greedy search."""
        self._ask_each("forget", lambda actor: actor.forget.remote())

    def bake(self, model: ModelFiles, files: ShardFiles, progress: Callable[[int], None]) -> int:
        """Write all files of a model, neighbouring ones on one actor.

        Args:
            model: what to write.
            files: the files, planned from it.
            progress: called with the bytes of ingredients that all actors have read so far.

        Returns how many bytes of the ingredients' parameters the actors have read. Raises SoupError if a file is missing
        afterwards.
        """
        count = min(self.mesh.size, len(files.files))
        bounds = [len(files.files) * rank // count for rank in range(count + 1)]

        def call(actor: Any, rank: int) -> Any:
            return actor.bake.remote(replace(model, first=bounds[rank], stop=bounds[rank + 1]))

        answers = self._ask("bake", call, range(count), of_all(lambda what, read, most: progress(read), sys.maxsize))
        files.check_sizes()
        return sum(answers)

    def time_step(self, model_batch: int, most: int, progress: ProgressCallback) -> StepTimings:
        """Time the parts of a step on at most `most` examples, on all actors at once; return what the slowest measured."""
        timings: list[StepTimings] = self._ask(
            "time_step", lambda actor, rank: actor.time_step.remote(model_batch, most), hear=of_each(progress)
        )
        return max(timings, key=lambda found: found.step_s)

    def reset_peak(self) -> None:
        """Restart the measurement of the actors' peak memory."""
        self._ask_each("reset_peak", lambda actor: actor.reset_peak.remote())

    def peak_memory(self) -> list[int]:
        """Return each actor's peak memory in bytes since `reset_peak`."""
        return self._ask_each("peak_memory", lambda actor: actor.peak_memory.remote())

    def close(self) -> None:
        """Kill the actors and free what they held."""
        self._drop_all()


def _count(splits: Sequence[Split]) -> int:
    """Return the number of examples of all splits together."""
    return sum(map(len, splits))


def _joined(answers: list[list[Outcome]]) -> list[Outcome]:
    """Join the actors' outcomes, [ranks][splits], into one outcome per split."""
    return [join_outcomes(outcomes) for outcomes in zip(*answers, strict=True)]

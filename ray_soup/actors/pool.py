"""The interfaces of a pool of actors: `StepPool` for the learning loop, and `ActorPool` for a run.

In a step, coordinates and row numbers go to the actors, and projected gradients come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from ray_soup.actors.messages import (
    KeptEnsemble,
    Mesh,
    MeshCounts,
    ModelFiles,
    Partial,
    SetupInfo,
    StepTimings,
    StoreInfo,
    TrainingJob,
    TrainingResult,
)
from ray_soup.io.progress import ProgressCallback, no_progress
from ray_soup.mixing.blocks import Blocks
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.mixing.shard_files import ShardFiles
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome, Score


class StepPool(Protocol):
    """The pool interface of the learning loop."""

    def choose_precision(self) -> str:
        """Choose float32 or bfloat16 for learning, on the first actor's hardware, once."""
        ...

    def gram_of_blocks(self) -> np.ndarray:
        """Return the inner products of the open directions in each block, float64 [B, K, K]."""
        ...

    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
        """Begin a model batch: the ingredients `chosen`, int64 [m], move; the others stay at x, float32 [K, B]."""
        ...

    def step(self, x: np.ndarray, factor: float, batch: Split) -> list[Partial]:
        """Return the partial projected gradients at x, float32 [m, B], on one batch split over the ranks.

        `factor` multiplies the logits. There is one for each rank; in a mesh of more than `relays.GROUP` ranks, one for each
        run of as many ranks, added in their order.
        """
        ...

    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Score:
        """Score the model batch on a split at x float32 [m, B], the examples split over the actors."""
        ...

    def evaluate_each(self, x: np.ndarray, split: Split) -> Outcome:
        """Evaluate the model batch on a split at x float32 [m, B] example by example, the examples split over the actors."""
        ...

    def recalibrate(self, x: np.ndarray, batches: list[Split]) -> Statistics:
        """Re-estimate running statistics at x float32 [m, B] on these batches, spread over the actors, and use them."""
        ...

    def use(self, statistics: Statistics) -> None:
        """Use these running statistics from here on."""
        ...


class ActorPool(StepPool, Protocol):
    """The pool interface of a run. Answers come in the order of ranks."""

    mesh: Mesh
    counts: MeshCounts

    @property
    def nodes(self) -> int:
        """The number of nodes that the actors run on."""
        ...

    def setup(self, progress: ProgressCallback, seen: tuple[str, ...] = ()) -> SetupInfo:
        """Start the actors that there is room for and wait until they are set up. They must see the files `seen`."""
        ...

    def open_store(self, subset: tuple[int, ...], blocks: Blocks, progress: ProgressCallback) -> StoreInfo:
        """Open the directions of the ingredients `subset` around their mean, for blocks of this kind."""
        ...

    def gram(self) -> np.ndarray:
        """Return the inner products of the open directions, float64 [K, K]."""
        ...

    def statistics_of_file(self, path: str, batches: list[Split], progress: ProgressCallback = no_progress) -> Statistics:
        """Re-estimate running statistics of the checkpoint at `path` on these batches, spread over the actors."""
        ...

    def evaluate_file(self, path: str, splits: list[Split], progress: ProgressCallback = no_progress) -> list[Outcome]:
        """Evaluate the checkpoint at `path` on each split, the examples split over the actors."""
        ...

    def evaluate_files(
        self, paths: list[str], splits: list[Split], progress: ProgressCallback = no_progress
    ) -> Iterator[list[Outcome]]:
        """Evaluate each checkpoint on each split, one checkpoint per actor at a time; yield the outcomes in order."""
        ...

    def evaluate_member(
        self,
        paths: tuple[str, ...],
        splits: list[Split],
        progress: ProgressCallback = no_progress,
        keep: KeptEnsemble = KeptEnsemble(),
    ) -> list[Outcome]:
        """Evaluate the last of the checkpoints `paths`, and add its logits to those of the earlier ones."""
        ...

    def evaluate_ensemble(
        self, paths: tuple[str, ...], splits: list[Split], keep: KeptEnsemble = KeptEnsemble()
    ) -> list[Outcome]:
        """Evaluate the mean of the logits of the checkpoints `paths` on each split."""
        ...

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> Score:
        """Score the mean of the ingredients `kept` and `candidate` on splits.

        If there are batches `calibration`, its running statistics are re-estimated on them.
        """
        ...

    def try_mixture(self, weights: np.ndarray, splits: list[Split], calibration: Sequence[Split] = ()) -> Score:
        """Score the mixture of all ingredients with these weights, float64 [K], on splits, as `try_candidate` does."""
        ...

    def train(self, job: TrainingJob, progress: ProgressCallback) -> TrainingResult:
        """Train all weights from a written soup on, not by layer.

        All actors do this together; if replicas have several shards, those of one replica.
        """
        ...

    def forget(self) -> None:
        """Free what the actors kept for an ensemble or a greedy search."""
        ...

    def bake(self, model: ModelFiles, files: ShardFiles, progress: Callable[[int], None]) -> int:
        """Write all files of a model, divided among the actors; return the bytes read."""
        ...

    def time_step(self, model_batch: int, most: int, progress: ProgressCallback) -> StepTimings:
        """Time the parts of a step on at most `most` examples, on all actors at once; return what the slowest measured."""
        ...

    def reset_peak(self) -> None:
        """Restart the measurement of the actors' peak memory."""
        ...

    def peak_memory(self) -> list[int]:
        """Return each actor's peak memory in bytes since `reset_peak`."""
        ...

    def close(self) -> None:
        """Kill the actors and free what they held."""
        ...

"""The work of one actor: every public method is a call that the driver may make.

A shard has its slice of every direction, and a whole model. It is stateless apart from `open_store`, `begin` and `use`, and
from results that it keeps to save work, so a lost actor can be re-created and its call retried. A pool runs the shard; this
module does not use Ray.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import torch

from ray_soup.actors import precision as precisions
from ray_soup.actors import timing
from ray_soup.actors.baker import bake, check_paths
from ray_soup.actors.candidates import CandidateMixer
from ray_soup.actors.evaluation import Ensemble, evaluate_checkpoint, evaluate_model, score
from ray_soup.actors.group import ShardGroup
from ray_soup.actors.messages import (
    ComparedExamples,
    Heartbeat,
    KeptEnsemble,
    Mesh,
    ModelFiles,
    Partial,
    SetupInfo,
    StepTimings,
    StoreInfo,
    Stream,
    TrainingJob,
    TrainingResult,
)
from ray_soup.actors.relays import unpacked
from ray_soup.actors.replica import load_replica, tensor_of
from ray_soup.actors.training import train
from ray_soup.actors.versions import own_versions
from ray_soup.io.cache import content_key
from ray_soup.io.hugging_face import download_all
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lifting import files_of, group_of
from ray_soup.io.progress import labelled
from ray_soup.mixing import stores
from ray_soup.mixing.blocks import Blocks, partition
from ray_soup.mixing.buffers import mixed_buffer
from ray_soup.mixing.directions import DirectionStore
from ray_soup.mixing.running_statistics import Statistics, Sums
from ray_soup.recipe import Recipe
from ray_soup.task.attention import FastAttention
from ray_soup.task.checkpointing import checkpoint_layers
from ray_soup.task.data import Split
from ray_soup.task.identity import notes_on
from ray_soup.task.leaks import check_leaks
from ray_soup.task.outcomes import Outcome, Score

T = TypeVar("T")


class Shard:
    """Shard number `shard` of a whole model, for one or more replicas of the mesh.

    Call `setup` first, then `join` if the replica has several shards, then `open_store` to learn. Methods that may take long
    return a stream: heartbeats (what, done, total), then the answer.
    """

    def __init__(self, recipe: Recipe, ingredients: Sequence[Ingredient], mesh: Mesh, shard: int, threads: int) -> None:
        self.recipe, self.ingredients, self.mesh, self.shard, self.threads = recipe, ingredients, mesh, shard, threads
        self._opened: tuple[int, ...] = ()
        self._output: tuple[str, ...] = ()
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if recipe.actors.gpus else "cpu")

    def setup(self, seen: tuple[str, ...] = ()) -> Stream[SetupInfo]:
        """Build the model and decode the data.

        Raises RecipeError if this node does not see the ingredients or the local files `seen` by the driver.
        """
        check_paths(self.ingredients, seen)
        yield from labelled("downloading ingredients", download_all(files_of(self.ingredients)))
        self.replica = yield from load_replica(self.recipe, self.device, self.ingredients)
        self.group = ShardGroup(self.shard, self.mesh.shards, self.replica.layout.numel, self.device)
        if not self.recipe.actors.by_layer:
            self.replica.allocate(self.group.padded)
        self.candidates = CandidateMixer(self.replica, self.ingredients)
        self.ensembles: dict[int, Ensemble] = {}
        examples, outside = self.replica.examples, list[str]()
        fingerprint = self.replica.fingerprint(outside)
        if self.recipe.actors.by_layer:
            self.replica.split(self.threads)
        elif self.recipe.learn.gradient_checkpointing:
            checkpoint_layers(self.replica.computing, self.recipe.model)
        notes = [*(note for e in examples.values() for note in e.notes), *notes_on(outside)]
        yield SetupInfo(
            {name: len(e) for name, e in examples.items()}, None, {}, fingerprint, socket.gethostname(),
            tuple(dict.fromkeys(notes)), {name: e.cut for name, e in examples.items() if e.cut is not None},
            own_versions(), examples={name: e.digest() for name, e in examples.items()},
        )  # fmt: skip

    def compare_examples(self) -> Stream[ComparedExamples]:
        """Hash all examples. Raises RecipeError if two splits share some."""
        built, examples = self.replica.built, self.replica.examples
        found = yield from check_leaks(self.recipe.data, built.preprocess, self.replica.objective.targets)
        contents = {name: content_key(found[name].tolist(), _plain(e.labels)) for name, e in examples.items() if found}
        yield ComparedExamples(found.get("fit"), contents)

    # The other shards of the replica

    def open_group(self, host: str) -> int:
        """Open the rendezvous of the group on this shard, shard 0, at its node `host`, and return the port."""
        return self.group.open(host)

    def join(self, host: str, port: int) -> None:
        """Form a group with the other shards of this replica."""
        self.group.join(host, port)

    # Directions

    def open_store(self, subset: tuple[int, ...], blocks: Blocks) -> Stream[StoreInfo]:
        """Open the direction store of the ingredients `subset` for blocks of this kind; build the store if it is missing.

        Raises IngredientError if an ingredient cannot be used.
        """
        chosen = [self.ingredients[k] for k in subset]
        if self._opened != subset:
            work = stores.open_store(chosen, self.replica.layout, self.recipe.directions.dtype, self.threads)
            self.store: DirectionStore = yield from labelled(
                "reading ingredients" if group_of(chosen) is None else "reading adapters", work
            )
            self.replica.set_mixed_buffers(
                {name: mixed_buffer(chosen, name, self.recipe.buffers) for name in self.replica.layout.mixed_buffers}
            )
            self._opened = subset
            if self.replica.layers is None:
                self.replica.hold_gradients(self.store.variant)
            self.use({})
            self.replica.set_parameters(self.store.center)
            self._output = self.replica.output_layer()
        self.use({})  # an earlier method may have left its running statistics
        parts, norms = self.store.blocks(partition(self.replica.layout, blocks))
        low, high = self.group.low, self.group.high
        self.plane = stores.plane_on(self.store, parts, low, high, self.device, self.threads)
        if self.replica.layers is None:
            self.center = tensor_of(self.store.center[low:high]).to(self.device)
        else:
            self.replica.layers.use_store(self.store, parts, tensor_of(self.store.center))
        held = (len(subset) * self.store.row_bytes + self.store.center.nbytes) // self.mesh.shards
        yield StoreInfo(parts, norms, self.store.sha256, self._output, held)

    def gram(self, part: tuple[int, int]) -> np.ndarray:
        """Sum the inner products of the directions over a part of the store, float64 [K, K].

        Args:
            part: (index, parts), which selects every `parts`-th piece of this shard's slice, from piece `index` on.
        """
        return stores.gram(self.plane, part)

    def gram_of_blocks(self, part: tuple[int, int]) -> np.ndarray:
        """Sum the inner products of the directions in each block over a part of the store, float64 [B, K, K]."""
        return stores.gram_of_blocks(self.plane, part)

    # Learning

    def choose_precision(self) -> str:
        """Choose float32 or bfloat16 for learning on this actor's hardware."""
        examples = next(iter(self.replica.examples.values()))
        most = -(-self.recipe.learn.batch_size // self.mesh.size)
        images, _ = examples.batch(np.arange(min(self.replica.micro_batch, most, len(examples))), self.device)
        return precisions.choose_precision(self.recipe, self.replica.outputs, images)

    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
        """Begin a model batch.

            base = center + sum of x d over the ingredients that do not move

        The base is recomputed in the order of the ingredients, so that it is bit-identical on every actor.

        Args:
            chosen: int64 [m], the ingredients that move.
            x: float32 [K, B], the coordinates of all ingredients.
            precision: float32 or bfloat16, for forward and backward passes.
        """
        layers = self.replica.layers
        self.precision = precisions.autocast(precision, self.device, keeps=layers is None)
        if layers is not None:
            layers.begin(chosen, x)
            return
        others = np.setdiff1d(np.flatnonzero(np.any(x != 0, axis=1)), chosen)
        self.base = self.center
        if len(others):
            self.base = self.center.clone()
            for first in range(0, len(others), len(chosen)):  # no more directions at a time than a step holds
                some = others[first : first + len(chosen)]
                self.plane.choose(some)
                self.plane.combine(self.base, self.base, np.ascontiguousarray(x[some], dtype=np.float32))
        self.plane.choose(chosen)

    def use(self, statistics: Statistics) -> None:
        """Use these running statistics from here on, and the mixed buffers for the rest."""
        self.replica.use(statistics)

    def _combine(self, x: np.ndarray) -> None:
        if self.replica.layers is not None:
            self.replica.layers.use_coordinates(x)
            return
        self.plane.combine(self.replica.theta[self.group.low : self.group.high], self.base, x)
        self.group.gather(self.replica.theta)
        self.replica.theta_changed()

    def step(self, x: np.ndarray, factor: float, batch: Split) -> Partial:
        """Combine, run forward and backward passes on this actor's part of the batch, and project.

        Args:
            x: float32 [m, B], coordinates of the model batch.
            factor: the factor on the logits.
            batch: this actor's part of the batch.
        """
        laps = timing.Laps(self.device)
        self._combine(x)
        laps.mark()
        replica = self.replica
        if replica.layers is None:
            replica.gradient.zero_()
        else:
            replica.layers.start()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        weight = torch.zeros((), dtype=torch.float64, device=self.device)
        objective = replica.objective
        t = torch.tensor(factor, dtype=torch.float32, device=self.device, requires_grad=True)
        t.grad = torch.zeros_like(t)
        with FastAttention():
            for inputs, targets in replica.micro_batches(batch):
                with self.precision:  # not longer: torch up to 2.9 would lose gradients of layers that run again
                    outputs = replica.outputs(inputs)
                loss = replica.loss(objective.scaled(outputs.float(), t), targets, self.recipe.learn.label_smoothing)
                torch.autograd.backward(loss)
                loss_sum += loss.detach()
                weight += objective.weights(targets).sum()
        laps.mark()
        if replica.layers is None:
            projected = self.plane.project(self.group.scatter(replica.gradient))
        else:
            projected = replica.layers.projected()
        sums = (t.grad.item(), loss_sum.item(), weight.item())
        laps.mark()
        return Partial(projected, *sums, laps.total(), laps.seconds(0), laps.seconds(2))

    def packed_step(self, head: bytes, rows: bytes) -> bytes:
        """Take a step on this actor's part of a PackedStep; return a packed Partial."""
        x, factor, source, mine = unpacked(head, rows)
        return self.step(x, factor, Split(source, mine)).packed()

    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Stream[Score]:
        """Score the current model batch on a split at x, float32 [m, B], with `factor` on the logits."""
        self._combine(x)
        total = Score()
        for piece in self.replica.pieces(split):
            with self.precision:
                total += score(self.replica, piece, factor)
            yield "evaluating", total.count, len(split)
        yield total

    def evaluate_each(self, x: np.ndarray, split: Split) -> Stream[Outcome]:
        """Evaluate the current model batch on a split at x, float32 [m, B], example by example."""
        self._combine(x)
        (found,) = yield from evaluate_model(self.replica, [split], precision=self.precision)
        yield found

    def sum_statistics(self, x: np.ndarray, batches: list[Split]) -> Stream[Sums]:
        """Sum the running statistics of the current model batch at x, float32 [m, B], over `batches`."""
        self._combine(x)
        yield from self._sum_statistics(batches)

    # Whole models, in float32

    def sum_statistics_of_file(self, path: str, batches: list[Split]) -> Stream[Sums]:
        """Sum the running statistics of the checkpoint at `path` over `batches`."""
        self.replica.load_file(path)
        yield from self._sum_statistics(batches)

    def _sum_statistics(self, batches: list[Split]) -> Stream[Sums]:
        sums = yield from self.replica.sum_statistics(batches)
        self.replica.restore_buffers()
        yield sums

    def evaluate_file(self, path: str, splits: list[Split], factored: bool) -> Stream[list[Outcome]]:
        """Evaluate the checkpoint at `path` on each split; `factored` adds the losses for finding a temperature."""
        yield from _streamed(evaluate_checkpoint(self.replica, path, splits, factored))

    def evaluate_member(
        self, paths: tuple[str, ...], splits: list[Split], rank: int, keep: KeptEnsemble = KeptEnsemble()
    ) -> Stream[list[Outcome]]:
        """Evaluate the last of the checkpoints `paths` for a rank, and add its outputs to those of the earlier ones."""
        yield from _streamed(self._ensemble(rank, keep).add(paths, splits))

    def evaluate_ensemble(
        self, paths: tuple[str, ...], splits: list[Split], rank: int, keep: KeptEnsemble = KeptEnsemble()
    ) -> Stream[list[Outcome]]:
        """Evaluate the mean of the outputs of the checkpoints `paths` on each split, for a rank."""
        yield from _streamed(self._ensemble(rank, keep).evaluate(paths, splits))

    def _ensemble(self, rank: int, keep: KeptEnsemble) -> Ensemble:
        """Return what is kept for the examples of a rank."""
        return self.ensembles.setdefault(rank, Ensemble(self.replica, keep.file_of(rank), keep.task))

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> Score:
        """Score the mean of the ingredients `kept` and `candidate` on splits.

        If there are batches `calibration`, its running statistics are re-estimated on them.
        """
        self.candidates.mix(kept, candidate, calibration)
        return sum((score(self.replica, split) for split in splits), Score())

    def try_mixture(self, weights: np.ndarray, splits: list[Split], calibration: Sequence[Split] = ()) -> Score:
        """Score the mixture of all ingredients with these weights, float64 [K], on splits.

        If there are batches `calibration`, its running statistics are re-estimated on them.
        """
        self.candidates.mix_weighted(weights, calibration)
        return sum((score(self.replica, split) for split in splits), Score())

    def open_training(self, host: str, count: int) -> int:
        """Open the rendezvous of `count` actors that train together on this one, at its node `host`; return the port."""
        self.peers = ShardGroup(0, count, self.replica.layout.numel, self.device)
        return self.peers.open(host)

    def train(self, job: TrainingJob, place: tuple[str, int] | None, seat: int, seats: int) -> Stream[TrainingResult]:
        """Train all weights from a written soup on, as `train` in ray_soup.actors.training does.

        Args:
            job: what to train.
            place: where the rendezvous of the actors is, host and port; None: the shards of this team train, which may be
                this actor alone.
            seat: this actor's place among them.
            seats: how many they are. They share the parts of each batch: as many as replicas, or, if these have several
                shards, as many as shards.
        """
        group = self.group
        if place is not None:
            numel = self.replica.layout.numel
            group = self.peers if seat == 0 else ShardGroup(seat, seats, numel, self.device)
            group.join(*place)
        try:
            result = yield from train(self.replica, job, group, self.mesh.replicas if self.mesh.shards == 1 else seats)
        finally:
            if place is not None:
                group.leave()
        self.replica.restore_buffers()
        if self._opened:
            self.replica.hold_gradients(self.store.variant)
        else:
            self.replica.drop_gradients()
        yield result

    def forget(self) -> None:
        """Free what was kept between calls for an ensemble or a greedy search."""
        self.ensembles.clear()
        self.candidates.forget()

    def bake(self, model: ModelFiles) -> Stream[int]:
        """Write files of a soup's model, as `bake` in ray_soup.actors.baker does."""
        yield from bake(self.ingredients, model, self.threads)

    # Measurements

    def time_step(self, model_batch: int, most: int) -> Stream[StepTimings]:
        """Time the parts of a step with synthetic directions of `model_batch` ingredients and at most `most` examples."""
        yield from _streamed(timing.time_step(self.replica, self.ingredients, model_batch, most, self.threads))

    def reset_peak(self) -> None:
        """Restart the measurement of this actor's peak memory."""
        timing.reset_peak(self.device)

    def peak_memory(self) -> int:
        """Return this actor's peak memory in bytes since `reset_peak`: resident memory plus GPU memory."""
        return timing.peak_memory(self.device)


def _plain(targets: np.ndarray) -> list[int] | str:
    """Return what identifies targets: the labels of classification, otherwise a hash."""
    if targets.ndim == 1 and targets.dtype == np.int64:
        return list(targets.tolist())
    return content_key(str(targets.dtype), list(targets.shape), blake2b(np.ascontiguousarray(targets).data).hexdigest())


def _streamed(work: Generator[Heartbeat, None, T]) -> Stream[T]:
    """Yield the heartbeats of a generator, then its value."""
    answer = yield from work
    yield answer

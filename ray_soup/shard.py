"""One actor's work as a plain class, no Ray in it.

An actor holds a slice of the parameter vector for every direction; the shards of a replica gather the whole vector from each
other before a forward pass and scatter the gradient back after it. What an actor answers depends on its arguments and on the
model batch that `begin` gave it, and on nothing else: a lost one is made anew and asked again.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ray_soup import directions, models
from ray_soup.blocks import Partition, flatten, layout_of, partition
from ray_soup.checkpoints import Ingredient
from ray_soup.data import Examples, load_splits
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.hyperplane import Hyperplane
from ray_soup.recipe import Recipe

T = TypeVar("T")
GROUP_DEADLINE = timedelta(minutes=10)  # of one collective among the shards of a replica


@dataclass(frozen=True)
class Mesh:
    """replicas x shards actors; rank r is shard r % shards of replica r // shards."""

    replicas: int
    shards: int

    @property
    def size(self) -> int:
        return self.replicas * self.shards


@dataclass(frozen=True)
class Partial:
    """What an actor found on its part of a batch: sums, to be divided by the size of the batch once by the driver."""

    gradient: np.ndarray
    """float64 [m, B]: sum over the examples of dL/dx."""
    loss: float
    seconds: float


@dataclass(frozen=True)
class Score:
    """Sums over examples; scores add up."""

    loss: float = 0.0
    correct: int = 0
    count: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.loss + other.loss, self.correct + other.correct, self.count + other.count)

    @property
    def nll(self) -> float:
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


@dataclass(frozen=True)
class Ready:
    """What an actor knows once it is set up: examples in each split, the blocks and their norms, the ingredients' hashes."""

    examples: dict[str, int]
    partition: Partition | None
    norms: np.ndarray | None
    """float64 [K, B]."""
    sha256: tuple[str, ...]


def micro_batch_size(recipe: Recipe, parameters: int) -> int:
    """Images in one forward and backward pass. On a CPU more than these bring no speed, only activations."""
    if recipe.learn.micro_batch != "auto":
        return recipe.learn.micro_batch
    if recipe.actors.gpus:
        return recipe.learn.batch_size
    return 32 if parameters > 5_000_000 else 128


def has_fast_bfloat16(device: torch.device) -> bool:
    """True where products in bfloat16 are done in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as info:
            flags = info.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class GroupLost(Exception):
    """A fellow shard is gone or does not answer; the replica is to be made anew."""


@contextlib.contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupLost(str(error).partition("\n")[0]) from error


class Shard:
    """Actor number `rank` of the mesh. `setup` first, then `join` where it has fellow shards."""

    def __init__(self, recipe: Recipe, ingredients: list[Ingredient], mesh: Mesh, rank: int, threads: int):
        self.recipe, self.ingredients, self.mesh, self.rank, self.threads = recipe, ingredients, mesh, rank, threads
        self.shard = rank % mesh.shards
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if recipe.actors.gpus else "cpu")

    def setup(self, learning: bool) -> Iterator[tuple[str, int, int] | Ready]:
        """Build the model, decode the data and, for `learning`, make or open the direction store.

        Yields (what, done, in all) on the way and Ready at the end. Raises RecipeError, IngredientError.
        """
        built = models.build(self.recipe.model)
        self.model = built.model.to(self.device).eval()
        self.layout = layout_of(self.model)
        self.examples: dict[str, Examples] = yield from _named(
            "decoding images", load_splits(self.recipe.data, self.recipe.learn.seed, built.preprocess)
        )
        self._check_classes()
        shards = self.mesh.shards
        self.slice = -(-self.layout.numel // shards)  # the vector is padded to slices of equal length
        self.low = min(self.shard * self.slice, self.layout.numel)
        self.high = min(self.low + self.slice, self.layout.numel)
        self.theta = torch.zeros(self.slice * shards, device=self.device)
        self.gradient = torch.zeros(self.slice * shards if learning else 0, device=self.device)
        self.micro_batch = micro_batch_size(self.recipe, self.layout.numel)
        self.autocast = self.recipe.precision == "bfloat16" or (
            self.recipe.precision == "auto" and has_fast_bfloat16(self.device)
        )
        parts, norms = None, None
        sha256: tuple[str, ...] = ()
        if learning:
            store = yield from _named(
                "reading ingredients",
                directions.open_store(self.ingredients, self.layout, self.recipe.directions.dtype, self.threads),
            )
            parts, norms = store.blocks(partition(self.layout, self.recipe.blocks))
            self.plane = Hyperplane(store, parts, self.low, self.high, self.device, self.threads)
            self.center = _readable(store.center[self.low : self.high]).to(self.device)
            self._want_gradients_of(store.variant)
            sha256 = store.sha256
        flatten(self.model, self.theta, self.gradient if learning else None, self.layout)
        self._soup_buffers = {
            name: buffer_of(self.ingredients, name, self.recipe.buffers).to(self.device)
            for name in (self.layout.buffers if self.ingredients else ())
        }
        self._restore_buffers()
        yield Ready({k: len(v) for k, v in self.examples.items()}, parts, norms, sha256)

    def _check_classes(self) -> None:
        first = next(iter(self.examples.values()), None)
        if first is None:
            raise RecipeError("The recipe names no data. Add data: with fit and test.")
        images, _ = first.batch(np.zeros(1, np.int64), self.device)
        try:
            with torch.inference_mode():
                logits = self.model(images)
        except (RuntimeError, ValueError, TypeError) as error:
            raise RecipeError(
                f"The model {self.recipe.model} cannot take the images of {first.source}, {images.dtype} "
                f"{list(images.shape[1:])} each: {str(error).partition(chr(10))[0]}"
            ) from error
        if logits.ndim != 2:
            raise RecipeError(f"The model {self.recipe.model} returned {list(logits.shape)}; expected logits [n, classes].")
        for examples in self.examples.values():
            examples.check_labels(logits.shape[1])

    def _want_gradients_of(self, variant: np.ndarray) -> None:
        parameters = dict(self.model.named_parameters())
        for name, moves in zip(self.layout.names, variant, strict=True):
            parameters[name].requires_grad_(bool(moves))

    def _restore_buffers(self) -> None:
        """Buffers as the soup will have them (bake.py writes the same)."""
        state = self.model.state_dict()
        for name, buffer in self._soup_buffers.items():
            state[name].copy_(buffer.view(state[name].shape))

    # Fellow shards

    def open_group(self, host: str) -> int:
        """Shard 0 of a replica waits for the others at this port of its node `host`."""
        self._store = dist.TCPStore(
            host, 0, self.mesh.shards, is_master=True, wait_for_workers=False, timeout=GROUP_DEADLINE
        )
        return self._store.port

    def join(self, host: str, port: int) -> None:
        """Make one group of the shards of this replica."""
        store = self._store if self.shard == 0 else dist.TCPStore(host, port, self.mesh.shards, timeout=GROUP_DEADLINE)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.shard, world_size=self.mesh.shards, timeout=GROUP_DEADLINE)

    def _gather(self) -> None:
        """The whole parameter vector out of the slices of the replica's shards."""
        if self.mesh.shards > 1:
            with _group_errors():
                mine = self.theta[self.shard * self.slice : (self.shard + 1) * self.slice]
                dist.all_gather_into_tensor(self.theta, mine)

    def _scatter(self) -> torch.Tensor:
        """This shard's slice of the gradient, summed over the replica's shards."""
        if self.mesh.shards == 1:
            return self.gradient[: self.layout.numel]
        mine = torch.empty(self.slice, device=self.device)
        with _group_errors():
            dist.reduce_scatter_tensor(mine, self.gradient)
        return mine[: self.high - self.low]

    # Learning

    def begin(self, chosen: np.ndarray, x: np.ndarray) -> None:
        """Start a model batch: ingredients `chosen` [m] move, the others stay at x [K, B].

        base = center + sum over the others of x d, computed from scratch in the order of the ingredients.
        """
        others = np.setdiff1d(np.flatnonzero(np.any(x != 0, axis=1)), chosen)
        self.base = self.center
        if len(others):
            self.base = self.center.clone()
            for first in range(0, len(others), len(chosen)):  # no more directions at a time than a step holds
                some = others[first : first + len(chosen)]
                self.plane.choose(some)
                self.plane.combine(self.base, self.base, np.ascontiguousarray(x[some], dtype=np.float32))
        self.plane.choose(chosen)

    def _combine(self, x: np.ndarray) -> None:
        self.plane.combine(self.theta[self.low : self.high], self.base, x)
        self._gather()

    def _precision(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def step(self, x: np.ndarray, positions: np.ndarray) -> Partial:
        """Combine, forward and backward on this actor's part of the batch, project.

        x float32 [m, B]; positions: of the split fit.
        """
        start = time.perf_counter()
        self._combine(x)
        self.gradient.zero_()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for first in range(0, len(positions), self.micro_batch):
            images, labels = self.examples["fit"].batch(positions[first : first + self.micro_batch], self.device)
            with self._precision():
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            loss.backward()
            loss_sum += loss.detach()
        projected = self.plane.project(self._scatter())
        return Partial(projected, loss_sum.item(), time.perf_counter() - start)

    def evaluate(self, x: np.ndarray, split: str, part: tuple[int, int]) -> Score:
        """Score of the current model batch at x float32 [m, B] on the examples part[0] to part[1] of a split."""
        self._combine(x)
        with self._precision():
            return self._score(split, part)

    def evaluate_file(self, path: str, split: str, part: tuple[int, int]) -> Score:
        """Score in float32 of the checkpoint at `path` on the examples part[0] to part[1] of a split."""
        models.load_checkpoint(self.model, path)
        try:
            return self._score(split, part)
        finally:
            self._restore_buffers()

    def _score(self, split: str, part: tuple[int, int]) -> Score:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            for first in range(part[0], part[1], self.micro_batch):
                positions = np.arange(first, min(first + self.micro_batch, part[1]))
                images, labels = self.examples[split].batch(positions, self.device)
                logits = self.model(images).float()
                loss += F.cross_entropy(logits, labels, reduction="sum")
                correct += (logits.argmax(dim=1) == labels).sum()
        return Score(loss.item(), int(correct.item()), part[1] - part[0])

    def peak_memory(self) -> int:
        """Most bytes this actor has held: resident memory, and what it took of its GPU."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return host + (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)


def _named(what: str, work: Generator[tuple[int, int], None, T]) -> Generator[tuple[str, int, int], None, T]:
    while True:
        try:
            done, total = next(work)
        except StopIteration as stop:
            return stop.value
        yield what, done, total


def _readable(array: np.ndarray) -> torch.Tensor:
    import warnings

    with warnings.catch_warnings():  # torch warns that the map is read-only; nothing here writes
        warnings.simplefilter("ignore")
        return torch.from_numpy(array)


def buffer_of(ingredients: list[Ingredient], name: str, policy: str) -> torch.Tensor:
    """The soup's buffer `name`, flat: the first ingredient's, or for `average` the mean of floats in float64, while
    integers must agree (counters of batches aside: the first ingredient's). Raises IngredientError."""
    first = ingredients[0].read(name)
    if policy == "first" or name.endswith("num_batches_tracked"):
        return first.clone()
    if first.dtype.is_floating_point:
        total = torch.zeros(first.shape, dtype=torch.float64)
        for ingredient in ingredients:
            total += ingredient.read(name)
        return total / len(ingredients)
    for ingredient in ingredients[1:]:
        if not torch.equal(ingredient.read(name), first):
            raise IngredientError(
                f"{ingredient.path}: the integer buffer {name} differs from that of {ingredients[0].path}; it cannot "
                "be averaged. Set buffers: first to take it from the first ingredient."
            )
    return first.clone()

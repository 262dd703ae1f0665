"""One actor's work as a plain class, no Ray in it.

An actor holds a slice of the parameter vector for every direction; the shards of a replica gather the whole vector from each
other before a forward pass and scatter the gradient back after it. What an actor answers depends on its arguments, on the
model batch that `begin` gave it and the running statistics that `use` gave it, and on nothing else: a lost one is made anew
and asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ray_soup import directions, models, running_statistics, storage
from ray_soup.blocks import Partition, flatten, layout_of, partition
from ray_soup.cache import content_key, drained
from ray_soup.checkpoints import Ingredient, common_dtype, reading_threads
from ray_soup.data import Examples, Split, check_leaks, load_sources
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.hyperplane import ITEMSIZE, Hyperplane, made_up_plane, widened
from ray_soup.objective import Function, loss_of, metric_of
from ray_soup.outcomes import LOG_FACTORS, Outcome, Score, join
from ray_soup.preprocess import identity
from ray_soup.recipe import Recipe
from ray_soup.running_statistics import Statistics

T = TypeVar("T")
CALIBRATION_BYTES = 1 << 28  # of made-up directions: more than a processor's cache holds
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
    by_factor: float
    """Likewise of dL/dt, t the factor on the logits."""
    loss: float
    seconds: float


@dataclass(frozen=True)
class Ready:
    """What an actor knows once it is set up."""

    sizes: dict[str, int]
    """Examples in each source."""
    fit_digests: np.ndarray | None
    """uint64 [n]; from the first actor alone, like `contents`."""
    contents: dict[str, str]
    """A hash of the images and labels of each source."""
    fingerprint: str
    """Of the model's structure and of the files that its function and the metric lie in: with the numbers, it is the same
    model."""
    node: str
    """The host that the actor runs on."""


@dataclass(frozen=True)
class Taken:
    """What is known of the ingredients that an actor took: blocks, norms of the directions, SHA-256."""

    partition: Partition
    norms: np.ndarray
    """float64 [K, B]."""
    sha256: tuple[str, ...]
    output: tuple[str, ...]
    """The parameters that scale the logits; empty where there are none."""
    held: int
    """Bytes of directions and center that the actor works on."""


def micro_batch_size(recipe: Recipe, parameters: int) -> int:
    """Images in one forward and backward pass. On a CPU more than these bring no speed, only activations."""
    if recipe.learn.micro_batch != "auto":
        return recipe.learn.micro_batch
    if recipe.actors.gpus:
        return recipe.learn.batch_size
    return 16 if parameters > 5_000_000 else 128


def has_bfloat16(device: torch.device) -> bool:
    """True where there are instructions for products in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as info:
            flags = info.read()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True)
class Calibration:
    """What a node was seen to take."""

    images: int
    forward_s: float
    step_s: float
    """Forward and backward passes of so many images."""
    combine_s: float
    project_s: float
    """Of one byte of compressed directions."""
    hash_s: float
    """Of one byte of ingredients, on one core."""
    read_s: float
    """Of one byte of ingredients, from where they lie."""
    peak_bytes: int
    """Of an actor with model and data, and without directions, in a forward and backward pass."""


def autocast(precision: str, device: torch.device) -> Any:
    """The context of forward passes in float32 or bfloat16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


def choose_precision(recipe: Recipe, model: torch.nn.Module, images: torch.Tensor) -> str:
    """What the recipe's `precision` stands for. auto is bfloat16 on a GPU that has it; on a CPU that has it, only where
    forward and backward passes of these images take a tenth less time: there are some on which they take longer."""
    device = images.device
    if recipe.precision != "auto":
        return recipe.precision
    if not has_bfloat16(device):
        return "float32"
    if device.type == "cuda":
        return "bfloat16"

    best = {"float32": float("inf"), "bfloat16": float("inf")}
    begun = time.perf_counter()
    for turn in range(5):  # in turns, so that a moment's disturbance strikes both; the first also prepares
        for precision in best:
            start = time.perf_counter()
            with autocast(precision, device):
                logits = model(images)
            logits.float().sum().backward()
            best[precision] = min(best[precision], time.perf_counter() - start)
        if turn and time.perf_counter() - begun > 0.3:
            break
    return "bfloat16" if best["bfloat16"] < 0.9 * best["float32"] else "float32"


class GroupLost(Exception):
    """A fellow shard is gone or does not answer; the replica is to be made anew."""


@contextlib.contextmanager
def _group_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise GroupLost(str(error).partition("\n")[0]) from error


class Shard:
    """Actor number `rank` of the mesh. `setup` first, then `join` where it has fellow shards, then `take` to learn."""

    def __init__(self, recipe: Recipe, ingredients: list[Ingredient], mesh: Mesh, rank: int, threads: int):
        self.recipe, self.ingredients, self.mesh, self.rank, self.threads = recipe, ingredients, mesh, rank, threads
        self.shard = rank % mesh.shards
        self._taken: tuple[int, ...] = ()
        self._members: tuple[str, ...] = ()
        self._logits: list[torch.Tensor] = []
        self._gather_ahead = ThreadPoolExecutor(1)
        self._summed: tuple[int, ...] = ()
        self._tried: tuple[tuple[int, ...], int] | None = None
        self.forget()
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if recipe.actors.gpus else "cpu")

    def setup(self, seen: tuple[str, ...] = ()) -> Iterator[tuple[str, int, int] | Ready]:
        """Build the model and decode the data. Yields (what, done, in all) on the way and Ready at the end.

        Raises RecipeError for ingredients, and local files `seen` by the driver, that this node does not see; the first
        actor also for images that are in two splits.
        """
        self._check_paths(seen)
        built = models.build(self.recipe.model)
        self.model = built.model.to(self.device).eval()
        self.layout = layout_of(self.model)
        self.examples: dict[str, Examples] = yield from _named(
            "decoding images", load_sources(self.recipe.data, built.preprocess)
        )
        if not self.examples:
            raise RecipeError("The recipe names no data. Add data: with fit and test.")
        for examples in self.examples.values():
            images, _ = examples.batch(np.zeros(1, np.int64), self.device)
            self.classes = self._classes(images, examples.spec)
            examples.check_labels(self.classes)
        self.loss = loss_of(self.recipe, self.classes, self.device)
        self.metric = metric_of(self.recipe, self.classes, self.device)
        found: dict[str, np.ndarray] = {}
        if self.rank == 0:
            found = yield from _named("comparing images", check_leaks(self.recipe.data, built.preprocess))
        shards = self.mesh.shards
        self.slice = -(-self.layout.numel // shards)  # the vector is padded to slices of equal length
        self.low = min(self.shard * self.slice, self.layout.numel)
        self.high = min(self.low + self.slice, self.layout.numel)
        self.theta = torch.zeros(self.slice * shards, device=self.device)
        flatten(self.model, self.theta, None, self.layout)
        self.micro_batch = micro_batch_size(self.recipe, self.layout.numel)
        self._mixed_buffers: dict[str, torch.Tensor] = {}
        self.use({})
        fingerprint = models.fingerprint(self.recipe.model, built)
        if self.recipe.metric is not None:
            fingerprint += content_key(identity(models.import_function(self.recipe.metric)))
        yield Ready(
            {name: len(examples) for name, examples in self.examples.items()},
            found.get("fit"),
            {name: content_key(found[name].tolist(), e.labels.tolist()) for name, e in self.examples.items() if found},
            fingerprint,
            socket.gethostname(),
        )

    def _check_paths(self, seen: tuple[str, ...]) -> None:
        files = [(f, size) for i in self.ingredients for f, size in zip(i.files, i.sizes, strict=True)]
        for path, size in [*((path, None) for path in seen), *files]:
            if storage.is_remote(path):
                continue
            found = os.path.getsize(path) if os.path.exists(path) else None
            if found is None or size not in (None, found):
                what = "does not exist" if found is None else f"has {found:,} bytes and the driver's {size:,}"
                raise RecipeError(
                    f"{path} {what} on the node {socket.gethostname()}. Put ingredients, data and OUT where every node sees "
                    "them: a shared disk, or a URI such as s3://BUCKET/...."
                )

    def take(self, subset: tuple[int, ...], blocks: str | int) -> Iterator[tuple[str, int, int] | Taken]:
        """Make or open the direction store of the ingredients `subset`, to learn coefficients for blocks of this kind.

        Yields (what, done, in all) on the way and Taken at the end. Raises IngredientError.
        """
        chosen = [self.ingredients[k] for k in subset]
        if self._taken != subset:
            store = directions.open_store(chosen, self.layout, self.recipe.directions.dtype, self.threads)
            self.store: directions.DirectionStore = yield from _named("reading ingredients", store)
            self._mixed_buffers = {
                name: buffer_of(chosen, name, self.recipe.buffers).to(self.device) for name in self.layout.buffers
            }
            self._taken = subset
            if not hasattr(self, "gradient"):
                self.gradient = torch.zeros(self.slice * self.mesh.shards, device=self.device)
            self._want_gradients_of(self.store.variant)
            flatten(self.model, self.theta, self.gradient, self.layout)
            self.use({})
            self.theta[: self.layout.numel] = _readable(self.store.center)
            self._output = self._output_layer()
        self.use({})  # a method before this one may have left others
        parts, norms = self.store.blocks(partition(self.layout, blocks))
        self.plane = Hyperplane(self.store, parts, self.low, self.high, self.device, self.threads)
        self.center = _readable(self.store.center[self.low : self.high]).to(self.device)
        held = (len(subset) * self.store.row_bytes + self.store.center.nbytes) // self.mesh.shards
        yield Taken(parts, norms, self.store.sha256, self._output, held)

    def choose_precision(self) -> str:
        """float32 or bfloat16: what to learn in, on this actor's hardware."""
        examples = next(iter(self.examples.values()))
        most = -(-self.recipe.learn.batch_size // self.mesh.size)
        images, _ = examples.batch(np.arange(min(self.micro_batch, most, len(examples))), self.device)
        return choose_precision(self.recipe, self.model, images)

    def calibrate(self, model_batch: int, most: int) -> Iterator[tuple[str, int, int] | Calibration]:
        """Time the parts of a step for about two seconds, with made-up directions of `model_batch` ingredients, and no more
        than `most` images."""
        yield "calibrating", 0, 3
        source, examples = next(iter(self.examples.items()))
        rows = np.arange(min(self.micro_batch, most, len(examples)), dtype=np.int32)
        images, labels = examples.batch(rows, self.device)
        precision = autocast(choose_precision(self.recipe, self.model, images), self.device)

        def passes() -> None:
            with precision:
                logits = self.model(images)
            F.cross_entropy(logits.float(), labels, reduction="sum").backward()

        def plane_of(numbers: int) -> tuple[Hyperplane, torch.Tensor, torch.Tensor, np.ndarray]:
            made_up = made_up_plane(self.recipe.directions.dtype, model_batch, numbers, self.device, self.threads)
            theta, base = (torch.zeros(numbers, device=self.device) for _ in range(2))
            return made_up, theta, base, np.full((model_batch, 1), 1e-3, np.float32)

        plane, theta, base, x = plane_of(directions.CHUNK)  # loads the compiled loops, which take memory
        plane.combine(theta, base, x)
        plane.project(theta)
        self.reset_peak()
        step_s = _seconds(passes)
        peak = self.peak_memory()
        forward_s = _seconds(lambda: self._score(Split(source, rows)))
        yield "calibrating", 1, 3
        numbers = max(directions.CHUNK, CALIBRATION_BYTES // (model_batch * ITEMSIZE[self.recipe.directions.dtype]))
        plane, theta, base, x = plane_of(numbers)
        nbytes = plane.store.rows.nbytes
        combine_s, project_s = _seconds(lambda: plane.combine(theta, base, x)), _seconds(lambda: plane.project(theta))
        yield "calibrating", 2, 3
        some = bytes(1 << 24)
        hash_s = _seconds(lambda: hashlib.sha256(some).digest()) / len(some)
        read_s = _reading(self.ingredients)
        yield Calibration(len(rows), forward_s, step_s, combine_s / nbytes, project_s / nbytes, hash_s, read_s, peak)

    def gram(self, part: tuple[int, int]) -> np.ndarray:
        """Sum over part[0] of part[1] parts of the store of d_j d_k: float64 [K, K]."""
        total = np.zeros((len(self.store.rows),) * 2)
        for start, stop, _, chunk in self.plane.pieces[part[0] :: part[1]]:
            rows = widened(self.store, start, stop, chunk)
            total += (rows @ rows.T).double().numpy()
        return total

    def _classes(self, images: torch.Tensor, spec: str) -> int:
        try:
            with torch.inference_mode():
                logits = self.model(images)
        except (RuntimeError, ValueError, TypeError) as error:
            raise RecipeError(
                f"The model {self.recipe.model} cannot take the images of {spec}, {images.dtype} "
                f"{list(images.shape[1:])} each: {str(error).partition(chr(10))[0]}"
            ) from error
        if logits.ndim != 2 or len(logits) != 1:
            raise RecipeError(
                f"The model {self.recipe.model} made {list(logits.shape)} of one image of {spec}, {images.dtype} "
                f"{list(images.shape[1:])}; expected logits [1, classes]."
            )
        return logits.shape[1]

    def _output_layer(self) -> tuple[str, ...]:
        """The parameters that, doubled, double the logits: those of one module with a dimension as long as there are
        classes. Found by trying; later modules first."""
        modules = [name for name, module in self.model.named_modules() if any(True for _ in module.parameters(False))]
        images, _ = next(iter(self.examples.values())).batch(np.zeros(1, np.int64), self.device)
        with torch.no_grad():
            logits = self.model(images)
            for module in reversed(modules):
                prefix = f"{module}." if module else ""
                names = [
                    name
                    for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
                    if name.startswith(prefix) and "." not in name[len(prefix) :] and self.classes in shape
                ]
                parameters = [self.model.get_parameter(name) for name in names]
                for parameter in parameters:
                    parameter.mul_(2)
                doubled = torch.allclose(self.model(images), 2 * logits, rtol=1e-4, atol=1e-6)
                for parameter in parameters:
                    parameter.div_(2)
                if names and doubled:
                    return tuple(names)
        return ()

    def _want_gradients_of(self, variant: np.ndarray) -> None:
        parameters = dict(self.model.named_parameters())
        for name, moves in zip(self.layout.names, variant, strict=True):
            parameters[name].requires_grad_(bool(moves))

    def use(self, statistics: Statistics) -> None:
        """From here on the buffers are as the soup will have them (bake.py writes the same), but for these."""
        self._soup_buffers = {**self._mixed_buffers, **{n: _readable(values) for n, values in statistics.items()}}
        self._copy_buffers(self._soup_buffers)

    def _copy_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        state = self.model.state_dict()
        for name, buffer in buffers.items():
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
        name = interface_towards(host, port)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)  # gloo left alone may choose 127.0.0.1
        with _group_errors():
            store = self._store if self.shard == 0 else dist.TCPStore(host, port, self.mesh.shards, timeout=GROUP_DEADLINE)
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=store, rank=self.shard, world_size=self.mesh.shards, timeout=GROUP_DEADLINE
            )

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

    def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
        """Start a model batch: ingredients `chosen` [m] move, the others stay at x [K, B]; passes are in `precision`.

        base = center + sum over the others of x d, computed from scratch in the order of the ingredients.
        """
        self.precision = autocast(precision, self.device)
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

    def _micro_batches(self, split: Split) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The next one is gathered while this one is worked on."""
        batch = self.examples[split.source].batch
        parts = [split.rows[first : first + self.micro_batch] for first in range(0, len(split), self.micro_batch)]
        coming = self._gather_ahead.submit(batch, parts[0], self.device) if len(parts) > 1 else None
        for number, rows in enumerate(parts):
            found = batch(rows, self.device) if coming is None else coming.result()
            if number + 1 < len(parts):
                coming = self._gather_ahead.submit(batch, parts[number + 1], self.device)
            yield found

    def step(self, x: np.ndarray, factor: float, batch: Split) -> Partial:
        """Combine, forward and backward on this actor's part of the batch, project.

        x float32 [m, B]; factor: on the logits.
        """
        start = time.perf_counter()
        self._combine(x)
        self.gradient.zero_()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        t = torch.tensor(factor, dtype=torch.float32, device=self.device, requires_grad=True)
        t.grad = torch.zeros_like(t)
        for images, labels in self._micro_batches(batch):
            with self.precision:
                logits = self.model(images)
            loss = self.loss(logits.float() * t, labels, self.recipe.learn.label_smoothing)
            loss.backward()
            loss_sum += loss.detach()
        projected = self.plane.project(self._scatter())
        return Partial(projected, t.grad.item(), loss_sum.item(), time.perf_counter() - start)

    def evaluate(self, x: np.ndarray, factor: float, split: Split) -> Iterator[tuple[str, int, int] | Score]:
        """Score of the current model batch at x float32 [m, B], with this factor on the logits. Like all that follows, which
        may take long, it yields (what, done, in all) as signs of life, and the answer at the end."""
        self._combine(x)
        score = Score()
        for piece in self._pieces(split):
            with self.precision:
                score += self._score(piece, factor)
            yield "evaluating", score.count, len(split)
        yield score

    # Running statistics, in float32

    def sum_statistics(self, x: np.ndarray, batches: list[Split]) -> Iterator[tuple[str, int, int] | dict[str, np.ndarray]]:
        """Sums over `batches` of the running statistics of the current model batch at x float32 [m, B]."""
        self._combine(x)
        sums = yield from self._statistics(batches)
        self._copy_buffers(self._soup_buffers)
        yield sums

    def sum_statistics_of_file(
        self, path: str, batches: list[Split]
    ) -> Iterator[tuple[str, int, int] | dict[str, np.ndarray]]:
        """The same of the checkpoint at `path`."""
        models.load_checkpoint(self.model, path)
        sums = yield from self._statistics(batches)
        self._copy_buffers(self._soup_buffers)
        yield sums

    def _statistics(self, batches: list[Split]) -> Generator[tuple[str, int, int], None, dict[str, np.ndarray]]:
        def images_of(split: Split) -> torch.Tensor:
            return self.examples[split.source].batch(split.rows, self.device)[0]

        return (yield from _named("recalibrating", running_statistics.summed(self.model, batches, images_of)))

    def _pieces(self, split: Split) -> Iterator[Split]:
        size = 8 * self.micro_batch
        for first in range(0, len(split), size):
            yield Split(split.source, split.rows[first : first + size])

    def _score(self, split: Split, factor: float = 1.0) -> Score:
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            for images, labels in self._micro_batches(split):
                logits = self.model(images).float()
                loss += self.loss(logits * factor, labels, 0.0)
                correct += (logits.argmax(dim=1) == labels).sum()
        return Score(loss.item(), int(correct.item()), len(split))

    # Whole models, in float32

    def evaluate_file(
        self, path: str, splits: list[Split], factored: bool, totals: list[torch.Tensor] | None = None
    ) -> Iterator[tuple[str, int, int] | list[Outcome]]:
        """What the checkpoint at `path` does on each split; `factored`: with the losses that temperatures are found from.
        The logits are added to `totals` [n, classes], one a split."""
        models.load_checkpoint(self.model, path)
        outcomes, done, count = [], 0, sum(map(len, splits))
        for number, split in enumerate(splits):
            parts: list[Outcome] = []
            first = 0
            for piece in self._pieces(split):
                with torch.inference_mode():
                    for images, labels in self._micro_batches(piece):
                        logits = self.model(images).float()
                        parts.append(outcome_of(logits, labels, factored, self.metric))
                        if totals is not None:
                            totals[number][first : first + len(labels)] += logits
                        first += len(labels)
                done += len(piece)
                yield "evaluating", done, count
            outcomes.append(join(parts))
        self._copy_buffers(self._soup_buffers)
        yield outcomes

    def evaluate_member(self, paths: tuple[str, ...], splits: list[Split]) -> Iterator[tuple[str, int, int] | list[Outcome]]:
        """What the last of the checkpoints `paths` does on each split; its logits are added to those of the ones before."""
        if self._members != paths[:-1]:  # this actor took the place of a lost one
            self._members = ()
            for end in range(1, len(paths)):
                yield from (news for news in self.evaluate_member(paths[:end], splits) if isinstance(news, tuple))
        if not self._members:
            self._logits = [torch.zeros(len(split), self.classes, device=self.device) for split in splits]
        before, self._members = self._members, ("unfinished",)
        yield from self.evaluate_file(paths[-1], splits, False, self._logits)
        self._members = (*before, paths[-1])

    def evaluate_ensemble(
        self, paths: tuple[str, ...], splits: list[Split]
    ) -> Iterator[tuple[str, int, int] | list[Outcome]]:
        """What the mean of the logits of the checkpoints `paths` does on each split."""
        if self._members != paths:
            yield from (news for news in self.evaluate_member(paths, splits) if isinstance(news, tuple))
        outcomes = []
        for split, total in zip(splits, self._logits, strict=True):
            labels = torch.from_numpy(self.examples[split.source].labels[split.rows]).to(self.device)
            outcomes.append(outcome_of(total / len(paths), labels, True, self.metric))
        yield outcomes

    def try_candidate(
        self, kept: tuple[int, ...], candidate: int, splits: list[Split], calibration: Sequence[Split] = ()
    ) -> int:
        """How many examples the plain mean of the ingredients `kept` and `candidate` gets right, with running statistics
        of the batches `calibration`. A running sum is kept, and an ingredient read once."""
        if self._tried != (kept, candidate):
            self._mix(kept, candidate)
            if calibration:
                found = running_statistics.averaged([drained(self._statistics(list(calibration)))])
                self._copy_buffers({name: torch.from_numpy(values) for name, values in found.items()})
        return sum(self._score(split).correct for split in splits)

    def _mix(self, kept: tuple[int, ...], candidate: int) -> None:
        """theta = (sum of kept + candidate) / (len(kept) + 1), in float64, then rounded as in bake.py."""
        if self._summed != kept:
            if self._summed == kept[:-1] and self._tried == (kept[:-1], kept[-1]):
                self._sum += self._candidate
            else:
                self._sum = torch.zeros(self.layout.numel, dtype=torch.float64)
                for k in kept:
                    self._sum += self._flat(k)
            self._summed = kept
        self._candidate = self._flat(candidate)
        count = len(kept) + 1
        chosen = [self.ingredients[k] for k in (*kept, candidate)]
        for name, start, stop in self.layout.spans():
            mean = (self._sum[start:stop] + self._candidate[start:stop]) / count
            self.theta[start:stop] = mean.to(common_dtype(chosen, name))
        self._copy_buffers({name: buffer_of(chosen, name, self.recipe.buffers) for name in self.layout.buffers})
        self._tried = (kept, candidate)

    def _flat(self, k: int) -> torch.Tensor:
        """The parameter vector of ingredient k, float32 [N]."""
        flat = torch.empty(self.layout.numel)
        for name, start, stop in self.layout.spans():
            flat[start:stop] = self.ingredients[k].read(name).view(-1)
        self.ingredients[k].close()
        return flat

    def forget(self) -> None:
        """Let go of what was kept between calls for an ensemble or a greedy search."""
        self._members, self._logits = (), []
        self._summed, self._tried = (), None
        self._sum = self._candidate = torch.empty(0)

    def reset_peak(self) -> None:
        """Count the peak of memory anew from here."""
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> int:
        """Most bytes that this actor has held since `reset_peak`: resident memory, and what it took of its GPU."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with contextlib.suppress(OSError), open("/proc/self/status") as file:
            host = next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM")), host)
        return host + (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)


def interface_towards(host: str, port: int) -> str | None:
    """The network interface that owns the address from which this machine talks to `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # chooses a route, and sends nothing
        mine = probe.getsockname()[0]
    for name, owned in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == mine for a in owned):
            return name
    return None


def _seconds(work: Callable[[], Any], at_least: float = 0.3) -> float:
    """The median of as many rounds as take so long, the first left out."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        start = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _reading(ingredients: list[Ingredient], places: int = 16, size: int = 1 << 23) -> float:
    """Seconds for a byte of the ingredients' files, read in some places."""
    files = [found for i in ingredients for found in zip(i.files, i.sizes, strict=True)]
    random = np.random.default_rng()  # other places each time: those before are in memory now
    chosen = [files[k] for k in random.integers(len(files), size=places)]
    offsets = [int(random.integers(max(1, total - size))) for _, total in chosen]

    def read(file: tuple[str, int], offset: int) -> int:
        return len(bytes(storage.open_file(*file).read(offset, min(size, file[1] - offset))))

    start = time.perf_counter()
    with ThreadPoolExecutor(reading_threads()) as pool:
        nbytes = sum(pool.map(read, chosen, offsets))
    return (time.perf_counter() - start) / nbytes


def outcome_of(
    logits: torch.Tensor, labels: torch.Tensor, factored: bool = False, metric: Function | None = None
) -> Outcome:
    """Of logits [n, classes] for labels int64 [n]."""
    logits = logits.float()
    log_p = F.log_softmax(logits, dim=1)
    loss = F.nll_loss(log_p, labels, reduction="none")
    best = log_p.max(dim=1)
    losses = None
    if factored:
        factors = torch.from_numpy(np.exp(LOG_FACTORS)).float().to(logits.device)
        own = logits.gather(1, labels[:, None])
        losses = torch.stack([torch.logsumexp(f * logits, dim=1) - f * own[:, 0] for f in factors], dim=1).cpu().numpy()
    scores = None if metric is None else metric(logits, labels).cpu().numpy()
    right = (best.indices == labels).cpu().numpy()
    return Outcome(loss.cpu().numpy(), right, best.values.exp().cpu().numpy(), losses, scores)


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

"""Messages: every type that crosses the network between the driver and the actors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ray_soup.mixing.blocks import Partition
    from ray_soup.mixing.coefficients import Coefficients
    from ray_soup.task.data import Split

T = TypeVar("T")

Heartbeat = tuple[str, int, int]
"""What is being done, the units done so far, and the units in total."""

Stream = Iterator[Heartbeat | T]
"""The reply to a call that may take long: heartbeats, then the answer, which is never a tuple."""


@dataclass(frozen=True)
class KeptEnsemble:
    """Where actors save the sum of the outputs of an ensemble's members, so that a resumed run does not start over."""

    stem: str = ""
    """Path or URI that every node sees, without the number of a rank; empty: nothing is saved."""
    task: str = ""
    """Digest of everything that outputs depend on: members, model, data and parts of the data."""

    def file_of(self, rank: int) -> str:
        """Return the file of a rank; empty if nothing is saved."""
        return f"{self.stem}.{rank}.pt" if self.stem else ""


@dataclass(frozen=True)
class Mesh:
    """Replicas x shards ranks; rank r is shard r % shards of replica r // shards.

    It is logical, and fixed for a run: an actor serves one rank or several, one after another.
    """

    replicas: int
    """Number of parts of every batch; each is computed by a whole model."""
    shards: int
    """Number of actors that together hold one model."""

    @property
    def size(self) -> int:
        """The number of ranks, and the largest number of actors."""
        return self.replicas * self.shards


@dataclass(frozen=True)
class MeshCounts:
    """What has happened to the actors of a mesh since setup. All but `actors` only grow."""

    lost: int = 0
    """Actors that died or did not answer."""
    created: int = 0
    """Actors that began to serve after the start: replacements, and those on nodes that joined."""
    moved: int = 0
    """Ranks that went from one actor to another."""
    drained: int = 0
    """Actors whose ranks moved away before their node left."""
    slowed: int = 0
    """Times that an actor was found to be much slower than the others."""
    actors: int = 0
    """Actors that serve the mesh now."""


@dataclass(frozen=True)
class Partial:
    """The part of one rank in a step, or of a group of ranks, as sums over its examples.

    The driver divides once, by the sum of the weights. The times of a group are those of its slowest rank.
    """

    gradient: np.ndarray
    """float64 [m, B]: sum over the examples of dL/dx."""
    by_factor: float
    """Sum over the examples of dL/dt, where t is the factor on the logits."""
    loss: float
    """Sum of the losses over the examples."""
    weight: float
    """Sum of the weights of the examples: their number, or that of their tokens or pixels."""
    seconds: float
    """Time from the actor's first work on this step to the end of its work on this part."""
    combine_s: float = 0.0
    """The part of it that went into combining; mixing by layer counts as passes."""
    project_s: float = 0.0
    """The part of it that went into projecting."""
    ranks: int = 1
    """How many ranks it is the part of; not packed."""

    def packed(self) -> bytes:
        """Return all numbers as float64, as an object takes longer to send: the gradient, then the fields in their order."""
        rest = (self.by_factor, self.loss, self.weight, self.seconds, self.combine_s, self.project_s)
        return np.concatenate([self.gradient.ravel(), rest]).tobytes()

    @staticmethod
    def unpacked(numbers: np.ndarray, shape: tuple[int, ...]) -> Partial:
        """Return what was packed, with a gradient of this shape."""
        gradient, rest = numbers[: math.prod(shape)], numbers[math.prod(shape) :]
        return Partial(gradient.reshape(shape), *rest.tolist())


@dataclass(frozen=True)
class ComparedExamples:
    """What is known of the examples after no two sources were found to share any."""

    fit_digests: np.ndarray | None
    """uint64 [n]: a hash of each example of fit."""
    contents: dict[str, str]
    """A hash of the inputs and labels of each source."""


@dataclass(frozen=True)
class SetupInfo:
    """An actor's report after setup."""

    sizes: dict[str, int]
    """Number of examples in each source."""
    fit_digests: np.ndarray | None
    """As in ComparedExamples, which the pool adds."""
    contents: dict[str, str]
    """As in ComparedExamples."""
    fingerprint: str
    """A hash of the model's structure and of the source files of its function and of the metric. Equal fingerprints and
    equal parameters mean the same model."""
    node: str
    """The host that the actor runs on."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, and what was assumed about its labels."""
    cut: Mapping[str, float] = field(default_factory=dict)
    """Of sources of text: the share of the texts or documents that have more tokens than fit into one example."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """The versions of ray_soup, torch and Python on the node."""
    node_id: str = ""
    """Ray's identifier of the node."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """A digest of the examples of each source."""


@dataclass(frozen=True)
class StoreInfo:
    """An actor's report after opening a direction store."""

    partition: Partition
    """The blocks, without the invariant ones."""
    norms: np.ndarray
    """float64 [K, B]: the norm of each direction in each block."""
    sha256: tuple[str, ...]
    """The SHA-256 of each ingredient."""
    output: tuple[str, ...]
    """The parameters that scale the logits; empty if the model has none."""
    held: int
    """Bytes of directions and center that the actor works on."""


@dataclass(frozen=True)
class ModelFiles:
    """The files of a soup's model, some of which an actor writes."""

    subset: tuple[int, ...]
    """The numbers of the ingredients that the coefficients refer to."""
    coefficients: Coefficients
    """The coefficients of the soup."""
    path: str
    """The file of a model that is not split, on a disk that all nodes share; with a `uri`, only its name counts."""
    out_dtype: str
    """Dtype of the floats, or `keep`."""
    shard_size: int | None
    """Maximum bytes of tensors per file."""
    first: int = 0
    """Number of the first file to write."""
    stop: int = 0
    """End of the files to write (excluded)."""
    uri: str = ""
    """Where actors upload the files, each followed by its SHA-256 in a file NAME.sha256; empty: they stay at `path`."""


@dataclass(frozen=True)
class TrainingJob:
    """All weights of a model, to be trained on fit from a written soup."""

    what: str
    """What is being done, for progress."""
    start: str
    """The soup's file, or index, at a path or URI that all actors see."""
    stem: str
    """Path or URI without a suffix, that they also see, of the files that they keep until the job is done."""
    task: str
    """Identifies everything that the result depends on: a state of another task is not resumed from."""
    lr: float
    """Largest learning rate."""
    wd: float
    """Weight decay."""
    epochs: int
    """Passes over fit."""
    batch_size: int
    """Examples per step, summed over all actors."""
    seed: int
    """Seed of the order of the examples."""
    precision: str
    """float32 or bfloat16, for forward and backward passes."""
    fit: Split
    """The examples to train on."""
    select: Split
    """The examples to stop on."""
    calibration: tuple[Split, ...] = ()
    """Batches of fit that running statistics are re-estimated on; empty: those of the soup are kept."""


@dataclass(frozen=True)
class TrainingResult:
    """What became of a TrainingJob."""

    curve: list[dict[str, float]]
    """One entry for the start (epoch -1) and for each epoch: epoch, fit_nll, select_nll, select_accuracy, steps, lr."""
    epoch: int
    """The best epoch on select, from 0; -1: none is better than the start."""
    cost: float
    """NLL on select after that epoch, or minus the figure that select_by names."""
    difference: str
    """The file of differences of that epoch; empty for the start."""
    precision: str
    """The precision that was used."""
    steps: int
    """Number of steps."""
    image_passes: int
    """Number of examples in forward and backward passes and in re-estimations of running statistics."""
    stopped: str = ""
    """Why the training ended early: `diverged` or `memory`; empty if it did not."""


@dataclass(frozen=True)
class StepTimings:
    """Measured speeds of a node, from which `plan` predicts the time of a run."""

    images: int
    """Number of examples in the timed passes."""
    forward_s: float
    """Seconds of a forward pass over `images` examples, as select is evaluated while learning."""
    exact_s: float
    """Seconds of a forward pass over `images` examples in float32, as results are evaluated."""
    step_s: float
    """Seconds of a forward and backward pass over `images` examples."""
    combine_s: float
    """Seconds to combine one byte of compressed directions."""
    project_s: float
    """Seconds to project onto one byte of compressed directions."""
    hash_s: float
    """Seconds to hash one byte of ingredients on one core."""
    read_s: float
    """Seconds to read one byte of ingredients from their storage."""
    peak_bytes: int
    """Peak memory in bytes of an actor during a forward and backward pass, with model and data but without directions."""

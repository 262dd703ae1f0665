"""Messages: every type that crosses the network between the driver and the actors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ray_soup.mixing.blocks import Partition
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.task.data import Split

T = TypeVar("T")

Heartbeat = tuple[str, int, int]
"""What is being done, the units done so far, and the units in total."""

Stream = Iterator[Heartbeat | T]
"""The reply to a call that may take long: heartbeats, then the answer, which is never a tuple."""


@dataclass(frozen=True)
class Mesh:
    """Replicas x shards actors; rank r is shard r % shards of replica r // shards."""

    replicas: int
    """Number of whole models; they split every batch."""
    shards: int
    """Number of actors that together hold one replica."""

    @property
    def size(self) -> int:
        """The number of actors."""
        return self.replicas * self.shards


@dataclass(frozen=True)
class Partial:
    """One actor's part of a step, as sums over its examples; the driver divides once, by the sum of the weights."""

    gradient: np.ndarray
    """float64 [m, B]: sum over the examples of dL/dx."""
    by_factor: float
    """Sum over the examples of dL/dt, where t is the factor on the logits."""
    loss: float
    """Sum of the losses over the examples."""
    weight: float
    """Sum of the weights of the examples: their number, or that of their tokens or pixels."""
    seconds: float
    """Time that the actor took."""


@dataclass(frozen=True)
class SetupInfo:
    """An actor's report after setup."""

    sizes: dict[str, int]
    """Number of examples in each source."""
    fit_digests: np.ndarray | None
    """uint64 [n]: a hash of each example of fit. Only the first actor reports it."""
    contents: dict[str, str]
    """A hash of the inputs and labels of each source. Only the first actor reports it."""
    fingerprint: str
    """A hash of the model's structure and of the source files of its function and of the metric. Equal fingerprints and
    equal parameters mean the same model."""
    node: str
    """The host that the actor runs on."""
    notes: tuple[str, ...] = ()
    """What was left out of the data, and what was assumed about its labels."""
    cut: Mapping[str, float] = field(default_factory=dict)
    """Of sources of text: the share of the texts or documents that have more tokens than fit into one example."""


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
    """The file of a model that is not split, on a disk that all nodes share."""
    out_dtype: str
    """Dtype of the floats, or `keep`."""
    shard_size: int | None
    """Maximum bytes of tensors per file."""
    first: int = 0
    """Number of the first file to write."""
    stop: int = 0
    """End of the files to write (excluded)."""


@dataclass(frozen=True)
class TrainingJob:
    """All weights of a model, to be trained on fit from a written soup."""

    what: str
    """What is being done, for progress."""
    start: str
    """The soup's file, or index, on a disk that all actors share."""
    stem: str
    """Path without a suffix, on the same disk, of the files that the actors keep until the job is done."""
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
    """Seconds of a forward pass over `images` examples."""
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

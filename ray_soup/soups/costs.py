"""The cost model of a run: seconds of each part of a step, of an evaluation and of the whole run, from the speeds of a node.

step       = turns * (combine + passes + project) + wire + driver
combine    = bytes of directions of a shard * seconds per byte; the same for project
passes     = a forward and backward pass over each micro-batch of a rank's part of the batch
wire       = coordinates to and gradients from every rank, through the driver's network; slices between shards
driver     = a round trip, and the driver's own work for each rank
relays     = with more than 16 ranks of one shard, both count for the driver's calls to relays and for those of one relay
turns      = ranks / actors, rounded up: an actor that serves several ranks computes them one after another

A part of a step that does not shrink when actors are added is where scaling stops.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_soup.actors.messages import Mesh, StepTimings
from ray_soup.actors.relays import GROUP
from ray_soup.mixing.store_format import ITEMSIZE
from ray_soup.recipe import Recipe
from ray_soup.soups.beginnings import screens
from ray_soup.soups.inputs import CALIBRATION, CALIBRATION_WHILE_CHOOSING
from ray_soup.soups.turns import model_batches
from ray_soup.task.outcomes import test_sets

CALL_S = 0.002  # a round trip to an actor, and the driver's own work in a step, where driver and actors share the cores
LINK_S = 1 / 25e9  # to send a byte to another GPU of the node: assumed, PCIe 4.0
LOOPBACK_S = 1 / 0.4e9  # to send a byte to another process through gloo, as measured
START_S = 5.0  # actors that import, compile, load and choose a precision; and the report


@dataclass(frozen=True)
class Workload:
    """What a run computes, whatever it runs on."""

    recipe: Recipe
    ingredients: int
    """Number of ingredients, K."""
    parameters: int
    """Elements of the parameter vector, N."""
    blocks: int
    """Number of blocks, B."""
    model_batch: int
    """Number of ingredients that move at a time, m."""
    sizes: dict[str, int]
    """Number of examples of each split."""
    nbytes: int
    """Bytes of all ingredients."""
    recalibrates: bool = False
    """Whether running statistics are re-estimated."""
    frozen: bool = False
    """Whether the ingredients are adapters of a frozen base."""
    has_store: bool = False
    """Whether the direction store exists."""
    stages: int = 1
    """How often the model batches move, each time in finer blocks."""

    @property
    def passed(self) -> float:
        """Bytes of directions per parameter that a step passes over; those of adapters are the values of all, once."""
        return 4 if self.frozen else self.model_batch * ITEMSIZE[self.recipe.directions.dtype]

    @property
    def stored(self) -> float:
        """Bytes per parameter of the direction store."""
        return 4 + (4 if self.frozen else self.ingredients * ITEMSIZE[self.recipe.directions.dtype])

    @property
    def turns(self) -> int:
        """Number of model batches that move, one after another."""
        learn = self.recipe.learn
        return self.stages * len(model_batches(self.ingredients, self.model_batch, learn.seed, learn.models_epochs))

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over fit."""
        return -(-self.sizes["fit"] // self.recipe.learn.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run; a refit takes at most as many again."""
        learn = self.recipe.learn
        return self.turns * learn.epochs * self.steps_per_epoch * (1 + learn.refit)

    @property
    def baseline_passes(self) -> int:
        """Forward passes for the best single ingredient: of all on select, then of the best on what is reported.

        Without this baseline, those that rank the ingredients for learn.screen.
        """
        count, select = self.ingredients, self.sizes["select"]
        if self.recipe.baseline == "none":
            return count * select * screens(self.recipe)
        return (count + 1) * select + sum(self.sizes[name] for name in test_sets(self.sizes))

    @property
    def starts(self) -> int:
        """Soups that are evaluated on select before learning begins at one of them."""
        return 2 if self.recipe.start is not None else 1 + (self.ingredients - 1).bit_length() if screens(self.recipe) else 0


@dataclass(frozen=True)
class Line:
    """Seconds of a pass over n examples: fixed + each * n, at least `least`."""

    fixed: float
    each: float
    least: float = 0.0

    def __call__(self, examples: int) -> float:
        """Return the seconds of a pass over this many examples."""
        return max(self.fixed + self.each * examples, self.least) if examples else 0.0


@dataclass(frozen=True)
class Speeds:
    """How fast an actor, the driver and the network of a cluster are; all in seconds."""

    micro_batch: int
    """Number of examples in one pass."""
    step: Line
    """A forward and backward pass over a micro-batch."""
    forward: Line
    """A forward pass over a micro-batch, as select is evaluated while learning."""
    exact: Line
    """A forward pass over a micro-batch in float32, as results are evaluated."""
    combine_s: float
    """To combine one byte of directions."""
    project_s: float
    """To project onto one byte of directions."""
    hash_s: float
    """To hash one byte of ingredients on one core."""
    read_s: float
    """To read one byte of ingredients from their storage."""
    call_s: float = CALL_S
    """Of the driver's work for one rank in a call."""
    round_trip_s: float = 0.0
    """Of a call, whatever the number of ranks."""
    wire_s: float = 0.0
    """To send one byte through the driver's network."""
    link_s: float = 0.0
    """To send one byte from shard to shard."""


def measured_speeds(timings: StepTimings, gpus: float) -> Speeds:
    """Return the speeds that one actor with this number of GPUs measured; its link to another one is that of a node."""
    step, forward, exact = (Line(0.0, s / timings.images) for s in (timings.step_s, timings.forward_s, timings.exact_s))
    return Speeds(
        timings.images, step, forward, exact, timings.combine_s, timings.project_s, timings.hash_s, timings.read_s,
        link_s=LINK_S if gpus else LOOPBACK_S,
    )  # fmt: skip


@dataclass(frozen=True)
class Costs:
    """Seconds of a workload on a mesh."""

    work: Workload
    speeds: Speeds
    mesh: Mesh
    actors: int
    """Number of actors that serve the ranks of the mesh."""

    @property
    def _by_layer(self) -> bool:
        """Whether every pass mixes and projects again."""
        return self.work.recipe.actors.by_layer

    @property
    def turns(self) -> int:
        """Ranks that the busiest actor serves."""
        return -(-self.mesh.size // self.actors)

    def _each(self, examples: int) -> int:
        """Return the examples of the largest part of a batch."""
        return -(-examples // self.mesh.size)

    def _passes(self, line: Line, examples: int) -> float:
        whole, rest = divmod(self._each(examples), self.speeds.micro_batch)
        return whole * line(self.speeds.micro_batch) + line(rest)

    def _mixed(self, examples: int) -> int:
        """Return how often a rank mixes the parameters for a forward pass over its part of the examples."""
        return -(-self._each(examples) // self.speeds.micro_batch) if self._by_layer else 1

    @property
    def _rows(self) -> float:
        """Bytes of directions that a shard passes over."""
        return -(-self.work.parameters // self.mesh.shards) * self.work.passed

    @property
    def _slices(self) -> float:
        """Seconds to gather the parameter vector from the shards, or to reduce-scatter its gradient."""
        return 4 * self.work.parameters * (self.mesh.shards - 1) / self.mesh.shards * self.speeds.link_s

    @property
    def _driver(self) -> float:
        return self.speeds.round_trip_s + self.speeds.call_s * self.mesh.size

    @property
    def _calls(self) -> list[int]:
        """The calls that are made one after another in a step: the driver's, and those of a relay, which wait for them."""
        size = self.mesh.size
        return [size] if size <= GROUP or self.mesh.shards > 1 else [-(-size // GROUP), GROUP]

    def step_parts(self, examples: int) -> dict[str, float]:
        """Return the seconds of each part of a step on a batch."""
        mixed = self._mixed(examples)
        calls = sum(self._calls)
        coordinates = 12 * self.work.model_batch * self.work.blocks * calls  # float32 out, float64 back
        return {
            "combine": self.turns * (2 if self._by_layer else 1) * mixed * self._rows * self.speeds.combine_s,
            "passes": self.turns * self._passes(self.speeds.step, examples),
            "project": self.turns * mixed * self._rows * self.speeds.project_s,
            "wire": self.turns * 2 * self._slices + (coordinates + 4 * examples) * self.speeds.wire_s,
            "driver": len(self._calls) * self.speeds.round_trip_s + calls * self.speeds.call_s,
        }

    def step_s(self, examples: int) -> float:
        """Estimate a step on a batch."""
        return sum(self.step_parts(examples).values())

    def training_s(self, examples: int) -> float:
        """Estimate a forward and backward pass over the examples, without combine and project."""
        return self.turns * self._passes(self.speeds.step, examples)

    def forward_s(self, examples: int, exact: bool = False) -> float:
        """Estimate a forward pass over the examples, without combine; `exact`: in float32."""
        return self.turns * self._passes(self.speeds.exact if exact else self.speeds.forward, examples)

    def evaluation_s(self, examples: int, exact: bool = False) -> float:
        """Estimate the evaluation of the soup on the examples; `exact`: in float32, as results are evaluated."""
        mixing = self.turns * (self._mixed(examples) * self._rows * self.speeds.combine_s + self._slices)
        return mixing + self.forward_s(examples, exact) + self._driver


def run_seconds(costs: Costs, cpus: float) -> dict[str, float]:
    """Return the seconds of each part of a run whose actors have `cpus` CPUs each."""
    work, speeds = costs.work, costs.speeds
    recipe, options = work.recipe, work.recipe.learn
    fit, select = work.sizes["fit"], work.sizes["select"]
    last = fit - (work.steps_per_epoch - 1) * options.batch_size
    steps_s = (work.steps_per_epoch - 1) * costs.step_s(options.batch_size) + costs.step_s(last)
    learning = work.turns * options.epochs * (steps_s + costs.evaluation_s(select)) + costs.evaluation_s(select)
    learning += options.refit * work.turns * options.epochs * steps_s
    learning += work.starts * costs.evaluation_s(select)
    if (
        work.recalibrates
    ):  # at every start, that of every turn, and after every epoch, for its mean once more before the next
        times = work.starts + work.turns * (options.epochs + 1 + options.average * (options.epochs - 1))
        learning += times * costs.evaluation_s(min(fit, CALIBRATION_WHILE_CHOOSING))
    store = 0.0 if work.has_store else work.nbytes * max(1.5 * speeds.hash_s / max(1, int(cpus)), speeds.read_s)
    reported = select + sum(work.sizes[name] for name in test_sets(work.sizes))
    evaluated = reported + (min(fit, CALIBRATION) if work.recalibrates else 0)
    final = costs.evaluation_s(evaluated, exact=True) + work.nbytes * max(0.1 * speeds.hash_s, speeds.read_s)
    seconds = {"start": START_S, "store": store, "learning": learning, "mixing and evaluation": final}
    if recipe.polish is not None:
        epoch_s = costs.training_s(fit) + costs.forward_s(select)
        seconds["polish"] = len(recipe.polish.rates) * recipe.polish.epochs * epoch_s
    if work.baseline_passes:
        seconds["best single ingredient"] = (
            costs.evaluation_s(work.baseline_passes, exact=True) + work.nbytes * speeds.read_s
        )
    return seconds

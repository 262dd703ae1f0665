"""What a method works with: the same for the built-in methods and for those of the user."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.blocks import Partition, partition
from ray_soup.mixing.coefficients import SUM_TOLERANCE
from ray_soup.recipe import Recipe
from ray_soup.soups.granularity import resolved_blocks
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING, Inputs
from ray_soup.task.choices import ranking
from ray_soup.task.data import Split, batch_positions

if TYPE_CHECKING:
    from ray_soup.soups.session import Session as RunSession

OFF = 1e-6
"""How far the sum of a user's coefficients may be from 1, for each unit of their size: they may come from float32."""
LARGEST_OFF = 1e-3
"""How far it may be at most."""


class NeedsDataError(RecipeError):
    """A method evaluates models, but has no data or no actors to do so."""


@dataclass(frozen=True)
class IngredientInfo:
    """An ingredient, as a method sees it."""

    name: str
    """Short name, unique among the ingredients."""
    path: str
    """Path or URI."""
    step: int | None = None
    """The step of its training run, if its path says so."""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its trial, if it comes from a sweep."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Results of that trial."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Plain values that are stored beside its tensors, such as `epoch`."""


class Session:
    """What a method works with, and the only argument of its function.

    A method is a function `(session) -> result`. The result is one of

    - coefficients: float [K], one for each ingredient, or [K, B], one for each ingredient and block; each column sums to 1;
    - for a method that is no weighted sum of the ingredients, the tensors of a model by name, or the path of a model file.

    The function should depend on the session alone and draw its random numbers from `seed`: an interrupted run calls it
    again, and `ray-soup verify` and `bake` compare what it returns then.

    Shapes: K ingredients, B blocks.
    """

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        subset: tuple[int, ...],
        progress: ProgressCallback,
        run: RunSession | None = None,
    ) -> None:
        self.recipe = recipe
        """The recipe of the run."""
        self.progress = progress
        """Call it with what is being done, the units done so far, and the units in total."""
        self.notes: list[str] = []
        """Notes for the user, one sentence or more each; append to it."""
        self.figures: dict[str, Any] = {}
        """Keys for run.json, of the built-in methods."""
        self.inputs, self.subset, self._run = inputs, subset, run
        self._chosen = [inputs.ingredients[k] for k in subset]
        self._calibrated = False

    @property
    def seed(self) -> int:
        """The seed, learn.seed in the recipe."""
        return self.recipe.learn.seed

    # Ingredients

    @cached_property
    def ingredients(self) -> tuple[IngredientInfo, ...]:
        """The K ingredients, in the order of the coefficients."""
        return tuple(
            IngredientInfo(
                i.name, i.path, i.step.number if i.step else None, i.trial.config if i.trial else {},
                i.trial.metrics if i.trial else {}, i.metadata,
            )
            for i in self._chosen
        )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the K ingredients."""
        return tuple(i.name for i in self._chosen)

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter tensor of the model, by name."""
        return dict(zip(self.inputs.layout.names, self.inputs.layout.shapes, strict=True))

    @property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """The shape of each other tensor of the model's state dict, by name."""
        return dict(self.inputs.layout.buffers)

    def read(self, ingredient: int, tensor: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read elements `start` to `stop` of a tensor of an ingredient, counted row by row.

        Returns values [stop - start] in the dtype of the file. Raises RecipeError if the model has no such tensor.
        """
        if tensor not in self._chosen[ingredient].tensors:
            raise RecipeError(f"Session.read: the model has no tensor {tensor!r}. Use names of parameters and buffers.")
        return self._chosen[ingredient].read(tensor, start, stop).clone()

    @cached_property
    def partition(self) -> Partition:
        """The B blocks: their names, and which tensors are in which."""
        examples = len(self._run.splits["fit"]) if self._run and "fit" in self._run.splits else 0
        layout, count = self.inputs.layout, len(self.subset)
        return partition(layout, resolved_blocks(self.recipe.blocks, layout, count, examples, not self.inputs.frozen))

    # Held-out data

    @property
    def run(self) -> RunSession:
        """The actors and the data of the run, for the built-in methods: no part of the public interface.

        Raises NeedsDataError if there is none.
        """
        if self._run is None:
            raise NeedsDataError(self._no_data())
        return self._run

    @property
    def _measured(self) -> RunSession:
        """The same, if it has held-out data. Raises NeedsDataError."""
        if self._run is None or "select" not in self._run.splits:
            raise NeedsDataError(self._no_data())
        return self._run

    def _no_data(self) -> str:
        return f"The method {self.recipe.method} evaluates models on held-out data. Add data.fit to the recipe."

    def held_out(self) -> list[dict[str, float]]:
        """Evaluate each ingredient on fit and select together: accuracy, nll and metric, those that the task has, [K].

        Evaluations are kept in the cache of the node, so that this is fast if they were made before.
        """
        outcomes = self._measured.individual()
        self._count(len(self.subset) * len(outcomes[0]))
        found = [{name: getattr(outcomes[k], name) for name in ("accuracy", "nll", "metric")} for k in self.subset]
        return [{name: value for name, value in one.items() if value is not None} for one in found]

    def ranked(self) -> list[int]:
        """Return the ingredients, 0 to K - 1, from best to worst on fit and select together, by `select_by`."""
        outcomes = self._measured.individual()
        return ranking({n: outcomes[k] for n, k in enumerate(self.subset)}, self.recipe.select_by)

    def evaluate(self, coefficients: ArrayLike) -> dict[str, float]:
        """Evaluate the soup with these coefficients, [K] or [K, B], on select: nll, accuracy and metric, if it has them.

        The model is mixed from compressed differences of the ingredients, as in learning, so that the figures may differ
        in the last digits from those of the finished soup, which are exact. Running statistics that are re-estimated for
        the finished soup are re-estimated here, too.
        """
        x, run = self._x(self.checked(coefficients)), self._measured
        self._recalibrate(x)
        select = run.splits["select"]
        score = run.pool.evaluate(x, 1.0, select)
        self._count(len(select))
        found = {"nll": score.nll, "accuracy": score.accuracy, "metric": score.mean_metric}
        return {name: value for name, value in found.items() if value is not None}

    def batches(self, epoch: int = 0) -> list[NDArray[np.int32]]:
        """Cut fit into batches of learn.batch_size: the positions of their examples, in an order of this seed and epoch."""
        learn = self.recipe.learn
        return batch_positions(len(self._measured.splits["fit"]), learn.batch_size, learn.seed, 2, 0, epoch)

    def gradient(self, coefficients: ArrayLike, batch: NDArray[np.int32]) -> tuple[float, NDArray[np.float64]]:
        """Compute the mean loss on a batch of fit, and its gradient with respect to the coefficients.

        The gradient is that along coefficients whose columns sum to 1: what is equal for all ingredients of a block is left
        out. It has the shape of the coefficients. Running statistics are those of the last `evaluate`.

        Args:
            coefficients: float [K] or [K, B].
            batch: positions of examples, as from `batches`.
        """
        values, run = self.checked(coefficients), self._measured
        x, fit = self._x(values), run.splits["fit"]
        if not self._calibrated:
            self._recalibrate(x)
        partials = run.pool.step(x, 1.0, Split(fit.source, fit.rows[batch]))
        weight = sum(p.weight for p in partials) or 1.0
        gradient = np.zeros_like(values)
        gradient[:, self._places] = sum(p.gradient for p in partials) / weight
        self._count(len(batch), steps=1)
        by_ingredient: NDArray[np.float64] = gradient.sum(axis=1) if np.ndim(coefficients) == 1 else gradient
        return sum(p.loss for p in partials) / weight, by_ingredient

    def checked(self, coefficients: ArrayLike) -> NDArray[np.float64]:
        """Check coefficients, [K] or [K, B], and return them as float64 [K, B]; a sum near 1 becomes 1.

        Raises RecipeError if they have another shape, are not finite, or do not sum to 1.
        """
        found, count, blocks = np.asarray(coefficients, dtype=np.float64), len(self.subset), self.partition
        cure = "Change what the method computes."
        if found.shape not in ((count,), (count, blocks.count)):
            more = f", or {[count, blocks.count]} for its {blocks.count} blocks" if blocks.count > 1 else ""
            raise RecipeError(
                f"method: {self.recipe.method}: found coefficients of the shape {list(found.shape)}; expected "
                f"[{count}], one for each ingredient{more}. {cure}"
            )
        values = np.repeat(found[:, None], blocks.count, axis=1) if found.ndim == 1 else found
        if not np.isfinite(values).all():
            raise RecipeError(f"method: {self.recipe.method}: a coefficient is not finite. {cure}")
        sums = values.sum(axis=0)
        size = np.maximum(np.abs(values).sum(axis=0), 1)
        wrong = np.flatnonzero(np.abs(sums - 1) > np.minimum(OFF * size, LARGEST_OFF))
        if len(wrong):
            block = blocks.names[wrong[0]]
            raise RecipeError(
                f"method: {self.recipe.method}: the coefficients of the block {block} sum to {sums[wrong[0]]:.6g}; expected "
                f"1. Divide them by their sum, or subtract it. {cure}"
            )
        return np.where(np.abs(sums - 1) > SUM_TOLERANCE, values / sums, values)

    # What stands behind these

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """The blocks, int64 [B'], in which ingredients differ. The actors hold the directions of these from here on."""
        run, count = self._measured, len(self.subset)
        store = run.open_store(self.subset, run.blocks)
        precision = "float32" if self.recipe.precision == "auto" else self.recipe.precision  # the same in every attempt
        run.pool.begin(np.arange(count), np.zeros((count, store.partition.count), dtype=np.float32), precision)
        position = {name: n for n, name in enumerate(self.partition.names)}
        return np.array([position[name] for name in store.partition.names], dtype=np.int64)

    def _x(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the factors of the directions, float32 [K, B']: as columns sum to 1, they are the coefficients."""
        return np.ascontiguousarray(values[:, self._places], dtype=np.float32)

    def _recalibrate(self, x: NDArray[np.float32]) -> None:
        batches = self._measured.calibration(CALIBRATION_WHILE_CHOOSING)
        if batches:
            self._measured.pool.recalibrate(x, batches)
            self._count(sum(map(len, batches)))
        self._calibrated = True

    def _count(self, examples: int, steps: int = 0) -> None:
        """Count what the method costs, for the table."""
        self.figures["image_passes"] = self.figures.get("image_passes", 0) + examples
        if steps:
            self.figures["steps"] = self.figures.get("steps", 0) + steps

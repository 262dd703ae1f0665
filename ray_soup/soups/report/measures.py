"""What the figures of a run are called: its loss, the unit of the loss, what is correct, and which figure makes choices.

Does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from ray_soup.recipe import Recipe, is_function
from ray_soup.recipe.schema import ObjectiveName
from ray_soup.soups.report.text import number

BUILT_IN = get_args(ObjectiveName)[1:]
"""The objectives whose loss is known here; the others are the user's own."""


@dataclass(frozen=True)
class Measures:
    """The names of a run's figures, as its objective says; the defaults are those of classification."""

    objective: str = "classification"
    """The objective: a built-in one, or `module:Class`."""
    unit: str = "example"
    """What the loss is counted per."""
    select_by: str = "auto"
    """The recipe key."""
    own_loss: str | None = None
    """The recipe key `loss`, which replaces the objective's loss in learning curves and trials."""
    inputs: str = "images"
    """What the examples of a classifier are: images or texts."""
    dtype: str = "float32"
    """The dtype of the weights with which models are evaluated."""

    # The names of the figures

    @property
    def loss(self) -> str:
        """The name of the loss."""
        return "MSE" if self.objective == "regression" else "NLL" if self.objective in BUILT_IN else "loss"

    @property
    def loss_per_unit(self) -> str:
        """The name of the loss with its unit, for text."""
        return self.loss if self.unit in ("example", "number") else f"{self.loss} per {self.unit}"

    @property
    def loss_heading(self) -> str:
        """The name of the loss with its unit, for a narrow column."""
        return self.loss_per_unit.replace(" per ", "/")

    @property
    def loss_format(self) -> str:
        """The format of the loss: an NLL is of the order of 1, but the scale of other losses is not known."""
        return ".4f" if self.loss == "NLL" else ".4g"

    @property
    def learned(self) -> str:
        """The name of the loss that the coefficients minimize, in learning curves and trials."""
        return "loss" if self.own_loss else self.loss_per_unit

    @property
    def accuracy(self) -> str:
        """The name of the accuracy, for text."""
        return "accuracy" if self.unit == "example" else f"{self.unit} accuracy"

    @property
    def accuracy_heading(self) -> str:
        """The name of the accuracy in percent, for a narrow column."""
        return "%" if self.unit == "example" else f"{self.unit} %"

    @property
    def examples(self) -> str:
        """What the examples of the costs are called."""
        return "images" if self.objective in ("classification", "segmentation") and self.inputs == "images" else "examples"

    def name_of(self, figure: str) -> str:
        """Return the name of `accuracy`, `metric` or `nll`, for text."""
        return {"accuracy": self.accuracy, "nll": self.loss_per_unit}.get(figure, figure)

    def shown(self, figure: str, value: float, sign: str = "") -> str:
        """Format a value of `accuracy`, `metric` or `nll`; a difference has the sign "+"."""
        if figure != "accuracy":
            return number(f"{{:{sign}{self.loss_format if figure == 'nll' else '.4f'}}}", value)
        return f"{number('{:+.2f}', 100 * value)} points" if sign else number("{:.2%}", value)

    # The figures that make choices

    def leading(self, rows: Iterable[Mapping[str, Any]], split: str) -> str:
        """Return the figure that ranks models and that one table or plot shows: `accuracy`, `metric` or `nll`."""
        wanted = self.select_by if self.select_by in ("metric", "nll") else "accuracy"
        return wanted if any(row.get(f"{split}_{wanted}") is not None for row in rows) else "nll"

    def decisive(self, change: Mapping[str, float]) -> str:
        """Return the figure that a soup and its baseline are judged by, one that their differences `change` have."""
        return self.select_by if f"select_{self.select_by}" in change else "nll"

    def improved(self, change: Mapping[str, float]) -> bool:
        """Return whether the differences from a baseline on select are an improvement in the decisive figure."""
        figure = self.decisive(change)
        value = change.get(f"select_{figure}", 0.0)
        return value < 0 if figure == "nll" else value > 0

    def better(self, figure: str) -> str:
        """Return the words for an improvement in a figure, as in `lower NLL`."""
        return f"{'lower' if figure == 'nll' else 'higher'} {self.name_of(figure)}"

    # Explanations

    def explained(self, has_accuracy: bool) -> str:
        """Return sentences that say what the loss and the accuracy are; empty for classification, where all know it."""
        if self.objective == "classification":
            return ""
        if self.objective == "regression":
            mean = "MSE: mean squared error over all numbers."
        elif self.objective == "multi_label":
            mean = "NLL/label: mean binary cross-entropy over all labels."
        elif self.objective in BUILT_IN:
            mean = f"NLL/{self.unit}: mean cross-entropy over all {self.unit}s that are scored, in nats."
        else:
            mean = f"{self.loss_heading}: the loss of the objective {self.objective}, per {self.unit}."
        return f"{mean} {self.accuracy_heading}: share that is predicted right." if has_accuracy else mean


def measures_in(record: Mapping[str, Any]) -> Measures:
    """Return the names of the figures of a run.json, or of a row that names its objective."""
    known = {key: record[key] for key in ("objective", "unit", "select_by", "inputs", "dtype") if key in record}
    return Measures(**known, own_loss=record.get("loss"))


def measures_of(recipe: Recipe) -> Measures:
    """Return the names of the figures of a recipe's runs. Raises RecipeError if its objective cannot be used."""
    from ray_soup.task.model_spec import in_bfloat16
    from ray_soup.task.models import objective_in
    from ray_soup.task.own_functions import objective_of

    objective = objective_of(recipe, objective_in(recipe.model))
    name = recipe.objective if is_function(recipe.objective) else objective.name
    inputs = "texts" if name == "classification" and _classifies_texts(recipe.model) else "images"
    dtype = "bfloat16" if in_bfloat16(recipe.model) else "float32"
    return Measures(name, objective.unit, recipe.select_by, recipe.loss, inputs, dtype)


def _classifies_texts(spec: str) -> bool:
    from ray_soup.task.model_spec import ModelSpec
    from ray_soup.task.transformers_models import load_config, task_of

    parsed = ModelSpec.parse(spec)
    if parsed.library != "transformers":
        return False
    return task_of(load_config(parsed.import_library(), parsed), parsed) == "ForSequenceClassification"


def recorded(measures: Measures) -> dict[str, Any]:
    """Return what run.json says about the objective, for `measures_in`."""
    found = {"objective": measures.objective, "unit": measures.unit, "select_by": measures.select_by}
    found |= {"inputs": measures.inputs} if measures.inputs != "images" else {}
    found |= {"dtype": measures.dtype} if measures.dtype != "float32" else {}
    return found | ({"loss": measures.own_loss} if measures.own_loss else {})

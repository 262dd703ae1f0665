"""The inputs of a run: its ingredients, checked against each other and bound to the model's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.adapters import AdapterIngredient, adapters_among
from ray_soup.io.binding import Ignored
from ray_soup.io.check import check_floats
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.io.lifting import group_of
from ray_soup.mixing.blocks import Layout, partition
from ray_soup.mixing.buffers import check_buffers, differing_layers
from ray_soup.recipe import RESERVED_NAMES, Recipe
from ray_soup.recipe.plain import shown
from ray_soup.soups.granularity import resolved_blocks
from ray_soup.soups.polish_checks import check_polish
from ray_soup.soups.start import Start, open_start
from ray_soup.soups.trajectory import check_trajectory, steps_of
from ray_soup.task.adapters import lift
from ray_soup.task.loader_names import check_named
from ray_soup.task.model_spec import in_bfloat16
from ray_soup.task.models import objective_in
from ray_soup.task.other_models import advice_for
from ray_soup.task.own_functions import check_functions, objective_of
from ray_soup.task.preprocessing import Examined, completed, examine
from ray_soup.task.tokenized import check_data

CALIBRATION = 10_000  # maximum number of examples of fit for the running statistics of a finished soup
CALIBRATION_WHILE_CHOOSING = 512  # the same while learning and for greedy candidates


@dataclass(frozen=True)
class Inputs:
    """The ingredients of a run, checked against each other and bound to the model's layout. Immutable."""

    ingredients: tuple[Ingredient, ...]
    layout: Layout
    notes: tuple[str, ...] = ()
    """Notes for the user about how the ingredients were trained."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """How examples are preprocessed, for run.json."""
    frozen: int = 0
    """Bytes that an actor holds of the base, if the ingredients are adapters."""
    start: Start | None = None
    """The finished soup that learning begins from."""
    adopted: dict[str, str] = field(default_factory=dict)
    """The options of the model that the recipe does not state, with the values that files of the ingredients do."""

    @property
    def held(self) -> tuple[int, int]:
        """What an actor holds, for estimates of its memory: parameters, and directions of each."""
        if not self.frozen:
            return self.layout.numel, len(self.ingredients)
        return self.frozen // 16 + self.layout.numel * 5 // 4, 0  # the base, and 20 bytes per element of any adapters

    @property
    def started(self) -> dict[str, Any]:
        """What a folder that is started records beside the recipe and the ingredients."""
        start = {} if self.start is None else {"start": self.start.digest}
        return {**start, **({"adopted": self.adopted} if self.adopted else {})}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the ingredients, in order."""
        return tuple(ingredient.name for ingredient in self.ingredients)

    @cached_property
    def steps(self) -> tuple[int, ...] | None:
        """The step of each ingredient, if they are different steps of one training run; otherwise None."""
        return steps_of(self.ingredients)

    @property
    def unit_of_steps(self) -> str:
        """What a step of a run is called: step or epoch."""
        first = self.ingredients[0].step
        return "step" if first is None else first.unit

    @property
    def everything(self) -> tuple[int, ...]:
        """The positions of all ingredients."""
        return tuple(range(len(self.ingredients)))

    @cached_property
    def differing_layers(self) -> tuple[str, ...]:
        """The layers whose running statistics differ between ingredients; the other BatchNorm layers were frozen."""
        return differing_layers(self.ingredients, self.layout.tracking, self.layout.buffers)

    def recalibrated(self, recipe: Recipe) -> tuple[str, ...]:
        """Return the layers whose running statistics are re-estimated on fit for every soup instead of averaged."""
        if recipe.data.fit is None or recipe.buffers not in ("auto", "recalibrate"):
            return ()
        return self.layout.tracking if recipe.buffers == "recalibrate" else self.differing_layers


def open_inputs(recipe: Recipe, needs_fit: bool = False) -> Inputs:
    """Open the ingredients, check them, and bind them to the model; reads headers and buffers only.

    Raises RecipeError if the recipe lacks data or ingredients, IngredientError if the ingredients do not fit together.
    """
    if recipe.data.fit is None and (needs_fit or recipe.info.needs_data):
        raise RecipeError(
            "The recipe has no data.fit, the held-out data to learn on. Add it, as in data: {fit: heldout.npz}."
        )
    if recipe.data.fit is None and recipe.buffers == "recalibrate":
        raise RecipeError("buffers: recalibrate needs data.fit, held-out data to estimate running statistics on. Add it.")
    check_functions(recipe)
    of_model = objective_in(recipe.model)
    check_data(recipe.data, objective_of(recipe, of_model).targets, of_model)
    of_runs: list[str] = []
    found = open_ingredients(recipe.ingredients, RESERVED_NAMES, of_runs)
    check_trajectory(recipe, found)
    examined = examine(recipe, found)
    recipe = completed(recipe, examined.adopted)
    layout, notes = examined.layout, [*of_runs, *examined.notes]
    adapters = adapters_among(found)
    check_polish(recipe, [adapter.path for adapter in adapters])
    if adapters and recipe.out_format != "safetensors":
        raise RecipeError(
            f"out_format is {recipe.out_format}, but the ingredients are LoRA adapters, such as {adapters[0].path}; PEFT "
            "loads safetensors. Remove the key."
        )
    if adapters:
        return _adapter_inputs(recipe, adapters, notes, examined)
    for key, value in recipe.adapter:
        if value:
            raise RecipeError(
                f"adapter.{key} is {shown(value)}, but the ingredients are whole models, such as {found[0].path}; the key "
                "is for LoRA adapters. Remove it."
            )
    ignore: Ignored = (*recipe.ignore, *layout.in_files.unsaved)
    layout, ingredients = check_named(layout, found, ignore, advice_for(recipe.model))
    check_floats(ingredients, layout.names)
    if needs_fit or not recipe.info.is_reference:
        notes += check_buffers(ingredients, layout.other_buffers, layout.owners, recipe.buffers)
    start = open_start(recipe, layout)
    return Inputs(
        tuple(ingredients), layout, tuple(notes), examined.preprocessing, start=start, adopted=examined.adopted
    )  # fmt: skip


def _adapter_inputs(
    recipe: Recipe, adapters: Sequence[AdapterIngredient], notes: Sequence[str], examined: Examined
) -> Inputs:
    """Lift adapters to ingredients of one model."""
    from ray_soup.mixing.adapter_store import check_not_cut
    from ray_soup.task.merged_models import check_merged

    ingredients, layout, more = lift(recipe.model, adapters, recipe.ignore)
    check_not_cut(partition(layout, resolved_blocks(recipe.blocks, layout, len(ingredients), 0, cuttable=False)))
    check_floats(ingredients, layout.names)
    group = group_of(ingredients)
    if group is not None and recipe.adapter.merge:
        check_merged(recipe.model, group)
    size = 2 if in_bfloat16(recipe.model) else 4
    frozen = 0 if group is None else size * sum(info.numel for info in group.base.tensors.values())
    start = open_start(recipe, layout)
    return Inputs(tuple(ingredients), layout, (*notes, *more), examined.preprocessing, frozen, start, examined.adopted)

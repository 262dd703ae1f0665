"""A mixture: the coefficients of a soup with their names, and how they were found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.bake import as_tensor, soup_range, written_dtype
from ray_soup.mixing.blocks import Layout, Partition, partition
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.mixing.spectral import singular_vectors
from ray_soup.recipe import Recipe
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.trajectory import order_of


class Subset(Protocol):
    """The ingredients that go into a soup: of a run, or of a method's session."""

    @property
    def recipe(self) -> Recipe:
        """The recipe of the soup."""

    @property
    def inputs(self) -> Inputs:
        """The ingredients of the run."""

    @property
    def subset(self) -> tuple[int, ...]:
        """Those that may go into the soup, by position."""


@dataclass
class Mixture:
    """The coefficients of a soup, and how they were found."""

    coefficients: Coefficients
    figures: dict[str, Any] = field(default_factory=dict)
    """Keys for run.json: steps, image_passes, curve and others."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one sentence or more each."""
    before: Coefficients | None = None
    """The coefficients before a refit on fit and select: figures on select are theirs."""


def mean_of(kept: Sequence[int], ingredients: int) -> np.ndarray:
    """Return the coefficients, float64 [K, 1], of the plain mean of the ingredients `kept`."""
    values = np.zeros((ingredients, 1))
    values[list(kept)] = 1 / len(kept)
    return values


def coefficients_of(session: Subset, values: np.ndarray, blocks: Partition, **options: Any) -> Coefficients:
    """Attach the names of ingredients, blocks and tensors to the coefficients `values`, float64 [K, B]."""
    layout = session.inputs.layout
    block_of = dict(zip(layout.names, blocks.block.tolist(), strict=True))
    cuts = {layout.names[tensor]: elements for tensor, elements in blocks.cuts.items()}
    names = tuple(session.inputs.names[k] for k in session.subset)
    policy = buffer_policy(session.recipe)
    made = Coefficients(values, names, blocks.names, block_of, policy, layout.tied, cuts=cuts, **options)
    return with_computed_buffers(made, [session.inputs.ingredients[k] for k in session.subset], layout, session.recipe)


def mean_coefficients(recipe: Recipe, inputs: Inputs, kept: Sequence[int]) -> Coefficients:
    """Return the coefficients of the plain mean of the ingredients `kept`, which needs no actors."""
    layout = inputs.layout
    whole = partition(layout, "model")
    block_of = dict.fromkeys(layout.names, 0)
    values = mean_of(kept, len(inputs.ingredients))
    made = Coefficients(values, inputs.names, whole.names, block_of, buffer_policy(recipe), layout.tied)
    return with_computed_buffers(made, inputs.ingredients, layout, recipe)


def with_computed_buffers(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], layout: Layout, recipe: Recipe
) -> Coefficients:
    """Add the buffers that are functions of the soup's weights: the singular vectors of spectral normalization.

    A soup of one ingredient keeps that ingredient's buffers.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: its K ingredients.
        layout: the layout of the model.
        recipe: the recipe, for the dtype of the soup.
    """
    if len(coefficients.used()) < 2:
        return coefficients
    found: Statistics = {}
    shapes = layout.state_shapes
    for norm in layout.spectral:
        name = layout.tied.get(norm.weight, norm.weight)
        dtype = written_dtype(ingredients, name, recipe.out_dtype)
        weight = soup_range(coefficients, ingredients, name, 0, math.prod(shapes[name]), dtype)
        vectors = singular_vectors(as_tensor(weight).view(shapes[name]), norm.dim)
        found |= {key: vector.astype(np.float32) for key, vector in zip((norm.u, norm.v), vectors, strict=True)}
    return replace(coefficients, statistics=coefficients.statistics | found)


def buffer_policy(recipe: Recipe) -> str:
    """Return how buffers are mixed, apart from those that are re-estimated."""
    return "first" if recipe.buffers == "first" else "average"


def order_in(session: Subset) -> list[int]:
    """Return the positions in the subset, ordered by step."""
    return order_of([session.inputs.ingredients[k] for k in session.subset])

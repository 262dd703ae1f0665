"""A soup whose model is written, but not yet described; how one is made without data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.io.progress import ProgressCallback
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe
from ray_soup.soups.baking import all_of, bakers
from ray_soup.soups.baseline import NOTHING_TO_COMPARE_WITH, Baseline
from ray_soup.soups.inputs import Inputs
from ray_soup.soups.make import make_without_data
from ray_soup.soups.methods.results import Model
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import MODEL, Output
from ray_soup.soups.write import bake_model
from ray_soup.task.outcomes import Outcome


@dataclass
class WrittenSoup:
    """A soup whose model is in the staging folder, with its results."""

    mixture: Mixture | Model
    row: dict[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    record: dict[str, Any] = field(default_factory=dict)
    sha256: list[str] = field(default_factory=list)
    shown: dict[str, Outcome] = field(default_factory=dict)
    """Outcomes for the reliability diagram, by method."""
    similarity: np.ndarray | None = None
    """Cosines of the directions, float64 [K, K]."""

    @property
    def coefficients(self) -> Coefficients | None:
        """The coefficients; None if the model is no weighted sum of the ingredients."""
        return self.mixture.coefficients if isinstance(self.mixture, Mixture) else None


def make_without_actors(
    recipe: Recipe, inputs: Inputs, output: Output, staging: Path, progress: ProgressCallback
) -> WrittenSoup:
    """Make the soup of a recipe without data: no actor builds the model, and nothing is evaluated."""
    mixture, sha256 = make_without_data(recipe, inputs, progress), list[str]()
    if isinstance(mixture, Model):
        mixture.write(staging / MODEL)
    else:
        with bakers(recipe, inputs.ingredients, output, progress) as pool:
            writers = all_of(pool, inputs.ingredients, output)
            mixture.notes += bake_model(staging, recipe, mixture.coefficients, inputs.ingredients, progress, writers)
            sha256 = [] if pool is None else pool.hash(progress)
    done = "not evaluated" if recipe.evaluate is None else f"evaluated by {recipe.evaluate} alone"
    note = f"The recipe has no data: this soup was {done}. {NOTHING_TO_COMPARE_WITH}"
    mixture.notes.insert(0, note)
    return WrittenSoup(mixture, sha256=sha256)

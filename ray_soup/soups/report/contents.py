"""What a report shows: the results of a run, and the tables and figures that the page is made of."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.tables import Row, Table
from ray_soup.task.outcomes import Outcome, judged


@dataclass(frozen=True)
class Report:
    """Everything that a report shows; empty parts are left out."""

    title: str
    """The heading of the page."""
    recipe: Recipe
    """The recipe as run."""
    rows: Sequence[Row]
    """The rows of the main table."""
    record: Mapping[str, Any]
    """run.json."""
    coefficients: Mapping[str, Coefficients] = field(default_factory=dict)
    """Learned coefficients, by the soup's label."""
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Learning curves, by the soup's label."""
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes on the first test set (on select if there is none), by the model's label: for the reliability diagram, and
    for intervals where no paired tests were made."""
    similarity: np.ndarray | None = None
    """Cosines of the ingredients' directions, float64 [K, K]."""
    steps: Sequence[int] | None = None
    """The step of each ingredient, if they are steps of one run."""
    weighted: Mapping[str, Coefficients] = field(default_factory=dict)
    """Coefficients to draw against the steps, by the soup's label."""
    unit: str = "step"
    """What a step is called."""

    @property
    def splits(self) -> list[str]:
        """The test sets, or select if there is none."""
        return judged(self.record.get("examples", {}))

    @property
    def measures(self) -> Measures:
        """What the figures are called."""
        return measures_in(self.record)


@dataclass(frozen=True)
class Section:
    """A table below the main one, with its heading and legend."""

    title: str
    """The heading."""
    table: Table
    """Headings and cells."""
    text: str
    """The legend; may be empty."""


@dataclass(frozen=True)
class Plot:
    """A figure with its title, its caption and its numbers."""

    title: str
    """The title above the figure."""
    text: str
    """The caption below it: one sentence that says what it shows, then the meaning of its marks."""
    svg: str
    """The drawing."""
    numbers: Table | None = None
    """What is drawn, as a table; None if a table of the page has it."""
    wide: bool = False
    """Whether the figure takes the width of the page."""

    @property
    def source(self) -> str:
        """The drawing as a data URI, which needs no escaping."""
        from markupsafe import Markup

        return Markup("data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode())

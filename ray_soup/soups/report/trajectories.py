"""Figures of soups of the steps of one run: weight against step, and the decay of the learning rate that it amounts to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ray_soup.mixing.blocks import layer_of
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.schedules import decay_of
from ray_soup.soups.report.figures import BLUE, GREY, ORANGE, drawn
from ray_soup.soups.report.text import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Which {unit}s each soup uses, and the decay of the learning rate that it amounts to. Above: the weight of each {unit}. "
    "Below: the sum of the weights from each {unit} on, a factor on the updates that led to it. Thick: mean over blocks; "
    "thin: the layers of the model."
)
MOST_LAYERS = 64
"""Thin lines that can still be told from a grey area."""


def blocks_by_layer(coefficients: Coefficients) -> dict[str, list[int]]:
    """Return the blocks of each layer of the model, in the model's order."""
    blocks: dict[str, set[int]] = {}
    for tensor in coefficients.block_of:
        for block in coefficients.blocks_of(tensor):
            blocks.setdefault(layer_of(tensor), set()).add(block)
    return {layer: sorted(some) for layer, some in blocks.items()}


def by_layer(coefficients: Coefficients) -> np.ndarray:
    """Return the mean coefficient over the blocks of each layer, float64 [K, layers]; no layers if there is one block."""
    if coefficients.values.shape[1] < 2:
        return np.zeros((len(coefficients.values), 0))
    columns = [coefficients.values[:, some].mean(axis=1) for some in blocks_by_layer(coefficients).values()]
    return np.stack(columns, axis=1)


def weights_by_step(soups: Mapping[str, Coefficients], steps: Sequence[int], unit: str) -> str:
    """Draw the weights of each soup against the steps, and the decay of the learning rate below them.

    Args:
        soups: coefficients by the soup's label.
        steps: the step of each ingredient.
        unit: what a step is called.
    """
    rows = -(-len(soups) // 2)
    order, ticks = np.argsort(steps), np.sort(steps)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2 * rows, min(2, len(soups)), squeeze=False, sharex=True, height_ratios=[3, 2] * rows)
        for axes in grid.ravel():
            axes.set_visible(False)
        for number, (name, soup) in enumerate(soups.items()):
            above, below = grid[2 * (number // 2) : 2 * (number // 2) + 2, number % 2]
            for axes in (above, below):
                axes.set_visible(True)
                axes.axhline(0, color=GREY, linewidth=0.5)
            means, layers = soup.values.mean(axis=1)[order], by_layer(soup)[order]
            _draw_lines(above, ticks, means, layers[:, :MOST_LAYERS], BLUE, "default")
            _draw_lines(below, ticks, decay_of(means), decay_of(layers[:, :MOST_LAYERS]), ORANGE, "steps-pre")
            above.set_title(label(name))
            below.tick_params(labelbottom=True)
            if number % 2 == 0:
                above.set_ylabel("weight")
                below.set_ylabel("factor on rate")
            below.set_xlabel(unit)

    return drawn(0.2 + 2.9 * rows, draw)


def _draw_lines(axes: Axes, steps: np.ndarray, means: np.ndarray, layers: np.ndarray, color: str, style: str) -> None:
    """Draw float64 [K] as a thick line, and float64 [K, layers] as thin ones, against int64 [K]."""
    for column in layers.T:
        axes.plot(steps, column, color=GREY, linewidth=0.5, alpha=0.6, drawstyle=style)
    marker = "o" if style == "default" else None
    axes.plot(steps, means, color=color, linewidth=2, marker=marker, markersize=4, drawstyle=style)

"""The coefficients of a soup by ingredient and layer, beside the hyperparameters that the ingredients were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.soups.report.figures import DIVERGING, drawn, label_ingredients
from ray_soup.soups.report.settings import Settings, shown_value
from ray_soup.soups.report.tables import Table
from ray_soup.soups.report.text import label, shortened
from ray_soup.soups.report.trajectories import blocks_by_layer, by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.5
"""Width of the heat map in inches; it takes the width of the page."""
MOST_SETTINGS = 6
"""Hyperparameters beside a heat map; the table of ingredients has all of them."""
MOST_ROWS = 36
"""Rows that are high enough for a line of text."""
MAP = "cividis"


def heat_map(coefficients: Coefficients, settings: Settings) -> str:
    """Draw a soup's coefficients, float64 [K, layers], with one column beside them for each of `settings`.

    Rows are sorted by their mean coefficient, largest first; the middle of the color scale is 1/K.
    """
    from matplotlib.colors import TwoSlopeNorm

    order = np.argsort(-coefficients.shares(), kind="stable")
    values, count = by_layer(coefficients)[order], len(order)
    reach = max(float(np.abs(values - 1 / count).max()), 1e-6)
    norm = TwoSlopeNorm(1 / count, 1 / count - reach, 1 / count + reach)
    beside, height = _first(settings), 2.1 + min(0.22 * count, 9)

    def draw(figure: Figure) -> None:
        ratios = [12, *([0.4 + 1.1 * len(beside)] if beside else [])]
        axes, *others = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios, sharey=True)[0]
        image = axes.imshow(values, aspect="auto", cmap=DIVERGING, norm=norm, interpolation="nearest")
        ticks = [norm.vmin or 0, 1 / count, norm.vmax or 0]
        bar = figure.colorbar(image, ax=axes, location="top", ticks=ticks, fraction=0.12 / height, pad=0.06 / height)
        bar.ax.set_xticklabels([f"{ticks[0]:.2f}", f"1/{count}", f"{ticks[2]:.2f}"])
        bar.set_label("mean coefficient of a layer")
        label_ingredients(axes, [coefficients.ingredients[k] for k in order], MOST_ROWS)
        axes.set_ylabel("ingredient, by mean coefficient")
        axes.set_xlabel("layer, from the input to the output")
        layers = values.shape[1]
        every = -(-layers // 24)
        axes.set_xticks(range(0, layers, every), [str(n + 1) for n in range(0, layers, every)])
        axes.spines[:].set_visible(False)
        for some in others:
            _draw_settings(some, {name: [column[k] for k in order] for name, column in beside.items()})

    return drawn(height, draw, WIDTH)


def _first(settings: Settings) -> dict[str, Sequence[Any]]:
    return dict(list(settings.items())[:MOST_SETTINGS])


def _draw_settings(axes: Axes, settings: Mapping[str, Sequence[Any]]) -> None:
    """Draw a column of colored cells for each hyperparameter, with its values as text if there is room."""
    from matplotlib import colormaps

    places = np.stack([place(column) for column in settings.values()], axis=1)
    axes.imshow(places, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    if len(places) <= MOST_ROWS:
        for n, column in enumerate(settings.values()):
            for row, value in enumerate(column):
                dark = colormaps[MAP](float(places[row, n]))[1] < 0.5
                text = shortened(label(shown_value(value)), 10)
                axes.text(n, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    names = [shortened(label(name), 18) for name in settings]
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axes.tick_params(left=False, labelleft=False)
    axes.set_title("hyperparameters")
    axes.spines[:].set_visible(False)


def place(column: Sequence[Any]) -> np.ndarray:
    """Return the place of each value among the distinct ones, float64 [K] from 0 (smallest) to 1."""
    numbers = all(isinstance(value, (int, float)) for value in column)
    distinct = sorted(set(column) if numbers else {str(value) for value in column})
    where = {value: n / max(1, len(distinct) - 1) for n, value in enumerate(distinct)}
    return np.array([where[value if numbers else str(value)] for value in column])


def caption(coefficients: Coefficients, settings: Settings) -> str:
    """Say what the heat map shows: what its rows, columns and colors are, and which settings of the sweep the soup used."""
    layers, shares = list(blocks_by_layer(coefficients)), coefficients.shares()
    text = (
        f"How much each ingredient counts in each of the {len(layers)} layers ({layers[0]} to {layers[-1]}), on average "
        "over the blocks of a layer: orange is above 1/K, the uniform soup, and purple below."
    )
    settings = _first(settings)
    if not settings:
        return text
    most, least = int(shares.argmax()), int(shares.argmin())
    trained = [", ".join(f"{name} {shown_value(column[k])}" for name, column in settings.items()) for k in (most, least)]
    text += (
        " Beside it: hyperparameters that differ between ingredients, from the smallest (blue) to the largest (yellow). "
        f"Largest mean coefficient: {shares[most]:.3f} ({trained[0]}); smallest: {shares[least]:.3f} ({trained[1]})."
    )
    found = [(name, rank_correlation(place(column), shares)) for name, column in settings.items() if _is_numeric(column)]
    if found:
        text += f" Rank correlation of the mean coefficient with {', '.join(f'{name}: {r:+.2f}' for name, r in found)}."
    return text


def _is_numeric(column: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in column)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Compute Spearman's rank correlation of float64 [K] each; 0 if one of them is constant."""
    from scipy.stats import rankdata

    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (first, second))
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def numbers(coefficients: Coefficients) -> Table:
    """Return what the heat map shows as a table, with a row per ingredient."""
    head = ["ingredient", *blocks_by_layer(coefficients)]
    cells = [[f"{value:.4f}" for value in line] for line in by_layer(coefficients)]
    return head, [[name, *line] for name, line in zip(coefficients.ingredients, cells, strict=True)]

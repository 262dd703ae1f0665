"""Figures of a report, each as an SVG: legible at the width of a phone and without color vision.

Matplotlib takes a third of a second to import, so this is done once there is something to draw.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.report.statistics import accuracy_interval
from ray_soup.soups.report.tables import Row, is_reference
from ray_soup.soups.report.text import label, one_line, shortened
from ray_soup.task.choices import cost_in
from ray_soup.task.outcomes import Outcome, calibration_error, reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
"""Colors that also differ in lightness; marker and line style differ too."""
DIVERGING = "PuOr_r"
WIDTH = 3.9
"""Width of a figure in inches: that of a phone, of a third of a desktop's page, and of half a sheet of paper."""
LABEL = 20
"""Characters of the longest label of a row."""


def drawn(height: float, draw: Callable[[Figure], None], width: float = WIDTH) -> str:
    """Return the SVG of a figure that `draw` fills; its background is transparent.

    Args:
        height: height of the figure in inches.
        draw: adds axes and their content to an empty figure.
        width: width of the figure in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "svg.fonttype": "none",
            "text.parse_math": False,  # a $ in a name is a $
            "text.usetex": False,
            "svg.hashsalt": "ray_soup",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # the browser has the font
            figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    return file.getvalue()


def panels(figure: Figure, labels: Sequence[str], columns: int = 2, **options: Any) -> list[Axes]:
    """Add axes to a figure, row by row, one for each label, with the label as its title.

    Args:
        figure: the figure to add to.
        labels: titles of the axes.
        columns: axes in a row.
        **options: passed on to `Figure.subplots`.
    """
    rows = -(-len(labels) // columns)
    grid = figure.subplots(rows, min(columns, len(labels)), squeeze=False, **options).ravel()
    for axes in grid[len(labels) :]:
        axes.set_visible(False)
    for axes, name in zip(grid, labels, strict=False):
        axes.set_title(shortened(label(name), 2 * LABEL // min(columns, len(labels))))
        axes.locator_params(nbins=4)
    return list(grid[: len(labels)])


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers; matplotlib's own labels are TeX."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def by_method(
    rows: Sequence[Row], key: str, axis_label: str, intervals: Mapping[str, tuple[float, float]], percent: bool
) -> str:
    """Draw a figure of each row with its 95 % interval, and that of the best single ingredient as a dotted line.

    Args:
        rows: rows of the results table; those without this figure are skipped.
        key: the figure, as in `test_accuracy`.
        axis_label: what the axis shows.
        intervals: the ends of the intervals, by the name of the row; a row without one is a mere point.
        percent: True to draw shares in percent.
    """
    shown, scale = [row for row in rows if row.get(key) is not None], 100 if percent else 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(reversed(shown)):
            name, value = row["model_name"], scale * row[key]
            soup = not is_reference(name)
            if name in intervals:
                low, high = intervals[name]
                axes.plot([scale * low, scale * high], [place, place], color=BLUE if soup else GREY, linewidth=2)
            axes.plot([value], [place], "o" if soup else "D", color=BLUE if soup else GREY)
            if name == BEST_SINGLE:
                axes.axvline(value, color=GREY, linewidth=1, linestyle=":")
        axes.set_yticks(range(len(shown)), [shortened(label(row["model_name"]), LABEL) for row in reversed(shown)])
        axes.set_xlabel(axis_label)

    return drawn(0.8 + 0.3 * len(shown), draw)


def wilson(rows: Sequence[Row], key: str, count: int) -> dict[str, tuple[float, float]]:
    """Return the 95 % Wilson interval of each row's accuracy over `count` examples, by the name of the row."""
    return {row["model_name"]: accuracy_interval(round(row[key] * count), count) for row in rows if key in row}


def label_ingredients(axes: Axes, names: Sequence[str], most: int) -> None:
    """Label the y axis with ingredients, at most `most` of them, evenly spaced."""
    every = max(1, -(-len(names) // most))
    axes.set_yticks(range(0, len(names), every), [shortened(one_line(name), 18) for name in names[::every]], fontsize=8)


def draw_histogram(axes: Axes, values: np.ndarray) -> None:
    """Draw a histogram of float64 [n] with hatched bars for negative values; no bar holds values of both signs."""
    edges = histogram_edges(values)
    axes.hist(values, bins=edges.tolist(), color=BLUE)
    for bar, edge in zip(axes.patches, edges, strict=False):
        if edge < 0:
            bar.set(facecolor=ORANGE, hatch="////", edgecolor="white", linewidth=0)


def histogram_edges(values: np.ndarray) -> np.ndarray:
    """Return equidistant edges of about 8 to 30 bins around float64 [n]; if values have both signs, 0 is an edge."""
    low, high = float(values.min()), float(values.max())
    width = (high - low) / min(30, max(8, len(values) // 8)) or max(abs(low), 1.0) / 8
    first, last = math.floor(low / width), math.floor(high / width) + 1  # a bin contains its left edge
    return np.arange(first, last + 1) * width


def distribution(coefficients: Mapping[str, Coefficients]) -> str:
    """Draw a histogram of each soup's coefficients, titled with the share of negative ones."""

    def draw(figure: Figure) -> None:
        for axes, (name, c) in zip(panels(figure, list(coefficients)), coefficients.items(), strict=True):
            draw_histogram(axes, c.values.ravel())
            axes.axvline(1 / len(c.values), color="black", linewidth=1, linestyle=":")
            axes.set_title(f"{shortened(label(name), LABEL)}: {np.mean(c.values < 0):.0%} < 0")
            axes.locator_params(nbins=4)
            axes.set_xlabel("coefficient")
            axes.set_ylabel("number")

    return drawn(0.4 + 1.7 * -(-len(coefficients) // 2), draw)


def learning_curves(curves: Mapping[str, list[dict[str, Any]]], loss: str = "NLL", select_by: str = "auto") -> str:
    """Draw the loss on fit and select by step for each soup, with a ring at the point that was kept.

    Lines are interrupted where a model batch ends. `select_by` is the recipe key.
    """

    def draw(figure: Figure) -> None:
        for axes, (_, curve) in zip(panels(figure, list(curves)), curves.items(), strict=True):
            for key, color, style, name in (("fit_nll", ORANGE, "s--", "fit"), ("select_nll", BLUE, "o-", "select")):
                for turn, points in itertools.groupby(curve, lambda p: p["turn"]):
                    some = [p for p in points if key in p]
                    xy = ([p["steps"] for p in some], [p[key] for p in some])
                    axes.plot(*xy, style, color=color, markersize=4, label=name if not turn else None)
            best = min(curve, key=lambda p: cost_in(p, select_by))
            axes.plot(
                [best["steps"]], [best["select_nll"]], "o", markersize=11, fillstyle="none", color="black", clip_on=False
            )
            axes.set_xlabel("optimizer steps")
            axes.set_ylabel(loss)
        figure.axes[0].legend(frameon=False, fontsize=8)

    return drawn(0.4 + 1.9 * -(-len(curves) // 2), draw)


def by_count(rows: Sequence[Row], key: str, axis_label: str, percent: bool) -> str:
    """Draw a figure such as `test_accuracy` against the number of ingredients, one line for each method."""
    styles, scale = itertools.cycle(((BLUE, "o-"), (ORANGE, "s--"), (GREY, "^:"))), 100 if percent else 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for method in dict.fromkeys(row["model_name"] for row in rows):
            points = sorted((r["count"], scale * r[key]) for r in rows if r["model_name"] == method)
            color, style = next(styles)
            axes.plot(*zip(*points, strict=True), style, color=color, label=label(method))
        axes.set_xticks(sorted({row["count"] for row in rows}))
        axes.set_xlabel("number of ingredients")
        axes.set_ylabel(axis_label)
        axes.legend(frameon=False)

    return drawn(3.0, draw)


def on_plane(trials: Sequence[Row], key: str) -> list[Row]:
    """Return the trials that `search_plane` draws: those with the figure `key`, and a number for a learning rate."""
    return [t for t in trials if t.get(key) is not None and t.get("learn.lr") != "auto"]


def search_plane(trials: Sequence[Row], key: str = "select_nll") -> str:
    """Draw the trials of a search by learning rate and model batch; size and color show the figure `key`.

    At least one of them must be `on_plane`.
    """
    shown = on_plane(trials, key)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        value = np.array([t[key] for t in shown])
        cost = value if key == "select_nll" else -value
        good = 1 - (cost - cost.min()) / max(float(np.ptp(cost)), 1e-12)
        x, y = [t["learn.lr"] for t in shown], [t["learn.model_batch"] for t in shown]
        axes.scatter(x, y, s=20 + 160 * good, c=good, cmap="cividis_r", vmin=-0.2, edgecolors="black", linewidths=0.5)
        best = int(cost.argmin())
        axes.plot([x[best]], [y[best]], "o", markersize=18, fillstyle="none", color="black")
        axes.annotate(f"{value[best]:.4f}", (x[best], y[best]), xytext=(12, 8), textcoords="offset points")
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_yticks(sorted(set(y)))
        axes.margins(0.15)
        axes.set_xlabel("learning rate (log scale)")
        axes.set_ylabel("model batch (ingredients)")

    return drawn(3.0, draw)


def similarity(cosines: np.ndarray, names: Sequence[str], duplicates: Sequence[tuple[int, int]]) -> str:
    """Draw the cosines of the ingredients' directions as a heat map.

    Args:
        cosines: float64 [K, K].
        names: the K ingredients.
        duplicates: pairs (j, k) to mark with a cross.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(cosines, aspect="auto", cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, ticks=[-1, 0, 1], shrink=0.8)
        bar.set_label("cosine")
        for pair in duplicates:
            axes.plot(*zip(pair, pair[::-1], strict=True), "x", color="black", markersize=7, linestyle="none")
        label_ingredients(axes, names, 18)
        axes.set_xticks([])
        axes.set_xlabel("ingredient, in the same order")
        axes.set_ylabel("ingredient")
        axes.spines[:].set_visible(False)

    return drawn(3.6, draw)


def reliability_diagram(outcomes: Mapping[str, Outcome]) -> str:
    """Draw accuracy against confidence in bins, with the examples in each bin below, one column for each model.

    Source: Guo et al. 2017, "On calibration of modern neural networks".
    """

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(outcomes), squeeze=False, sharex=True, height_ratios=[3, 1])
        for (top, bottom), (name, outcome) in zip(grid.T, outcomes.items(), strict=True):
            bins = reliability(outcome)
            confidence, accuracy = ([100 * b[key] for b in bins] for key in ("confidence", "accuracy"))
            top.plot([0, 100], [0, 100], ":", color="black", linewidth=1)
            top.plot(confidence, accuracy, "o-", color=BLUE, markersize=4)
            top.set_title(f"{shortened(label(name), LABEL)}\nECE {calibration_error(outcome):.3f}")
            bottom.bar(confidence, [b["count"] for b in bins], width=5, color=GREY)
            bottom.set_yscale("log")
            plain_ticks(bottom.yaxis)
            bottom.set_xlabel("confidence, %")
        grid[0, 0].set_ylabel("accuracy, %")
        grid[1, 0].set_ylabel("examples")

    return drawn(3.4, draw)

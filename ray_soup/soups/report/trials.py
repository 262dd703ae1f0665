"""Tables of the trials of a search, and their legends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_soup.soups.report.measures import Measures
from ray_soup.soups.report.tables import Table, table

TRIALS_LEGEND = (
    "Trial 0 is the unchanged recipe. Figures on select are those at the stopping point, and are optimistic; test was not "
    "used."
)


def trials_table(search: Mapping[str, Any], which: str, measures: Measures = Measures()) -> Table:
    """Format the `trials` of a search, or its `pareto` front."""
    keys = [(key, key.rpartition(".")[2], "{:.4g}") for key in search["keys"]]
    loss = "loss" if measures.own_loss else measures.loss_heading
    figures = [
        ("select_nll", f"select {loss}", f"{{:{measures.loss_format}}}"),
        ("select_accuracy", f"select {measures.accuracy_heading}", "{:.2f}"),
        ("select_metric", "select metric", "{:.4f}"),
    ]
    costs = [
        ("seconds", "seconds", "{:.1f}"),
        ("peak_memory_bytes", "peak MB", "{:,.0f}"),
        ("percent", "done %", "{:.0f}"),
        ("error", "error", "{}"),
    ]
    return table(search[which], [("trial", "trial", "{}"), *keys, *figures, *costs])


def searched_for(search: Mapping[str, Any], measures: Measures) -> str:
    """Return the name of the figure that a search optimized."""
    figure = search["metric"].removeprefix("select_")
    return measures.learned if figure == "nll" else measures.name_of(figure)


def pareto_legend(search: Mapping[str, Any], measures: Measures = Measures()) -> str:
    """Return the legend of the Pareto front of a search."""
    return f"Trials that no other trial beats in {searched_for(search, measures)}, memory and time at once."

"""The last lines of a command: what was made, how good it is, and how to load it. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_soup.recipe import BEST_SINGLE
from ray_soup.soups.report.measures import measures_in
from ray_soup.soups.report.tables import titled

Row = Mapping[str, Any]


def what_was_made(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return a sentence about the model in OUT, from run.json and its row, the first one."""
    count, used = len(record.get("ingredients", ())), rows[0].get("ingredients_used", 0) if rows else 0
    return f"Made by {_name(record)}{f' from {used:.0f} of {count} ingredients' if count and used else ''}."


def how_good(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return a sentence that compares the model with the best single ingredient, on test if there is test data.

    Empty if they were not compared.

    Args:
        record: run.json.
        rows: the rows of the model and of the best single ingredient.
    """
    measures, on_select = measures_in(record), record.get("improvement", {})
    tests = [t for t in record.get("tests", ()) if (t["model_name"], t["against"]) == (_name(record), BEST_SINGLE)]
    change = tests[0] if tests else {key.removeprefix("select_"): value for key, value in on_select.items()}
    split = tests[0]["split"] if tests else "select"
    decisive = measures.select_by if measures.select_by in change else "nll"
    if len(rows) < 2 or f"{decisive}_low" not in change:
        return ""
    difference, low, high = (measures.shown(decisive, change[f"{decisive}{end}"], "+") for end in ("", "_low", "_high"))
    interval = f"difference {difference}, 95 % interval {low} to {high}"
    if len(record.get("seeds", ())) > 1:
        interval = f"means over {len(record['seeds'])} seeds; with the first one, {interval}"
    figures = []
    for figure in dict.fromkeys((decisive, "nll", "accuracy")):
        ours, theirs = (row.get(f"{split}_{figure}") for row in rows[:2])
        if ours is not None and theirs is not None:
            figures.append(
                f"{measures.name_of(figure)} {measures.shown(figure, ours)} against {measures.shown(figure, theirs)}"
            )
            figures[-1] += f" ({interval})" if figure == decisive else ""
    optimistic = "" if tests else " Figures on select are optimistic: choices were made on it."
    return f"On {titled(split)}, it is {_verdict(decisive, change)}: {', '.join(figures)}.{optimistic}"


def how_to_load(record: Mapping[str, Any]) -> list[str]:
    """Return lines that say how to load the model, as its model card does; none if run.json does not know."""
    lines = record.get("load", "").splitlines()
    return ["To load it from its folder:", *(f"    {line}" if line else "" for line in lines)] if lines else []


def _name(record: Mapping[str, Any]) -> str:
    name: str = record["chosen"] if "chosen" in record else record["method"]
    return name


def _verdict(figure: str, change: Mapping[str, float]) -> str:
    """Return the words for a difference between the model and the best single ingredient."""
    low, high = change[f"{figure}_low"], change[f"{figure}_high"]
    if low <= 0 <= high:
        return "not significantly different from the best single ingredient"
    return f"{'better' if (high < 0) == (figure == 'nll') else 'worse'} than the best single ingredient"

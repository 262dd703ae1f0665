"""Tables of results as text and Markdown, and the legends that explain them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_soup.recipe import BEST_SINGLE, METHODS, PEFT_MERGES, TRAINED
from ray_soup.soups.report.measures import Measures, measures_in
from ray_soup.soups.report.text import (
    BEFORE_REFIT,
    BEFORE_REFIT_NOTE,
    OPTIMISTIC,
    OPTIMISTIC_NOTE,
    capital,
    markdown_text,
    number,
)
from ray_soup.task.outcomes import test_sets

Row = Mapping[str, Any]
"""Figures of one model, by the keys of results.jsonl."""
Columns = Sequence[tuple[str, str, str]]
"""Key, heading and format of each column."""
Table = tuple[list[str], list[list[str]]]
"""Headings, and the cells of each row."""

MEAN_SINGLE = "mean single"
"""Name of the row with the mean of the ingredients' own figures; not a model."""
ENSEMBLE = "ensemble"
"""Name of the row of the ensemble of all ingredients; not a soup."""

MODEL = ("model_name", "model", "{}")
COSTS = ("steps", "image_passes", "seconds", "peak_memory_bytes", "ingredients_used")
"""Keys of what it costs to make a soup."""

EVALUATE = "evaluate_"
"""Begins the keys of figures that the recipe's function `evaluate` computed; their names follow."""

FIGURES = ("accuracy", "metric", "nll", "ece", "scaled", "perplexity", "byte", "sd")
"""Last parts of keys such as test_nll that are no score of the recipe's objective."""

REFIT = "refit_steps"
"""Key of a row whose soup was refitted on fit and select: its figures on select are those before the refit."""

UNBIASED = ("uniform", "last", MEAN_SINGLE, ENSEMBLE, *PEFT_MERGES)
"""Rows that nothing was learned or chosen for: their figures are honest on any data that their ingredients did not see."""


def is_reference(name: str) -> bool:
    """Return whether a row of a table is a reference and not a soup: single ingredients and the ensemble."""
    return name in (MEAN_SINGLE, ENSEMBLE, TRAINED) or (name in METHODS and METHODS[name].is_reference)


def splits_of(rows: Iterable[Row]) -> list[str]:
    """Return the splits that the rows have figures for, in order of appearance."""
    figures = (key.rpartition("_") for row in rows for key in row if not key.startswith(EVALUATE))
    return list(dict.fromkeys(split for split, _, figure in figures if figure in ("accuracy", "nll")))


def scores_in(rows: Iterable[Row]) -> list[str]:
    """Return the names of what the objective's `scores` returned, whose means the rows have, as in `test_f1`."""
    rows = list(rows)
    splits = splits_of(rows)
    parts = (key.rpartition("_") for row in rows for key in row if not key.startswith(EVALUATE))
    return list(dict.fromkeys(name for split, _, name in parts if split in splits and name not in FIGURES))


def titled(split: str) -> str:
    """Return a split's name for display: a named test set is called by its name alone."""
    return split.removeprefix("test_")


def quality(rows: Sequence[Row], measures: Measures = Measures()) -> list[tuple[str, str, str]]:
    """Return the columns of model quality in the rows.

    For each split these are accuracy, metric, loss, what follows from it, and the scores of the objective; then come the
    figures of the recipe's function `evaluate`.
    """
    columns, splits = [MODEL], splits_of(rows)
    tests, scores = test_sets(splits), scores_in(rows)
    for split in splits:
        name, one = titled(split), len(tests) < 2
        columns += [
            (f"{split}_accuracy", f"{name} {measures.accuracy_heading}", "{:.2f}"),
            (f"{split}_metric", f"{name} metric", "{:.4f}"),
            (f"{split}_nll", f"{name} {measures.loss_heading}", f"{{:{measures.loss_format}}}"),
            (f"{split}_nll_scaled", "NLL scaled" if one else f"{name} scaled", "{:.4f}"),
        ]
        if split != "select" or not tests:
            columns += [
                (f"{split}_perplexity", "perplexity" if one else f"{name} perplexity", "{:.4g}"),
                (f"{split}_bits_per_byte", "bits/byte" if one else f"{name} bits/byte", "{:.4f}"),
            ]
        columns += [(f"{split}_{score}", f"{name} {score}", "{:.4f}") for score in scores]
    return [*columns, *own_columns(rows)]


def own_columns(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """Return the columns of what the recipe's function `evaluate` computed."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(EVALUATE) and not key.endswith("_sd"))
    return [(key, key.removeprefix(EVALUATE), "{:.4g}") for key in keys]


def steps_table(trajectory: Row, most: int = 20) -> Table:
    """Format the weights of the steps of a run, at most about `most` of them, evenly spaced, from the first one in use.

    The last column is the sum of the weights from a step on: the factor on the learning rate that led to it.
    """
    weights, steps = trajectory["weights"], trajectory["steps"]
    rates = [sum(weights[n:]) for n in range(len(weights))]
    first = next((n for n, weight in enumerate(weights) if weight), 0)
    every = -(-(len(steps) - first) // most)
    shown = range(len(steps) - 1, first - 1, -every)[::-1]
    return (
        [trajectory["unit"], "weight", "learning rate"],
        [[f"{steps[n]:,}", number("{:+.4f}", weights[n]), number("{:.4f}", rates[n])] for n in shown],
    )


def cost(measures: Measures = Measures()) -> list[tuple[str, str, str]]:
    """Return the columns of what it cost to make the models."""
    headings = ("steps", measures.examples, "seconds", "peak MB", "used")
    return list(zip(COSTS, headings, ("{:,.0f}", "{:,.0f}", "{:.1f}", "{:,.0f}", "{:.3g}"), strict=True))


def results_in_parts(rows: Sequence[Row], measures: Measures, several: bool) -> list[tuple[str, Columns]]:
    """Return the columns of the main table under a title; or, if there are several test sets, those of several tables.

    There is one for each figure, with a column for each test set, so that the columns can be compared, and one of the costs.
    """
    columns, own = quality(rows, measures), own_columns(rows)
    if not several:
        return [("Results", [*columns, *cost(measures)])]
    figures = {"accuracy": capital(measures.accuracy), "metric": "Metric", "nll": capital(measures.loss_per_unit),
               "nll_scaled": "NLL scaled", "perplexity": "Perplexity", "bits_per_byte": "Bits per byte",
               **{name: capital(name) for name in scores_in(rows)}}  # fmt: skip
    groups: list[tuple[str, Columns]] = [
        (title, [c for c in columns[1:] if c not in own and c[0].endswith(f"_{figure}")])
        for figure, title in figures.items()
    ]
    groups.append(("Costs", [*own, *cost(measures)]))
    return [(title, [MODEL, *group]) for title, group in groups if any(c[0] in row for row in rows for c in group)]


def table(rows: Sequence[Row], columns: Columns) -> Table:
    """Format rows as text.

    A column that no row has a value for is left out. A value with a standard deviation (`key_sd`) is followed by ± and the
    deviation, and an optimistic one by a mark.
    """
    shown = [c for c in columns if any(row.get(c[0]) is not None for row in rows)]
    return [c[1] for c in shown], [[_cell(row, key, form) for key, _, form in shown] for row in rows]


def _cell(row: Row, key: str, form: str) -> str:
    value, spread, scale = row.get(key), row.get(f"{key}_sd"), _display_scale(key)
    if value is None:
        text = "-"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, dict):  # blocks: {tensor: 4}
        text = f"{{{', '.join(f'{name}: {one}' for name, one in value.items())}}}"
    else:
        text = number(form, value if scale == 1 else value * scale)
    mark = OPTIMISTIC if value is not None and is_optimistic(row, key) else ""
    mark += BEFORE_REFIT if value is not None and is_before_refit(row, key) else ""
    return f"{text}{mark} ±{number(form, spread * scale)}" if spread else f"{text}{mark}"


def is_optimistic(row: Row, key: str) -> bool:
    """Return whether a figure is on data that the row's model may have been learned, stopped or chosen on."""
    return key.startswith(("fit_", "select_")) and row.get("model_name") not in UNBIASED


def is_before_refit(row: Row, key: str) -> bool:
    """Return whether a figure is that of the soup before a refit on fit and select."""
    return key.startswith("select_") and REFIT in row


def refitted(figures: Mapping[str, Any]) -> dict[str, int]:
    """Return what a row says about the refit of its soup; nothing if there was none.

    Args:
        figures: the keys of run.json about the soup.
    """
    steps = figures.get("refit", {}).get("steps", 0)
    return {REFIT: steps} if steps else {}


def _display_scale(key: str) -> float:
    """Return the factor from the stored unit to the displayed one: fractions to percent, bytes to MB."""
    if key.startswith(EVALUATE):
        return 1
    return 100 if key.endswith("_accuracy") else 1e-6 if key == "peak_memory_bytes" else 1


def series_table(rows: Sequence[Row], key: str, split: str, measures: Measures = Measures()) -> Table:
    """Format the leading figure on a split, with a row for each method and a column for each value of `key`."""
    values, figure = list(dict.fromkeys(row[key] for row in rows)), measures.leading(rows, split)
    form = {"accuracy": "{:.2f}", "nll": f"{{:{measures.loss_format}}}"}.get(figure, "{:.4f}")
    found = {(row["model_name"], row[key]): _cell(row, f"{split}_{figure}", form) for row in rows}
    names = list(dict.fromkeys(row["model_name"] for row in rows))
    return ["model", *map(str, values)], [[n, *(found[n, v] for v in values)] for n in names]


def series_title(rows: Sequence[Row], split: str, measures: Measures) -> str:
    """Return what `series_table` shows: `Accuracy on v2 in percent`."""
    figure = measures.leading(rows, split)
    name = measures.name_of(figure)
    return f"{capital(name)} on {titled(split)}{' in percent' if figure == 'accuracy' else ''}"


def of_seed(record: Row) -> str:
    """Return which seed the series over subsets show, for the end of a title; empty if the run has only one."""
    seeds = record.get("seeds", [])
    return f" (seed {seeds[0]} only)" if len(seeds) > 1 else ""


def series_legend(rows: Sequence[Row], key: str, split: str, measures: Measures = Measures(), seed: str = "") -> str:
    """Return the legend of `series_table`; `seed` is from `of_seed`."""
    figure = measures.leading(rows, split)
    name = measures.name_of(figure) + (" in percent" if figure == "accuracy" else "")
    which = "without the N best ingredients" if key == "dropped" else "with the first N ingredients of a shuffled list"
    return f"{capital(name)} {which}{seed}; each column is one N."


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown, all columns but the first aligned to the right; the cells are plain text."""
    lines = [[markdown_text(cell) for cell in line] for line in (head, *cells)]
    lines.insert(1, ["---"] + ["---:"] * (len(head) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def legend(record: Mapping[str, Any], rows: Sequence[Row] = ()) -> str:
    """Return the legend of the main table: what its figures were measured on and what its columns mean.

    Args:
        record: run.json.
        rows: the rows of the table, whose columns are explained.
    """
    seeds, examples, measures = record.get("seeds", []), record.get("examples", {}), measures_in(record)
    sizes = ", ".join(f"{name} {count:,}" for name, count in examples.items())

    def has(figure: str) -> bool:
        return any(key.endswith(f"_{figure}") and not key.startswith(EVALUATE) for row in rows for key in row)

    about = [measures.explained(has("accuracy"))]
    about += ["Metric: mean of the recipe's metric over the examples."] if has("metric") else []
    if scores := scores_in(rows):
        about.append(f"{', '.join(scores)}: means of the objective's scores over the examples.")
    about += ["Perplexity: exp of the NLL per token."] if has("perplexity") else []
    about += ["Bits/byte: NLL in bits per byte of the texts."] if has("bits_per_byte") else []
    about += ["NLL scaled: test NLL after temperature scaling fitted on select."] if has("nll_scaled") else []
    own = [heading for _, heading, _ in own_columns(rows)]
    if own:
        about.append(f"{', '.join(own)}: computed by {record['evaluate']['function']} from the model's folder.")
    if any(row.get("model_name") in PEFT_MERGES for row in rows):
        about.append("peft: PEFT's own merges with equal weights (TIES: density 0.2, weights 1, as it averages itself).")
    names = [row["model_name"] for row in rows if "model_name" in row]
    if any(is_optimistic(row, key) for row in rows for key in row):
        about.append(OPTIMISTIC_NOTE)
    if any(REFIT in row for row in rows):
        about.append(BEFORE_REFIT_NOTE)
    if TRAINED in names:
        about.append(f"{TRAINED}: all weights, trained on fit from the uniform soup; no average of the ingredients.")
    if any("image_passes" in row for row in rows):
        evaluated = [name for name in (BEST_SINGLE, "greedy") if name in names]
        also = f"; for {' and '.join(evaluated)} they include evaluating the ingredients" if evaluated else ""
        about.append(f"{measures.examples.capitalize()}: forward passes needed to make the soup{also}.")
    if any("seconds" in row for row in rows):
        about.append("Seconds: time beyond the steps that all methods share.")
    if any(re.search(r"-m\d+$", name) for name in names):
        about.append("A suffix -mN: N ingredients per model batch.")
    if MEAN_SINGLE in names:
        about.append(f"{MEAN_SINGLE}: mean of the ingredients' own figures.")
    used = " Test was used for reporting only." if test_sets(examples) else ""
    text = (
        f"Examples: {sizes}. All figures are measured on the written model files, in {measures.dtype}.{used} "
        f"{' '.join(filter(None, about))}"
    ).rstrip()
    if len(seeds) > 1:
        text += (
            f" Mean ± standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}). Each seed redraws the split "
            "into fit and select and the order of batches; ingredients and test are the same for all seeds. Figures without "
            "± do not vary with the seed. The paired tests, the plots and the chosen soup are those of the first seed."
        )
    return text

"""Tables of results as text and Markdown, and the legends that explain them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.disk import write_bytes
from ray_soup.recipe import BASELINES
from ray_soup.soups.report.text import OPTIMISTIC, OPTIMISTIC_NOTE, markdown_paragraph, markdown_text
from ray_soup.task.outcomes import judged, test_sets

Row = Mapping[str, Any]
"""Figures of one model, by the keys of results.jsonl."""
Columns = Sequence[tuple[str, str, str]]
"""Key, heading and format of each column."""
Table = tuple[list[str], list[list[str]]]
"""Headings, and the cells of each row."""

MEAN_SINGLE = "mean single"
"""Name of the row with the mean of the ingredients' own figures; not a model."""
ENSEMBLE = "ensemble"
"""Name of the row of the logit ensemble of all ingredients; not a soup."""

MODEL = ("model_name", "model", "{}")
COST = (
    ("steps", "steps", "{:,.0f}"),
    ("image_passes", "images", "{:,.0f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak_memory_bytes", "peak MB", "{:,.0f}"),
    ("ingredients_used", "used", "{:.3g}"),
)
TRIAL = (
    ("select_nll", "select NLL", "{:.4f}"),
    ("select_accuracy", "select %", "{:.2f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak_memory_bytes", "peak MB", "{:,.0f}"),
    ("percent", "done %", "{:.0f}"),
    ("error", "error", "{}"),
)

TESTS_LEGEND = (
    "Paired tests on the test set: differences in accuracy (percentage points) and in NLL with 95 % bootstrap intervals, "
    "and the p-value of the exact McNemar test on accuracy. A negative NLL difference is an improvement. If an interval "
    "contains 0, the difference is not significant."
)
DROPPED_LEGEND = "Accuracy in percent without the N best ingredients; each column is one N."
COUNTS_LEGEND = "Accuracy in percent with the first N ingredients of a shuffled list; each column is one N."
TRIALS_LEGEND = (
    "Trial 0 is the unchanged recipe. NLL and accuracy are measured on select, at the stopping point, and are "
    "optimistic; test was not used."
)
PARETO_LEGEND = "Trials that no other trial beats in NLL, memory and time at once."
UNBIASED = ("uniform", MEAN_SINGLE, ENSEMBLE)
"""Rows that nothing was learned or chosen for: their figures are honest on any data that their ingredients did not see."""
MARK = "<!-- ray-soup compare -->"
"""The line before and after the tables in a Markdown file."""


def splits_of(rows: Iterable[Row]) -> list[str]:
    """Return the splits that the rows have figures for, in order of appearance."""
    return list(dict.fromkeys(k.removesuffix("_accuracy") for row in rows for k in row if k.endswith("_accuracy")))


def titled(split: str) -> str:
    """Return a split's name for display: a named test set is called by its name alone."""
    return split.removeprefix("test_")


def quality(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return the columns of model quality: accuracy, metric, NLL and scaled NLL for each split in the rows."""
    columns, splits = [MODEL], splits_of(rows)
    for split in splits:
        name, one = titled(split), len(test_sets(splits)) < 2
        columns += [
            (f"{split}_accuracy", f"{name} %", "{:.2f}"),
            (f"{split}_metric", f"{name} metric", "{:.4f}"),
            (f"{split}_nll", f"{name} NLL", "{:.4f}"),
            (f"{split}_nll_scaled", "NLL scaled" if one else f"{name} scaled", "{:.4f}"),
        ]
    return columns


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
    else:
        text = form.format(value if scale == 1 else value * scale)
    mark = OPTIMISTIC if value is not None and is_optimistic(row, key) else ""
    return f"{text}{mark} ±{form.format(spread * scale)}" if spread else f"{text}{mark}"


def is_optimistic(row: Row, key: str) -> bool:
    """Return whether a figure is on data that the row's model may have been learned, stopped or chosen on."""
    return key.startswith(("fit_", "select_")) and row.get("model_name") not in UNBIASED


def _display_scale(key: str) -> float:
    """Return the factor from the stored unit to the displayed one: fractions to percent, bytes to MB."""
    return 100 if key.endswith("_accuracy") else 1e-6 if key == "peak_memory_bytes" else 1


def tests_table(tests: Iterable[Row], against: str, split: str) -> Table:
    """Format paired tests on a split: differences from the baseline `against`, with intervals and p-values."""
    head = [f"minus {against}", "points (95 %)", "p", "NLL (95 %)"]
    return head, [
        [
            t["model_name"],
            f"{100 * t['accuracy']:+.2f} ({100 * t['accuracy_low']:+.2f}, {100 * t['accuracy_high']:+.2f})",
            f"{t['mcnemar_p']:.2g}",
            f"{t['nll']:+.4f} ({t['nll_low']:+.4f}, {t['nll_high']:+.4f})",
        ]
        for t in tests
        if (t["against"], t["split"]) == (against, split)
    ]


def series_table(rows: Sequence[Row], key: str, split: str) -> Table:
    """Format accuracy on a split in percent, with a row for each method and a column for each value of `key`."""
    values = list(dict.fromkeys(row[key] for row in rows))
    found = {(row["model_name"], row[key]): _cell(row, f"{split}_accuracy", "{:.2f}") for row in rows}
    names = list(dict.fromkeys(row["model_name"] for row in rows))
    return ["model", *map(str, values)], [[n, *(found[n, v] for v in values)] for n in names]


def trials_table(search: Mapping[str, Any], which: str) -> Table:
    """Format the `trials` of a search, or its `pareto` front."""
    keys = [(key, key.rpartition(".")[2], "{:.4g}") for key in search["keys"]]
    return table(search[which], (("trial", "trial", "{}"), *keys, *TRIAL))


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown, all columns but the first aligned to the right; the cells are plain text."""
    lines = [[markdown_text(cell) for cell in line] for line in (head, *cells)]
    lines.insert(1, ["---"] + ["---:"] * (len(head) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_markdown(record: Mapping[str, Any]) -> str:
    """Format all tables of a comparison as Markdown, each followed by its legend.

    Args:
        record: run.json of a comparison.
    """
    splits = judged(record["examples"])

    def each(table_on: Callable[[str], Table]) -> list[str]:
        """Format one table for each test set, under the set's name if there are several."""
        found = []
        for split in splits:
            found += [f"On {markdown_text(titled(split))}:"] if len(splits) > 1 else []
            found.append(markdown(*table_on(split)))
        return found

    parts = [markdown(*table(record["table"], [*quality(record["table"]), *COST])), markdown_paragraph(legend(record))]
    if record["tests"]:
        for baseline in BASELINES:
            parts += each(partial(tests_table, record["tests"], baseline))
        parts.append(TESTS_LEGEND)
    if record["eliminations"]:
        parts += [*each(partial(series_table, record["eliminations"], "dropped")), DROPPED_LEGEND]
    if record["counts"]:
        parts += [*each(partial(series_table, record["counts"], "count")), COUNTS_LEGEND]
    return "\n\n".join(parts)


def insert(text: str, file: str) -> None:
    """Replace the text between the two lines MARK of a file.

    Raises RecipeError if the file cannot be read or does not contain exactly two such lines.
    """
    path = Path(file).resolve()  # a link stays a link
    try:
        parts = path.read_bytes().decode().split(MARK)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. Use a text file with two lines {MARK}.") from error
    if len(parts) != 3:
        raise RecipeError(
            f"{file} has {len(parts) - 1} lines {MARK}; expected 2. Mark the place for the tables with one such line before "
            "and one after it."
        )
    before, _, after = parts
    mode = path.stat().st_mode
    write_bytes(path, f"{before}{MARK}\n\n{text}\n\n{MARK}{after}".encode())
    path.chmod(mode)


def legend(record: Mapping[str, Any]) -> str:
    """Return the legend of the main table: what its figures were measured on and what its columns mean."""
    seeds, examples = record.get("seeds", []), record.get("examples", {})
    sizes = ", ".join(f"{name} {count:,}" for name, count in examples.items())
    text = (
        f"Examples: {sizes}. All figures are measured on the written model files, in float32. {OPTIMISTIC_NOTE} "
        "Test was used for reporting only. "
        "NLL scaled: test NLL after temperature "
        "scaling fitted on select. Images: forward passes needed to make the soup; for best_single and greedy they include "
        "evaluating the ingredients. Seconds: time beyond the steps that all methods share. A suffix -mN: N ingredients per "
        f"model batch. {MEAN_SINGLE}: mean of the ingredients' own figures."
    )
    if len(seeds) > 1:
        text += (
            f" Mean ± standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}). Each seed redraws the split "
            "into fit and select and the order of batches; ingredients and test are the same for all seeds. Figures without "
            "± do not vary with the seed. The paired tests, the plots and the chosen soup are those of the first seed."
        )
    return text

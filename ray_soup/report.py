"""Tables, the report, and the model card."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ray_soup.coefficients import Coefficients
from ray_soup.errors import RecipeError
from ray_soup.outcomes import Outcome, judged, test_sets
from ray_soup.recipe import Recipe, dump_recipe

Columns = Sequence[tuple[str, str, str]]
"""(key, heading, format)"""
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
AGAINST = ("best_single", "greedy")  # what each soup is tested against
TESTS_LEGEND = (
    "Paired, on the test images: differences of accuracy, in percentage points, and of NLL, with 95 % intervals "
    "(bootstrap), and the p of the exact McNemar test of the accuracies. A negative NLL difference is better. An interval "
    "that holds 0 proves nothing."
)
DROPPED_LEGEND = "Accuracy in percent when so many of the best ingredients are left out."
COUNTS_LEGEND = "Accuracy in percent with so many ingredients, the first of a shuffle."
MARK = "<!-- ray-soup compare -->"
TWIN = 0.999  # directions with a larger cosine are of the same checkpoint, as good as


def splits_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The splits that the rows have figures of."""
    return list(dict.fromkeys(k.removesuffix("_accuracy") for row in rows for k in row if k.endswith("_accuracy")))


def titled(split: str) -> str:
    """A split as a reader sees it: a test set by its name."""
    return split.removeprefix("test_")


def quality(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The columns of what models do, for each split that the rows have figures of."""
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


def _unit(key: str) -> float:
    """What a figure is multiplied with to be shown."""
    return 100 if key.endswith("_accuracy") else 1e-6 if key == "peak_memory_bytes" else 1


def table(rows: Sequence[dict[str, Any]], columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of `rows`: those of the columns that a row has; with ± where there is a spread."""
    shown = [c for c in columns if any(row.get(c[0]) is not None for row in rows)]
    cells = []
    for row in rows:
        line = []
        for key, _, form in shown:
            value, spread, unit = row.get(key), row.get(f"{key}_sd"), _unit(key)
            shown_as = "{}" if isinstance(value, str) else form
            text = "-" if value is None else shown_as.format(value if isinstance(value, str) or unit == 1 else value * unit)
            if spread:
                text += f" ±{form.format(spread * unit)}"
            line.append(text)
        cells.append(line)
    return [c[1] for c in shown], cells


def tests_table(tests: Sequence[dict[str, Any]], against: str, split: str) -> tuple[list[str], list[list[str]]]:
    """Paired tests on a split as text: differences to the soup `against` with their intervals, and p."""
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


def series_table(rows: Sequence[dict[str, Any]], key: str, split: str) -> tuple[list[str], list[list[str]]]:
    """A line a method, a column for each value of `key`: accuracy on a split in percent."""
    values = list(dict.fromkeys(row[key] for row in rows))
    found = {(row["model_name"], row[key]): row[f"{split}_accuracy"] for row in rows}
    names = list(dict.fromkeys(row["model_name"] for row in rows))
    return ["model", *map(str, values)], [[n, *(f"{100 * found[n, v]:.2f}" for v in values)] for n in names]


def trials_table(search: dict[str, Any], which: str) -> tuple[list[str], list[list[str]]]:
    """The `trials` of a search, or its `pareto` front."""
    keys = [(key, key.rpartition(".")[2], "{:.4g}") for key in search["keys"]]
    return table(search[which], (("trial", "trial", "{}"), *keys, *TRIAL))


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_markdown(record: dict[str, Any]) -> str:
    """The tables of a comparison as Markdown, with what their reader must know."""
    splits = judged(record["examples"])

    def each(table_on: Callable[[str], tuple[list[str], list[list[str]]]]) -> list[str]:
        """A table for each test set, under its name where there are several."""
        found = []
        for split in splits:
            found += [f"On {titled(split)}:"] if len(splits) > 1 else []
            found.append(markdown(*table_on(split)))
        return found

    parts = [markdown(*table(record["table"], [*quality(record["table"]), *COST])), legend(record)]
    if record["tests"]:
        for other in AGAINST:
            parts += each(lambda split, other=other: tests_table(record["tests"], other, split))
        parts.append(TESTS_LEGEND)
    if record["eliminations"]:
        parts += [*each(lambda split: series_table(record["eliminations"], "dropped", split)), DROPPED_LEGEND]
    if record["counts"]:
        parts += [*each(lambda split: series_table(record["counts"], "count", split)), COUNTS_LEGEND]
    return "\n\n".join(parts)


def insert(text: str, file: str) -> None:
    """Put `text` between the two lines MARK of a file. Raises RecipeError."""
    try:
        before, _, after = Path(file).read_text().split(MARK)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file} must hold two lines {MARK}, between which the tables go.") from error
    Path(file).write_text(f"{before}{MARK}\n\n{text}\n\n{MARK}{after}")


def legend(record: dict[str, Any]) -> str:
    """What the reader of the table must know."""
    seeds, examples = record.get("seeds", []), record.get("examples", {})
    sizes = ", ".join(f"{name} {count:,}" for name, count in examples.items())
    text = (
        f"Examples: {sizes}. Figures are those of the written models, in float32. Select is held-out data that choices were "
        "made on, so its figures flatter; test steered nothing. NLL scaled: test NLL after temperature scaling found on "
        "select. Images: forward passes to make the soup, those of the ingredients counted for best_single and greedy. "
        "Seconds: what came on top of the work that all share. -m: with model batches of so many ingredients. mean single: "
        "the mean of the ingredients' own figures."
    )
    if len(seeds) > 1:
        text += (
            f" Mean ± standard deviation over {len(seeds)} seeds ({seeds[0]} to {seeds[-1]}), which redraw the cut into fit "
            "and select and the order of batches; ingredients and test are the same in all. What has no spread does not "
            "depend on the seed. Tests, figures and the chosen soup are of the first seed."
        )
    return text


@dataclass
class Report:
    """What a report shows; what is empty is left out."""

    title: str
    recipe: Recipe
    rows: Sequence[dict[str, Any]]
    record: dict[str, Any]
    coefficients: dict[str, Coefficients] = field(default_factory=dict)
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    similarity: np.ndarray | None = None


def html(report: Report) -> str:
    """The report as one self-contained page."""
    from jinja2 import Environment

    record = report.record
    tables, splits = [], judged(record.get("examples", {}))

    def add(title: str, found: tuple[list[str], list[list[str]]], text: str) -> None:
        tables.append({"title": title, "head": found[0], "cells": found[1], "text": text})

    for split in splits:
        where = f", on {titled(split)}" if len(splits) > 1 else ""
        if record.get("tests"):
            for other in AGAINST:
                text = TESTS_LEGEND if other == AGAINST[-1] else ""
                add(f"Against {other}{where}", tests_table(record["tests"], other, split), text)
        if record.get("eliminations"):
            add(f"Without the best{where}", series_table(record["eliminations"], "dropped", split), DROPPED_LEGEND)
        if record.get("counts"):
            add(f"By number of ingredients{where}", series_table(record["counts"], "count", split), COUNTS_LEGEND)
    if record.get("search"):
        text = "Trial 0 is the recipe as it was. NLL and accuracy are those of the point kept on select; test was not seen."
        add("Trials of the search", trials_table(record["search"], "trials"), text)
        text = "Trials that no other beats in NLL, memory and time together."
        add("Pareto front", trials_table(record["search"], "pareto"), text)
    template = (files("ray_soup") / "report.html.jinja").read_text()
    return Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        title=report.title,
        subtitle=f"{record['parameters']:,} parameters; model {report.recipe.model}; {record['wall_s']:.0f} s in all.",
        notes=record["notes"],
        table=table(report.rows, [*quality(report.rows), *COST]),
        chosen=record.get("chosen"),
        legend=legend(record),
        tables=tables,
        figures=[{**f, "source": _embedded(f["svg"])} for f in _figures(report)],
        recipe=dump_recipe(report.recipe).strip(),
        ingredients=record["ingredients"],
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    )  # fmt: skip


def _embedded(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _figures(report: Report) -> list[dict[str, str]]:
    from ray_soup import figures

    record, names = report.record, [i["name"] for i in report.record["ingredients"]]
    splits, found = judged(record.get("examples", {})), []

    def add(title: str, text: str, svg: str) -> None:
        found.append({"title": title, "text": text, "svg": svg})

    for split in splits if len(report.rows) > 1 else ():
        where = f" on {titled(split)}" if len(splits) > 1 else ""
        add(f"Accuracy by method{where}", "With 95 % intervals (Wilson); soups as dots, their references as diamonds; "
            "dotted: the best single.", 
            figures.accuracy_by_method(report.rows, split, record["examples"][split]))  # fmt: skip
    for split in splits if record.get("counts") else ():
        add("Accuracy by number of ingredients", f"On {titled(split)}; the first of a shuffle.",
            figures.by_count(record["counts"], split))  # fmt: skip
    search = record.get("search", {})
    if {"learn.lr", "learn.model_batch"} <= set(search.get("keys", ())):
        add("Learning rate and model batch", "The larger and darker, the lower the NLL on select; ringed: the best.",
            figures.search_plane(search["trials"]))  # fmt: skip
    if report.curves:
        add("Learning curves", "NLL on fit (dashed) and select (solid); the ring is the point that was kept.",
            figures.learning_curves(report.curves))  # fmt: skip
    if report.coefficients:
        add("Distribution of coefficients", "Hatched: negative ones. Dotted: 1/K, the uniform soup.",
            figures.distribution(report.coefficients))  # fmt: skip
    for label, coefficients in report.coefficients.items():
        if coefficients.values.shape[1] > 1:
            add(f"Coefficients of {label}", "Ingredients by blocks; white is 1/K.", figures.heat_map(coefficients))
    if report.similarity is not None:
        twins = [(int(j), int(k)) for j, k in np.argwhere(np.triu(report.similarity > TWIN, 1))]
        said = "; ".join(f"{names[j]} and {names[k]}" for j, k in twins)
        add("Cosines of directions", "Of each ingredient's difference from the mean of all, in the order of the list. "
            + (f"Crossed: as good as duplicates ({said})." if twins else "No two are duplicates."),
            figures.similarity(report.similarity, names, twins))  # fmt: skip
    if report.outcomes:
        add("Reliability", f"Accuracy against confidence on {titled(splits[0])}; on the dotted line a model knows how sure "
            "it may be.",
            figures.reliability_diagram(report.outcomes))  # fmt: skip
    return found


def model_card(
    recipe: Recipe, coefficients: Coefficients, rows: Sequence[dict[str, Any]], record: dict[str, Any], load: str
) -> str:
    """The README.md beside a soup, with the front matter of the Hub; `load`: the line of Python that loads it."""
    order = sorted(zip(coefficients.shares(), coefficients.ingredients, strict=True), reverse=True)
    shares = "\n".join(f"| {name} | {share:+.4f} |" for share, name in order)
    library = recipe.model.partition(":")[0]
    library = library if library in ("open_clip", "timm", "transformers") else "pytorch"
    base = f"base_model: {recipe.base_model}\n" if recipe.base_model else ""
    used = len(coefficients.used())
    notes = "".join(f"\n\n{note}" for note in record["notes"])
    factor = f" Its logits carry a learned factor of {coefficients.factor:.4f}." if coefficients.factored else ""
    return f"""---
{base}base_model_relation: merge
tags: [merge, model-soup, ray-soup]
library_name: {library}
---
# A model soup of {used} ingredients

Made by [ray_soup](https://pypi.org/project/ray_soup/) with the method `{record["method"]}` for the model `{recipe.model}`:
each tensor is a weighted sum of the same tensor in {used} fine-tuned checkpoints, with weights that sum to 1.{factor}
In its folder it loads with

```python
{load}
```

## Results

{markdown(*table(rows, [*quality(rows), *COST]))}

{legend(record) if record.get("examples") else ""}{notes}

## Ingredients

| ingredient | mean coefficient |
| --- | ---: |
{shares}

`coefficients.safetensors` holds all of them ({len(coefficients.blocks)} blocks), and with the ingredients makes this model
again: `ray-soup bake`.

## Intended use and limits

For the task and the kind of data that it was learned and tested on, in place of the best of its ingredients, at the same
inference cost. It keeps the ingredients' biases and licences. On other data it may do worse than any of them: test it
there. A soup of runs from different initialisations does not work.

## Recipe

```yaml
{dump_recipe(recipe).strip()}
```
"""

"""Tables and the model card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_soup.coefficients import Coefficients
from ray_soup.recipe import Recipe, dump_recipe

COLUMNS = (
    ("model_name", "model", "{}"),
    ("select_accuracy", "select %", "{:.2%}"),
    ("select_nll", "select NLL", "{:.4f}"),
    ("test_accuracy", "test %", "{:.2%}"),
    ("test_nll", "test NLL", "{:.4f}"),
    ("steps", "steps", "{}"),
    ("seconds", "seconds", "{:.1f}"),
    ("peak_memory_bytes", "peak MB", "{}"),
)


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the table of `rows`: a column for each key that a row has."""
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    cells = []
    for row in rows:
        line = []
        for key, _, form in columns:
            value = row.get(key)
            if value is not None and key == "peak_memory_bytes":
                value = round(value / 1e6)
            line.append("-" if value is None else form.format(value).rstrip("%"))
        cells.append(line)
    return [c[1] for c in columns], cells


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    head, cells = table(rows)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def model_card(recipe: Recipe, coefficients: Coefficients, rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The README.md beside a soup."""
    order = sorted(zip(coefficients.shares(), coefficients.ingredients, strict=True), reverse=True)
    shares = "\n".join(f"| {name} | {share:+.4f} |" for share, name in order)
    load = "load_file" if not coefficients.tied else "load_model"
    return f"""---
tags: [merge, model-soup, ray-soup]
base_model_relation: merge
---
# A model soup of {len(order)} ingredients

Made by [ray_soup](https://pypi.org/project/ray_soup/) with the method `{recipe.method}` for the model `{recipe.model}`:
each tensor is a weighted sum of the same tensor in {len(order)} fine-tuned checkpoints, with weights that sum to 1.
`model.safetensors` loads with `safetensors.torch.{load}`.

{markdown(rows)}

Accuracy and NLL are those of this file, in float32. *select* is held-out data that choices were made on, so its figures
flatter; *test* steered nothing.{"".join(chr(10) * 2 + note for note in notes)}

## Ingredients

| ingredient | mean coefficient |
| --- | ---: |
{shares}

`coefficients.safetensors` holds all of them ({len(coefficients.blocks)} blocks), and with the ingredients makes this model
again: `ray-soup bake`.

## Recipe

```yaml
{dump_recipe(recipe).strip()}
```

## Limits

A soup is as good as what it is made of, for the data it was learned on: it keeps the ingredients' biases and licences, and a
soup of runs from different initialisations does not work.
"""

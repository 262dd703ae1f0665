"""The model card: the README.md of a soup, with front matter for the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ray_soup.io.redact import redact
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import Recipe, dump_recipe
from ray_soup.soups.report.measures import measures_in
from ray_soup.soups.report.paths import shortener
from ray_soup.soups.report.tables import Row, cost, legend, markdown, quality, table
from ray_soup.soups.report.text import (
    markdown_block,
    markdown_code,
    markdown_paragraph,
    markdown_text,
    number,
    preprocessing_text,
)

HUB_LIBRARIES = ("open_clip", "timm", "transformers", "peft")
"""Model libraries that the Hub knows under the same names as recipes; all others are `pytorch`."""

POLISHED = (
    " Then all weights were trained on held-out data: the model is no longer an average of its ingredients, and "
    "`difference.safetensors` holds what was added to each tensor."
)

LIMITS = """\
Use this model in place of the best of its ingredients, for the task and the kind of data that it was learned and tested on;
inference costs the same. It inherits the biases and licenses of its ingredients. On other data it may be worse than any of
them: test it there first. A soup works only if all its ingredients were fine-tuned from one initialization."""
"""The last section but one of a card."""


def model_card(
    recipe: Recipe, coefficients: Coefficients | None, rows: Sequence[Row], record: Mapping[str, Any], load: str
) -> str:
    """Return the model card of a soup as Markdown.

    Args:
        recipe: the recipe as run.
        coefficients: the coefficients of the soup; None: the model is no weighted sum of the ingredients.
        rows: the rows of the results table.
        record: run.json.
        load: the lines of Python that load the model, run in its folder.
    """
    if coefficients is None:
        return _card_without_coefficients(recipe, rows, record, load)
    used, measures = len(coefficients.used()), measures_in(record)
    factor = f" Its logits include a learned factor of {coefficients.factor:.4f}." if coefficients.factored else ""
    explained = markdown_paragraph(legend(record, rows)) if record.get("examples") else ""
    summed = "each tensor is a weighted sum of the same tensor in"
    adapter = "base" in record and not recipe.adapter.merge
    shorten = shortener(recipe)
    model = markdown_code(shorten(recipe.model))
    notes = "".join(f"\n\n{markdown_paragraph(shorten(note))}" for note in record["notes"])
    is_trained = bool(record.get("polish", {}).get("best_epoch"))
    if recipe.adapter.merge:
        summed = "this base model, changed in each module by a weighted sum of the products B A of"
    elif adapter:
        summed = "an adapter for it, whose product B A is, in each module, a weighted sum of the products of"
    return f"""{_front_matter(recipe, adapter)}
# A model soup of {used} ingredients

Made by [ray_soup](https://pypi.org/project/ray_soup/) with the method `{record["method"]}` for the model
{model}: {summed} {used} fine-tuned {"LoRA adapters" if "base" in record else "checkpoints"}, with
weights that sum to 1.{factor}{POLISHED if is_trained else ""} To load it, in its folder:

{markdown_block(load, "python")}

## Results

{markdown(*table(rows, [*quality(rows, measures), *cost(measures)]))}

{explained}{notes}
{_preprocessing(record)}
## Ingredients

| ingredient | mean coefficient |
| --- | ---: |
{_shares(coefficients)}

`coefficients.safetensors` holds the coefficients of all blocks ({len(coefficients.blocks)}). `ray-soup bake` rebuilds this
model from them{", this difference" if is_trained else ""} and the ingredients.

## Intended use and limits

{LIMITS}

## Recipe

{markdown_block(shorten(dump_recipe(recipe).strip()), "yaml")}
"""


def _preprocessing(record: Mapping[str, Any]) -> str:
    """Return the section about preprocessing; empty if run.json has none."""
    text = preprocessing_text(record.get("preprocessing", {}))
    return f"\n## Preprocessing\n\n{markdown_paragraph(text[0].upper() + text[1:])}.\n" if text else ""


def _front_matter(recipe: Recipe, adapter: bool) -> str:
    library = "peft" if adapter else recipe.model.partition(":")[0]
    values: dict[str, Any] = {"base_model": redact(recipe.base_model)} if recipe.base_model else {}
    values |= {
        "base_model_relation": "merge",
        "tags": ["merge", "model-soup", "ray-soup"],
        "library_name": library if library in HUB_LIBRARIES else "pytorch",
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=10_000)}---"


def _shares(coefficients: Coefficients) -> str:
    """Format one table row per ingredient, the largest mean coefficient first."""
    order = sorted(zip(coefficients.shares(), coefficients.ingredients, strict=True), reverse=True)
    return "\n".join(f"| {markdown_text(name)} | {number('{:+.4f}', share)} |" for share, name in order)


def _card_without_coefficients(recipe: Recipe, rows: Sequence[Row], record: Mapping[str, Any], load: str) -> str:
    """Return the model card of a model that is no weighted sum of its ingredients."""
    measures, names = measures_in(record), [ingredient["name"] for ingredient in record["ingredients"]]
    shorten = shortener(recipe)
    notes = "".join(f"\n\n{markdown_paragraph(shorten(note))}" for note in record["notes"])
    explained = markdown_paragraph(legend(record, rows)) if record.get("examples") else ""
    return f"""{_front_matter(recipe, False)}
# A model made of {len(names)} ingredients

Made by [ray_soup](https://pypi.org/project/ray_soup/) with the method `{record["method"]}`, a function that is no part of
ray_soup, for the model {markdown_code(shorten(recipe.model))}: it is computed from {len(names)} fine-tuned checkpoints, and
is no weighted sum of them. To load it from its folder:

{markdown_block(load, "python")}

## Results

{markdown(*table(rows, [*quality(rows, measures), *cost(measures)]))}

{explained}{notes}
{_preprocessing(record)}
## Ingredients

{chr(10).join(f"- {markdown_text(name)}" for name in names)}

`ray-soup bake` rebuilds this model from them, if it finds the same function.

## Intended use and limits

{LIMITS}

## Recipe

{markdown_block(shorten(dump_recipe(recipe).strip()), "yaml")}
"""

"""blocks: auto, as many groups of rows as there are examples for each coefficient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_soup.mixing.blocks import Layout, partition
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.granularity import FINER, resolved_blocks
from ray_soup.soups.run import run
from ray_soup.soups.start import Start, fine_enough
from tests.conftest import values

LAYOUT = Layout(("1.weight", "1.bias", "2.weight"), ((8, 3), (8,), (4, 8)))


@given(st.integers(1, 100), st.integers(0, 10**6))
def test_there_are_never_more_coefficients_than_examples_unless_tensors_are_whole(ingredients: int, examples: int) -> None:
    blocks = resolved_blocks("auto", LAYOUT, ingredients, examples)
    count = partition(LAYOUT, blocks).count
    assert count == 3 or ingredients * count <= examples
    assert count == 12 or ingredients * 2 * count > examples
    assert resolved_blocks("auto", LAYOUT, ingredients, examples, cuttable=False) == "tensor"


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model", 7, {"tensor": 3}])
def test_what_the_recipe_says_is_kept(blocks: object) -> None:
    assert resolved_blocks(blocks, LAYOUT, 2, 10**6) == blocks  # type: ignore[arg-type]


@pytest.mark.parametrize("old", FINER)
@pytest.mark.parametrize("least", FINER)
def test_blocks_are_fine_enough_for_the_soup_that_learning_begins_from(old: object, least: object) -> None:
    parts = partition(LAYOUT, old)  # type: ignore[arg-type]
    columns = np.random.default_rng(0).dirichlet(np.ones(3), parts.count).T
    cuts = {LAYOUT.names[tensor]: elements for tensor, elements in parts.cuts.items()}
    block_of = dict(zip(LAYOUT.names, parts.block.tolist(), strict=True))
    start = Start("OUT", Coefficients(columns, tuple("abc"), parts.names, block_of, cuts=cuts), ("A", "B", "C"), "0")
    assert fine_enough(start, least, LAYOUT) == max(old, least, key=FINER.index)  # type: ignore[arg-type, type-var]


@pytest.mark.slow
def test_a_run_with_the_defaults_and_one_that_begins_from_it_with_more_ingredients(zoo: Path, tmp_path: Path) -> None:
    recipe = {key: value for key, value in values(zoo).items() if key != "blocks"} | {"learn": {"epochs": 1}}
    five = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(5)]
    first = run(make_recipe({**recipe, "ingredients": five[:2]}), tmp_path / "first")
    again = run(make_recipe({**recipe, "ingredients": five, "start": str(first.out)}), tmp_path / "again")
    for soup, ingredients in ((first, 2), (again, 5)):
        assert len(soup.record["ingredients"]) == ingredients
        assert soup.record["curve"][-1]["lr"] > 0
    assert again.record["start"]["ingredients"] == 2

"""The recipe key `preprocess`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_soup.errors import RecipeError
from ray_soup.recipe import Preprocessing, dump_recipe, for_method, load_recipe, make_recipe, with_changes

MAPPING = {"size": [48, 32], "mean": 0.5, "std": [0.1, 0.2, 0.3], "crop_pct": 0.9, "interpolation": "nearest", "channels": 3}


@pytest.mark.parametrize("given", [MAPPING, {"size": 48}, {"mean": [0.5]}, "package.module:function"])
def test_a_dump_loads_as_the_same_recipe(given: Any) -> None:
    recipe = make_recipe({"model": "timm:x", "preprocess": given})
    text = dump_recipe(recipe)
    assert make_recipe(yaml.safe_load(text)) == recipe
    assert yaml.safe_load(text)["preprocess"] == given
    assert for_method(recipe, "greedy").preprocess == recipe.preprocess
    stated = recipe.preprocess.values() if isinstance(recipe.preprocess, Preprocessing) else recipe.preprocess
    assert stated == given


def test_a_recipe_without_the_key_is_dumped_as_before() -> None:
    recipe = make_recipe({"model": "timm:x", "preprocess": None})
    assert recipe.preprocess is None
    assert "preprocess" not in dump_recipe(recipe)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"size": 0}, r"preprocess\.size: found 0\. Expected a number of pixels, or \[height, width\]\."),
        ({"size": [48, 48, 48]}, r"preprocess\.size: .*Expected a number of pixels"),
        ({"size": float("nan")}, r"preprocess\.size: .*Expected a number of pixels"),
        ({"sise": 3}, r"preprocess\.sise: unknown key; did you mean 'size'\?"),
        ({}, r"preprocess: found \{\}\. Expected one or more of size, mean, "),
        ({"mean": [1, 2]}, r"preprocess\.mean: found \[1, 2\]\. Expected one number, or a list with one for each channel\."),
        ({"mean": True}, r"preprocess\.mean: found true"),
        ({"std": 0}, r"preprocess\.std: found 0\. Expected positive numbers\."),
        ({"crop_pct": 1.5}, r"preprocess\.crop_pct: found 1\.5\. Expected a number above 0 to 1, or null\."),
        ({"interpolation": "best"}, r"preprocess\.interpolation: found 'best'\. Expected bicubic or bilinear or nearest"),
        ({"channels": 2}, r"preprocess\.channels: found 2\. Expected 1 or 3"),
        ({"channels": True}, r"preprocess\.channels: found true\. Expected 1 or 3"),
        ({"channels": 1, "std": [0.1, 0.2, 0.3]}, "std has 3 values, and channels is 1"),
        ("a b", r"preprocess: found 'a b'\. Expected package\.module:function\."),
        (5, "preprocess: found 5"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(given: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        make_recipe({"model": "timm:x", "preprocess": given})
    assert len(str(caught.value).splitlines()) == 2  # one fault, and not one for each type that the key may have


def test_overrides_change_single_values(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: timm:x\npreprocess: {size: 48, mean: [0.5, 0.4, 0.3]}\n")

    def changed(*overrides: str) -> Any:
        found = load_recipe(tmp_path / "recipe.yaml", overrides).preprocess
        return found.values() if isinstance(found, Preprocessing) else found

    assert changed() == {"size": 48, "mean": [0.5, 0.4, 0.3]}
    assert changed("preprocess.size=64", "preprocess.interpolation=bicubic") == {
        "size": 64, "mean": [0.5, 0.4, 0.3], "interpolation": "bicubic",
    }  # fmt: skip
    assert changed("preprocess={size: 64}") == {"size": 64}
    assert changed("preprocess=a.b:c") == "a.b:c"
    assert changed("preprocess=null") is None
    with pytest.raises(RecipeError, match=r"override preprocess\.size=x is not valid:\n  preprocess\.size: found 'x'"):
        changed("preprocess.size=x")
    recipe = with_changes(load_recipe(tmp_path / "recipe.yaml"), {"preprocess.size": 9})
    assert recipe.preprocess == Preprocessing(size=9, mean=[0.5, 0.4, 0.3])


def test_a_search_cannot_vary_it() -> None:
    with pytest.raises(RecipeError, match="a search cannot vary this key"):
        make_recipe({"model": "timm:x", "search": {"preprocess.size": {"choice": [48, 64]}}})

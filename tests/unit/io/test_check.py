from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.check import check_finite, check_floats, check_together, common_dtype, common_shapes
from ray_soup.io.find import open_ingredients


def test_every_difference_between_ingredients_is_listed(tmp_path: Path) -> None:
    good = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}
    for k, changed in enumerate(
        [
            good,
            good,
            {"w": good["w"]},
            {**good, "extra": torch.zeros(1)},
            {**good, "w": torch.zeros(3, 2)},
            {**good, "w": torch.zeros(2, 3, dtype=torch.int32)},
        ]
    ):
        save_file(changed, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    assert common_shapes(ingredients) == ({"n": (), "w": (2, 3)}, str(tmp_path / "0.safetensors"))
    with pytest.raises(IngredientError) as error:
        check_together(ingredients)
    said = str(error.value)
    assert said.startswith("4 of 6 ingredients do not fit together")
    for line in (
        "2.safetensors does not fit:\n    missing: n []",
        "extra float32 [1]",
        "shape: w is [3, 2], in",
        "dtype: w is int32 [2, 3], the other ingredients have floats",
    ):
        assert line in said


def test_bound_ingredients_are_returned_and_those_given_stay_as_they_are(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "0.safetensors")
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "1.pt")
    ingredients = open_ingredients(str(tmp_path))
    bound = check_together(ingredients, {"a": (2,)}, {})
    assert [list(i.tensors) for i in ingredients] == [["a"], ["module.a"]]
    assert [list(i.tensors) for i in bound] == [["a"], ["a"]]
    assert [i.read("a").tolist() for i in bound] == [[0.0, 0.0], [1.0, 1.0]]
    assert [i.identity for i in bound] == [i.identity for i in ingredients]


def test_one_ingredient_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="two or more ingredients"):
        check_together(open_ingredients(str(tmp_path)))


def test_the_widest_dtype_is_written(tmp_path: Path) -> None:
    for k, dtype in enumerate((torch.float16, torch.bfloat16, torch.float16)):
        save_file({"a": torch.zeros(1, dtype=dtype)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    assert common_dtype(ingredients, "a") == torch.float32
    assert common_dtype(ingredients[::2], "a") == torch.float16


def test_integer_parameters_and_infinite_elements_are_named(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"a": torch.zeros(3), "n": torch.zeros(3, dtype=torch.int8)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    check_floats(ingredients, ["a"])
    with pytest.raises(IngredientError, match=r"0\.safetensors: the parameter n is int8 \[3\]; expected floats"):
        check_floats(ingredients, ["a", "n"])
    parts = [torch.zeros(3), torch.tensor([0.0, float("inf"), float("nan")])]
    check_finite(ingredients[:1], "a", 0, parts[:1])
    with pytest.raises(IngredientError, match=r"1\.safetensors: the tensor a contains inf at element 17; expected finite"):
        check_finite(ingredients, "a", 16, parts)

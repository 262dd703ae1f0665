"""Objects of Python in a recipe: paths, functions and classes that can be imported, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup import Recipe
from ray_soup.errors import RecipeError
from ray_soup.recipe import as_recipe, load_recipe, with_changes
from tests import tiny


def test_paths_functions_and_classes_become_their_names(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "model": tiny.build, "ingredients": [tmp_path / "a.pt"],
        "data": {"fit": tmp_path / "f.npz", "test": {"v": tmp_path}},
        "objective": tiny.Tiny, "learn": {"epochs": np.int64(3)},
    }  # fmt: skip
    written = {
        "model": "tests.tiny:build", "ingredients": [f"{tmp_path}/a.pt"], "objective": "tests.tiny:Tiny",
        "data": {"fit": f"{tmp_path}/f.npz", "test": {"v": str(tmp_path)}}, "learn": {"epochs": 3},
    }  # fmt: skip
    assert as_recipe(values) == as_recipe(written) == Recipe(**values) == Recipe(**written)
    plain = as_recipe({"model": tiny.build})
    assert with_changes(plain, {"data.fit": tmp_path, "loss": tiny.train}) == with_changes(
        plain, {"data.fit": str(tmp_path), "loss": "tests.tiny:train"}
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": tiny.build()}, "model: found Tiny("),
        ({"model": tiny.build()}, "of type Tiny. Expected the name of a model, or of a function that builds it, as in"),
        ({"model": "a:b", "data": {"fit": torch.utils.data.TensorDataset(torch.ones(2))}}, "of type TensorDataset. "),
        ({"model": "a:b", "data": {"fit": np.ones(3)}}, "For models and data in memory, use ray_soup.mix_state_dicts."),
        ({"model": "a:b", "ingredients": [{"w": torch.ones(2)}]}, "of type Tensor. Expected the paths of checkpoints."),
        ({"model": lambda: 1}, "model: found <lambda> of tests.unit.recipe"),
        ({"model": "a:b", "loss": lambda x: x}, "which other processes cannot import. Expected a function at the top level"),
        ({"model": "a:b", "learn": {"lr": tiny.build}}, "learn.lr: found 'tests.tiny:build'. Expected a number above 0 or"),
        ({"model": "a:b", "seed": 3}, "seed: unknown key; did you mean 'learn.seed' or 'finetune.seed'?"),
        ({"model": "a:b", "actors": {"lr": 3}}, "actors.lr: unknown key; did you mean 'learn.lr' or 'polish.lr' or "),
        ({"model": "a:b", "epoch": 3}, "epoch: unknown key; did you mean 'learn.epochs' or 'polish.epochs' or "),
    ],
)  # fmt: skip
def test_objects_in_memory_and_keys_without_their_section_are_refused_in_our_words(values: Any, said: str) -> None:
    for make in (as_recipe, lambda given: Recipe(**given)):
        with pytest.raises(RecipeError) as error:
            make(values)
        assert str(error.value).startswith("The recipe is not valid:\n  ")
        assert said in str(error.value)


def test_a_recipe_file_is_a_path() -> None:
    given: Any = {"model": "a:b"}
    with pytest.raises(RecipeError, match="as a recipe file; expected the path of a YAML file"):
        load_recipe(given)

"""The public names of the package: they are imported on first use, and do what they say."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ray_soup
from ray_soup import api
from ray_soup.recipe import Recipe, make_recipe

MINIMAL = {"model": "a:b", "ingredients": "zoo"}


def test_every_public_name_exists_and_is_listed() -> None:
    for name in ray_soup.__all__:
        assert getattr(ray_soup, name).__doc__
    assert dir(ray_soup) == sorted([*ray_soup.__all__, "__version__"])
    assert set(ray_soup._MODULES) < set(ray_soup.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lern'"):
        ray_soup.lern  # noqa: B018


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ray_soup; dir(ray_soup); print(sorted({'torch', 'ray', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_functions_stay_functions_after_modules_of_the_same_name_are_imported() -> None:
    code = (
        "import ray_soup.soups.learn, ray_soup.soups.compare, ray_soup.mixing.bake, ray_soup.tune.search; "
        "from ray_soup import *; print(all(callable(getattr(ray_soup, name)) for name in ray_soup.__all__), "
        "learn.__module__, ray_soup.recipe.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True ray_soup.api ray_soup.recipe\n"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Record the recipes that would be run."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(api, "run", lambda recipe, out, progress, **more: recipes.append(recipe))
    monkeypatch.setattr(api, "run_compare", lambda recipe, out, options, progress, overwrite: recipes.append(recipe))
    return recipes


def test_learn_takes_the_recipes_method_if_it_learns(ran: list[Recipe], tmp_path: Path) -> None:
    for method in ("uniform", "greedy", "best_single", "mehl+"):
        ray_soup.learn({**MINIMAL, "method": method}, tmp_path)
        assert ran[-1].method == "mehl+"
    ray_soup.learn({**MINIMAL, "method": "learned"}, tmp_path)
    assert (ran[-1].method, ran[-1].learn.lr) == ("learned", 0.05)
    ray_soup.learn({**MINIMAL, "method": "learned"}, tmp_path, "mehl", learn={"epochs": 2}, **{"learn.lr": 0.5})
    assert (ran[-1].method, ran[-1].learn.lr, ran[-1].learn.epochs) == ("mehl", 0.5, 2)


def test_every_command_takes_changes_of_the_recipe(ran: list[Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(MINIMAL)
    methods = {"uniform": "uniform", "greedy": "greedy", "best_single": "best_single", "compare": "mehl+"}
    for command, method in ((getattr(ray_soup, name), method) for name, method in methods.items()):
        command(recipe, tmp_path, **{"learn.seed": 7})
        assert (ran[-1].method, ran[-1].learn.seed) == (method, 7)


COMMANDS = ("learn", "greedy", "uniform", "best_single", "compare", "search", "finetune", "plan", "evaluate", "bake",
            "verify", "mix_state_dicts")  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_progress_is_a_keyword_of_every_command(name: str) -> None:
    parameters: Any = inspect.signature(getattr(ray_soup, name)).parameters
    assert parameters["progress"].kind is inspect.Parameter.KEYWORD_ONLY

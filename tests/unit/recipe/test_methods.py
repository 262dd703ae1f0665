"""The table of methods, and that recipes agree with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ray_soup.errors import RecipeError
from ray_soup.recipe import (
    BASELINES,
    BEST_SINGLE,
    DEFAULT_METHOD,
    LEARNED,
    METHODS,
    PEFT_MERGES,
    RESERVED_NAMES,
    SCHEDULES,
    Learn,
    Recipe,
    for_method,
    make_recipe,
    method_info,
)
from ray_soup.recipe.schema import Section

OF_STEPS = ("last", "schedule:uniform", "schedule:linear", "schedule:cosine", "schedule:minus_sqrt", "ema")
NAMES = ("best_single", "uniform", "greedy", "learned", "learned+", "mehl", "mehl+", *OF_STEPS)


def test_the_table_lists_the_methods_in_the_order_of_tables() -> None:
    assert tuple(METHODS) == NAMES
    assert all(name == method.name for name, method in METHODS.items())
    assert LEARNED == ("learned", "learned+", "mehl", "mehl+")
    assert BASELINES == ("best_single", "greedy")
    assert (BEST_SINGLE, DEFAULT_METHOD) == ("best_single", "mehl+")
    others = {*PEFT_MERGES, "ensemble", "trained", "mehl+ polished"}
    assert {*NAMES, *others} - set(OF_STEPS) == RESERVED_NAMES  # names of ingredients stay what they were
    assert tuple(name for name, method in METHODS.items() if method.needs_steps) == OF_STEPS
    assert OF_STEPS[1:] == SCHEDULES


def test_the_table_says_what_a_comparison_does_with_a_method() -> None:
    assert [name for name, method in METHODS.items() if not method.uses_seed] == ["best_single", "uniform", "greedy", "last"]
    assert [name for name, method in METHODS.items() if method.uses_model_batches] == ["mehl", "mehl+"]
    assert [name for name, method in METHODS.items() if method.is_reference] == ["best_single", "last"]
    assert [name for name, method in METHODS.items() if not method.needs_data] == ["uniform", *OF_STEPS]
    on = {
        series: [name for name, method in METHODS.items() if series in method.on_subsets]
        for series in ("dropped", "counted")
    }
    assert on == {"dropped": ["best_single", "uniform", "greedy", "mehl+"], "counted": ["greedy", "mehl+"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_its_defaults_from_the_table(name: str) -> None:
    recipe, info = make_recipe({"model": "a:b", "method": name}), METHODS[name]
    assert recipe.info is info
    assert method_info(name) is info
    assert recipe.blocks == info.blocks
    assert recipe.learn == Learn(**info.learn)
    assert for_method(make_recipe({"model": "a:b"}), name) == recipe


def test_the_recipes_default_method_is_the_tables() -> None:
    assert make_recipe({"model": "a:b"}) == make_recipe({"model": "a:b", "method": DEFAULT_METHOD})


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RecipeError, match=r"method: found 'mehl\+\+'; expected one of best_single, uniform, greedy, learned"
    ):
        method_info("mehl++")


def test_every_key_has_a_description() -> None:
    def undescribed(section: type[Section], prefix: str = "") -> list[str]:
        found = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                assert field.annotation.__doc__
                found += undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                found.append(prefix + name)
        return found

    assert undescribed(Recipe) == []


def test_recipes_load_without_torch_and_ray() -> None:
    code = "import sys, ray_soup.recipe; print(sorted({'torch', 'ray', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

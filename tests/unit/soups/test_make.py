"""The table of methods and the functions that implement them."""

from __future__ import annotations

import ast

from ray_soup.recipe import METHODS
from ray_soup.soups.methods.registry import MAKERS
from tests.conftest import ROOT

UNAMBIGUOUS = {"best_single", "learned", "learned+", "mehl", "mehl+"}  # "uniform" is a distribution, too
MAY_NAME_METHODS = {"__init__.py", "recipe/methods.py", "recipe/schema.py", "soups/methods/registry.py"}
"""Besides the registry: functions called like methods, and values of `baseline`."""


def test_every_method_has_a_function_and_every_function_a_row_in_the_table() -> None:
    assert list(MAKERS) == list(METHODS)


def test_no_other_module_asks_for_a_method_by_name() -> None:
    package = ROOT / "ray_soup"
    for path in package.rglob("*.py"):
        if str(path.relative_to(package)) in MAY_NAME_METHODS:
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        named = {s for s in strings if isinstance(s, str)} & UNAMBIGUOUS
        assert not named, f"{path} names the methods {named}"

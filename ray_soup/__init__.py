"""ray_soup: one model out of all the checkpoints of a sweep."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from ray_soup.task.functions import installed_first as _installed_first

if _TYPE_CHECKING:
    from ray_soup.api import (
        bake,
        best_single,
        compare,
        evaluate,
        finetune,
        greedy,
        inspect,
        learn,
        plan,
        search,
        uniform,
        verify,
    )  # fmt: skip
    from ray_soup.errors import SoupError
    from ray_soup.mixing.coefficients import Coefficients, load_coefficients
    from ray_soup.recipe import Recipe, load_recipe
    from ray_soup.soups.in_memory import MixedSoup, mix_state_dicts
    from ray_soup.soups.methods.interface import Session
    from ray_soup.soups.output import Soup
    from ray_soup.soups.results import load_results
    from ray_soup.task.loading import load_model
    from ray_soup.task.objective import Objective

_installed_first()  # before torch and others are imported: in a worker process of Ray the current folder comes first
__version__ = "0.2.0"
__all__ = [
    "Coefficients", "MixedSoup", "Objective", "Recipe", "Session", "Soup", "SoupError", "bake", "best_single", "compare",
    "evaluate", "finetune", "greedy", "inspect", "learn", "load_coefficients", "load_model", "load_recipe", "load_results",
    "mix_state_dicts", "plan", "search", "uniform", "verify",
]  # fmt: skip
_MODULES = {
    "Coefficients": "mixing.coefficients", "MixedSoup": "soups.in_memory", "Objective": "task.objective",
    "Recipe": "recipe", "Session": "soups.methods.interface", "Soup": "soups.output", "SoupError": "errors",
    "load_coefficients": "mixing.coefficients", "load_model": "task.loading", "load_recipe": "recipe",
    "load_results": "soups.results", "mix_state_dicts": "soups.in_memory",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name on first use: torch and Ray take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(_import_module(f"{__name__}.{_MODULES.get(name, 'api')}"), name)
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

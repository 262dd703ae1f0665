"""ray_soup: one model out of all the checkpoints of a sweep."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_soup.coefficients import Coefficients, load_coefficients
    from ray_soup.errors import SoupError
    from ray_soup.folder import Soup
    from ray_soup.recipe import Recipe, load_recipe
    from ray_soup.soups import bake_soup, compare_soups, greedy_soup, learn_soup, search_soup, uniform_soup
    from ray_soup.state_dicts import MixedSoup, mix_state_dicts

__version__ = "0.1.0"
__all__ = [
    "Coefficients", "MixedSoup", "Recipe", "Soup", "SoupError", "bake_soup", "compare_soups", "greedy_soup", "learn_soup",
    "load_coefficients", "load_recipe", "mix_state_dicts", "search_soup", "uniform_soup",
]  # fmt: skip
_MODULES = {
    "Coefficients": "coefficients", "MixedSoup": "state_dicts", "Recipe": "recipe", "Soup": "folder", "SoupError": "errors",
    "load_coefficients": "coefficients", "load_recipe": "recipe", "mix_state_dicts": "state_dicts",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Names are imported when they are asked for: torch and Ray take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'soups')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

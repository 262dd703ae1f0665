"""ray_soup: one model out of all the checkpoints of a sweep."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_soup.coefficients import Coefficients, load_coefficients
    from ray_soup.errors import SoupError
    from ray_soup.folder import Soup
    from ray_soup.recipe import Recipe, load_recipe
    from ray_soup.soups import bake, compare, greedy, learn, search, uniform
    from ray_soup.state_dicts import MixedSoup, mix_state_dicts

__version__ = "0.1.0"
__all__ = [
    "Coefficients", "MixedSoup", "Recipe", "Soup", "SoupError", "bake", "compare", "greedy", "learn", "load_coefficients",
    "load_recipe", "mix_state_dicts", "search", "uniform",
]  # fmt: skip
_MODULES = {
    "Coefficients": "coefficients", "MixedSoup": "state_dicts", "Recipe": "recipe", "Soup": "folder", "SoupError": "errors",
    "load_coefficients": "coefficients", "load_recipe": "recipe", "mix_state_dicts": "state_dicts",
}  # fmt: skip


class _Package(ModuleType):
    """Names are imported when they are asked for: torch and Ray take seconds. `ray_soup.learn` is the function even after
    the module of that name was imported."""

    def __getattribute__(self, name: str) -> Any:
        if name in __all__:
            return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'soups')}"), name)
        return super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package

"""The recipe: the validated description of a run, and the table of methods. Imports ray_soup.errors only."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from ray_soup.recipe.distributions import DISTRIBUTIONS as DISTRIBUTIONS
    from ray_soup.recipe.fields import Section as Section
    from ray_soup.recipe.learning import Learn as Learn
    from ray_soup.recipe.load import as_recipe as as_recipe
    from ray_soup.recipe.load import dump_recipe as dump_recipe
    from ray_soup.recipe.load import for_method as for_method
    from ray_soup.recipe.load import load_recipe as load_recipe
    from ray_soup.recipe.load import make_recipe as make_recipe
    from ray_soup.recipe.load import parse_overrides as parse_overrides
    from ray_soup.recipe.load import with_changes as with_changes
    from ray_soup.recipe.methods import BASELINES as BASELINES
    from ray_soup.recipe.methods import BEST_SINGLE as BEST_SINGLE
    from ray_soup.recipe.methods import DEFAULT_METHOD as DEFAULT_METHOD
    from ray_soup.recipe.methods import LEARNED as LEARNED
    from ray_soup.recipe.methods import METHODS as METHODS
    from ray_soup.recipe.methods import PEFT_MERGES as PEFT_MERGES
    from ray_soup.recipe.methods import POLISHED as POLISHED
    from ray_soup.recipe.methods import RESERVED_NAMES as RESERVED_NAMES
    from ray_soup.recipe.methods import SCHEDULES as SCHEDULES
    from ray_soup.recipe.methods import TRAINED as TRAINED
    from ray_soup.recipe.methods import MethodInfo as MethodInfo
    from ray_soup.recipe.methods import method_info as method_info
    from ray_soup.recipe.methods import own_function as own_function
    from ray_soup.recipe.paths import absolute as absolute
    from ray_soup.recipe.paths import absolute_paths as absolute_paths
    from ray_soup.recipe.paths import is_function as is_function
    from ray_soup.recipe.preprocessing import Preprocessing as Preprocessing
    from ray_soup.recipe.schema import ActorsSection as ActorsSection
    from ray_soup.recipe.schema import Data as Data
    from ray_soup.recipe.schema import Directions as Directions
    from ray_soup.recipe.schema import Greedy as Greedy
    from ray_soup.recipe.schema import Recipe as Recipe
    from ray_soup.recipe.schema import Schedule as Schedule
    from ray_soup.recipe.tuning import Finetune as Finetune
    from ray_soup.recipe.tuning import Polish as Polish
    from ray_soup.recipe.tuning import Search as Search
    from ray_soup.recipe.tuning import Trunk as Trunk

_NAMES = {  # by module
    "distributions": "DISTRIBUTIONS",
    "fields": "Section",
    "learning": "Learn",
    "load": "as_recipe dump_recipe for_method load_recipe make_recipe parse_overrides with_changes",
    "methods": "BASELINES BEST_SINGLE DEFAULT_METHOD LEARNED METHODS PEFT_MERGES POLISHED RESERVED_NAMES SCHEDULES TRAINED "
    "MethodInfo method_info own_function",
    "paths": "absolute absolute_paths is_function",
    "preprocessing": "Preprocessing",
    "schema": "ActorsSection Data Directions Greedy Recipe Schedule",
    "tuning": "Finetune Polish Search Trunk",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a name on first use: what checks recipes takes longer to import than `ray-soup --help` may."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found

"""The table of methods: the name, kind, description and defaults of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Literal

from ray_soup.errors import RecipeError
from ray_soup.recipe.paths import is_function
from ray_soup.recipe.plain import shown

Kind = Literal["selection", "schedule", "hyperplane", "softmax", "own"]


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """One method. A new method is one entry of METHODS and one function in ray_soup.soups.methods."""

    name: str
    kind: Kind
    """selection: chooses ingredients and averages them; schedule: weights of the steps of one run by a formula;
    hyperplane: coefficients of any sign that sum to 1; softmax: positive coefficients that sum to 1; own: a function of the
    user's."""
    description: str
    """One sentence for help texts."""
    blocks: str = "model"
    """Default of the recipe key `blocks`."""
    learn: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the recipe section `learn` that differ from the section's own."""
    needs_data: bool = True
    """Whether the method needs data.fit."""
    needs_steps: bool = False
    """Whether the ingredients must be the steps of one training run."""
    for_uneven_steps: bool = False
    """Whether the method equals another one of the table if the steps of the run are equidistant."""
    is_reference: bool = False
    """Whether the method returns an ingredient and not a soup."""
    is_baseline: bool = False
    """Whether a comparison tests every soup against this method."""
    on_subsets: tuple[str, ...] = ()
    """The series of a comparison that include the method: "dropped" (without the best ingredients), "counted" (with fewer
    ingredients)."""

    @property
    def learns(self) -> bool:
        """Whether the method learns coefficients by gradient descent."""
        return self.kind in ("hyperplane", "softmax")

    @property
    def is_own(self) -> bool:
        """Whether the method is a function of the user's."""
        return self.kind == "own"

    @property
    def uses_seed(self) -> bool:
        """Whether the result depends on learn.seed, if only by the split into fit and select."""
        return self.kind != "selection"

    @property
    def uses_model_batches(self) -> bool:
        """Whether the method can move the coordinates of some ingredients while the others stay in place."""
        return self.kind == "hyperplane"


SOFTMAX_LEARN: Mapping[str, Any] = {"lr": 0.05, "batch_size": 256, "whiten": 0.0}
"""Settings of Learned-Soup (Wortsman et al. 2022), which has no directions to whiten."""


def _of_steps(name: str, description: str, kind: Kind = "schedule", **flags: Any) -> MethodInfo:
    """Return a method for the steps of one training run."""
    return MethodInfo(name=name, kind=kind, description=description, needs_data=False, needs_steps=True, **flags)


METHODS: dict[str, MethodInfo] = {
    method.name: method
    for method in (
        MethodInfo(
            name="best_single",
            kind="selection",
            description="Take the ingredient that is most accurate on held-out data.",
            is_reference=True,
            is_baseline=True,
            on_subsets=("dropped",),
        ),
        MethodInfo(
            name="uniform",
            kind="selection",
            description="Average all ingredients.",
            needs_data=False,
            on_subsets=("dropped",),
        ),
        MethodInfo(
            name="greedy",
            kind="selection",
            description="Average the ingredients that help, tried from the best down.",
            is_baseline=True,
            on_subsets=("dropped", "counted"),
        ),
        MethodInfo(
            name="learned",
            kind="softmax",
            description="Learn one positive coefficient per ingredient (Learned-Soup).",
            learn=SOFTMAX_LEARN,
        ),
        MethodInfo(
            name="learned+",
            kind="softmax",
            description="Learn one positive coefficient per ingredient and tensor (Learned-Soup).",
            blocks="tensor",
            learn=SOFTMAX_LEARN,
        ),
        MethodInfo(
            name="mehl",
            kind="hyperplane",
            description="Learn one coefficient of any sign per ingredient (MEHL-Soup).",
        ),
        MethodInfo(
            name="mehl+",
            kind="hyperplane",
            description="Learn coefficients of any sign for each tensor, or for groups of its rows (MEHL-Soup).",
            blocks="auto",
            on_subsets=("dropped", "counted"),
        ),
        _of_steps("last", "Take the last checkpoint of one run.", "selection", is_reference=True),
        _of_steps("schedule:uniform", "Average the last checkpoints of one run."),
        _of_steps(
            "schedule:linear",
            "Mix the last checkpoints of one run as if its learning rate had decayed linearly.",
            for_uneven_steps=True,
        ),
        _of_steps(
            "schedule:cosine", "Mix the last checkpoints of one run as if its learning rate had decayed along a cosine."
        ),
        _of_steps(
            "schedule:minus_sqrt", "Mix the last checkpoints of one run as if its learning rate had decayed as 1 - sqrt(x)."
        ),
        _of_steps("ema", "Take the exponential moving average of the checkpoints of one run."),
    )
}
"""Every method by its name, in the order in which tables list them."""

LEARNED = tuple(name for name, method in METHODS.items() if method.learns)
"""Names of the methods that learn."""
SCHEDULES = tuple(name for name, method in METHODS.items() if method.kind == "schedule")
"""Names of the methods that weight the steps of one run by a formula."""
BASELINES = tuple(name for name, method in METHODS.items() if method.is_baseline)
"""Names of the methods that a comparison tests every soup against."""
BEST_SINGLE = "best_single"
DEFAULT_METHOD = "mehl+"
PEFT_MERGES = ("peft:linear", "peft:cat", "peft:svd", "peft:ties")
"""Names of the rows in which a comparison of adapters shows PEFT's own merges."""
TRAINED = "trained"
"""Name of the row in which a comparison shows all weights, trained on the same data from the uniform soup."""
POLISHED = f"{DEFAULT_METHOD} polished"
"""Name of the row of the soup all of whose weights are trained as the recipe says."""
RESERVED_NAMES = frozenset(
    {*(name for name, method in METHODS.items() if not method.needs_steps), *PEFT_MERGES, "ensemble", TRAINED, POLISHED}
)
"""Names in results.jsonl that an ingredient must not have; steps of a run are called otherwise."""
ENTRY_POINTS = "ray_soup.methods"
"""The group of entry points whose names are methods."""
EXPECTED = (
    f"one of {', '.join(METHODS)}; package.module:function for a function of yours; or the name of an installed entry point "
    f"in the group {ENTRY_POINTS}"
)
"""What can be a method."""


def own_function(name: str) -> str | None:
    """Return `package.module:function` for a method of the user's: its own name, or what an entry point of that name says.

    None if it is no such method.
    """
    if name in METHODS or name.startswith(("schedule:", "peft:")):
        return None
    if is_function(name):
        return name
    found = next(iter(entry_points(group=ENTRY_POINTS, name=name)), None)
    return None if found is None else found.value.partition("[")[0].replace(" ", "")


def find_method(name: object) -> MethodInfo | None:
    """Look up a method by its name; None if there is no such method."""
    if not isinstance(name, str) or name in METHODS:
        return METHODS.get(name) if isinstance(name, str) else None
    function = own_function(name)
    if function is None:
        return None
    return MethodInfo(name=name, kind="own", description=f"Call the function {function}.", needs_data=False)


def method_info(name: str) -> MethodInfo:
    """Look up a method by its name. Raises RecipeError if there is no such method."""
    found = find_method(name)
    if found is None:
        raise RecipeError(f"method: found {shown(name)}; expected {EXPECTED}. Choose one of these.")
    return found

"""The schedules: weights of the last steps of a run, with the window or the decay that is best on select."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_soup.errors import SoupError
from ray_soup.mixing.schedules import DECAYS, windows
from ray_soup.recipe import Recipe
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import Subset
from ray_soup.soups.trajectory import fixed_weights, is_chosen, is_shaped, steps_of, weights
from ray_soup.task.choices import cost, figures_on_select

if TYPE_CHECKING:
    from ray_soup.soups.session import Session as RunSession


def scheduled(session: Session) -> NDArray[np.float64]:
    """Mix the last steps of one run by a schedule, or by their moving average."""
    choice = choose(session.run) if is_chosen(session.recipe) else fixed(session)
    session.figures |= choice.record(session)
    session.notes.append(choice.note(session.recipe.method, session.figures, len(session.names)))
    return choice.weights


@dataclass
class Choice:
    """The weights that a schedule gives to the steps of a run, and how they were chosen."""

    weights: NDArray[np.float64]
    """float64 [K], in the order of the ingredients."""
    window: int
    """Number of last steps that were mixed."""
    decay: float | None = None
    """The decay of the moving average; None for the schedules."""
    tried: list[dict[str, float]] = field(default_factory=list)
    """The figures on select of every window or decay; empty if nothing was to be chosen."""
    looked: int = 0
    """Number of examples that these were evaluated on, and that running statistics were estimated on."""

    def record(self, session: Subset) -> dict[str, Any]:
        """Return the figures for run.json: the window, the steps in it, and what was tried."""
        chosen = [session.inputs.ingredients[k] for k in session.subset]
        steps = sorted(steps_of(chosen) or ())[-self.window :]
        found: dict[str, Any] = {"window": self.window} | ({} if self.decay is None else {"decay": self.decay})
        return {"image_passes": self.looked, "schedule": {**found, "steps": steps, "tried": self.tried}}

    def note(self, method: str, record: dict[str, Any], total: int) -> str:
        """Say which steps were mixed, for the user."""
        steps, what = record["schedule"]["steps"], "window" if self.decay is None else "decay"
        by = f", with a decay of {self.decay:g}" if self.decay is not None else ""
        how = f"; the {what} is the best of {len(self.tried)} on select" if len(self.tried) > 1 else ""
        return f"{method}: mixed the last {self.window} of {total} steps, {steps[0]} to {steps[-1]}{by}{how}."


def fixed(session: Subset) -> Choice:
    """Return the weights of a schedule whose window and decay are numbers."""
    recipe, ingredients = session.recipe, [session.inputs.ingredients[k] for k in session.subset]
    ((window, decay),) = _candidates(recipe, len(ingredients))
    return Choice(fixed_weights(recipe, ingredients), window, decay)


def choose(session: RunSession) -> Choice:
    """Return the weights of the session's schedule; what is `auto` is the best on select, by the figure of select_by."""
    recipe, ingredients = session.recipe, [session.inputs.ingredients[k] for k in session.subset]
    if not is_chosen(recipe):
        return fixed(session)
    candidates = _candidates(recipe, len(ingredients))
    select, calibration = session.splits["select"], session.calibration(CALIBRATION_WHILE_CHOOSING)
    tried: list[dict[str, float]] = []
    costs: list[float] = []
    for done, (window, decay) in enumerate(candidates):
        session.progress(f"trying {recipe.method}", done, len(candidates))
        values = np.zeros(len(session.inputs.ingredients))
        values[list(session.subset)] = weights(recipe, ingredients, window, decay)
        score = session.pool.try_mixture(values, [select], calibration)
        costs.append(cost(score, recipe.select_by))
        named: dict[str, float] = {"window": window} if decay is None else {"window": window, "decay": decay}
        tried.append(named | figures_on_select(score))
    session.pool.forget()
    known = [number for number, value in enumerate(costs) if not math.isnan(value)]
    if not known:
        raise SoupError(f"{recipe.method}: the loss on select is not finite, whatever is tried. Look for NaN in the data.")
    window, decay = candidates[min(known, key=lambda number: costs[number])]
    looked = len(candidates) * (len(select) + sum(map(len, calibration)))
    return Choice(weights(recipe, ingredients, window, decay), window, decay, tried, looked)


def _candidates(recipe: Recipe, count: int) -> list[tuple[int, float | None]]:
    """Return the windows and decays to try for `count` steps."""
    window, decay = recipe.schedule.window, recipe.schedule.decay
    if is_shaped(recipe):
        return [(one, None) for one in (windows(count) if window == "auto" else [window])]
    return [(count if window == "auto" else window, one) for one in (DECAYS if decay == "auto" else [decay])]

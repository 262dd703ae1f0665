"""The methods: one function `(session) -> Mixture` each.

To add a method, write a function here, and add a row to MAKERS and one to METHODS in ray_soup/recipe/methods.py, with kind,
description and defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing.bake import soup_range, written_dtype
from ray_soup.mixing.blocks import Layout, Partition, partition
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.running_statistics import Statistics
from ray_soup.mixing.spectral import singular_vectors
from ray_soup.recipe import SCHEDULES, Recipe
from ray_soup.soups.beginnings import beginnings
from ray_soup.soups.greedy import GreedySearch, greedy
from ray_soup.soups.learn import learn, refit_steps, summary
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.schedule import choose
from ray_soup.soups.session import CALIBRATION_WHILE_CHOOSING, Inputs, Session
from ray_soup.soups.start import began_note, began_record
from ray_soup.soups.state import LearnState
from ray_soup.soups.trajectory import fixed_weights, order_of
from ray_soup.task.choices import cost_in, ranking


@dataclass
class Mixture:
    """The coefficients of a soup, and how they were found."""

    coefficients: Coefficients
    figures: dict[str, Any] = field(default_factory=dict)
    """Keys for run.json: steps, image_passes, curve and others."""
    notes: list[str] = field(default_factory=list)
    """Notes for the user, one sentence or more each."""
    before: Coefficients | None = None
    """The coefficients before a refit on fit and select: figures on select are theirs."""


def make(session: Session) -> Mixture:
    """Make the soup that the session's recipe describes; a learning method resumes from `session.state_file`."""
    return MAKERS[session.recipe.method](session)


def uniform(session: Session) -> Mixture:
    """Average all ingredients."""
    return Mixture(_on_whole_model(session, mean_of(range(len(session.subset)), len(session.subset))))


def best_single(session: Session) -> Mixture:
    """Take the ingredient that is best on fit and select together."""
    figures, passes = _held_out_figures(session)
    held_out = session.individual()
    best = ranking({k: held_out[k] for k in session.subset}, session.recipe.select_by)[0]
    name = session.inputs.names[best]
    figures |= {"best_single": name, "image_passes": passes}
    values = mean_of([session.subset.index(best)], len(session.subset))
    return Mixture(
        _on_whole_model(session, values), figures, [f"Best single ingredient on fit and select together: {name}."]
    )


def greedy_soup(session: Session) -> Mixture:
    """Average the ingredients that a greedy search keeps."""
    figures, passes = _held_out_figures(session)
    held_out = session.individual()
    search = greedy(
        session.pool,
        {k: held_out[k] for k in session.subset},
        session.held_out,
        session.recipe.greedy.keep,
        lambda done, total: session.progress("greedy", done, total),
        session.calibration(CALIBRATION_WHILE_CHOOSING),
        session.recipe.select_by,
    )
    share = search.looked / max(1, search.candidates * len(held_out[0]))
    figures |= {"image_passes": passes + search.looked, "greedy": _greedy_figures(session.inputs, search, share)}
    note = (
        f"Greedy kept {len(search.kept)} of {len(session.subset)} ingredients; it evaluated its candidates on {share:.0%} "
        "of the held-out examples."
    )
    values = mean_of([session.subset.index(k) for k in search.kept], len(session.subset))
    return Mixture(_on_whole_model(session, values), figures, [note])


def last(session: Session) -> Mixture:
    """Take the last step of one run."""
    return Mixture(_on_whole_model(session, mean_of(_order(session)[-1:], len(session.subset))))


def scheduled(session: Session) -> Mixture:
    """Mix the last steps of one run by a schedule, or by their moving average."""
    choice, recipe = choose(session), session.recipe
    figures = choice.record(session)
    note = choice.note(recipe.method, figures, len(session.subset))
    return Mixture(_on_whole_model(session, choice.weights[:, None]), figures, [note])


def learned(session: Session) -> Mixture:
    """Learn the coefficients by gradient descent: MEHL-Soup on the hyperplane, or Learned-Soup through a softmax."""
    recipe, softmax = session.recipe, session.recipe.info.kind == "softmax"
    store = session.open_store(session.subset, session.blocks)
    begins = beginnings(session, store)

    def after_step(step: int, steps: int, state: LearnState) -> None:
        what = "learning" if state.before is None else "refitting"
        session.progress(f"{what} {recipe.method}", step, steps)

    state = learn(
        recipe, session.pool, store.norms, session.splits, session.model_batch, session.state_file, after_step,
        session.after_epoch, session.calibration(CALIBRATION_WHILE_CHOOSING), session.learned_from(store),
        _order(session) if recipe.learn.smoothness else (), starts=begins,
    )  # fmt: skip
    notes: list[str] = []
    asked, count = recipe.learn.model_batch, len(session.subset)
    if not softmax and asked != "auto" and asked > count:
        notes.append(f"learn.model_batch is {asked:,}, and there are {count} ingredients: all of them moved at a time.")
    if begins:
        notes += began_note(recipe.method, begins, state)
    if not (state.y if state.before is None else state.before).any():
        notes.append(f"{recipe.method}: no point was better on select than the uniform soup, so this is the uniform soup.")
    elif state.start is not None and state.curve[0] is min(state.curve, key=lambda line: cost_in(line, recipe.select_by)):
        notes.append(f"{recipe.method}: no point was better on select than this start, so the soup is that of the start.")
    if softmax and not store.output and state.factor.item() != 1:  # it stays 1 where outputs are no logits
        notes.append(
            f"{recipe.method}: no layer of the model scales its logits, so the learned factor {state.factor.item():.4f} "
            "on the logits is stored with the coefficients, and the model's NLL is reported without it."
        )
    of = parametrization(softmax, store.norms)

    def soup(y: torch.Tensor, factor: float) -> Coefficients:
        scaled = {"factor": factor, "factored": store.output} if softmax else {}
        return coefficients_of(session, of.coefficients(y.numpy()), store.partition, **scaled)

    made = Mixture(soup(state.y, state.factor.item()), summary(state), notes)
    if begins:
        made.figures["start"] = began_record(begins, state)
    if state.before is not None and refit_steps(state):
        made.before = soup(state.before, state.before_factor)
        made.notes.append(
            f"{recipe.method}: {refit_steps(state):,} steps of the refit learned on fit and select together. Figures on "
            "select are those of the soup before the refit; all others are those of the soup after it."
        )
    return made


MAKERS: dict[str, Callable[[Session], Mixture]] = {
    "best_single": best_single,
    "uniform": uniform,
    "greedy": greedy_soup,
    "learned": learned,
    "learned+": learned,
    "mehl": learned,
    "mehl+": learned,
    "last": last,
    **dict.fromkeys(SCHEDULES, scheduled),
}


def mean_of(kept: Sequence[int], ingredients: int) -> np.ndarray:
    """Return the coefficients, float64 [K, 1], of the plain mean of the ingredients `kept`."""
    values = np.zeros((ingredients, 1))
    values[list(kept)] = 1 / len(kept)
    return values


def coefficients_of(session: Session, values: np.ndarray, blocks: Partition, **options: Any) -> Coefficients:
    """Attach the names of ingredients, blocks and tensors to the coefficients `values`, float64 [K, B]."""
    layout = session.inputs.layout
    block_of = dict(zip(layout.names, blocks.block.tolist(), strict=True))
    cuts = {layout.names[tensor]: elements for tensor, elements in blocks.cuts.items()}
    names = tuple(session.inputs.names[k] for k in session.subset)
    policy = buffer_policy(session.recipe)
    made = Coefficients(values, names, blocks.names, block_of, policy, layout.tied, cuts=cuts, **options)
    return with_computed_buffers(made, [session.inputs.ingredients[k] for k in session.subset], layout, session.recipe)


def coefficients_without_data(recipe: Recipe, inputs: Inputs) -> Coefficients:
    """Return the coefficients of a method that needs neither data nor actors."""
    if recipe.info.needs_steps:
        is_last = recipe.info.is_reference
        kept = order_of(inputs.ingredients)[-1:]
        values = mean_of(kept, len(inputs.ingredients)) if is_last else fixed_weights(recipe, inputs.ingredients)[:, None]
        return _without_actors(recipe, inputs, values)
    return mean_coefficients(recipe, inputs, inputs.everything)


def mean_coefficients(recipe: Recipe, inputs: Inputs, kept: Sequence[int]) -> Coefficients:
    """Return the coefficients of the plain mean of the ingredients `kept`, which needs no actors."""
    return _without_actors(recipe, inputs, mean_of(kept, len(inputs.ingredients)))


def _without_actors(recipe: Recipe, inputs: Inputs, values: np.ndarray) -> Coefficients:
    layout = inputs.layout
    whole = partition(layout, "model")
    block_of = dict.fromkeys(layout.names, 0)
    made = Coefficients(values, inputs.names, whole.names, block_of, buffer_policy(recipe), layout.tied)
    return with_computed_buffers(made, inputs.ingredients, layout, recipe)


def with_computed_buffers(
    coefficients: Coefficients, ingredients: Sequence[Ingredient], layout: Layout, recipe: Recipe
) -> Coefficients:
    """Add the buffers that are functions of the soup's weights: the singular vectors of spectral normalization.

    A soup of one ingredient keeps that ingredient's buffers.

    Args:
        coefficients: the coefficients of the soup.
        ingredients: its K ingredients.
        layout: the layout of the model.
        recipe: the recipe, for the dtype of the soup.
    """
    if len(coefficients.used()) < 2:
        return coefficients
    found: Statistics = {}
    shapes = layout.state_shapes
    for norm in layout.spectral:
        name = layout.tied.get(norm.weight, norm.weight)
        dtype = written_dtype(ingredients, name, recipe.out_dtype)
        weight = soup_range(coefficients, ingredients, name, 0, math.prod(shapes[name]), dtype)
        vectors = singular_vectors(weight.view(shapes[name]), norm.dim)
        found |= {key: vector.astype(np.float32) for key, vector in zip((norm.u, norm.v), vectors, strict=True)}
    return replace(coefficients, statistics=coefficients.statistics | found)


def buffer_policy(recipe: Recipe) -> str:
    """Return how buffers are mixed, apart from those that are re-estimated."""
    return "first" if recipe.buffers == "first" else "average"


def _order(session: Session) -> list[int]:
    """Return the positions in the subset, ordered by step."""
    return order_of([session.inputs.ingredients[k] for k in session.subset])


def _on_whole_model(session: Session, values: np.ndarray) -> Coefficients:
    return coefficients_of(session, values, partition(session.inputs.layout, "model"))


def _held_out_figures(session: Session) -> tuple[dict[str, Any], int]:
    """Return the ingredients' figures on the held-out set, for run.json, and the number of examples evaluated."""
    outcomes, names = session.individual(), session.inputs.names
    known = {k: {name: getattr(outcomes[k], name) for name in ("accuracy", "nll", "metric")} for k in session.subset}
    figures = {names[k]: {name: value for name, value in known[k].items() if value is not None} for k in session.subset}
    return {"held_out": figures}, len(session.subset) * len(outcomes[0])


def _greedy_figures(inputs: Inputs, search: GreedySearch, share: float) -> dict[str, Any]:
    kept = [inputs.names[k] for k in search.kept]
    return {"kept": kept, "candidates": search.candidates, "looked_share": share}

"""The learned soups: MEHL-Soup on the hyperplane (Li et al. 2024), and Learned-Soup (Wortsman et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray_soup.actors.messages import StoreInfo
from ray_soup.io.lazy import torch
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.soups.beginnings import beginnings
from ray_soup.soups.curve import refit_steps, summary
from ray_soup.soups.granularity import stages
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING
from ray_soup.soups.learn import learn
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import Mixture, coefficients_of, order_in
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.start import Beginning, began_note, began_record
from ray_soup.soups.state import LearnState, StateCallback
from ray_soup.soups.together import tensor_of_each
from ray_soup.task.choices import cost_in

if TYPE_CHECKING:
    from ray_soup.soups.session import Session as RunSession


def learned(session: Session) -> Mixture:
    """Learn the coefficients by gradient descent: MEHL-Soup on the hyperplane, or Learned-Soup through a softmax."""
    run, recipe, softmax = session.run, session.recipe, session.recipe.info.kind == "softmax"

    def after_step(step: int, steps: int, state: LearnState) -> None:
        what = "learning" if state.before is None else "refitting"
        run.progress(f"{what} {recipe.method}", step, steps)

    store, begins, state = learn_in(run, after_step, run.after_epoch)
    notes: list[str] = []
    asked, count = recipe.learn.model_batch, len(run.subset)
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
        return coefficients_of(run, of.coefficients(y.numpy()), store.partition, **scaled)

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


def learn_in(
    session: RunSession, after_step: StateCallback, after_epoch: StateCallback, refits: bool = True
) -> tuple[StoreInfo, list[Beginning], LearnState]:
    """Open the directions of a session's soup and learn its coordinates, or resume from `session.state_file`.

    Callbacks and `refits` as for `learn`. Returns the directions, where learning could begin, and the last state.
    """
    recipe, store = session.recipe, session.open_store(session.subset, session.blocks)
    two = stages(recipe, session.blocks) > 1
    begins = beginnings(session, store)
    state = learn(
        recipe, session.pool, store.norms, session.splits, session.model_batch, session.state_file, after_step, after_epoch,
        session.calibration(CALIBRATION_WHILE_CHOOSING), session.learned_from(store),
        order_in(session) if recipe.learn.smoothness else (), refits, begins,
        tensor_of_each(store.partition, session.inputs.layout.sizes) if two else None,
    )  # fmt: skip
    return store, begins, state

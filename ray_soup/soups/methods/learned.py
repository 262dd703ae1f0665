"""The learned soups: MEHL-Soup on the hyperplane (Li et al. 2024), and Learned-Soup (Wortsman et al. 2022)."""

from __future__ import annotations

import torch

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.soups.beginnings import beginnings
from ray_soup.soups.learn import learn, refit_steps, summary
from ray_soup.soups.methods.interface import Session
from ray_soup.soups.mixture import Mixture, coefficients_of, order_in
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.session import CALIBRATION_WHILE_CHOOSING
from ray_soup.soups.start import began_note, began_record
from ray_soup.soups.state import LearnState
from ray_soup.task.choices import cost_in


def learned(session: Session) -> Mixture:
    """Learn the coefficients by gradient descent: MEHL-Soup on the hyperplane, or Learned-Soup through a softmax."""
    run, recipe, softmax = session.run, session.recipe, session.recipe.info.kind == "softmax"
    store = run.open_store(run.subset, run.blocks)
    begins = beginnings(run, store)

    def after_step(step: int, steps: int, state: LearnState) -> None:
        what = "learning" if state.before is None else "refitting"
        run.progress(f"{what} {recipe.method}", step, steps)

    state = learn(
        recipe, run.pool, store.norms, run.splits, run.model_batch, run.state_file, after_step,
        run.after_epoch, run.calibration(CALIBRATION_WHILE_CHOOSING), run.learned_from(store),
        order_in(run) if recipe.learn.smoothness else (), starts=begins,
    )  # fmt: skip
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

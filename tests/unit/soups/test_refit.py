"""learn.refit: the turns again, on fit and select together, and the figures of the soups before and after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ray_soup
from ray_soup.recipe import dump_recipe, for_method, make_recipe
from ray_soup.soups.curve import best_epochs, refit_steps, summary
from ray_soup.soups.optimize import learning_rate
from ray_soup.soups.report.tables import legend, quality, table
from ray_soup.soups.state import load_state
from ray_soup.soups.turns import joint_batches, model_batches
from ray_soup.task.data import Split, batch_positions
from tests import tiny
from tests.conftest import values
from tests.learning import Learner, by_autograd, same, stopping
from tests.unit.soups.test_in_memory import loader, states


@pytest.fixture(autouse=True)
def _save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)


@pytest.mark.parametrize("average", [False, True])
def test_a_refit_equals_autograd_on_fit_and_select_together(zoo: Path, tmp_path: Path, average: bool) -> None:
    """The rates are so high that turns end at points before their last, or where they began."""
    changes: dict[str, Any] = {"learn__model_batch": 5, "learn__epochs": 4, "learn__cosine_lr": False}
    changes["learn__lr"] = 0.1 if average else 0.05
    learner = Learner(zoo, learn__refit=True, learn__average=average, method="mehl", blocks="layer", **changes)
    state, options = learner.learn(tmp_path / "s.pt"), learner.recipe.learn
    epochs = [best_epochs(state.curve, turn, "auto") for turn in (0, 1)]
    assert 0 < sum(epochs) < 8
    rows = np.concatenate([learner.splits["fit"].rows, learner.splits["select"].rows])
    y = torch.zeros_like(state.y)
    for turn, chosen in enumerate(model_batches(8, 5, options.seed, 1)):
        steps = 8 * epochs[turn]
        order = [positions for n in range(4) for positions in batch_positions(597, 61, 1, 5, turn, n)]
        rates = [learning_rate(options, options.lr, step, 32) for step in range(steps)]
        iterates = by_autograd(learner, y, chosen, [rows[positions] for positions in order[:steps]], rates)
        if iterates:
            y[chosen] = torch.stack(iterates[-8:]).mean(0) if average else iterates[-1]
    torch.testing.assert_close(state.y, y, rtol=1e-3, atol=1e-4)
    assert refit_steps(state) == 8 * sum(epochs)
    assert state.steps == 64 + 8 * sum(epochs)
    plain = Learner(zoo, learn__average=average, method="mehl", blocks="layer", **changes).learn(tmp_path / "plain.pt")
    assert state.before is not None
    assert torch.equal(state.before, plain.y)
    assert (state.curve, state.best_cost) == (plain.curve, plain.best_cost)
    assert "refit" not in summary(plain)
    assert summary(state)["refit"] == {"steps": refit_steps(state)}


def test_a_turn_without_a_better_point_is_left_out(zoo: Path, tmp_path: Path) -> None:
    learner = Learner(zoo, learn__refit=True, learn__lr=1e4, learn__cosine_lr=False, learn__model_batch=4)
    state = learner.learn(tmp_path / "s.pt")
    assert refit_steps(state) == 0
    assert not state.y.any()
    assert not state.before.any()


@pytest.mark.parametrize("share", [True, False])
def test_a_pass_over_both_has_each_example_once(share: bool) -> None:
    fit, select = Split("fit", np.arange(3, 40, dtype=np.int32)), Split("select", np.arange(11, dtype=np.int32))
    if share:
        select = Split("fit", np.array([0, 1, 2, 40, 41], dtype=np.int32))
    total = 37 + len(select)
    batches = joint_batches(fit, select, 7, 1, 5, 0, 0)
    sizes = [sum(map(len, batch)) for batch in batches]
    assert (len(sizes), set(sizes[:-1]), sum(sizes)) == (-(-total // 7), {7}, total)
    seen = [(part.source, row) for batch in batches for part in batch for row in part.rows.tolist()]
    assert sorted(seen) == sorted((s.source, row) for s in (fit, select) for row in s.rows.tolist())
    assert all(len(part) for batch in batches for part in batch)
    again, other = joint_batches(fit, select, 7, 1, 5, 0, 0), joint_batches(fit, select, 7, 1, 5, 0, 1)
    for batch, same_batch in zip(batches, again, strict=True):
        assert [p.rows.tolist() for p in batch] == [p.rows.tolist() for p in same_batch]
    assert [p.rows.tolist() for p in batches[0]] != [p.rows.tolist() for p in other[0]]


def cuts(learner: Learner, folder: Path, first: int, last: int) -> Iterator[Path]:
    """Yield states of runs that were stopped in the first pass, after it, as the refit began, in it, and at its end."""
    for at in (first - 3, first + 1, first + 5, last):
        file = folder / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            learner.learn(file, stopping(at))
        found = load_state(file)
        assert found.steps == at - 1
        assert (found.before is not None) == (at > first)
        yield file
    file = folder / "between.pt"
    assert learner.learn(file, refits=False).before is None
    yield file


@pytest.mark.slow
@pytest.mark.parametrize("source", ["share", "file"])
def test_a_stopped_refit_is_bit_identical(conv_zoo: Path, tmp_path: Path, source: str) -> None:
    """With running statistics, a softmax and its factor, and two replicas; select is a share of fit, or a file."""
    select = 0.25 if source == "share" else str(conv_zoo / "test.npz")
    data = {"fit": str(conv_zoo / "heldout.npz"), "select": select}
    learner = Learner(
        conv_zoo, 2, 112, data=data, model="tests.tiny:build_conv", method="learned", learn__refit=True, learn__average=True,
        learn__batch_size=112, learn__lr=0.2,
    )  # fmt: skip
    whole = learner.learn(tmp_path / "whole.pt")
    first = int(whole.curve[-1]["steps"])
    assert refit_steps(whole) > 4
    assert not torch.equal(whole.y, whole.before)
    assert whole.factor.item() != whole.before_factor
    for file in cuts(learner, tmp_path, first, whole.steps):
        resumed = learner.learn(file)
        same(resumed, whole)
        assert torch.equal(resumed.before, whole.before)


def test_figures_on_select_are_those_before_the_refit_and_on_test_those_after_it(zoo: Path) -> None:
    settings: dict[str, Any] = {"learn": {"epochs": 2, "batch_size": 61}, "directions": {"dtype": "float32"}}
    given = states(zoo), loader(zoo, "heldout")
    plain = ray_soup.mix_state_dicts(tiny.Tiny(), *given, test=loader(zoo, "test"), **settings)
    settings["learn"]["refit"] = True
    soup = ray_soup.mix_state_dicts(tiny.Tiny(), *given, test=loader(zoo, "test"), **settings)
    for name in ("select_nll", "select_accuracy"):
        assert soup.figures[name] == plain.figures[name]
    assert soup.record["improvement"] == plain.record["improvement"]
    steps = soup.record["refit"]["steps"]
    assert soup.record["steps"] == plain.record["steps"] + steps
    assert sum(note.startswith(f"mehl+: {steps} steps of the refit") for note in soup.notes) == 1
    assert "refit" not in plain.record
    model = tiny.Tiny()
    arrays = np.load(zoo / "test.npz")
    for mixed in (plain, soup):
        model.load_state_dict(mixed.state_dict())
        with torch.inference_mode():
            logits = model.eval()(torch.from_numpy(arrays["images"]))
        nll = F.cross_entropy(logits, torch.from_numpy(arrays["labels"])).item()
        assert mixed.figures["test_nll"] == pytest.approx(nll, rel=1e-5)
    assert soup.figures["test_nll"] != plain.figures["test_nll"]


def test_tables_mark_figures_before_the_refit() -> None:
    rows = [
        {"model_name": "mehl+", "select_nll": 0.5, "test_nll": 0.6, "refit_steps": 40},
        {"model_name": "mehl", "select_nll": 0.5, "test_nll": 0.6},
    ]
    assert table(rows, quality(rows))[1] == [["mehl+", "0.5000†‡", "0.6000"], ["mehl", "0.5000†", "0.6000"]]
    record = {"examples": {"select": 1, "test": 1}}
    assert "‡ before the refit" in legend(record, rows)
    assert "‡" not in legend(record, rows[1:])


def test_the_key_is_dumped_only_if_it_is_set_and_carries_over_to_every_method(zoo: Path) -> None:
    assert "refit" not in dump_recipe(make_recipe(values(zoo)))
    recipe = make_recipe(values(zoo, learn__refit=True))
    assert "refit: true" in dump_recipe(recipe)
    assert for_method(recipe, "learned").learn.refit

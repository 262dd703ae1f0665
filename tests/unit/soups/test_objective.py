"""Learning with a loss and a metric of the recipe, label smoothing, and patience."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups.curve import stale_epochs
from ray_soup.soups.evaluations import figures_of
from ray_soup.soups.learn import learn
from ray_soup.soups.state import LearnState, load_state, save_state
from ray_soup.task.data import Split, cut_splits
from ray_soup.task.outcomes import join_outcomes, load_outcomes, save_outcomes
from tests.conftest import InProcess, values, yield_last
from tests.tiny import Tiny
from tests.unit.mixing.stores import dense, stored_directions
from tests.unit.task.objectives import focal

OBJECTIVES = "tests.unit.task.objectives"


def learned(pool: InProcess, file: Path, **callbacks: Any) -> LearnState:
    recipe, setup = pool.shards[0].recipe, pool.setup_info
    norms = pool.open_all(recipe.blocks).norms
    splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, recipe.learn.seed)
    return learn(recipe, pool, norms, splits, 8, file, **callbacks)


def pool_of(zoo: Path, **changes: Any) -> InProcess:
    return InProcess(make_recipe(values(zoo, directions={"dtype": "float32"}, **changes)))


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"learn__label_smoothing": 0.2}, lambda a, y: F.cross_entropy(a, y, label_smoothing=0.2, reduction="sum")),
        ({"loss": f"{OBJECTIVES}:focal"}, lambda a, y: focal(a, y).sum()),
    ],
)
def test_the_projected_gradient_of_a_loss_equals_autograd(zoo: Path, changes: dict[str, Any], reference: Any) -> None:
    """Autograd through a graph of all directions."""
    pool = pool_of(zoo, blocks="model", learn__micro_batch=7, **changes)
    pool.open_all("model")
    shard, layout = pool.shards[0], pool.layout
    x = np.full((8, 1), 0.01, np.float32) * np.arange(8, dtype=np.float32)[:, None]
    pool.begin(np.arange(8), np.zeros((8, 1)), "float32")
    (partial,) = pool.step(x, 1.5, Split("fit", np.arange(61, dtype=np.int32)))

    wide = torch.from_numpy(x[:, 0]).requires_grad_()
    factor = torch.tensor(1.5, requires_grad=True)
    center = torch.from_numpy(dense(zoo / "zoo", layout).mean(axis=0)).float()
    theta = center + wide @ torch.from_numpy(stored_directions(shard.store)).float()
    pieces = [t.view(s) for t, s in zip(theta.split(list(layout.sizes)), layout.shapes, strict=True)]
    arrays = np.load(zoo / "heldout.npz")
    images, labels = torch.from_numpy(arrays["images"][:61]), torch.from_numpy(arrays["labels"][:61])
    logits = torch.func.functional_call(Tiny(), dict(zip(layout.names, pieces, strict=True)), (images,))
    loss = reference(logits * factor, labels)
    loss.backward()
    assert partial.loss == pytest.approx(loss.item(), rel=1e-5)
    assert partial.by_factor == pytest.approx(factor.grad.item(), rel=1e-4)
    np.testing.assert_allclose(
        partial.gradient[:, 0], wide.grad.numpy(), rtol=1e-4, atol=1e-4 * float(wide.grad.abs().max())
    )


@pytest.mark.parametrize("method", ["mehl+", "learned"])
def test_cross_entropy_as_the_recipes_loss_is_bit_identical(zoo: Path, tmp_path: Path, method: str) -> None:
    plain = learned(pool_of(zoo, method=method), tmp_path / "plain.pt")
    own = learned(pool_of(zoo, method=method, loss=f"{OBJECTIVES}:summed"), tmp_path / "own.pt")
    assert torch.equal(plain.y, own.y)
    assert plain.curve == own.curve
    by_example = learned(pool_of(zoo, method=method, loss=f"{OBJECTIVES}:each"), tmp_path / "each.pt")
    assert torch.equal(plain.y, by_example.y)
    other = learned(pool_of(zoo, method=method, loss=f"{OBJECTIVES}:focal"), tmp_path / "focal.pt")
    assert not torch.equal(plain.y, other.y)
    assert other.curve[0]["select_nll"] < plain.curve[0]["select_nll"]  # select is scored with the same loss


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": f"{OBJECTIVES}:mean"}, "of three examples is .* Return losses"),
        ({"loss": f"{OBJECTIVES}:without_gradient"}, "has no gradient with respect to the logits"),
        ({"loss": f"{OBJECTIVES}:broken"}, r"broken raised RuntimeError: size mismatch"),
        ({"loss": f"{OBJECTIVES}:none"}, "has no 'none'"),
        ({"metric": f"{OBJECTIVES}:mean"}, r"returned \[\]; expected a score for each of 3 examples"),
    ],
)
def test_an_unsound_loss_or_metric_is_refused_when_actors_start(zoo: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?i){said}"):
        InProcess(make_recipe(values(zoo, **changes)))


def test_a_metric_is_reported_next_to_accuracy(zoo: Path, tmp_path: Path) -> None:
    plain, own = (InProcess(make_recipe(values(zoo, **m))) for m in ({}, {"metric": f"{OBJECTIVES}:in_top_2"}))
    assert plain.setup_info.fingerprint != own.setup_info.fingerprint  # outcomes in the cache lack the scores
    split = Split("test", np.arange(300, dtype=np.int32))
    path = str(zoo / "zoo" / "model_0.safetensors")
    (outcome,) = yield_last(own.shards[0].evaluate_file(path, [split], False))
    save_outcomes({"test": outcome}, tmp_path / "a.npz")
    loaded = load_outcomes(tmp_path / "a.npz")["test"]
    found = figures_of({"test": join_outcomes([loaded.at(np.arange(n, n + 150)) for n in (0, 150)])})
    arrays, model = np.load(zoo / "test.npz"), own.shards[0].replica.model
    logits = model(torch.from_numpy(arrays["images"][:300]))
    top = logits.topk(2).indices.numpy() == arrays["labels"][:300, None]
    assert found["test_metric"] == pytest.approx(top.any(axis=1).mean())
    assert found["test_metric"] > found["test_accuracy"] == pytest.approx(top[:, 0].mean())


class Killed(Exception):
    """Stands for the end of a process."""


def test_patience_ends_a_model_batch_and_a_resumed_run_ends_the_same(zoo: Path, tmp_path: Path) -> None:
    """Steps that only do harm after the first; the other run is killed after every epoch and resumed."""
    changes = {"learn": {"batch_size": 61, "epochs": 6, "lr": 3.0, "cosine_lr": False}, "blocks": "model"}
    pool = pool_of(zoo, **{**changes, "learn": {**changes["learn"], "patience": 2}})
    state = learned(pool, tmp_path / "whole.pt")
    nll = [line["select_nll"] for line in state.curve]
    assert len(nll) == int(np.argmin(nll)) + 3 < 7

    def kill(*_: Any) -> None:
        raise Killed

    for _ in range(len(nll) - 1):
        with pytest.raises(Killed):
            learned(pool, tmp_path / "cut.pt", after_epoch=kill)
    resumed = learned(pool, tmp_path / "cut.pt")
    assert torch.equal(resumed.y, state.y)
    assert resumed.curve == state.curve
    patient = learned(pool_of(zoo, **{**changes, "learn": {**changes["learn"], "patience": 6}}), tmp_path / "patient.pt")
    assert patient.curve[: len(nll)] == state.curve


def test_epochs_are_stale_since_the_last_improvement_in_this_turn(tmp_path: Path) -> None:
    def state(turn: int, *nll: tuple[int, int, float]) -> LearnState:
        curve = [{"turn": t, "epoch": e, "select_nll": value} for t, e, value in nll]
        return LearnState(torch.zeros(1, 1, dtype=torch.float64), turn=turn, curve=curve)

    first = [(0, -1, 5.0), (0, 0, 4.0), (0, 1, 4.5), (0, 2, 4.5)]
    assert stale_epochs(state(0), "auto") == 0
    assert stale_epochs(state(0, *first[:1]), "auto") == 0
    assert stale_epochs(state(0, *first[:2]), "auto") == 0
    assert stale_epochs(state(0, *first), "auto") == 2
    assert stale_epochs(state(1, *first), "auto") == 0
    assert stale_epochs(state(1, *first, (1, 0, 4.1)), "auto") == 1
    assert stale_epochs(state(1, *first, (1, 0, 4.1), (1, 1, 3.9)), "auto") == 0
    save_state(state(0, *first), tmp_path / "s.pt")
    assert stale_epochs(load_state(tmp_path / "s.pt"), "auto") == 2

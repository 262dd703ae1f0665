"""Losses and metrics of a recipe's own, label smoothing, and an end before the last epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ray_soup.data import Split, cut
from ray_soup.errors import RecipeError
from ray_soup.learn import State, learn, load_state, save_state, stale_epochs
from ray_soup.outcomes import join, load_outcomes, save_outcomes
from ray_soup.pipeline import figures_of
from ray_soup.recipe import make_recipe
from tests.conftest import InProcess, values, yield_last
from tests.test_directions import dense, widened
from tests.tiny import Tiny


def summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def each(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    log_p = F.log_softmax(logits, dim=1).gather(1, labels[:, None])[:, 0]
    return -((1 - log_p.exp()) ** 2) * log_p


def mean(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels)


def without_gradient(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(1) != labels).float()


def broken(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits @ labels


def in_top_2(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.topk(2).indices == labels[:, None]).any(1)


def bench(zoo: Path, **changes: Any) -> InProcess:
    recipe = make_recipe(values(zoo, directions={"dtype": "float32"}, **changes))
    actors = InProcess(recipe)
    actors.recipe = recipe
    actors.norms = actors.take_all(recipe.blocks).norms
    return actors


def learned(actors: InProcess, file: Path, **options: Any) -> State:
    recipe = actors.recipe
    splits = cut(recipe.data, actors.ready.sizes, actors.ready.fit_digests, recipe.learn.seed)
    return learn(recipe, actors, actors.norms, splits, 8, file, **options)


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"learn__label_smoothing": 0.2}, lambda a, y: F.cross_entropy(a, y, label_smoothing=0.2, reduction="sum")),
        ({"loss": "tests.test_objective:focal"}, lambda a, y: focal(a, y).sum()),
    ],
)
def test_the_projected_gradient_of_a_loss_is_autograd(zoo: Path, changes: dict[str, Any], reference: Any) -> None:
    """Through a graph of all directions."""
    actors = bench(zoo, blocks="model", learn__micro_batch=7, **changes)
    shard, layout = actors.shards[0], actors.layout
    x = np.full((8, 1), 0.01, np.float32) * np.arange(8, dtype=np.float32)[:, None]
    actors.begin(np.arange(8), np.zeros((8, 1)), "float32")
    partial = shard.step(x, 1.5, Split("fit", np.arange(61, dtype=np.int32)))

    wide = torch.from_numpy(x[:, 0]).requires_grad_()
    factor = torch.tensor(1.5, requires_grad=True)
    center = torch.from_numpy(dense(zoo / "zoo", layout).mean(axis=0)).float()
    theta = center + wide @ torch.from_numpy(widened(shard.store)).float()
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
def test_cross_entropy_as_a_loss_of_ones_own_gives_the_same_bits(zoo: Path, tmp_path: Path, method: str) -> None:
    plain = learned(bench(zoo, method=method), tmp_path / "plain.pt")
    own = learned(bench(zoo, method=method, loss="tests.test_objective:summed"), tmp_path / "own.pt")
    assert torch.equal(plain.y, own.y)
    assert plain.curve == own.curve
    by_example = learned(bench(zoo, method=method, loss="tests.test_objective:each"), tmp_path / "each.pt")
    assert torch.equal(plain.y, by_example.y)
    other = learned(bench(zoo, method=method, loss="tests.test_objective:focal"), tmp_path / "focal.pt")
    assert not torch.equal(plain.y, other.y)
    assert other.curve[0]["select_nll"] < plain.curve[0]["select_nll"]  # stopped by the same loss


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": "tests.test_objective:mean"}, "of three examples is .* expected losses"),
        ({"loss": "tests.test_objective:without_gradient"}, "has no gradient by the logits"),
        ({"loss": "tests.test_objective:broken"}, r"failed with made-up logits \[3, 10\]"),
        ({"loss": "tests.test_objective:none"}, "has no 'none'"),
        ({"metric": "tests.test_objective:mean"}, r"returned \[\]; expected a score for each of 3 examples"),
    ],
)
def test_a_function_that_is_no_loss_or_metric_is_refused_at_the_start(zoo: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=f"(?i){said}"):
        InProcess(make_recipe(values(zoo, **changes)))


def test_label_smoothing_and_a_loss_of_ones_own_are_refused_together(zoo: Path) -> None:
    with pytest.raises(RecipeError, match="label_smoothing belongs to cross-entropy"):
        make_recipe(values(zoo, loss="a:b", learn__label_smoothing=0.1))
    with pytest.raises(RecipeError, match="metric: 'accuracy' found; expected"):
        make_recipe(values(zoo, metric="accuracy"))


def test_a_metric_is_reported_beside_accuracy(zoo: Path, tmp_path: Path) -> None:
    plain, own = (InProcess(make_recipe(values(zoo, **m))) for m in ({}, {"metric": "tests.test_objective:in_top_2"}))
    assert plain.ready.fingerprint != own.ready.fingerprint  # outcomes that were kept lack the scores
    split = Split("test", np.arange(300, dtype=np.int32))
    path = str(zoo / "zoo" / "model_0.safetensors")
    (outcome,) = yield_last(own.shards[0].evaluate_file(path, [split], False))
    save_outcomes({"test": outcome}, tmp_path / "a.npz")
    found = figures_of(
        {"test": join([load_outcomes(tmp_path / "a.npz")["test"].at(np.arange(n, n + 150)) for n in (0, 150)])}
    )
    arrays, model = np.load(zoo / "test.npz"), own.shards[0].model
    logits = model(torch.from_numpy(arrays["images"][:300]))
    top = logits.topk(2).indices.numpy() == arrays["labels"][:300, None]
    assert found["test_metric"] == pytest.approx(top.any(axis=1).mean())
    assert found["test_metric"] > found["test_accuracy"] == pytest.approx(top[:, 0].mean())


def test_patience_ends_a_model_batch_and_a_stopped_run_ends_the_same(zoo: Path, tmp_path: Path) -> None:
    """Steps that only do harm after the first; killed after every epoch, and going on."""
    changes = {"learn": {"batch_size": 61, "epochs": 6, "lr": 3.0, "cosine_lr": False}, "blocks": "model"}
    actors = bench(zoo, **{**changes, "learn": {**changes["learn"], "patience": 2}})
    state = learned(actors, tmp_path / "whole.pt")
    nll = [line["select_nll"] for line in state.curve]
    assert len(nll) == int(np.argmin(nll)) + 3 < 7

    class Killed(Exception):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    for _ in range(len(nll) - 1):
        with pytest.raises(Killed):
            learned(actors, tmp_path / "cut.pt", after_epoch=kill)
    cut_short = learned(actors, tmp_path / "cut.pt")
    assert torch.equal(cut_short.y, state.y)
    assert cut_short.curve == state.curve
    patient = learned(bench(zoo, **{**changes, "learn": {**changes["learn"], "patience": 6}}), tmp_path / "patient.pt")
    assert patient.curve[: len(nll)] == state.curve


def test_epochs_are_stale_since_the_last_better_one_of_the_turn(tmp_path: Path) -> None:
    def state(turn: int, *nll: tuple[int, int, float]) -> State:
        curve = [{"turn": t, "epoch": e, "select_nll": value} for t, e, value in nll]
        return State(torch.zeros(1, 1, dtype=torch.float64), turn=turn, curve=curve)

    first = [(0, -1, 5.0), (0, 0, 4.0), (0, 1, 4.5), (0, 2, 4.5)]
    assert stale_epochs(state(0)) == 0
    assert stale_epochs(state(0, *first[:1])) == 0
    assert stale_epochs(state(0, *first[:2])) == 0
    assert stale_epochs(state(0, *first)) == 2
    assert stale_epochs(state(1, *first)) == 0
    assert stale_epochs(state(1, *first, (1, 0, 4.1))) == 1
    assert stale_epochs(state(1, *first, (1, 0, 4.1), (1, 1, 3.9))) == 0
    save_state(state(0, *first), tmp_path / "s.pt")
    assert stale_epochs(load_state(tmp_path / "s.pt")) == 2

"""The learning loop: its schedule of model batches, its state, and Learned-Soup compared with autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ray_soup.errors import RecipeError
from ray_soup.recipe import make_recipe
from ray_soup.soups.curve import summary
from ray_soup.soups.learn import learn
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.state import PLAIN_VERSION, VERSION, LearnState, load_state, save_state
from ray_soup.soups.turns import model_batches
from ray_soup.task.data import batch_positions, cut_splits
from tests import tiny
from tests.conftest import InProcess, values


def test_every_model_comes_once_in_a_models_epoch() -> None:
    turns = model_batches(10, 4, seed=3, models_epochs=2)
    assert [len(t) for t in turns] == [4, 4, 2, 4, 4, 2]
    for turn in (turns[:3], turns[3:]):
        assert sorted(np.concatenate(turn)) == list(range(10))
    assert not np.array_equal(turns[0], turns[3])
    assert all(np.array_equal(a, b) for a, b in zip(turns, model_batches(10, 4, 3, 2), strict=True))


# State


def equal(found: Any, expected: Any) -> bool:
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_a_saved_state_is_loaded_unchanged(tmp_path: Path) -> None:
    state = LearnState(
        torch.randn(3, 2).double(), turn=1, epoch=2, moving=torch.randn(1, 2).double(), factor=torch.tensor(1.25).double(),
        step_ms=[1.5], curve=[{"turn": 0, "epoch": -1, "select_nll": 0.5}],
    )  # fmt: skip
    save_state(state, tmp_path / "s.pt")
    loaded = load_state(tmp_path / "s.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]
    for name in state.__dataclass_fields__:
        assert equal(getattr(loaded, name), getattr(state, name)), name
    assert loaded.best is None
    assert loaded.y.dtype == loaded.moving.dtype == torch.float64


def test_a_state_of_version_1_is_read_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    """Version 1 has the same keys without `version`."""
    state = LearnState(torch.randn(3, 2).double(), precision="bfloat16", steps=7)
    save_state(state, tmp_path / "s.pt")
    fields = torch.load(tmp_path / "s.pt", weights_only=True)
    assert fields.pop("version") == PLAIN_VERSION
    torch.save(fields, tmp_path / "first.pt")
    loaded = load_state(tmp_path / "first.pt")
    assert torch.equal(loaded.y, state.y)
    assert (loaded.precision, loaded.steps) == ("bfloat16", 7)
    torch.save({**fields, "version": VERSION + 1}, tmp_path / "newer.pt")
    with pytest.raises(RecipeError, match=rf"newer\.pt has version {VERSION + 1}; this ray_soup reads versions up to"):
        load_state(tmp_path / "newer.pt")


def test_a_resumed_run_keeps_its_precision(zoo: Path, tmp_path: Path) -> None:
    """Even if the other precision is faster by then."""
    begun: list[str] = []

    class Choosing(InProcess):
        faster = "bfloat16"

        def choose_precision(self) -> str:
            return self.faster

        def begin(self, chosen: np.ndarray, x: np.ndarray, precision: str) -> None:
            begun.append(precision)
            super().begin(chosen, x, precision)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = make_recipe(values(zoo, precision="auto", learn__model_batch=4))
    pool = Choosing(recipe)
    store = pool.open_all("tensor")
    splits = cut_splits(recipe.data, pool.setup_info.sizes, pool.setup_info.fit_digests, 1)
    with pytest.raises(KeyboardInterrupt):
        learn(recipe, pool, store.norms, splits, 4, tmp_path / "s.pt", after_epoch=stop)
    pool.faster = "float32"
    state = learn(recipe, pool, store.norms, splits, 4, tmp_path / "s.pt")
    assert begun == ["bfloat16"] * 3
    assert summary(state)["precision"] == "bfloat16"


# Learned-Soup


def learned_soup_by_autograd(
    folder: Path, plus: bool, batches: list[np.ndarray], lr: float
) -> tuple[list[torch.Tensor], list[float]]:
    """Learned-Soup by autograd over a graph of all ingredients, as Wortsman et al. 2022 describe it.

    Returns the coefficients [K, tensors] after every step, and the factor on the logits after every step.
    """
    states = [load_file(f) for f in sorted((folder / "zoo").glob("*.safetensors"))]
    model = tiny.Tiny().eval()
    names = [name for name, _ in model.named_parameters()]
    stacked = {name: torch.stack([s[name] for s in states]) for name in names}
    raw = torch.zeros(len(states), len(names) if plus else 1, dtype=torch.float64, requires_grad=True)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([raw, factor], lr=lr, weight_decay=0.0)
    images, labels = (torch.from_numpy(a[600:1197]) for a in tiny.digits())
    coefficients, factors = [], []
    for batch in batches:
        c = raw.softmax(0).expand(-1, len(names))
        mixed = {n: torch.einsum("k,k...->...", c[:, i].float(), stacked[n]) for i, n in enumerate(names)}
        logits = torch.func.functional_call(model, mixed, (images[batch],))
        optimizer.zero_grad()
        F.cross_entropy(logits * factor.float(), labels[batch]).backward()
        if plus:  # their gradient is rounding noise only, which AdamW would amplify
            raw.grad[:, [names.index("key.bias"), names.index("unused")]] = 0
        optimizer.step()
        coefficients.append(raw.detach().softmax(0).expand(-1, len(names)).clone())
        factors.append(factor.item())
    return coefficients, factors


@pytest.mark.parametrize("method", ["learned", "learned+"])
@pytest.mark.parametrize("size", [1, 2])
def test_learned_soup_equals_autograd_over_all_ingredients(zoo: Path, tmp_path: Path, method: str, size: int) -> None:
    changes = {"learn": {"batch_size": 112, "epochs": 5, "average": False}, "directions": {"dtype": "float32"}}
    recipe = make_recipe(values(zoo, method=method, **changes))
    assert (recipe.learn.lr, recipe.learn.cosine_lr) == (0.05, False)
    pool = InProcess(recipe, size)
    store = pool.open_all(recipe.blocks)
    splits = cut_splits(recipe.data, pool.setup_info.sizes, pool.setup_info.fit_digests, recipe.learn.seed)
    state = learn(recipe, pool, store.norms, splits, 8, tmp_path / "s.pt")
    assert state.steps == 20
    order = [batch_positions(448, 112, recipe.learn.seed, 2, 0, epoch) for epoch in range(5)]
    batches = [splits["fit"].rows[positions] for epoch in order for positions in epoch]
    coefficients, factors = learned_soup_by_autograd(zoo, method == "learned+", batches, recipe.learn.lr)
    kept = min(state.curve, key=lambda line: line["select_nll"])["steps"]
    assert kept > 0
    found = parametrization(True, store.norms).coefficients(state.y.numpy())
    wide = np.stack([found[:, b] if b >= 0 else np.full(8, 1 / 8) for b in store.partition.block], axis=1)
    expected = coefficients[kept - 1].numpy()
    if method == "learned":
        wide, expected = found, expected[:, :1]
    assert np.linalg.norm(wide - expected) <= 1e-4 * np.linalg.norm(expected)
    assert abs(state.factor.item() - factors[kept - 1]) <= 1e-4 * factors[kept - 1]
    assert abs(state.factor.item() - 1) > 0.01
    assert np.abs(found - 1 / 8).max() > 0.01

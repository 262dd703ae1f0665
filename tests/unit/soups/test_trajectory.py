"""Steps of one run: schedules compared with a plain loop, the penalty on rough coefficients with autograd, and refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.mixing.schedules import DECAYS, average, schedule
from ray_soup.recipe import SCHEDULES, dump_recipe, make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.learn import _Learning, learn
from ray_soup.soups.methods.scheduled import choose
from ray_soup.soups.optimize import parametrization
from ray_soup.soups.run import run
from ray_soup.soups.session import Session
from ray_soup.soups.trajectory import roughness
from ray_soup.task.data import batch_positions
from tests import tiny
from tests.conftest import InProcess, values
from tests.trajectories import write_run

COUNT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, and a run with seven checkpoints whose last one comes early: its distance is not that of the others."""
    folder = tmp_path_factory.mktemp("trajectory")
    tiny.write_data(folder)
    write_run(folder / "run", COUNT + 1)
    for file in (folder / "run" / "checkpoint-95").iterdir():
        file.unlink()
    (folder / "run" / "checkpoint-95").rmdir()
    return folder


def recipe_values(folder: Path, **changes: Any) -> dict[str, Any]:
    return values(folder, **{"ingredients": f"{folder}/run?per_trial=all", **changes})


def session_of(recipe: Any, size: int = 1) -> Session:
    """A session with actors in this process."""
    pool = InProcess(recipe, size)
    everything = pool.inputs.everything
    session = Session(recipe, pool.inputs, pool, pool.setup_info, Mesh(size, 1), 1, len(everything), subset=everything)
    return session.with_soup(splits=session.cut(recipe.learn.seed))


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    paths = sorted((folder / "run").iterdir(), key=lambda path: int(path.name.partition("-")[2]))
    return [load_file(path / "model.safetensors") for path in paths]


def nll_of(mixed: dict[str, torch.Tensor], rows: np.ndarray) -> float:
    model = tiny.build().eval()
    model.load_state_dict(mixed)
    images, labels = (torch.from_numpy(array[600:1197][rows]) for array in tiny.digits())
    with torch.inference_mode():
        return F.cross_entropy(model(images), labels).item()


def mixed(run: list[dict[str, torch.Tensor]], weights: np.ndarray) -> dict[str, torch.Tensor]:
    def one(name: str) -> torch.Tensor:
        if not run[0][name].is_floating_point():
            return run[0][name]
        return sum(float(c) * state[name].double() for c, state in zip(weights, run, strict=True)).float()

    return {name: one(name) for name in run[0]}


@pytest.mark.parametrize("method", SCHEDULES)
def test_a_schedule_tries_every_window_and_takes_the_best_as_a_plain_loop_does(method: str, folder: Path) -> None:
    recipe, run = make_recipe(recipe_values(folder, method=method)), states(folder)
    session, steps = session_of(recipe, 2), [65, 70, 75, 80, 85, 90, 100]
    choice = choose(session)
    select = session.splits["select"].rows
    expected = []
    if method == "ema":
        candidates = [(COUNT, average(decay, COUNT)) for decay in DECAYS]
    else:
        shape = method.partition(":")[2]
        candidates = [(window, schedule(shape, steps[-window:])) for window in range(2, COUNT + 1)]
    for window, weights in candidates:
        padded = np.concatenate([np.zeros(COUNT - window), weights])
        expected.append((nll_of(mixed(run, padded), select), window, padded))
    assert [line["select_nll"] for line in choice.tried] == pytest.approx([nll for nll, _, _ in expected], rel=1e-5)
    _, window, weights = min(expected, key=lambda line: line[0])
    assert choice.window == window
    np.testing.assert_array_equal(choice.weights, weights)
    assert (choice.decay is None) == (method != "ema")
    record = choice.record(session)["schedule"]
    assert record["steps"] == steps[-window:]
    assert choice.looked == len(expected) * len(select)


def test_the_figure_of_select_by_chooses(folder: Path) -> None:
    by = {}
    for figure in ("nll", "accuracy"):
        choice = choose(session_of(make_recipe(recipe_values(folder, method="schedule:cosine", select_by=figure))))
        worst = [-line["select_accuracy"] if figure == "accuracy" else line["select_nll"] for line in choice.tried]
        assert choice.window == choice.tried[int(np.argmin(worst))]["window"]
        by[figure] = choice.tried
    assert by["nll"] == by["accuracy"]


def test_a_window_without_a_finite_loss_is_not_chosen(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-65" / "model.safetensors"
    state = load_file(file)
    save_file({**state, "head.weight": torch.full_like(state["head.weight"], 3e38)}, file)
    changes = {"method": "schedule:uniform", "ingredients": f"{tmp_path}/run?per_trial=all"}
    choice = choose(session_of(make_recipe(recipe_values(folder, **changes))))
    assert np.isnan(choice.tried[-1]["select_nll"])
    assert choice.window < COUNT
    assert np.isfinite([line["select_nll"] for line in choice.tried[:-1]]).all()


def test_a_search_over_smoothness_is_refused_before_it_starts_if_ingredients_are_no_run(zoo: Path, tmp_path: Path) -> None:
    from ray_soup.tune.search import search

    recipe = make_recipe(values(zoo, search={"trials": 2, "learn.smoothness": {"choice": [0.1]}}))
    with pytest.raises(RecipeError, match=r"learn\.smoothness: 0\.1 is for the steps of one training run"):
        search(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("listed", [False, True])
def test_a_fixed_window_needs_no_data_and_follows_the_steps_and_not_the_list(
    folder: Path, tmp_path: Path, listed: bool
) -> None:
    """The same soup from a list in another order, whose names say the steps."""
    changes: dict[str, Any] = {"method": "schedule:linear", "schedule": {"window": 3}, "data": {}}
    if listed:
        changes["ingredients"] = [str(folder / "run" / f"checkpoint-{step}") for step in (100, 65, 90, 85, 70)]
    soup = run(make_recipe(recipe_values(folder, **changes)), tmp_path / "out")
    found, expected = (
        load_file(soup.out / "model.safetensors"),
        mixed(states(folder)[-3:], schedule("linear", [85, 90, 100])),
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    used = load_coefficients(soup.out / "coefficients.safetensors")
    assert sorted(used.ingredients[k] for k in used.used()) == ["checkpoint-100", "checkpoint-85", "checkpoint-90"]
    last = run(make_recipe(recipe_values(folder, **{**changes, "method": "last"})), tmp_path / "last")
    assert all(torch.equal(load_file(last.out / "model.safetensors")[n], t) for n, t in states(folder)[-1].items())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"method": "schedule:linear", "schedule": {"window": 8}}, "schedule.window is 8, but .* names 7 steps"),
    "window of another method": ({"method": "mehl", "schedule": {"window": 8}}, "schedule.window is 8"),
    "no data": ({"method": "schedule:linear", "data": {}}, "schedule.window is auto, .* no data.fit. Add it, or"),
    "no data for a decay": ({"method": "ema", "data": {}}, "schedule.decay is auto, .* no data.fit. Add it, or"),
    "a folder of another run": (
        {"method": "last", "ingredients": ["RUN/checkpoint-65", "ZOO/zoo/model_0.safetensors"]},
        "method: last is for the steps of one training run, but .*model_0.safetensors is. Name the folder of one run",
    ),
    "smoothness": (
        {"ingredients": "ZOO/zoo/*.safetensors", "learn": {"smoothness": 0.1}},
        "learn.smoothness: 0.1 is for the steps of one training run, but .*remove this key",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_run_is_refused_before_anything_starts(name: str, folder: Path, zoo: Path) -> None:
    changes, message = REFUSED[name]

    def placed(spec: str) -> str:
        return spec.replace("RUN", str(folder / "run")).replace("ZOO", str(zoo))

    if "ingredients" in changes:
        spec = changes["ingredients"]
        changes = {**changes, "ingredients": placed(spec) if isinstance(spec, str) else [placed(one) for one in spec]}
    with pytest.raises(RecipeError, match=re.compile(message, re.DOTALL)):
        open_inputs(make_recipe(recipe_values(folder, **changes)))


def test_recipes_without_the_new_keys_are_written_as_before(folder: Path) -> None:
    text = dump_recipe(make_recipe(recipe_values(folder)))
    assert "schedule:" not in text
    assert "smoothness" not in text
    changed = make_recipe(recipe_values(folder, schedule={"window": 4}, learn={"smoothness": 0.5}))
    assert "window: 4" in dump_recipe(changed)
    assert "smoothness: 0.5" in dump_recipe(changed)


# The penalty on rough coefficients


def penalty_by_torch(c: torch.Tensor, order: list[int]) -> torch.Tensor:
    change = (c[order][1:] - c[order][:-1]) * len(c)
    return (change**2).mean()


def test_the_gradient_of_the_penalty_equals_autograd() -> None:
    c = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    order = [3, 0, 5, 1, 2, 4]
    expected = penalty_by_torch(c, order)
    expected.backward()
    found, gradient = roughness(c.detach().numpy(), order)
    assert found == pytest.approx(expected.item())
    np.testing.assert_allclose(gradient, c.grad.numpy(), rtol=1e-12, atol=1e-12)
    alternating = np.tile([[0.0], [2 / 6]], (3, 2))
    assert roughness(alternating, range(6))[0] == pytest.approx(4)
    assert roughness(np.full((6, 2), 1 / 6), order)[0] == 0


@pytest.mark.parametrize("method", ["mehl+", "learned+"])
def test_the_penalty_of_a_model_batch_equals_autograd(folder: Path, tmp_path: Path, method: str) -> None:
    """With some ingredients in place, whose coefficients move too when those of the others do."""
    recipe = make_recipe(recipe_values(folder, method=method, learn__smoothness=0.3))
    session = session_of(recipe)
    store = session.pool.open_store(session.subset, recipe.blocks, session.progress)
    random = np.random.default_rng(0)
    size = COUNT if method == "learned+" else 3
    learning = _Learning.start(
        recipe, session.pool, store.norms, session.splits, size, tmp_path / "s.pt", None, "",
    )  # fmt: skip
    learning.order = [2, 0, 1, 3, 6, 5, 4]
    chosen = learning.turns[0]
    state = learning.state
    state.y = torch.from_numpy(random.standard_normal(store.norms.shape))
    state.moving = torch.from_numpy(random.standard_normal((size, store.norms.shape[1])))
    y = state.y.clone()
    y[chosen] = state.moving
    y.requires_grad_()
    n = torch.from_numpy(store.norms)
    x = y / n
    c = y.softmax(0) if method == "learned+" else x + (1 - x.sum(0)) / COUNT
    (0.3 * penalty_by_torch(c, list(learning.order))).backward()
    of = parametrization(method == "learned+", store.norms[chosen])
    found = of.gradient(state.moving.numpy(), learning.by_roughness())
    np.testing.assert_allclose(found, y.grad.numpy()[chosen], rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_learning_with_the_penalty_equals_autograd_over_the_whole_run(folder: Path, tmp_path: Path) -> None:
    changes = {"directions": {"dtype": "float32"}, "method": "mehl", "blocks": "tensor"}
    options = {"batch_size": 112, "epochs": 3, "lr": 0.05, "smoothness": 0.02, "cosine_lr": False}
    recipe = make_recipe(recipe_values(folder, **changes, learn=options))
    session, run = session_of(recipe), states(folder)
    store = session.pool.open_store(session.subset, "tensor", session.progress)
    seen: list[torch.Tensor] = []
    learn(
        recipe, session.pool, store.norms, session.splits, COUNT, tmp_path / "s.pt", order=range(COUNT),
        after_step=lambda step, steps, state: seen.append(state.moving.clone()),
    )  # fmt: skip
    names = [name for name, _ in tiny.Tiny().named_parameters()]
    n = torch.from_numpy(store.norms)
    y = torch.zeros_like(n, requires_grad=True)
    optimizer = torch.optim.AdamW([y], lr=0.05, weight_decay=0.0)
    fit = session.splits["fit"].rows
    images, labels = (torch.from_numpy(array[600:1197][fit]) for array in tiny.digits())
    stacked = {name: torch.stack([state[name] for state in run]) for name in names}
    of_block = dict(zip(names, store.partition.block.tolist(), strict=True))
    for epoch in range(3):
        for batch in batch_positions(len(fit), 112, recipe.learn.seed, 2, 0, epoch):
            x = y / n
            c = x + (1 - x.sum(0)) / COUNT
            mean = torch.full((COUNT,), 1 / COUNT)
            soup = {
                name: torch.einsum("k,k...->...", c[:, b].float() if (b := of_block[name]) >= 0 else mean, stacked[name])
                for name in names
            }
            logits = torch.func.functional_call(tiny.Tiny().eval(), soup, (images[batch],))
            loss = F.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            (loss + 0.02 * penalty_by_torch(c, list(range(COUNT)))).backward()
            y.grad[:, store.partition.names.index("key.bias")] = 0  # their gradient is rounding noise only
            optimizer.step()
    assert len(seen) == 12
    torch.testing.assert_close(seen[-1], y.detach(), rtol=1e-3, atol=1e-4)

"""The session of a method: what it computes equals plain torch, and what a method may not return is refused in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ray_soup.actors.messages import Mesh
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.progress import no_progress
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import CALIBRATION_WHILE_CHOOSING, open_inputs
from ray_soup.soups.make import make, make_without_data, mix
from ray_soup.soups.methods.interface import NeedsDataError, Session
from ray_soup.soups.methods.results import Model, result_of
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.rows import open_rows
from ray_soup.soups.session import Session as RunSession
from tests import tiny
from tests.conftest import InProcess, values

COUNT = 3
EXACT = {"directions": {"dtype": "float32"}, "learn": {"batch_size": 100}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "zoo").mkdir()
    tiny.write_data(folder)
    tiny.write_zoo(folder / "zoo", COUNT)
    return folder


def run_of(folder: Path, size: int = 1, **changes: Any) -> RunSession:
    """A run whose actors are in this process."""
    recipe = make_recipe(values(folder, **{"method": "tests.own_methods:by_loss", **EXACT, **changes}))
    pool = InProcess(recipe, size)
    everything = pool.inputs.everything
    run = RunSession(recipe, pool.inputs, pool, pool.setup_info, Mesh(size, 1), 1, COUNT, subset=everything)
    return run.with_soup(splits=run.cut(recipe.learn.seed))


def session_of(run: RunSession) -> Session:
    return Session(run.recipe, run.inputs, run.subset, no_progress, run)


def without_data(folder: Path, **changes: Any) -> Session:
    recipe = make_recipe({**values(folder, method="tests.own_methods:median", **changes), "data": {}})
    inputs = open_inputs(recipe)
    return Session(recipe, inputs, inputs.everything, no_progress)


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "zoo" / f"model_{k}.safetensors") for k in range(COUNT)]


def loss_of(coefficients: torch.Tensor, zoo: list[dict[str, torch.Tensor]], names: list[str], rows: np.ndarray) -> Any:
    """The mean loss of the soup with these coefficients, [K, T], on rows of the held-out images; by plain torch."""
    mixed = {n: sum(coefficients[k, t] * zoo[k][n] for k in range(COUNT)) for t, n in enumerate(names)}
    images, labels = (torch.from_numpy(array[600:1197][rows]) for array in tiny.digits())
    model = tiny.build().eval()
    return F.cross_entropy(torch.func.functional_call(model, mixed, (images,)), labels)


@pytest.mark.parametrize("size", [1, 2])
def test_evaluate_and_gradient_equal_those_of_plain_torch(folder: Path, size: int) -> None:
    run = run_of(folder, size, blocks="tensor")
    session, zoo = session_of(run), states(folder)
    names = list(session.partition.names)
    assert names == [name for name, _ in tiny.build().named_parameters()] == list(session.parameters)
    c = np.random.default_rng(0).dirichlet(np.ones(COUNT), len(names)).T
    found = session.evaluate(c)
    assert found["nll"] == pytest.approx(
        loss_of(torch.from_numpy(c).float(), zoo, names, run.splits["select"].rows).item(), rel=1e-4
    )
    batch = session.batches()[1]
    at = torch.from_numpy(c).float().requires_grad_()
    expected = loss_of(at, zoo, names, run.splits["fit"].rows[batch])
    expected.backward()
    loss, gradient = session.gradient(c, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = (g - g.mean(axis=0) for g in (gradient, at.grad.numpy()))
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
    _, by_ingredient = session.gradient([0.5, 0.25, 0.25], batch)  # one coefficient per ingredient: summed over blocks
    assert by_ingredient.shape == (COUNT,)
    assert (session.figures["steps"], session.figures["image_passes"]) == (2, len(run.splits["select"]) + 200)


def test_running_statistics_are_re_estimated_as_for_other_candidates(conv_zoo: Path) -> None:
    recipe = make_recipe(values(conv_zoo, method="tests.own_methods:by_loss", model="tests.tiny:build_conv", **EXACT))
    pool = InProcess(recipe)
    everything = pool.inputs.everything
    run = RunSession(recipe, pool.inputs, pool, pool.setup_info, Mesh(1, 1), 1, len(everything), subset=everything)
    run = run.with_soup(splits=run.cut(recipe.learn.seed))
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    calibration = run.calibration(CALIBRATION_WHILE_CHOOSING)
    score = run.pool.try_mixture(weights, [run.splits["select"]], calibration)
    assert len(calibration) > 0
    assert session_of(run).evaluate(weights)["nll"] == pytest.approx(score.nll, rel=1e-4)


def test_a_method_of_the_user_makes_the_mixture_that_it_returns(folder: Path) -> None:
    run = run_of(folder)
    mixture = mix(run)
    held_out = session_of(run).held_out()
    assert [session_of(run).ranked()[0]] == [np.argmax([f["accuracy"] for f in held_out])]
    weights = np.exp([-10 * f["nll"] for f in held_out])
    np.testing.assert_allclose(mixture.coefficients.values[:, 0], weights / weights.sum(), rtol=1e-9)
    assert mixture.notes == ["Weights by held-out NLL."]
    np.testing.assert_array_equal(mix(run).coefficients.values, mixture.coefficients.values)
    blocks = make(run_of(folder, method="tests.own_methods:descent", blocks="tensor"))
    assert isinstance(blocks, Mixture)
    assert blocks.coefficients.values.shape == (COUNT, 17)
    np.testing.assert_allclose(blocks.coefficients.values.sum(axis=0), 1, atol=1e-12)


def test_a_model_is_what_the_method_returned_with_the_buffers_of_a_soup(folder: Path, tmp_path: Path) -> None:
    session = without_data(folder)
    model = make_without_data(session.recipe, session.inputs, no_progress)
    assert isinstance(model, Model)
    zoo = states(folder)
    for name, tensor in model.tensors.items():
        expected = torch.stack([state[name] for state in zoo]).median(dim=0).values
        assert torch.equal(tensor, expected if name in session.parameters else zoo[0][name]), name
    model.write(tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == zoo[0].keys()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.tensors.items()}}, tmp_path / "again.pt")
    again = result_of(session, tmp_path / "again.pt")
    assert isinstance(again, Model)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in model.tensors.items())
    assert session.read(1, "head.bias", 2, 5).tolist() == zoo[1]["head.bias"][2:5].tolist()


def test_an_entry_point_is_a_method(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ray_soup.methods]\nmedian = tests.own_methods:median\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    session = without_data(folder)
    recipe = make_recipe({**session.recipe.model_dump(), "method": "median"})
    assert recipe.info.is_own
    assert isinstance(make_without_data(recipe, session.inputs, no_progress), Model)


REFUSED: list[tuple[Callable[[Session], Any], str]] = [
    (lambda session: [0.5, 0.5], "found coefficients of the shape [2]; expected [3], one for each ingredient."),
    (lambda session: np.ones((COUNT, 2)) / COUNT, "found coefficients of the shape [3, 2]; expected [3]"),
    (lambda session: [0.5, 0.5, 0.5], "the coefficients of the block model sum to 1.5; expected 1."),
    (lambda session: [0.5, 0.5, float("nan")], "a coefficient is not finite."),
    (lambda session: None, "returned a NoneType; expected coefficients [K] or [K, B], a dictionary of tensors"),
    (lambda session: ["a", "b", "c"], "returned coefficients that are no numbers"),
    (lambda session: [1 + 1j, 0, 0], "returned coefficients that are no numbers (they are complex)"),
    (lambda session: [5e5, -499998.1, 0.0], "the coefficients of the block model sum to 1.9; expected 1."),
    (lambda session: {"head.weight": torch.zeros(1)}, "returned a model that lacks 'unused', 'embed.weight', 'embed.bias'"),
    (lambda session: {"other": torch.zeros(1)}, "returned a model that has 'other'; expected the 19 tensors"),
    (lambda session: {n: torch.zeros(2) for n in session.parameters}, "in which unused is [2]; expected a tensor [7]"),
    (
        lambda session: {n: torch.full(s, torch.inf) for n, s in session.parameters.items()},
        "returned a model in which unused is not finite",
    ),
    (lambda session: "nowhere.safetensors", "nowhere.safetensors"),
    (lambda session: session.read(0, "nose"), "the model has no tensor 'nose'"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_a_method_may_not_return_is_refused(folder: Path, method: Callable[[Session], Any], message: str) -> None:
    session = without_data(folder)
    with pytest.raises(SoupError, match=re.escape(message)):
        result_of(session, method(session))


def test_a_model_that_overflows_the_dtype_of_the_soup_is_refused(folder: Path) -> None:
    session = without_data(folder, out_dtype="float16")
    large = {name: torch.full(shape, 1e5) for name, shape in session.parameters.items()}
    with pytest.raises(RecipeError, match="in which unused is not finite in float16"):
        result_of(session, large)


def test_coefficients_may_be_a_tensor_of_any_float_dtype_with_a_gradient(folder: Path) -> None:
    returned = torch.tensor([0.25, 0.25, 0.5], dtype=torch.bfloat16, requires_grad=True)
    assert result_of(without_data(folder), returned).coefficients.values[:, 0].tolist() == [0.25, 0.25, 0.5]


def test_a_sum_near_one_becomes_one(folder: Path) -> None:
    mixture = result_of(without_data(folder), torch.tensor([0.1, 0.2, 0.7]))  # float32
    assert isinstance(mixture, Mixture)
    np.testing.assert_allclose(mixture.coefficients.values.sum(axis=0), 1, rtol=0, atol=1e-15)
    assert result_of(without_data(folder), [0.5, 0.5, 0.0]).coefficients.used() == [0, 1]


def test_without_data_a_method_cannot_evaluate(folder: Path) -> None:
    session = without_data(folder)
    for call in (session.held_out, session.ranked, session.batches, lambda: session.evaluate([1.0, 0.0, 0.0])):
        with pytest.raises(
            NeedsDataError, match=re.escape("evaluates models on held-out data. Add data.fit to the recipe.")
        ):
            call()


def test_rows_are_opened_at_the_start_and_refused_by_name(folder: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    good = str(folder / "zoo" / "model_0.safetensors")
    for rows, message in (
        ({"ties": str(tmp_path / "other.safetensors")}, "compare.rows.ties: "),
        ({"ties": str(tmp_path / "none.safetensors")}, "compare.rows.ties: "),
        ({"model_1": good}, "compare.rows.model_1: an ingredient has this name. Choose another name for the row."),
    ):
        recipe = make_recipe(values(folder, compare={"rows": rows}))
        with pytest.raises(SoupError, match=re.escape(message)):
            open_rows(recipe, open_inputs(recipe))
    for name in ("mehl", "ensemble", "mehl+-m3", "a/b", " a"):
        with pytest.raises(RecipeError, match=r"compare\.rows: found"):
            make_recipe(values(folder, compare={"rows": {name: good}}))

"""`start`: learning begins from a finished soup's coefficients, whatever ingredients came or went since."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ray_soup.errors import RecipeError
from ray_soup.io.hashing import sha256_file
from ray_soup.mixing.blocks import Blocks, Layout, partition
from ray_soup.mixing.coefficients import MEAN, Affine, Coefficients, save_coefficients
from ray_soup.recipe import dump_recipe, for_method, make_recipe
from ray_soup.soups.identity import begun as begun_record
from ray_soup.soups.identity import check_same
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.records import write_run_record
from ray_soup.soups.start import Start, began_note, beginning, matches, open_start
from ray_soup.soups.state import load_state
from tests import tiny
from tests.conftest import values
from tests.learning import Learner, same, stopping

LAYOUT = Layout(("1.weight", "1.bias", "2.weight"), ((4, 3), (4,), (2, 4)))


def soup_of(columns: Any, names: str = "abc", blocks: dict[str, int] | None = None) -> Start:
    """A soup of LAYOUT with these coefficients [K, B] and ingredients whose digests are their names in capitals."""
    found = np.array(columns, dtype=np.float64)
    block_of = blocks or dict(zip(LAYOUT.names, range(3), strict=True))
    made = Coefficients(found, tuple(names), tuple(f"block {b}" for b in range(found.shape[1])), block_of)
    return Start("OUT", made, tuple(name.upper() for name in names), "0")


def coefficients_in(start: Start, names: str, blocks: Blocks = "tensor") -> np.ndarray:
    """The coefficients [K, B] of the start with ingredients of these names."""
    parts = partition(LAYOUT, blocks)
    norms = np.random.default_rng(0).uniform(1, 2, (len(names), parts.count))
    y = beginning(start, tuple(names), tuple(name.upper() for name in names), LAYOUT, parts, norms).y
    return Affine(norms).coefficients(y)


OLD = [[0.5, 1.5, -0.25], [0.25, -1, 0.25], [0.25, 0.5, 1]]


def test_the_same_ingredients_in_any_order_have_the_same_coefficients() -> None:
    for order in itertools.permutations(range(3)):
        found = coefficients_in(soup_of(OLD), "".join("abc"[k] for k in order))
        np.testing.assert_allclose(found, np.array(OLD)[list(order)], atol=1e-15)


def test_new_ingredients_begin_at_0_and_what_others_had_is_divided_evenly_among_those_that_stay() -> None:
    found = coefficients_in(soup_of(OLD), "cdbe")
    gone = np.array(OLD[0]) / 2
    np.testing.assert_allclose(found, [OLD[2] + gone, [0, 0, 0], OLD[1] + gone, [0, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(found.sum(axis=0), 1)


def test_coarser_blocks_of_the_soup_become_finer_and_finer_ones_are_refused() -> None:
    whole = soup_of([[0.5], [1], [-0.5]], blocks=dict.fromkeys(LAYOUT.names, 0))
    np.testing.assert_allclose(coefficients_in(whole, "abc"), np.tile([[0.5], [1], [-0.5]], 3))
    same_in_layer = soup_of([[0.5, 0.5, 0], [1, 1, 0], [-0.5, -0.5, 1]])
    np.testing.assert_allclose(coefficients_in(same_in_layer, "abc", "layer"), [[0.5, 0], [1, 0], [-0.5, 1]], atol=1e-15)
    with pytest.raises(RecipeError, match=r"tensors 1\.weight and 1\.bias have different .* blocks=tensor"):
        coefficients_in(soup_of(OLD), "abc", "layer")
    invariant = soup_of([[0.5, 0], [1, 0], [-0.5, 1]], blocks={"1.weight": 0, "1.bias": MEAN, "2.weight": 1})
    np.testing.assert_allclose(coefficients_in(invariant, "abc", "layer"), [[0.5, 0], [1, 0], [-0.5, 1]], atol=1e-15)
    np.testing.assert_allclose(coefficients_in(invariant, "abc")[:, 1], 1 / 3)


def test_groups_of_rows_become_finer_and_coarser_ones_are_refused() -> None:
    parts = partition(LAYOUT, {"tensor": 2})  # two groups of each weight, and of the bias
    assert parts.count == 6
    columns = np.random.default_rng(1).dirichlet(np.ones(3), 6).T
    block_of = dict(zip(LAYOUT.names, parts.block.tolist(), strict=True))
    cuts = {LAYOUT.names[tensor]: elements for tensor, elements in parts.cuts.items()}
    cut = Start("OUT", Coefficients(columns, tuple("abc"), parts.names, block_of, cuts=cuts), ("A", "B", "C"), "0")
    np.testing.assert_allclose(coefficients_in(cut, "abc", {"tensor": 2}), columns, atol=1e-15)
    finer = columns[:, [0, 0, 1, 1, 2, 2, 3, 3, 4, 5]]
    np.testing.assert_allclose(coefficients_in(cut, "abc", {"tensor": 4}), finer, atol=1e-15)
    np.testing.assert_allclose(coefficients_in(soup_of(OLD), "abc", {"tensor": 2}), np.repeat(OLD, 2, axis=1), atol=1e-15)
    with pytest.raises(RecipeError, match=r"rows of the tensor 1\.weight have different coefficients"):
        coefficients_in(cut, "abc")


def test_ingredients_are_matched_by_content_and_then_by_name() -> None:
    start = soup_of(OLD)
    assert matches(start, ["x", "y", "z"], ["C", "D", "A"]) == [2, None, 0]
    assert matches(start, ["b", "a"], ["new", "C"]) == [1, 2]
    twice = Start("OUT", start.coefficients, ("A", "A", "A"), "0")
    assert matches(twice, ["c", "b", "d", "e"], ["A", "A", "A", "A"]) == [2, 1, 0, None]
    with pytest.raises(RecipeError, match=r"none of these 2 ingredients, such as d; it was made of others, such as a\."):
        coefficients_in(start, "de")


# A finished soup


def random_soup(count: int, scale: float = 0.05) -> Coefficients:
    """Coefficients of the first ingredients of the zoo, around those of the uniform soup."""
    layout = tiny_layout()
    c = 1 / count + scale * np.random.default_rng(0).standard_normal((count, len(layout.names)))
    names = tuple(f"model_{k}" for k in range(count))
    return Coefficients(
        c + (1 - c.sum(axis=0)) / count, names, layout.names, dict(zip(layout.names, range(99), strict=False))
    )


def write_out(folder: Path, zoo: Path, made: Coefficients) -> None:
    """Write what of a finished soup is read: its coefficients and run.json."""
    folder.mkdir()
    file = folder / "coefficients.safetensors"
    save_coefficients(made, file)
    files = [str(zoo / "zoo" / f"{name}.safetensors") for name in made.ingredients]
    listed = [{"name": n, "path": f, "sha256": sha256_file(f)} for n, f in zip(made.ingredients, files, strict=True)]
    record: Any = {"exit": 0, "files": {file.name: sha256_file(str(file))}, "ingredients": listed}
    write_run_record(record, folder / "run.json")


def tiny_layout() -> Layout:
    parameters = dict(tiny.Tiny().named_parameters())
    return Layout(tuple(parameters), tuple(tuple(p.shape) for p in parameters.values()))


def select_nll(learner: Learner, c: Coefficients) -> float:
    """The NLL on select of the soup with these coefficients, by plain torch."""
    paths = {ingredient.name: ingredient.path for ingredient in learner.pool.inputs.ingredients}
    states = [load_file(paths[name]) for name in c.ingredients]
    soup = {n: sum(w * s[n].double() for w, s in zip(c.of(n), states, strict=True)).float() for n in c.block_of}
    images, labels = (torch.from_numpy(array[600:1197][learner.splits["select"].rows]) for array in tiny.digits())
    with torch.no_grad():
        return F.cross_entropy(torch.func.functional_call(tiny.Tiny().eval(), soup, (images,)), labels).item()


def begun(folder: Path, out: Path, **changes: Any) -> Learner:
    """A learner whose start is the soup in `out`."""
    learner = Learner(folder, start=str(out), **changes)
    learner.beginning = beginning(
        learner.pool.inputs.start, learner.pool.inputs.names, learner.store.sha256, learner.pool.layout,
        learner.store.partition, learner.store.norms,
    )  # fmt: skip
    return learner


def test_learning_begins_at_the_soup_and_a_stopped_run_is_bit_identical(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With six of the eight ingredients, whitened, and refitted from the same start."""
    monkeypatch.setattr("ray_soup.soups.learn.SAVE_EVERY_S", 0.0)
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(2, 8)]
    six = Learner(zoo, ingredients=paths, learn__average=True, learn__lr=0.05, learn__cosine_lr=False)
    y, parts = six.learn(tmp_path / "six.pt").y.numpy(), six.store.partition
    block_of = dict(zip(six.pool.layout.names, parts.block.tolist(), strict=True))
    old = Coefficients(Affine(six.store.norms).coefficients(y), six.pool.inputs.names, parts.names, block_of)
    write_out(tmp_path / "old", zoo, old)
    learner = begun(zoo, tmp_path / "old", learn__model_batch=5, learn__epochs=1, learn__refit=True, learn__whiten=1.0)
    assert learner.beginning.about["ingredients"] == 6
    whole = learner.learn(tmp_path / "whole.pt", starts=[learner.beginning])
    assert whole.curve[0]["select_nll"] == pytest.approx(select_nll(learner, old), rel=1e-4)
    assert whole.began is not None
    assert whole.began["used"]
    assert whole.began["select_nll"] == pytest.approx(whole.curve[0]["select_nll"], rel=1e-6)
    assert whole.began["select_nll"] < whole.began["uniform_select_nll"]
    for at in (3, 11, whole.steps):
        file = tmp_path / f"{at}.pt"
        with pytest.raises(KeyboardInterrupt):
            learner.learn(file, stopping(at), starts=[learner.beginning])
        assert load_state(file).start is not None
        same(learner.learn(file, starts=[learner.beginning]), whole)


def test_the_uniform_soup_is_the_start_if_it_is_better(zoo: Path, tmp_path: Path) -> None:
    write_out(tmp_path / "old", zoo, random_soup(8, scale=3.0))
    learner = begun(zoo, tmp_path / "old", learn__epochs=1)
    state = learner.learn(tmp_path / "s.pt", starts=[learner.beginning])
    plain = Learner(zoo, learn__epochs=1).learn(tmp_path / "plain.pt")
    assert not state.began["used"]
    assert state.began["uniform_select_nll"] == pytest.approx(plain.curve[0]["select_nll"], rel=1e-6)
    assert state.began["uniform_select_nll"] < state.began["select_nll"]
    assert torch.equal(state.y, plain.y)
    assert state.curve == plain.curve
    assert "learning began from the uniform soup, which is better" in began_note("mehl+", [learner.beginning], state)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "run.json").unlink(), r"start: .*old is not a finished soup: no run\.json found"),
        (
            lambda out: write_run_record({"exit": 130}, out / "run.json"),
            "start: .*old is not a finished soup: its run ended with",
        ),
        (
            lambda out: (out / "coefficients.safetensors").write_bytes(b"1"),
            r"start: .*coefficients\.safetensors was changed",
        ),
    ],
)
def test_what_is_no_finished_soup_is_refused(
    zoo: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    recipe = make_recipe(values(zoo, start=str(tmp_path / "old")))
    write_out(tmp_path / "old", zoo, random_soup(2))
    assert open_start(recipe, tiny_layout()) is not None
    change(tmp_path / "old")
    with pytest.raises(RecipeError, match=message):
        open_start(recipe, tiny_layout())


def test_another_start_is_another_run(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(values(zoo, start=str(tmp_path / "old")))
    records = []
    for count in (2, 3):
        write_out(tmp_path / "old", zoo, random_soup(count))
        inputs = open_inputs(recipe)
        records.append(begun_record(recipe, inputs.ingredients, **inputs.started))
        shutil.rmtree(tmp_path / "old")
    check_same(tmp_path, records[0], records[0])
    with pytest.raises(RecipeError, match=r"was started with start [0-9a-f]{64}, but this command has [0-9a-f]{64}"):
        check_same(tmp_path, records[0], records[1])
    assert open_inputs(make_recipe(values(zoo))).started == {}


def test_a_soup_of_another_model_and_coarser_blocks_are_refused_before_a_run(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(values(zoo, start=str(tmp_path / "old")))
    write_out(tmp_path / "old", zoo, random_soup(2))
    with pytest.raises(RecipeError, match=r"another model: this model has the tensor 1\.weight, and the soup does not"):
        open_start(recipe, LAYOUT)
    with pytest.raises(RecipeError, match="have different coefficients, but these `blocks:` have one for both"):
        open_start(make_recipe(values(zoo, start=str(tmp_path / "old"), blocks="model")), tiny_layout())


def test_the_key_is_for_methods_on_the_hyperplane(zoo: Path) -> None:
    assert "start" not in dump_recipe(make_recipe(values(zoo)))
    recipe = make_recipe(values(zoo, start="/old"))
    assert "start: /old" in dump_recipe(recipe)
    assert for_method(recipe, "mehl+").start == "/old"
    assert for_method(recipe, "mehl").start is None
    for method in ("learned", "greedy"):
        with pytest.raises(RecipeError, match=f"start: found '/old' with method: {method}. Expected mehl or"):
            make_recipe(values(zoo, start="/old", method=method))

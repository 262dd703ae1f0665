"""The recipe section `polish`, from the recipe to a proven folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.io.cache import cache_at
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.output import Soup
from ray_soup.soups.run import run
from tests.conftest import values
from tests.tiny import TinyConv

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]
POLISH = {"epochs": 3, "lr": [1e-4, 0.004], "batch_size": 100}


def recipe_of(zoo: Path, **changes: Any) -> Any:
    return make_recipe(values(zoo, **{"model": "tests.tiny:build_conv", "polish": POLISH, **changes}))


@pytest.fixture(scope="module")
def plain(conv_zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Soup:
    """The soup without polish."""
    return run(recipe_of(conv_zoo, polish=None), tmp_path_factory.mktemp("plain") / "out")


@pytest.fixture(scope="module")
def polished(conv_zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[Soup]:
    """A model with BatchNorm, interrupted once while it was trained and once after that."""
    out, seen = tmp_path_factory.mktemp("polished") / "out", list[str]()

    def interrupting(what: str, done: int, total: int) -> None:
        seen.append(what)
        if (what, done) == ("polishing, lr 0.004", 8) or (what == "evaluating ingredients" and "polishing" in seen[-2]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(conv_zoo), out, interrupting)
    assert list(out.glob("state/**/actors/polish_1.pt"))
    return run(recipe_of(conv_zoo), out)


def test_the_model_is_the_soup_plus_the_difference(plain: Soup, polished: Soup) -> None:
    soup, model = load_file(plain.out / "model.safetensors"), load_file(polished.out / "model.safetensors")
    difference = load_file(polished.out / "difference.safetensors")
    ours, theirs = (load_coefficients(s.out / "coefficients.safetensors") for s in (polished, plain))
    np.testing.assert_array_equal(ours.values, theirs.values)
    assert difference.keys() == dict(TinyConv().named_parameters()).keys()
    for name, change in difference.items():
        assert change.dtype == torch.float32
        assert torch.equal(model[name], soup[name] + change)
    assert not torch.equal(model["norm.running_mean"], soup["norm.running_mean"])
    assert torch.equal(model["norm.running_mean"], torch.from_numpy(ours.statistics["norm.running_mean"]))


def test_figures_are_those_of_the_file_and_select_is_better_than_before(plain: Soup, polished: Soup, conv_zoo: Path) -> None:
    row, record = polished.rows[0], polished.record["polish"]
    assert record["select"]["after"]["nll"] == row["select_nll"] < plain.rows[0]["select_nll"]
    assert record["select"]["before"]["nll"] == pytest.approx(plain.rows[0]["select_nll"], rel=1e-6)
    model = TinyConv().eval()
    model.load_state_dict(load_file(polished.out / "model.safetensors"))
    data = np.load(conv_zoo / "test.npz")
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(model(torch.from_numpy(data["images"])), torch.from_numpy(data["labels"]))
    assert row["test_nll"] == pytest.approx(loss.item(), rel=1e-5)
    assert (record["lr"], record["rates"], record["epochs"]) == (0.004, [1e-4, 0.004], 3)
    assert record["steps"] == 2 * 3 * 5
    assert row["steps"] == plain.rows[0]["steps"] + record["steps"]
    assert row["image_passes"] == plain.rows[0]["image_passes"] + record["image_passes"]
    assert any("no longer an average of the ingredients" in note for note in polished.notes)
    card, report = ((polished.out / name).read_text() for name in ("README.md", "report.html"))
    assert "no longer an average of its ingredients" in card
    assert "`difference.safetensors` holds what was added" in card
    assert "no longer an average" in report


def test_an_interrupted_run_ends_with_the_same_bits(polished: Soup, conv_zoo: Path, tmp_path: Path) -> None:
    whole = run(recipe_of(conv_zoo), tmp_path / "whole")
    for name in ("model.safetensors", "difference.safetensors"):
        assert (whole.out / name).read_bytes() == (polished.out / name).read_bytes()
    assert whole.record["polish"] == polished.record["polish"]


def test_a_uri_gets_the_same_model_after_the_same_interruption(
    polished: Soup, conv_zoo: Path, s3: str, tmp_path: Path
) -> None:
    """Actors keep their state in the bucket, where the resumed run finds it; nothing of it stays."""

    def interrupting(what: str, done: int, total: int) -> None:
        if (what, done) == ("polishing, lr 0.004", 8):
            raise KeyboardInterrupt

    out = f"{s3}/out"
    with cache_at(tmp_path / "first"), pytest.raises(KeyboardInterrupt):
        run(recipe_of(conv_zoo), out, interrupting)
    left = [name.rpartition("/")[2] for name in storage.walk(f"{out}/state") if "/actors/" in name]
    assert {name.partition(".")[0] for name in left} == {"polish_0", "polish_1"}
    seen = list[tuple[str, int, int]]()
    with cache_at(tmp_path / "second"):
        soup = run(recipe_of(conv_zoo), out, lambda *progress: seen.append(progress))
    again = [done for what, done, total in seen if what == "polishing, lr 0.004" and total > 1]
    assert not again or min(again) > 4  # an actor may have ended its training before it was killed
    assert not any(what == "polishing, lr 0.0001" and total > 1 for what, _, total in seen)
    for name in ("model.safetensors", "difference.safetensors"):
        assert storage.read_bytes(f"{out}/{name}") == (polished.out / name).read_bytes()
    assert soup.record["polish"] == polished.record["polish"]
    assert not [name for name in storage.walk(f"{out}/state") if "/actors/" in name]
    assert "difference.safetensors" in verify(out)[3]


def test_the_folder_is_rebuilt_and_proven(polished: Soup, tmp_path: Path) -> None:
    lines = verify(polished.out)
    assert "computed from coefficients, ingredients and difference.safetensors" in lines[3]
    copy = bake_copy(polished.out, tmp_path / "copy")
    for name in ("model.safetensors", "difference.safetensors"):
        assert (copy.out / name).read_bytes() == (polished.out / name).read_bytes()
    difference = load_file(copy.out / "difference.safetensors")
    difference["head.bias"][3] += 1e-3
    save_file(difference, copy.out / "difference.safetensors")
    with pytest.raises(SoupError, match=r"difference.safetensors was changed"):
        verify(copy.out)
    with pytest.raises(RecipeError, match=r"difference.safetensors was changed"):
        bake_copy(copy.out, tmp_path / "again")


def test_a_soup_that_no_epoch_improves_stays_as_it_is(conv_zoo: Path, plain: Soup, tmp_path: Path) -> None:
    soup = run(recipe_of(conv_zoo, polish={"epochs": 1, "lr": 3.0}), tmp_path / "out")
    assert (soup.out / "model.safetensors").read_bytes() == (plain.out / "model.safetensors").read_bytes()
    assert not (soup.out / "difference.safetensors").exists()
    assert soup.record["polish"]["best_epoch"] == 0
    assert soup.rows[0]["test_nll"] == plain.rows[0]["test_nll"]
    assert any("no epoch of polish was better on select" in note for note in soup.notes)
    assert len(verify(soup.out)) == 5
    assert "no longer" not in (soup.out / "README.md").read_text()


def test_a_greedy_soup_in_16_bits_and_several_files(zoo: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        values(zoo, method="greedy", out_dtype="bfloat16", shard_size=3000, polish={"epochs": 3, "lr": 0.001})
    )
    soup = run(recipe, tmp_path / "out")
    assert soup.record["polish"]["best_epoch"] > 0
    assert len(verify(soup.out)) == 5
    index = json.loads((soup.out / "model.safetensors.index.json").read_text())["weight_map"]
    copy = bake_copy(soup.out, tmp_path / "copy")
    for name in set(index.values()):
        assert (copy.out / name).read_bytes() == (soup.out / name).read_bytes()


@pytest.fixture(scope="module")
def compared(conv_zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Soup:
    """A comparison that was interrupted while it trained all weights from the uniform soup."""
    out = tmp_path_factory.mktemp("compared") / "out"

    def interrupting(what: str, done: int, total: int) -> None:
        if (what, done) == ("training trained, lr 0.0003", 3):
            raise KeyboardInterrupt

    recipe = recipe_of(conv_zoo)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, out, progress=interrupting)
    return compare(recipe, out)


def test_the_polished_row_is_the_model_that_learn_makes(compared: Soup, polished: Soup) -> None:
    row = next(row for row in compared.rows if row["model_name"] == "mehl+ polished")
    for key in ("select_nll", "test_nll", "test_accuracy", "steps", "image_passes"):
        assert row[key] == polished.rows[0][key], key
    assert (compared.record["chosen"], compared.record["method"]) == ("mehl+ polished", "mehl+")
    for name in ("model.safetensors", "difference.safetensors"):
        assert (compared.out / name).read_bytes() == (polished.out / name).read_bytes()
    assert compared.record["polish"] == polished.record["polish"]
    assert "difference.safetensors" in verify(compared.out)[3]


def test_a_comparison_in_a_bucket_is_the_same(compared: Soup, conv_zoo: Path, s3: str, tmp_path: Path) -> None:
    """Interrupted while it evaluates ingredients, while it trains, and at the end, each time on a node that has nothing."""
    out, recipe = f"{s3}/out", recipe_of(conv_zoo)

    def at(where: str, least: int) -> Callable[[str, int, int], None]:
        def interrupting(what: str, done: int, total: int) -> None:
            if what == where and done >= least:
                raise KeyboardInterrupt

        return interrupting

    for number, (where, least) in enumerate((
        ("evaluating ingredients", 3000), ("training trained, lr 0.0003", 3), ("mixing", 0)
    )):  # fmt: skip
        with cache_at(tmp_path / str(number)), pytest.raises(KeyboardInterrupt):
            compare(recipe, out, progress=at(where, least))
    with cache_at(tmp_path / "last"):
        found = compare(recipe, out)
    figures = [name for name in compared.rows[0] if name.startswith(("select_", "test_"))]
    for ours, theirs in zip(found.rows, compared.rows, strict=True):
        assert [ours.get(name) for name in figures] == [theirs.get(name) for name in figures]
    for name in ("model.safetensors", "difference.safetensors"):
        assert storage.read_bytes(f"{out}/{name}") == (compared.out / name).read_bytes()
    assert not [name for name in storage.walk(f"{out}/state") if "/actors/" in name]


def test_the_reference_is_the_uniform_soup_trained_with_the_best_learning_rate(
    compared: Soup, conv_zoo: Path, tmp_path: Path
) -> None:
    polish = {"epochs": 2, "lr": [1e-4, 3e-4, 1e-3], "batch_size": 61}
    alone = run(recipe_of(conv_zoo, method="uniform", polish=polish), tmp_path / "out")
    trained, table = compared.record["trained"], [row["model_name"] for row in compared.record["table"]]
    assert trained == alone.record["polish"]
    assert table[-2:] == ["mehl+ polished", "trained"]
    row = next(row for row in compared.rows if row["model_name"] == "trained")
    for key in ("select_nll", "test_nll", "image_passes"):
        assert row[key] == alone.rows[0][key], key
    tests = {(t["model_name"], t["against"]) for t in compared.record["tests"]}
    assert {(name, against) for name in table[-2:] for against in ("best_single", "greedy")} <= tests
    html = (compared.out / "report.html").read_text()
    assert "trained is a reference and no soup" in html


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actors__by_layer": True}, "actors.by_layer is true. Remove one of the two"),
        ({"learn__refit": True}, "learn.refit is true: training stops on select, which a refit learns on"),
        ({"out_format": "dcp"}, "out_format is dcp; expected safetensors"),
        ({"method": "uniform", "data": {}}, "the recipe has no data.fit"),
    ],
)
def test_what_cannot_be_polished_is_refused_before_anything_is_written(
    conv_zoo: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(recipe_of(conv_zoo, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Whole runs from and to distributed checkpoints of torch: written, loaded, verified, rebuilt, evaluated and resumed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io import storage
from ray_soup.recipe import dump_recipe, make_recipe, with_changes
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.output import Soup
from ray_soup.soups.report.terminal import print_soup
from ray_soup.soups.run import run
from tests import adapters, tiny
from tests.conftest import ROOT, put, ray_soup, steps_saved, values
from tests.distributed import load, save


@pytest.fixture(scope="module")
def sharded(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four ingredients of the zoo, as a trainer saves them, and its data."""
    folder = tmp_path_factory.mktemp("sharded")
    for k in range(4):
        state = load_file(zoo / "zoo" / f"model_{k}.safetensors")
        moments = {name: {"exp_avg": tensor} for name, tensor in state.items()}
        save({"model": state, "optimizer": {"state": moments}}, folder / "runs" / f"model_{k}")
    for name in ("heldout", "test"):
        shutil.copy(zoo / f"{name}.npz", folder)
    return folder


def recipe_of(folder: Path, **changes: Any) -> Any:
    return make_recipe(values(folder, **{"ingredients": str(folder / "runs"), "out_format": "dcp", **changes}))


@pytest.fixture(scope="module")
def uniform(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("soup") / "out"
    run(recipe_of(sharded, method="uniform", data={}, shard_size="8KB"), out)
    return out


def mean_of(zoo: Path) -> dict[str, torch.Tensor]:
    states = [load_file(zoo / "zoo" / f"model_{k}.safetensors") for k in range(4)]
    return {
        name: sum(0.25 * state[name].double() for state in states).float() if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }


def test_the_soup_of_sharded_checkpoints_is_a_sharded_checkpoint_of_their_mean(zoo: Path, uniform: Path) -> None:
    expected = mean_of(zoo)
    for name, tensor in load(uniform, expected).items():
        assert torch.equal(tensor, expected[name]), name
    record = json.loads((uniform / "run.json").read_text())
    assert {".metadata", "__0_0.distcp", "__0_1.distcp"} <= set(record["files"])
    assert "torch.distributed.checkpoint.load(model.state_dict(), checkpoint_id='.')" in (uniform / "README.md").read_text()
    assert not list(uniform.glob("*model*.safetensors"))


def test_the_command_says_what_it_wrote(sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soup = run(recipe_of(sharded, method="uniform", data={}), tmp_path / "out")
    print_soup(soup, False)
    assert f"Wrote {tmp_path}/out/.metadata and 1 .distcp file, its coefficients" in capsys.readouterr().out


def test_it_loads_into_the_model_by_the_line_of_its_card(uniform: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(uniform)
    model = tiny.build()
    exec("torch.distributed.checkpoint.load(model.state_dict(), checkpoint_id='.')", {"torch": torch, "model": model})
    for name, tensor in load(uniform, model.state_dict()).items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_it_is_verified_rebuilt_and_may_be_an_ingredient(uniform: Path, tmp_path: Path) -> None:
    lines = verify(uniform)
    assert any("19 tensors are bit-identical" in line for line in lines)
    assert any(
        "12 sampled tensors equal those computed from the ingredients as their own libraries" in line for line in lines
    )
    bake_copy(uniform, tmp_path / "again")
    files = [".metadata", *(file.name for file in uniform.glob("*.distcp"))]
    assert len(files) > 2
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (uniform / name).read_bytes()
    verify(tmp_path / "again")


def test_damage_to_a_finished_soup_is_named(uniform: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(uniform, out)
    file = out / "__0_1.distcp"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SoupError, match=r"__0_1\.distcp"):
        verify(out)
    file.write_bytes(data)
    verify(out)
    shutil.copy(file, out / "__7_0.distcp")
    with pytest.raises(RecipeError, match=r"__7_0\.distcp is not among the files in run\.json"):
        verify(out)
    (out / "__7_0.distcp").unlink()
    (out / ".metadata").unlink()
    with pytest.raises(SoupError, match=r"\.metadata"):
        verify(out)


def test_an_ingredient_that_changed_since_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(sharded, folder)
    run(recipe_of(folder, method="uniform", data={}), tmp_path / "out")
    save({"model": {n: t + 1 for n, t in mean_of_dcp(folder).items()}}, folder / "runs" / "model_1")
    with pytest.raises(IngredientError, match=r"model_1 has changed since the soup was made"):
        verify(tmp_path / "out")


def mean_of_dcp(folder: Path) -> dict[str, torch.Tensor]:
    state = tiny.build().state_dict()
    found = load(folder / "runs" / "model_1", {f"model.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def test_adapters_are_written_as_safetensors_only(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters.write_adapters(tmp_path, adapters.CONFIGS[:2])
    recipe = make_recipe({**adapters.values(tmp_path), "method": "uniform", "data": {}, "out_format": "dcp"})
    with pytest.raises(
        RecipeError, match=r"out_format is dcp, but the ingredients are LoRA adapters, such as .*Remove the key"
    ):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def learned(sharded: Path, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Soup]:
    """A recipe, and the soup that was learned from it without interruption."""
    recipe = recipe_of(sharded, method="mehl+", learn__lr=0.05, learn__epochs=20)
    return recipe, run(recipe, tmp_path_factory.mktemp("learned") / "out")


@pytest.mark.slow
def test_a_learned_soup_has_the_bits_and_the_figures_of_one_written_as_safetensors(
    learned: tuple[Any, Soup], tmp_path: Path
) -> None:
    recipe, soup = learned
    plain = run(with_changes(recipe, {"out_format": "safetensors"}), tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in load(Path(soup.out), expected).items():
        assert torch.equal(tensor, expected[name])
    keys = [key for key in soup.rows[0] if key not in ("seconds", "peak_memory_bytes")]
    assert [soup.rows[0][key] for key in keys] == [plain.rows[0][key] for key in keys]
    verify(soup.out)
    row = evaluate(recipe, str(soup.out), "test")
    assert row["test_nll"] == soup.rows[0]["test_nll"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_running_statistics_are_re_estimated(conv_zoo: Path, tmp_path: Path) -> None:
    changes = {"model": "tests.tiny:build_conv", "ingredients": str(conv_zoo / "zoo"), "method": "uniform"}
    run(recipe_of(conv_zoo, **changes), tmp_path / "dcp")
    run(recipe_of(conv_zoo, **{**changes, "out_format": "safetensors"}), tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in load(tmp_path / "dcp", expected).items():
        assert torch.equal(tensor, expected[name]), name
    verify(tmp_path / "dcp")


@pytest.mark.slow
def test_ingredients_and_soup_in_remote_storage(zoo: Path, sharded: Path, s3: str, tmp_path: Path) -> None:
    put(sharded / "runs", f"{s3}/runs")
    recipe = recipe_of(sharded, method="uniform", data={}, ingredients=f"{s3}/runs")
    run(recipe, f"{s3}/out")
    assert {".metadata", "__0_0.distcp", "run.json"} <= set(storage.walk(f"{s3}/out"))
    for name in storage.listdir(f"{s3}/out"):
        if storage.isfile(f"{s3}/out/{name}"):
            (tmp_path / name).write_bytes(storage.read_bytes(f"{s3}/out/{name}"))
    expected = mean_of(zoo)
    for name, tensor in load(tmp_path, expected).items():
        assert torch.equal(tensor, expected[name])
    assert any("because the ingredients are in remote storage" in line for line in verify(f"{s3}/out"))


@pytest.mark.slow
def test_a_killed_run_equals_one_that_was_not(learned: tuple[Any, Soup], tmp_path: Path) -> None:
    recipe, soup = learned
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ray_soup("learn", str(tmp_path / "recipe.yaml"), str(tmp_path / "killed"))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not steps_saved(tmp_path / "killed"):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert not (tmp_path / "killed" / ".metadata").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (".metadata", "__0_0.distcp"):
        assert (tmp_path / "killed" / name).read_bytes() == (Path(soup.out) / name).read_bytes()

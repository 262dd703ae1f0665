"""Soups from the recipe to the output folder: the model, its figures, and the files beside it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, load_model, save

from ray_soup.actors.on_ray import RayPool
from ray_soup.errors import RecipeError, SoupError
from ray_soup.io.find import open_ingredients
from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import bake_copy, evaluate, verify
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.run import run
from ray_soup.task.data import Split
from ray_soup.task.outcomes import Outcome
from tests.conftest import values
from tests.tiny import Tiny

pytestmark = pytest.mark.usefixtures("cluster")


def states_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "zoo" / f"model_{k}.safetensors") for k in range(8)]


def mean_of(folder: Path) -> dict[str, torch.Tensor]:
    """The mean of the zoo's state dicts, float64."""
    return {n: sum(s[n].double() for s in states_of(folder)) / 8 for n in Tiny().state_dict()}


# The model and its figures


def test_the_model_is_the_weighted_sum_of_the_ingredients(zoo: Path, soup: Path) -> None:
    coefficients = load_coefficients(soup / "coefficients.safetensors")
    assert np.abs(coefficients.values.sum(axis=0) - 1).max() <= 1e-12
    assert (coefficients.values < 0).any()
    model, states = load_file(soup / "model.safetensors"), states_of(zoo)
    for name in coefficients.block_of:
        exact = sum(c * s[name].double() for c, s in zip(coefficients.of(name), states, strict=True))
        assert torch.equal(model[name], exact.float()) or torch.allclose(model[name], exact.float(), rtol=2**-23, atol=0)
        assert model[name].dtype == states[0][name].dtype
    Tiny().load_state_dict(model)
    assert torch.equal(model["unused"], states[0]["unused"])


def test_reported_figures_are_those_of_the_file(zoo: Path, soup: Path) -> None:
    row = json.loads((soup / "results.jsonl").read_text().splitlines()[0])
    model = Tiny()
    load_model(model, soup / "model.safetensors")
    test = np.load(zoo / "test.npz")
    with torch.inference_mode():
        logits = model(torch.from_numpy(test["images"]))
    labels = torch.from_numpy(test["labels"])
    assert row["test_accuracy"] == (logits.argmax(dim=1) == labels).double().mean().item()
    assert row["test_nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    again = evaluate(make_recipe(values(zoo)), str(soup), "test")
    assert again["test_accuracy"] == row["test_accuracy"]
    assert again["test_nll"] == pytest.approx(row["test_nll"], rel=1e-6)


def test_the_uniform_soup_is_the_mean(zoo: Path, tmp_path: Path) -> None:
    run(make_recipe(values(zoo, method="uniform")), tmp_path / "out")
    mean = mean_of(zoo)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), mean[name], rtol=1e-7, atol=1e-12)


def test_best_single_is_the_most_accurate_ingredient_on_held_out_data(zoo: Path, tmp_path: Path) -> None:
    best = run(make_recipe(values(zoo, method="best_single", actors__replicas=2)), tmp_path / "out")
    held_out = np.load(zoo / "heldout.npz")
    scores = []
    for state in states_of(zoo):
        model = Tiny()
        model.load_state_dict(state)
        with torch.inference_mode():
            logits = model(torch.from_numpy(held_out["images"]))
        right = (logits.argmax(dim=1).numpy() == held_out["labels"]).sum()
        scores.append((-int(right), torch.nn.functional.cross_entropy(logits, torch.from_numpy(held_out["labels"])).item()))
    chosen = min(range(8), key=lambda k: scores[k])
    assert best.record["best_single"] == f"model_{chosen}"
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, states_of(zoo)[chosen][name])
    for k in range(8):
        assert best.record["held_out"][f"model_{k}"]["accuracy"] == -scores[k][0] / len(held_out["labels"])


@pytest.mark.slow
def test_a_learned_factor_is_folded_into_the_last_layer(zoo: Path, tmp_path: Path) -> None:
    soup = run(make_recipe(values(zoo, method="learned+")), tmp_path / "out")
    coefficients = load_coefficients(soup.out / "coefficients.safetensors")
    assert coefficients.factored == ("head.weight", "head.bias")
    assert abs(coefficients.factor - 1) > 0.01
    assert np.abs(coefficients.values.sum(axis=0) - 1).max() <= 1e-12
    assert (coefficients.values > 0).all()
    bake(replace(coefficients, factored=()), open_ingredients(str(zoo / "zoo")), tmp_path / "plain")
    images = torch.from_numpy(np.load(zoo / "test.npz")["images"])
    logits = []
    for file in (soup.out / "model.safetensors", tmp_path / "plain"):
        model = Tiny()
        model.load_state_dict(load_file(file))
        with torch.inference_mode():
            logits.append(model(images))
    torch.testing.assert_close(logits[0], coefficients.factor * logits[1], rtol=1e-5, atol=1e-5)
    assert len(verify(soup.out)) == 5


# The form of the model file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_soup_in_another_dtype_verifies_and_is_baked_bit_identical(zoo: Path, tmp_path: Path, dtype: str) -> None:
    recipe = {**values(zoo, method="uniform", data={}), "out_dtype": dtype}
    run(make_recipe(recipe), tmp_path / "out")
    assert len(verify(tmp_path / "out")) == 5
    mean = mean_of(zoo)
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name == "seen":
            assert (tensor.dtype, tensor.item()) == (torch.int64, 1797)
        else:
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.allclose(tensor.double(), mean[name], rtol=torch.finfo(tensor.dtype).eps, atol=1e-7)
    bake_copy(tmp_path / "out", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


@pytest.mark.slow
def test_shards_follow_the_convention_of_hugging_face(zoo: Path, tmp_path: Path) -> None:
    """Everything that reads a soup also reads its shards, and finds the same tensors and figures."""
    run(make_recipe(values(zoo, method="uniform", data={})), tmp_path / "whole")
    recipe = {**values(zoo, method="uniform"), "shard_size": "6 KB"}
    soup = run(make_recipe(recipe), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 2
    assert not (tmp_path / "out" / "model.safetensors").exists()
    parts = {file: load_file(tmp_path / "out" / file) for file in files}
    tensors = {name: parts[file][name] for name, file in index["weight_map"].items()}
    assert sum(map(len, parts.values())) == len(tensors)
    one = load_file(tmp_path / "whole" / "model.safetensors")
    assert tensors.keys() == one.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in one.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(sum(t.nbytes for t in p.values()) <= 6000 or len(p) == 1 for p in parts.values())
    again = evaluate(make_recipe(values(zoo)), str(tmp_path / "whole"), "test")
    assert soup.rows[0]["test_nll"] == pytest.approx(again["test_nll"], rel=1e-6)
    bake_copy(tmp_path / "out", tmp_path / "again")
    for file in (*files, "model.safetensors.index.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert len(verify(tmp_path / "again")) == 5
    content = bytearray((tmp_path / "again" / files[1]).read_bytes())
    content[-1] ^= 1
    (tmp_path / "again" / files[1]).write_bytes(content)
    with pytest.raises(SoupError, match=f"{files[1]} was changed: its SHA-256 is"):
        verify(tmp_path / "again")


# The files beside it


def test_a_finished_folder_holds_these_files_and_records(soup: Path) -> None:
    assert {f.name for f in soup.iterdir()} == {
        "model.safetensors", "coefficients.safetensors", "recipe.yaml", "results.jsonl", "run.json", "README.md",
        "report.html", "state", "coefficients.parquet", "tensorboard",
    }  # fmt: skip
    record = json.loads((soup / "run.json").read_text())
    for key in ("method", "seed", "versions", "mesh", "steps", "image_passes", "wall_s", "peak_memory_bytes",
                "wire_bytes_per_step", "driver_overhead_ms", "ingredients"):  # fmt: skip
        assert key in record
    assert record["exit"] == 0
    card = (soup / "README.md").read_text()
    assert "model_0" in card
    assert "| mehl+ |" in card


def test_the_table_of_coefficients_equals_the_file(soup: Path) -> None:
    table, coefficients = pq.read_table(soup / "coefficients.parquet"), load_coefficients(soup / "coefficients.safetensors")
    rows = table.to_pylist()
    assert table.column_names == ["ingredient", "block", "coefficient"]
    assert len(rows) == coefficients.values.size
    for row in rows:
        k, b = coefficients.ingredients.index(row["ingredient"]), coefficients.blocks.index(row["block"])
        assert row["coefficient"] == coefficients.values[k, b]


def scalars_in(folder: Path) -> list[tuple[str, int, float]]:
    """Read (tag, step, value) of all scalars in a folder of TensorBoard event files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # length, its checksum, the record, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_shows_the_learning_curve(soup: Path) -> None:
    found = scalars_in(soup / "tensorboard" / "mehl+")
    curve = json.loads((soup / "run.json").read_text())["curve"]
    assert [(step, value) for tag, step, value in found if tag == "select_nll"] == [
        (line["steps"], pytest.approx(line["select_nll"])) for line in curve
    ]
    assert {tag for tag, _, _ in found} == {"fit_nll", "select_nll", "select_accuracy", "lr"}
    assert found[-1][2] < 0.05


def test_after_a_resume_tensorboard_shows_every_epoch_once(tmp_path: Path) -> None:
    curve = [{"steps": n, "select_nll": float(n)} for n in range(4)]
    state = SimpleNamespace(curve=curve[:2])
    scalars(tmp_path / "board")(1, 3, state)
    again = scalars(tmp_path / "board")
    for count in (3, 4):
        state.curve = curve[:count]
        again(count - 1, 3, state)
    assert scalars_in(tmp_path / "board") == [("select_nll", n, float(n)) for n in range(4)]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_best_single_stands_beside_a_soup_and_is_evaluated_once(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In results.jsonl, run.json, the report and the model card; a second run takes it from the cache."""
    asked: list[int] = []
    original = RayPool.evaluate_files

    def evaluate_files(self: RayPool, paths: list[str], splits: list[Split], *more: object) -> Iterator[list[Outcome]]:
        asked.extend(len(split) for split in splits for _ in paths)
        return original(self, paths, splits, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(RayPool, "evaluate_files", evaluate_files)
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe(values(zoo, method="uniform", learn__seed=3))
    soup = run(recipe, tmp_path / "out")
    ours, best = soup.rows
    assert asked == [149] * 8  # rows of select, which is a share of fit
    assert best["model_name"] == "best_single"
    assert best["ingredient"] == soup.record["best_single"]
    change = soup.record["improvement"]
    assert change["select_nll"] == ours["select_nll"] - best["select_nll"]
    assert change["select_accuracy"] == ours["select_accuracy"] - best["select_accuracy"]
    assert {"test_accuracy", "test_nll", "test_nll_scaled", "test_ece", "temperature"} <= set(best)
    assert [json.loads(line) for line in (soup.out / "results.jsonl").read_text().splitlines()] == soup.rows
    assert "| best_single |" in (soup.out / "README.md").read_text()
    assert "Accuracy by method" in (soup.out / "report.html").read_text()
    other = evaluate(recipe, str(zoo / "zoo" / f"{best['ingredient']}.safetensors"), "test")
    assert best["test_accuracy"] == other["test_accuracy"]
    assert best["test_nll"] == pytest.approx(other["test_nll"], rel=1e-6)
    asked.clear()
    again = run(recipe, tmp_path / "again")
    assert asked == []
    assert again.rows[1] == best
    without = run(make_recipe(values(zoo, method="uniform", learn__seed=3, baseline="none")), tmp_path / "without")
    assert (len(without.rows), "improvement" in without.record, asked) == (1, False, [])


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["ingredient", "examples"])
def test_a_stopped_run_does_not_go_on_with_other_contents(zoo: Path, tmp_path: Path, changed: str) -> None:
    """Neither the size nor the time of the file shows that it was replaced."""
    shutil.copytree(zoo, tmp_path / "copy")
    recipe, out = make_recipe(values(tmp_path / "copy")), tmp_path / "out"

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("learning") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, out, progress=stop)
    file = tmp_path / "copy" / ("zoo/model_3.safetensors" if changed == "ingredient" else "heldout.npz")
    before = file.stat()
    if changed == "ingredient":
        file.write_bytes(reversed_tensors(file))
    else:
        arrays = dict(np.load(file))
        arrays["images"] = arrays["images"][::-1]
        np.savez(file, **arrays)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(
        RecipeError, match=r"learn\.pt is damaged \(it belongs to another recipe, or to ingredients or examples"
    ):
        run(recipe, out)
    (out / "state" / "learn.pt").unlink()
    assert run(recipe, out).record["exit"] == 0


def reversed_tensors(file: Path) -> bytes:
    """Return the bytes of a safetensors file in which one tensor has its numbers in reversed order."""
    state = load_file(file)
    name = max(state, key=lambda n: state[n].numel())
    state[name] = state[name].flatten().flip(0).reshape(state[name].shape).contiguous()
    return save(state)

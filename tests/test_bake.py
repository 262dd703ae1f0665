from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file

from ray_soup.bake import bake
from ray_soup.checkpoints import check_together, open_ingredients
from ray_soup.coefficients import MEAN, Coefficients, load_coefficients, save_coefficients
from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.pipeline import bake_again, evaluate, run, verify
from ray_soup.recipe import make_recipe
from tests.conftest import values
from tests.tiny import Tiny


@pytest.fixture(scope="module")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    out = tmp_path_factory.mktemp("soup") / "out"
    run(make_recipe(values(zoo, learn__lr=0.05)), out)
    return out


def ingredients_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "zoo" / f"model_{k}.safetensors") for k in range(8)]


def test_the_model_is_the_weighted_sum_of_the_ingredients(zoo: Path, soup: Path) -> None:
    coefficients = load_coefficients(soup / "coefficients.safetensors")
    assert np.abs(coefficients.values.sum(axis=0) - 1).max() <= 1e-12
    assert (coefficients.values < 0).any()
    model, states = load_file(soup / "model.safetensors"), ingredients_of(zoo)
    for name in coefficients.block_of:
        exact = sum(c * s[name].double() for c, s in zip(coefficients.of(name), states, strict=True))
        assert torch.equal(model[name], exact.float()) or torch.allclose(model[name], exact.float(), rtol=2**-23, atol=0)
        assert model[name].dtype == states[0][name].dtype
    Tiny().load_state_dict(model)
    assert torch.equal(model["unused"], states[0]["unused"])


def test_reported_figures_are_those_of_the_file(zoo: Path, soup: Path, cluster: None) -> None:
    row = json.loads((soup / "results.jsonl").read_text())
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


def test_what_a_run_leaves(soup: Path) -> None:
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


def test_baked_again_it_has_the_same_bits_and_verifies(soup: Path, tmp_path: Path) -> None:
    bake_again(soup, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (soup / "model.safetensors").read_bytes()
    assert len(verify(tmp_path / "again")) == 4


def test_verify_finds_one_flipped_byte_in_any_file(soup: Path, tmp_path: Path) -> None:
    assert any("bit for bit" in line for line in verify(soup))
    for name in ("model.safetensors", "coefficients.safetensors", "recipe.yaml", "results.jsonl", "README.md"):
        copy = tmp_path / name
        shutil.copytree(soup, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(SoupError, match=f"{name}: SHA-256") as error:
            verify(copy)
        assert error.value.exit_code == 1


def test_verify_recomputes_the_model(soup: Path, tmp_path: Path) -> None:
    """Coefficients and hashes that were changed together do not pass."""
    from ray_soup.checkpoints import sha256_file

    copy = tmp_path / "copy"
    shutil.copytree(soup, copy)
    coefficients = load_coefficients(copy / "coefficients.safetensors")
    coefficients.values[0, 0] += 0.5
    coefficients.values[1, 0] -= 0.5
    save_coefficients(coefficients, copy / "coefficients.safetensors")
    record = json.loads((copy / "run.json").read_text())
    record["files"]["coefficients.safetensors"] = sha256_file(str(copy / "coefficients.safetensors"))
    (copy / "run.json").write_text(json.dumps(record))
    with pytest.raises(SoupError, match="is not what coefficients and ingredients make"):
        verify(copy)


def test_an_ingredient_that_changed_is_named(zoo: Path, tmp_path: Path, cluster: None) -> None:
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    run(
        make_recipe({**values(zoo), "ingredients": str(tmp_path / "zoo"), "method": "uniform", "data": {}}), tmp_path / "out"
    )
    state = load_file(tmp_path / "zoo" / "model_3.safetensors")
    state["head.bias"] += 1
    save_file(state, tmp_path / "zoo" / "model_3.safetensors")
    for again in (lambda: verify(tmp_path / "out"), lambda: bake_again(tmp_path / "out", tmp_path / "new")):
        with pytest.raises(IngredientError, match=r"model_3\.safetensors has changed since the soup was made"):
            again()
    assert not (tmp_path / "new").exists()


def test_uniform_and_best_single(zoo: Path, tmp_path: Path, cluster: None) -> None:
    run(make_recipe(values(zoo, method="uniform")), tmp_path / "u")
    mean = {n: sum(s[n].double() for s in ingredients_of(zoo)) / 8 for n in Tiny().state_dict()}
    for name, tensor in load_file(tmp_path / "u" / "model.safetensors").items():
        assert torch.allclose(tensor.double(), mean[name], rtol=1e-7, atol=1e-12)
    best = run(make_recipe(values(zoo, method="best_single", actors__replicas=2)), tmp_path / "b")
    held_out = np.load(zoo / "heldout.npz")
    scores = []
    for state in ingredients_of(zoo):
        model = Tiny()
        model.load_state_dict(state)
        with torch.inference_mode():
            logits = model(torch.from_numpy(held_out["images"]))
        right = (logits.argmax(dim=1).numpy() == held_out["labels"]).sum()
        scores.append((-int(right), torch.nn.functional.cross_entropy(logits, torch.from_numpy(held_out["labels"])).item()))
    chosen = min(range(8), key=lambda k: scores[k])
    assert best.record["best_single"] == f"model_{chosen}"
    for name, tensor in load_file(tmp_path / "b" / "model.safetensors").items():
        assert torch.equal(tensor, ingredients_of(zoo)[chosen][name])
    for k in range(8):
        assert best.record["held_out"][f"model_{k}"]["accuracy"] == -scores[k][0] / len(held_out["labels"])


def mixed(folder: Path, states: list[dict[str, torch.Tensor]], buffers: str = "average") -> dict[str, torch.Tensor]:
    for k, state in enumerate(states):
        torch.save(state, folder / f"{k}.pt")
    ingredients = open_ingredients(str(folder / "*.pt"))
    shapes = {name: tuple(t.shape) for name, t in states[0].items() if name != "alias"}
    check_together(ingredients, shapes, {"alias": "w"})
    c = Coefficients(
        np.array([[2.0], [-1.0]]), ("0", "1"), ("all",), {"w": 0, "half": 0, "same": MEAN}, buffers, {"alias": "w"}
    )
    bake(c, ingredients, folder / "soup.safetensors")
    return load_file(folder / "soup.safetensors")


def states() -> list[dict[str, torch.Tensor]]:
    made = []
    for k in range(2):
        torch.manual_seed(k)
        w = torch.randn(3, 2_000_003)[:, :2_000_001]  # rows that do not follow each other, more than a range
        made.append(
            {
                "half": torch.randn(5).to([torch.float16, torch.bfloat16][k]),
                "w": w,
                "alias": w,
                "same": torch.arange(3.0),
                "running": torch.tensor([1.0 + k]),
                "steps": torch.tensor(7),
                "num_batches_tracked": torch.tensor(k),
            }
        )
    return made


def test_dtypes_strides_ties_and_buffers(tmp_path: Path) -> None:
    given = states()
    soup = mixed(tmp_path, given)
    assert soup.keys() == given[0].keys() - {"alias"}
    assert torch.equal(soup["w"], (2 * given[0]["w"].double() - given[1]["w"].double()).float())
    assert soup["half"].dtype == torch.float32
    assert torch.equal(soup["half"], 2 * given[0]["half"].float() - given[1]["half"].float())
    assert torch.equal(soup["same"], torch.arange(3.0))
    assert soup["running"].item() == 1.5
    assert (soup["steps"].item(), soup["steps"].dtype) == (7, torch.int64)
    assert soup["num_batches_tracked"].item() == 0
    with safe_open(tmp_path / "soup.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "alias": "w"}


def test_integer_buffers_must_agree_or_the_recipe_says_which(tmp_path: Path) -> None:
    given = states()
    given[1]["steps"] = torch.tensor(8)
    with pytest.raises(IngredientError, match=r"1\.pt: the integer buffer steps differs"):
        mixed(tmp_path, given)
    assert not (tmp_path / "soup.safetensors").exists()
    soup = mixed(tmp_path, given, "first")
    assert soup["steps"].item() == 7
    assert soup["running"].item() == 1.0


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    given = states()
    given[1]["w"][1, 5] = float("inf")
    with pytest.raises(IngredientError, match=r"1\.pt: the tensor w holds inf at number 2000006"):
        mixed(tmp_path, given)
    assert not (tmp_path / "soup.safetensors").exists()


def test_a_full_disk_leaves_nothing_half_written(zoo: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs takes more rights than there are here")
    try:
        for k in range(2):
            save_file({"w": torch.full((50_000,), float(k))}, tmp_path / f"{k}.safetensors")
        ingredients = open_ingredients(str(tmp_path / "*.safetensors"))
        check_together(ingredients)
        c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("w",), {"w": 0})
        with pytest.raises(SoupError, match=r"could not be written \(No space left on device\); it takes 200,") as error:
            bake(c, ingredients, small / "model.safetensors")
        assert error.value.exit_code == 1
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_unfinished_folder_is_no_soup(tmp_path: Path) -> None:
    for call in (verify, lambda out: bake_again(out, tmp_path / "new")):
        with pytest.raises(RecipeError, match=r"is not a finished soup: found no run\.json"):
            call(tmp_path)


def test_a_soup_has_the_buffers_of_the_ingredients_that_it_uses(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    for k, state in enumerate(ingredients_of(zoo)[:3]):
        save_file({**state, "mean": torch.tensor(float(k))}, tmp_path / "zoo" / f"m{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path / "zoo"))
    block_of = dict.fromkeys(dict(Tiny().named_parameters()), 0)
    for shares, mean in (([0, 0, 1], 2.0), ([0.5, 0, 0.5], 1.0), ([-1, 2, 0], 0.5)):
        values = np.array(shares, dtype=float)[:, None]
        bake(Coefficients(values, ("0", "1", "2"), ("model",), block_of), ingredients, tmp_path / "soup")
        assert load_file(tmp_path / "soup")["mean"].item() == mean
    one = load_file(tmp_path / "zoo" / "m2.safetensors")
    bake(Coefficients(np.eye(3)[:, [2]], ("0", "1", "2"), ("model",), block_of), ingredients, tmp_path / "soup")
    assert all(torch.equal(t, one[name]) for name, t in load_file(tmp_path / "soup").items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_soup_in_another_dtype(zoo: Path, tmp_path: Path, dtype: str) -> None:
    recipe = {**values(zoo, method="uniform", data={}), "out_dtype": dtype}
    run(make_recipe(recipe), tmp_path / "out")
    assert len(verify(tmp_path / "out")) == 4
    mean = {n: sum(s[n].double() for s in ingredients_of(zoo)) / 8 for n in Tiny().state_dict()}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if name == "seen":
            assert (tensor.dtype, tensor.item()) == (torch.int64, 1797)
        else:
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.allclose(tensor.double(), mean[name], rtol=torch.finfo(tensor.dtype).eps, atol=1e-7)
    bake_again(tmp_path / "out", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in load_file(tmp_path / "out" / "model.safetensors").items())


def test_a_number_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"w": torch.full((3,), 1e5)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("w",), {"w": 0})
    with pytest.raises(IngredientError, match=r"tensor w does not fit into torch\.float16"):
        bake(c, ingredients, tmp_path / "soup.safetensors", out_dtype="float16")


@pytest.mark.usefixtures("cluster")
def test_shards_as_hugging_face_writes_them(zoo: Path, tmp_path: Path) -> None:
    """Everything that reads a soup reads shards too, and finds the same numbers and figures."""
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
    bake_again(tmp_path / "out", tmp_path / "again")
    for file in (*files, "model.safetensors.index.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert len(verify(tmp_path / "again")) == 4
    content = bytearray((tmp_path / "again" / files[1]).read_bytes())
    content[-1] ^= 1
    (tmp_path / "again" / files[1]).write_bytes(content)
    with pytest.raises(SoupError, match=f"{files[1]}: SHA-256"):
        verify(tmp_path / "again")


def test_a_size_is_read_as_people_write_it(zoo: Path) -> None:
    for text, nbytes in (("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5k", 1500), (7, 7), (None, None)):
        assert make_recipe({**values(zoo), "shard_size": text}).shard_size == nbytes
    for text in ("5 apples", "0", -1):
        with pytest.raises(RecipeError, match=r"shard_size: .* give a size of 1 byte or more, as in 5GB"):
            make_recipe({**values(zoo), "shard_size": text})


def test_coefficients_as_a_table(soup: Path) -> None:
    import pyarrow.parquet as pq

    table, coefficients = pq.read_table(soup / "coefficients.parquet"), load_coefficients(soup / "coefficients.safetensors")
    rows = table.to_pylist()
    assert table.column_names == ["ingredient", "block", "coefficient"]
    assert len(rows) == coefficients.values.size
    for row in rows:
        k, b = coefficients.ingredients.index(row["ingredient"]), coefficients.blocks.index(row["block"])
        assert row["coefficient"] == coefficients.values[k, b]


def events(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all scalars in a folder of TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as stream:
            data = stream.read()
        while data:  # length, its checksum, the record, its checksum
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_the_curve_is_there_for_tensorboard(soup: Path) -> None:
    found = events(soup / "tensorboard" / "mehl+")
    curve = json.loads((soup / "run.json").read_text())["curve"]
    assert [(step, value) for tag, step, value in found if tag == "select_nll"] == [
        (line["steps"], pytest.approx(line["select_nll"])) for line in curve
    ]
    assert {tag for tag, _, _ in found} == {"fit_nll", "select_nll", "select_accuracy", "lr"}
    assert found[-1][2] < 0.05


def test_after_a_resume_tensorboard_has_every_epoch_once(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from ray_soup.folder import scalars

    curve = [{"steps": n, "select_nll": float(n)} for n in range(4)]
    state = SimpleNamespace(curve=curve[:2])
    scalars(tmp_path / "board")(1, 3, state)
    again = scalars(tmp_path / "board")
    for count in (3, 4):
        state.curve = curve[:count]
        again(count - 1, 3, state)
    assert events(tmp_path / "board") == [("select_nll", n, float(n)) for n in range(4)]


@pytest.mark.usefixtures("cluster")
def test_a_learned_factor_lies_in_the_last_layer(zoo: Path, tmp_path: Path) -> None:
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
    assert len(verify(soup.out)) == 4

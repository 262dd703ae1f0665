from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, SoupError
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import Ingredient
from ray_soup.mixing import shard_files
from ray_soup.mixing.bake import bake, overwrite_tensors
from ray_soup.mixing.coefficients import MEAN, Coefficients, to_coefficients
from tests.tiny import Tiny


def states_of(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / "zoo" / f"model_{k}.safetensors") for k in range(8)]


def opened(pattern: Path) -> list[Ingredient]:
    return check_together(open_ingredients(str(pattern)))


def random_coefficients(names: list[str]) -> Coefficients:
    """Coefficients of any sign for 8 ingredients, and a block per tensor."""
    values = to_coefficients(np.random.default_rng(0).standard_normal((8, len(names))))
    block_of = {name: b for b, name in enumerate(names)}
    return Coefficients(values, tuple(f"model_{k}" for k in range(8)), tuple(names), block_of)


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_the_soup_is_the_weighted_sum_of_the_ingredients(zoo: Path, tmp_path: Path, threads: int | None) -> None:
    coefficients = random_coefficients(list(dict(Tiny().named_parameters())))
    assert (coefficients.values < 0).any()
    told: list[tuple[int, int]] = []

    def count(done: int, total: int) -> None:
        told.append((done, total))

    path = bake(coefficients, opened(zoo / "zoo"), tmp_path / "soup.safetensors", threads, count)
    soup, states = load_file(path), states_of(zoo)
    for name in coefficients.block_of:
        exact = sum(c * s[name].double() for c, s in zip(coefficients.of(name), states, strict=True))
        torch.testing.assert_close(soup[name], exact.float(), rtol=2**-23, atol=1e-12)
        assert soup[name].dtype == states[0][name].dtype
    assert soup.keys() == states[0].keys()
    Tiny().load_state_dict(soup)
    total = 8 * 4 * sum(states[0][name].numel() for name in coefficients.block_of)
    assert told[-1] == (total, total)
    assert told == sorted(told)


def states() -> list[dict[str, torch.Tensor]]:
    made = []
    for k in range(2):
        torch.manual_seed(k)
        w = torch.randn(3, 2_000_003)[:, :2_000_001]  # rows that are not contiguous; larger than a range
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


def mixed(folder: Path, states: list[dict[str, torch.Tensor]], buffers: str = "average") -> dict[str, torch.Tensor]:
    """The soup 2 * first - second of torch checkpoints with these states."""
    for k, state in enumerate(states):
        torch.save(state, folder / f"{k}.pt")
    shapes = {name: tuple(t.shape) for name, t in states[0].items() if name != "alias"}
    ingredients = check_together(open_ingredients(str(folder / "*.pt")), shapes, {"alias": "w"})
    c = Coefficients(
        np.array([[2.0], [-1.0]]), ("0", "1"), ("all",), {"w": 0, "half": 0, "same": MEAN}, buffers, {"alias": "w"}
    )
    bake(c, ingredients, folder / "soup.safetensors")
    return load_file(folder / "soup.safetensors")


def test_a_soup_handles_dtypes_strides_ties_and_buffers(tmp_path: Path) -> None:
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


def test_integer_buffers_are_those_of_the_first_ingredient(tmp_path: Path) -> None:
    given = states()
    given[1]["steps"] = torch.tensor(8)
    soup = mixed(tmp_path, given)
    assert soup["steps"].item() == 7
    assert soup["running"].item() == 1.5
    soup = mixed(tmp_path, given, "first")
    assert soup["steps"].item() == 7
    assert soup["running"].item() == 1.0


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    given = states()
    given[1]["w"][1, 5] = float("inf")
    with pytest.raises(IngredientError, match=r"1\.pt: the tensor w contains inf at element 2000006"):
        mixed(tmp_path, given)
    assert not (tmp_path / "soup.safetensors").exists()


def test_a_full_disk_leaves_no_partly_written_model(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this process has no right to mount a small tmpfs")
    try:
        for k in range(2):
            save_file({"w": torch.full((50_000,), float(k))}, tmp_path / f"{k}.safetensors")
        ingredients = opened(tmp_path / "*.safetensors")
        c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("w",), {"w": 0})
        with pytest.raises(SoupError, match=r"could not be written \(No space left on device\); it takes 200,") as error:
            bake(c, ingredients, small / "model.safetensors")
        assert error.value.exit_code == 1
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_write_that_fails_while_others_go_on_leaves_no_model(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def fdatasync(file: int) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # the system says so once; later calls succeed

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(shard_files, "SYNC_BYTES", 0)
    coefficients = random_coefficients(list(dict(Tiny().named_parameters())))
    with pytest.raises(SoupError, match=r"soup\.safetensors could not be written \(Input/output error\)"):
        bake(coefficients, opened(zoo / "zoo"), tmp_path / "soup.safetensors")
    assert not list(tmp_path.glob("soup*"))


def test_an_interrupted_bake_leaves_no_partly_written_model(zoo: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    coefficients = random_coefficients(list(dict(Tiny().named_parameters())))
    with pytest.raises(KeyboardInterrupt):
        bake(coefficients, opened(zoo / "zoo"), tmp_path / "model.safetensors", 2, interrupt, shard_size=6000)
    assert not list(tmp_path.iterdir())


def test_a_soup_has_the_buffers_of_the_ingredients_that_it_uses(zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    for k, state in enumerate(states_of(zoo)[:3]):
        save_file({**state, "mean": torch.tensor(float(k))}, tmp_path / "zoo" / f"m{k}.safetensors")
    ingredients = opened(tmp_path / "zoo")
    block_of = dict.fromkeys(dict(Tiny().named_parameters()), 0)
    for shares, mean in (([0, 0, 1], 2.0), ([0.5, 0, 0.5], 1.0), ([-1, 2, 0], 0.5)):
        values = np.array(shares, dtype=float)[:, None]
        bake(Coefficients(values, ("0", "1", "2"), ("model",), block_of), ingredients, tmp_path / "soup")
        assert load_file(tmp_path / "soup")["mean"].item() == mean
    one = load_file(tmp_path / "zoo" / "m2.safetensors")
    bake(Coefficients(np.eye(3)[:, [2]], ("0", "1", "2"), ("model",), block_of), ingredients, tmp_path / "soup")
    assert all(torch.equal(t, one[name]) for name, t in load_file(tmp_path / "soup").items())


def test_recorded_statistics_replace_the_mixed_buffers(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"w": torch.ones(2), "norm.running_mean": torch.full((2,), float(k))}, tmp_path / f"{k}.safetensors")
    statistics = {"norm.running_mean": np.array([5.0, 6.0], np.float32)}
    c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("w",), {"w": 0}, statistics=statistics)
    bake(c, opened(tmp_path / "*.safetensors"), tmp_path / "soup")
    assert load_file(tmp_path / "soup")["norm.running_mean"].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_floats_are_written_in_out_dtype_and_integers_are_kept(zoo: Path, tmp_path: Path, dtype: str) -> None:
    names = list(dict(Tiny().named_parameters()))
    uniform = Coefficients(np.full((8, 1), 1 / 8), tuple("abcdefgh"), ("model",), dict.fromkeys(names, 0))
    bake(uniform, opened(zoo / "zoo"), tmp_path / "soup", out_dtype=dtype)
    mean = {n: sum(s[n].double() for s in states_of(zoo)) / 8 for n in Tiny().state_dict()}
    for name, tensor in load_file(tmp_path / "soup").items():
        if name == "seen":
            assert (tensor.dtype, tensor.item()) == (torch.int64, 1797)
        else:
            assert tensor.dtype == getattr(torch, dtype)
            assert torch.allclose(tensor.double(), mean[name], rtol=torch.finfo(tensor.dtype).eps, atol=1e-7)


def test_a_value_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"w": torch.full((3,), 1e5)}, tmp_path / f"{k}.safetensors")
    c = Coefficients(np.full((2, 1), 0.5), ("0", "1"), ("w",), {"w": 0})
    with pytest.raises(IngredientError, match=r"tensor w does not fit into float16.*Set out_dtype: float32"):
        bake(c, opened(tmp_path), tmp_path / "soup.safetensors", out_dtype="float16")


def test_shards_follow_the_convention_of_hugging_face(zoo: Path, tmp_path: Path) -> None:
    coefficients, ingredients = random_coefficients(list(dict(Tiny().named_parameters()))), opened(zoo / "zoo")
    one = load_file(bake(coefficients, ingredients, tmp_path / "one.safetensors"))
    (tmp_path / "out").mkdir()
    path = bake(coefficients, ingredients, tmp_path / "out" / "model.safetensors", shard_size=6000)
    assert path == tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert len(files) > 2
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [*files, path.name]
    parts = {file: load_file(tmp_path / "out" / file) for file in files}
    tensors = {name: parts[file][name] for name, file in index["weight_map"].items()}
    assert sum(map(len, parts.values())) == len(tensors)
    assert tensors.keys() == one.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in one.items())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert all(sum(t.nbytes for t in p.values()) <= 6000 or len(p) == 1 for p in parts.values())


def test_overwritten_tensors_have_the_dtype_of_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2, dtype=torch.float16), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    overwrite_tensors({"a": np.arange(4, dtype=np.float32).reshape(2, 2)}, tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["a"], torch.arange(4, dtype=torch.float16).reshape(2, 2))
    assert torch.equal(state["b"], torch.ones(3))

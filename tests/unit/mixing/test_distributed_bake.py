"""A soup written as a distributed checkpoint is the soup, and torch.distributed.checkpoint loads it."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, SoupError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.mixing import distributed_bake
from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.distributed_bake import bake_distributed
from tests.distributed import load, run_processes
from tests.unit.mixing.test_bake import opened, random_coefficients

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool]  # fmt: skip


def odd_ingredients(folder: Path) -> list[str]:
    """Write two ingredients with tensors of every dtype, scalars and empty tensors; returns the names of their floats."""
    for k in range(2):
        values = torch.arange(15).reshape(3, 5) % 2
        state = {f"t{n}": (values + k * dtype.is_floating_point).to(dtype) for n, dtype in enumerate(DTYPES)}
        state |= {"scalar": torch.tensor(1.5 + k), "empty": torch.zeros(0, 4), "after.bias": torch.arange(3.0) * k}
        save_file(state, folder / f"m{k}.safetensors")
    return [name for name, tensor in state.items() if tensor.is_floating_point()]


def checked(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Check that a distributed checkpoint has these tensors, for torch and for ray_soup."""
    loaded, ingredient = load(folder, state), open_ingredient(str(folder))
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
        assert torch.equal(ingredient.read(name), tensor.reshape(-1))


@pytest.mark.parametrize("shard_size", [None, 2000, 1])
def test_it_has_the_bits_of_the_soup_as_safetensors(zoo: Path, tmp_path: Path, shard_size: int | None) -> None:
    ingredients = opened(zoo / "zoo" / "*.safetensors")
    coefficients = random_coefficients([n for n, i in ingredients[0].tensors.items() if n not in ("mean", "seen")])
    expected = load_file(bake(coefficients, ingredients, tmp_path / "soup.safetensors"))
    file = bake_distributed(coefficients, ingredients, tmp_path, shard_size=shard_size)
    assert file == tmp_path / ".metadata"
    assert (len(list(tmp_path.glob("*.distcp"))) > 2) == (shard_size is not None)
    (tmp_path / "soup.safetensors").unlink()
    checked(tmp_path, expected)


def test_every_dtype_and_shape_survives_and_the_archives_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_bake, "RANGE", 4)  # several ranges for each tensor
    floats = odd_ingredients(tmp_path)
    ingredients = opened(tmp_path / "m*.safetensors")
    coefficients = Coefficients(np.array([[0.25], [0.75]]), ("m0", "m1"), ("m",), dict.fromkeys(floats, 0))
    (tmp_path / "soup").mkdir()
    expected = load_file(bake(coefficients, ingredients, tmp_path / "soup.safetensors"))
    seen: list[tuple[int, int]] = []
    bake_distributed(coefficients, ingredients, tmp_path / "soup", progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] > 0
    checked(tmp_path / "soup", expected)
    data = (tmp_path / "soup" / "__0_0.distcp").read_bytes()
    ingredient = open_ingredient(str(tmp_path / "soup"))
    for name, info in ingredient.tensors.items():
        for piece in info.pieces:
            archive = zipfile.ZipFile(BytesIO(data[piece.place : piece.place + piece.length]))
            assert archive.testzip() is None  # with the right checksums
            assert ingredient.read(name).data_ptr() % 64 == 0


def test_a_tied_tensor_is_stored_once_and_loads_under_both_names(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"embed": torch.arange(4.0) + k}, tmp_path / f"m{k}.safetensors")
    c = Coefficients(np.array([[0.5], [0.5]]), ("m0", "m1"), ("m",), {"embed": 0}, tied={"head": "embed"})
    (tmp_path / "soup").mkdir()
    bake_distributed(c, opened(tmp_path / "m*.safetensors"), tmp_path / "soup")
    checked(tmp_path / "soup", {"embed": torch.arange(4.0) + 0.5, "head": torch.arange(4.0) + 0.5})
    assert (tmp_path / "soup" / "__0_0.distcp").read_bytes().count(b"archive/data/0") == 2  # a header, and its entry


def test_a_failure_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "m0.safetensors")
    save_file({"a": torch.tensor([1.0, float("inf"), 1.0])}, tmp_path / "m1.safetensors")
    c = Coefficients(np.array([[0.5], [0.5]]), ("m0", "m1"), ("m",), {"a": 0})
    (tmp_path / "soup").mkdir()
    with pytest.raises(IngredientError, match=r"m1\.safetensors: the tensor a contains inf"):
        bake_distributed(c, opened(tmp_path / "m*.safetensors"), tmp_path / "soup")
    assert list((tmp_path / "soup").iterdir()) == []
    with pytest.raises(SoupError, match=r"nowhere/__0_0\.distcp could not be written"):
        bake_distributed(c, opened(tmp_path / "m*.safetensors"), tmp_path / "nowhere")


@pytest.mark.slow
def test_a_tensor_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    """Its archive has sizes of 64 bits."""
    numel = (1 << 32) + 100  # one byte each
    part = torch.zeros(1 << 20, dtype=torch.uint8)
    part[7] = 5
    with open(tmp_path / "__0_0.distcp", "wb") as stream:
        parts = [part] * (1 << 12) + [torch.full((100,), 9, dtype=torch.uint8)]
        distributed_bake._write_archive(stream, 0, (numel,), "uint8", iter(parts))
        place = distributed_bake._Place("__0_0.distcp", 0, stream.tell())
    distributed_bake._write_metadata(tmp_path / ".metadata", {"a": (numel,)}, {"a": "uint8"}, {"a": place}, {})
    ingredient = open_ingredient(str(tmp_path))
    assert ingredient.read("a", numel - 101, numel).tolist() == [0] + [9] * 100
    assert ingredient.read("a", (1 << 31) + 7, (1 << 31) + 8).tolist() == [5]
    loaded = torch.load(tmp_path / "__0_0.distcp", mmap=True, weights_only=True)
    assert loaded.shape == (numel,)
    assert loaded[-1] == 9


@pytest.mark.slow
def test_two_processes_load_a_soup_into_a_sharded_model(tmp_path: Path) -> None:
    for k in range(2):
        torch.manual_seed(k)
        save_file(torch.nn.Linear(5, 7).state_dict(), tmp_path / f"m{k}.safetensors")
    c = Coefficients(np.array([[0.5], [0.5]]), ("m0", "m1"), ("m",), {"weight": 0, "bias": 0})
    (tmp_path / "soup").mkdir()
    bake_distributed(c, opened(tmp_path / "m*.safetensors"), tmp_path / "soup")
    run_processes(
        """
        model = fully_shard(torch.nn.Linear(5, 7), mesh=mesh)
        state = model.state_dict()
        dcp.load(state, checkpoint_id="soup")
        model.load_state_dict(state)
        whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
        if rank == 0:
            torch.save(whole, "whole.pt")
        """,
        tmp_path,
    )
    states = [load_file(tmp_path / f"m{k}.safetensors") for k in range(2)]
    for name, tensor in torch.load(tmp_path / "whole.pt").items():
        assert torch.equal(tensor, sum(0.5 * state[name].double() for state in states).float())

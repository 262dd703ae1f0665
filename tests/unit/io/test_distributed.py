"""A distributed checkpoint of torch reads as what torch loads from it, whatever its pieces; a damaged one is refused."""

from __future__ import annotations

import os
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.hashing import hash_ingredients
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.mixing.bake import bake
from ray_soup.mixing.coefficients import Coefficients
from tests.distributed import load, run_processes, save, write, write_metadata

MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
NAMES = ["weight", "model.0.weight", "app.model.layer.bias", "a.b.c.d.e"]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return drawn > 0 if dtype == torch.bool else drawn.abs().to(dtype)


def check_ranges(ingredient: Ingredient, loaded: dict[str, torch.Tensor], rng: random.Random) -> None:
    for name, tensor in loaded.items():
        flat = tensor.reshape(-1)
        ranges = [(0, len(flat))] + [tuple(sorted(rng.randint(0, len(flat)) for _ in "ab")) for _ in range(6)]
        for start, stop in ranges:
            read = ingredient.read(name, start, stop)
            assert torch.equal(read, flat[start:stop]), (name, start, stop)
            assert read.is_contiguous()
            assert read.dtype == tensor.dtype
            assert read.data_ptr() % max(1, read.itemsize) == 0


PROPERTY = given(
    tensors=st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=4).map(tuple), st.sampled_from(DTYPES)), max_size=3),
    cuts=st.integers(0, 7),
    files=st.integers(1, 3),
    seed=st.integers(0, 2**30),
)


def check_layout(tensors: list[tuple[tuple[int, ...], torch.dtype]], cuts: int, files: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as temporary:
        folder = Path(temporary) / "m"
        state = {name: values(*one, seed) for name, one in zip(NAMES, [((3, 2), torch.float32), *tensors], strict=False)}
        write(folder, state, cuts, files, seed)
        ingredient = open_ingredient(str(folder))
        assert {name: (info.shape, info.dtype) for name, info in ingredient.tensors.items()} == {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()
        }
        check_ranges(ingredient, load(folder, state), random.Random(seed))
        check_ranges(pickle.loads(pickle.dumps(ingredient)), state, random.Random(seed + 1))


@PROPERTY
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_range_equals_what_torch_loads(**drawn: Any) -> None:
    check_layout(**drawn)


@pytest.mark.slow
@PROPERTY
@settings(max_examples=400, deadline=None, print_blob=True)
def test_every_range_equals_what_torch_loads_in_many_more_cases(**drawn: Any) -> None:
    check_layout(**drawn)


STATE = {"weight": torch.arange(24.0).reshape(6, 4), "bias": torch.arange(5, dtype=torch.bfloat16)}


def training(k: float) -> dict[str, Any]:
    """A nested state dict as trainers save it: the state of the optimizer has tensors of the model's names and shapes."""
    model = {name: tensor + k for name, tensor in STATE.items()}
    moments = {name: {"exp_avg": -tensor, "step": torch.tensor(3.0)} for name, tensor in model.items()}
    groups = [{"lr": 0.1, "params": list(model)}]
    return {
        "app": {"model": model},
        "optim": {"exp_avg": {name: -tensor for name, tensor in model.items()}, "state": moments, "param_groups": groups},
        "step": 7,
    }


def test_the_model_of_a_training_is_found_under_its_prefix_and_mixed_without_the_optimizer(tmp_path: Path) -> None:
    for k in range(2):
        save(training(float(k)), tmp_path / f"step-{k}")
    shapes = {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    bound = check_together(open_ingredients(str(tmp_path / "step-*")), shapes)
    assert [ingredient.name for ingredient in bound] == ["step-0", "step-1"]
    assert not any("optim" in name for ingredient in bound for name in ingredient.left_out)
    soup = load_file(bake(uniform(bound), bound, tmp_path / "soup.safetensors"))
    loaded = [load(tmp_path / f"step-{k}", {f"app.model.{n}": t for n, t in STATE.items()}) for k in range(2)]
    for name, tensor in STATE.items():
        mean = sum(0.5 * one[f"app.model.{name}"].double() for one in loaded)
        assert torch.equal(soup[name], torch.as_tensor(mean).float().to(tensor.dtype))


def uniform(bound: list[Ingredient]) -> Coefficients:
    share = np.full((len(bound), 1), 1 / len(bound))
    return Coefficients(share, tuple(i.name for i in bound), ("m",), dict.fromkeys(bound[0].tensors, 0))


def test_a_key_chooses_what_to_use(tmp_path: Path) -> None:
    folder = save(training(1.0), tmp_path / "m")
    assert set(open_ingredient(str(folder)).tensors) == {"app.model.weight", "app.model.bias"}
    assert torch.equal(open_ingredient(f"{folder}?key=app.model").read("weight"), (STATE["weight"] + 1).reshape(-1))
    assert open_ingredient(f"{folder}?key=optim.exp_avg").read("weight")[0] == -1
    with pytest.raises(IngredientError, match=r"has no tensors under the key 'ema'; .*what its names begin with: app"):
        open_ingredient(f"{folder}?key=ema")


def test_the_state_of_an_optimizer_alone_is_no_model(tmp_path: Path) -> None:
    folder = save({"optimizer": {"state": {"weight": {"exp_avg": torch.ones(3)}}}}, tmp_path / "optimizer_0")
    with pytest.raises(IngredientError, match=r"optimizer_0 has no tensors of a model, only the state of a training"):
        open_ingredient(str(folder))


def test_two_models_in_one_checkpoint_are_not_confused(tmp_path: Path) -> None:
    """An average gives way to the model with a remark; two with the same claim are refused."""
    shapes = {name: tuple(tensor.shape) for name, tensor in STATE.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    one = open_ingredient(str(save({"model": STATE, "ema": zeros}, tmp_path / "m"))).bind(shapes, {})
    assert torch.equal(one.read("weight"), STATE["weight"].reshape(-1))
    assert "ema" in " ".join(one.remarks)
    two = open_ingredient(str(save({"actor": STATE, "critic": zeros}, tmp_path / "n"))).bind(shapes, {})
    assert "the whole model occurs under" in two.unclear


def test_the_digest_covers_every_file(tmp_path: Path) -> None:
    write(tmp_path / "m", STATE, cuts=3, files=3)
    first = hash_ingredients([open_ingredient(str(tmp_path / "m"))])
    for file in sorted((tmp_path / "m").iterdir()):
        data = file.read_bytes()
        opened = open_ingredient(str(tmp_path / "m"))
        kept = file.stat()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(file, ns=(kept.st_mtime_ns, kept.st_mtime_ns))
        assert hash_ingredients([opened]) != first, file
        file.write_bytes(data)
    assert hash_ingredients([open_ingredient(str(tmp_path / "m"))]) == first


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", STATE)
    ingredient = open_ingredient(str(tmp_path / "m"))
    ingredient.read("weight")
    os.utime(tmp_path / "m" / ".metadata", ns=(1, 1))
    with pytest.raises(IngredientError, match=r"\.metadata changed while it was in use"):
        ingredient.check_unchanged()


# Damaged and hostile checkpoints


def metadata_of(folder: Path) -> Metadata:
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def place(metadata: Metadata, name: str = "weight") -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == name)


def chunk(metadata: Metadata, name: str = "weight") -> Any:
    return metadata.state_dict_metadata[name].chunks[0]  # type: ignore[union-attr]


def lacks(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["weight"].chunks[0]  # type: ignore[union-attr]


def twice(metadata: Metadata) -> None:
    entry = metadata.state_dict_metadata["weight"]
    entry.chunks[0] = ChunkStorageMetadata(entry.chunks[1].offsets, entry.chunks[0].sizes)  # type: ignore[union-attr]
    metadata.storage_data[MetadataIndex("weight", entry.chunks[0].offsets)] = place(metadata)  # type: ignore[union-attr]


def cycle(metadata: Metadata) -> None:
    metadata.state_dict_metadata["weight"].chunks = [metadata.state_dict_metadata]  # type: ignore[union-attr,list-item]
    metadata.planner_data = metadata


LIES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a piece is missing": (lacks, r"the tensor weight is \[6, 4\], but its 3 pieces have fewer elements"),
    "a piece twice": (twice, r"the tensor weight is \[6, 4\], but "),
    "a negative offset": (lambda m: setattr(place(m), "offset", -8), "the place of a piece of weight is"),
    "a negative index": (lambda m: setattr(chunk(m), "offsets", torch.Size([-1, 0])), "the offset of a piece of weight"),
    "a negative shape": (lambda m: setattr(m.state_dict_metadata["weight"], "size", torch.Size([-6, -4])), "the shape of"),
    "a huge tensor": (
        lambda m: setattr(m.state_dict_metadata["weight"], "size", torch.Size([2**60, 4])),
        "pieces have fewer elements",
    ),
    "a huge piece": (lambda m: setattr(chunk(m), "sizes", torch.Size([2**60, 4])), "is outside"),
    "numbers beyond any file": (lambda m: setattr(place(m), "offset", 2**70), "the place of a piece of weight"),
    "a length beyond the file": (lambda m: setattr(place(m), "length", 2**60), r"\.distcp is truncated"),
    "a length of nothing": (lambda m: setattr(place(m), "length", 3), "it gives 3 bytes to a piece of weight"),
    "a cycle": (cycle, "a piece of 'weight' is a dict"),
    "another dtype": (
        lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", torch.int32),  # type: ignore[union-attr]
        r"is float32 \[.*\], but \.metadata says int32",
    ),
    "a dtype that cannot be mixed": (
        lambda m: setattr(m.state_dict_metadata["weight"].properties, "dtype", torch.complex64),  # type: ignore[union-attr]
        "the tensor weight is torch.complex64; expected one of",
    ),
    "a file elsewhere": (lambda m: setattr(place(m), "relative_path", "../x.distcp"), "expected a file ending in"),
    "a file of another kind": (lambda m: setattr(place(m), "relative_path", "/etc/passwd"), "expected a file ending in"),
    "a file that is missing": (lambda m: setattr(place(m), "relative_path", "__9_0.distcp"), "__9_0.distcp is missing"),
    "compressed pieces": (lambda m: setattr(place(m), "transform_descriptors", ["zstd"]), "are transformed"),
    "text for a shape": (lambda m: setattr(chunk(m), "sizes", "64"), "the shape of a piece of weight is '64'"),
    "no pieces at all": (lambda m: setattr(m, "storage_data", None), "without a dictionary storage_data"),
    "another place": (lambda m: setattr(place(m), "offset", 1), "(overlap at byte|is damaged)"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_that_lies_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    folder = tmp_path / "m"
    metadata = write(folder, STATE, cuts=3, files=2)
    change, message = LIES[lie]
    change(metadata)
    write_metadata(folder, metadata)
    with pytest.raises(IngredientError, match=message) as error:
        open_ingredient(str(folder)).read("weight")
    assert str(folder) in str(error.value)


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


PICKLES = {
    "a call": pickle.dumps(Runs()),
    "a call in the metadata": pickle.dumps(Metadata({"weight": Runs()}, None, {})),  # type: ignore[dict-item]
    "eval by an old name": b"\x80\x02c__builtin__\neval\nX\x0c\x00\x00\x00open('ran','w')\x85R.",
    "a file object": b"\x80\x04\x8c\x02io\x8c\x04open\x93\x8c\x03ran\x8c\x01w\x86R.",
    "nothing": b"",
    "no stop": b"\x80\x04}",
    "a list": pickle.dumps([1, 2]),
    "deep tuples": b"\x80\x04)" + b"\x85" * 1_000_000 + b".",
    "a deep tuple as a key": b"\x80\x04})" + b"\x85" * 15 + b"K\x01s.",
    "a list as a key": b"\x80\x04}]K\x01s.",
    "a huge memo": pickle.dumps(Metadata({}, None, {}))[:-1] + b"r\xff\xff\xff\x7f.",
    "a huge text": b"\x80\x04X\xff\xff\xff\x7fabc.",
    "a call of nothing": b"\x80\x04K\x01)R.",
    "an unknown operation": b"\x80\x04K\x01\x97.",
    "deep lists": b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m", STATE)
    (tmp_path / "m" / ".metadata").write_bytes(PICKLES[name])
    with pytest.raises(IngredientError, match=r"m/\.metadata (is damaged|was not opened)"):
        open_ingredient(str(tmp_path / "m"))
    assert not (tmp_path / "ran").exists()
    piece = tmp_path / "n"
    metadata = write(piece, {"weight": STATE["weight"]})
    torch.save(Runs(), piece / "__0_0.distcp")
    info = place(metadata)
    info.length = (piece / "__0_0.distcp").stat().st_size
    write_metadata(piece, metadata)
    with pytest.raises(IngredientError, match=r"__0_0\.distcp: weight at byte 0 (holds|is damaged)"):
        open_ingredient(str(piece)).read("weight")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_cut_or_swapped_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m", STATE, cuts=3, files=2)
    file = tmp_path / "m" / "__1_0.distcp"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(IngredientError, match=r"__1_0\.distcp is truncated: it has [\d,]+ bytes, but a piece of"):
        open_ingredient(str(tmp_path / "m"))
    file.unlink()
    with pytest.raises(IngredientError, match=r"__1_0\.distcp is missing, but .*\.metadata lists it"):
        open_ingredient(str(tmp_path / "m"))
    file.write_bytes(bytes(len(data)))
    with pytest.raises(IngredientError, match=r"__1_0\.distcp: \w+ at byte \d+ is damaged"):
        [open_ingredient(str(tmp_path / "m")).read(name) for name in STATE]
    file.write_bytes(data)
    (tmp_path / "m" / ".metadata").unlink()
    for spec in (str(tmp_path / "m"), str(tmp_path)):
        with pytest.raises(IngredientError, match=r"no \.metadata, which torch.distributed.checkpoint writes last"):
            open_ingredients(spec)
    (tmp_path / "m" / "__0.metadata").touch()
    with pytest.raises(IngredientError, match=r"each process described its own part \(__0\.metadata\)"):
        open_ingredients(str(tmp_path / "m"))


def test_a_folder_with_another_model_and_a_file_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "m", STATE)
    for name in (".metadata", "__0_0.distcp"):
        with pytest.raises(
            IngredientError, match=rf"{name} is one file of a distributed checkpoint .* Write {tmp_path}/m inst"
        ):
            open_ingredient(str(tmp_path / "m" / name))
    save_file({"weight": torch.zeros(6, 4)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(IngredientError, match=r"contains two models: model\.safetensors, and a distributed checkpoint"):
        open_ingredient(str(tmp_path / "m"))
    assert open_ingredient(str(tmp_path / "m" / "model.safetensors")).read("weight").sum() == 0


def test_folders_are_found_by_a_folder_a_glob_and_a_list(tmp_path: Path) -> None:
    paths = [tmp_path / "zoo" / name for name in ("a", "b", "c")]
    for k, path in enumerate(paths):
        write(path, {name: tensor + k for name, tensor in STATE.items()})
    for spec in (str(tmp_path / "zoo"), str(tmp_path / "zoo" / "*"), list(map(str, paths))):
        assert [i.name for i in open_ingredients(spec)] == ["a", "b", "c"]
    with pytest.raises(RecipeError, match=r"needs two or more ingredients; found one: .*zoo/a"):
        check_together(open_ingredients(str(paths[0])))


@pytest.mark.slow
def test_two_processes_save_a_sharded_model_and_its_soup_is_the_mean_of_what_torch_loads(tmp_path: Path) -> None:
    run_processes(
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict
        for k in range(2):
            torch.manual_seed(k)
            model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
            model = fully_shard(model, mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters())
            model(torch.randn(4, 5)).sum().backward()
            optimizer.step()
            weights, state = get_state_dict(model, optimizer)
            dcp.save({"model": weights, "optim": state}, checkpoint_id=f"step-{k}")
        """,
        tmp_path,
    )
    opened = open_ingredients(str(tmp_path / "step-*"))
    infos = opened[0].tensors
    assert len(infos["model.0.weight"].pieces) == 2
    like = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in infos.items()}
    loaded = [load(tmp_path / f"step-{k}", like) for k in range(2)]
    for ingredient, state in zip(opened, loaded, strict=True):
        check_ranges(ingredient, state, random.Random(0))
    bound = check_together(opened)
    floats = [name for name in like if like[name].is_floating_point()]
    c = uniform(bound)
    soup = load_file(bake(c, bound, tmp_path / "soup.safetensors"))
    for name in floats:
        assert torch.equal(soup[name], sum(0.5 * state[name].double() for state in loaded).float()), name

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.checkpoints import (
    StreamingHash,
    check_together,
    common_dtype,
    find_checkpoints,
    open_ingredient,
    open_ingredients,
    sha256_file,
)
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.storage import LocalFile


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "fc.weight": torch.randn(7, 3).t(),  # not row after row
        "fc.bias": torch.randn(3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "count": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def assert_reads_as(path: Path, expected: dict[str, torch.Tensor]) -> None:
    ingredient = open_ingredient(str(path))
    assert ingredient.match(expected, {})
    for name, tensor in expected.items():
        info = ingredient.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(ingredient.read(name), tensor.flatten())
        middle = tensor.numel() // 2
        assert torch.equal(ingredient.read(name, 1, middle), tensor.flatten()[1:middle])


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("container", ["", "state_dict", "model", "module", "ema_state_dict"])
def test_torch_files_in_every_container(tmp_path: Path, suffix: str, container: str) -> None:
    path = tmp_path / f"a.{suffix}"
    torch.save({"epoch": 3, "optimizer": [torch.zeros(2)], container: state()} if container else state(), path)
    assert_reads_as(path, state())


def test_safetensors_alone_and_in_shards(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_reads_as(tmp_path / "a.safetensors", tensors)
    names = sorted(tensors)
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {}
    for number, part in enumerate((names[:4], names[4:])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_reads_as(folder, tensors)
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / "a.safetensors"), str(folder)]
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(IngredientError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_ingredient(str(folder))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_is_stripped_only_for_an_exact_match(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in state().items()}, tmp_path / "a.pt")
    assert_reads_as(tmp_path / "a.pt", state())
    torch.save({"loss.weight": torch.zeros(1), **{prefix + n: t for n, t in state().items()}}, tmp_path / "b.pt")
    assert not open_ingredient(str(tmp_path / "b.pt")).match(state(), {})


def test_a_model_whose_own_names_begin_with_a_prefix_keeps_them(tmp_path: Path) -> None:
    torch.save({"model.a": torch.ones(1)}, tmp_path / "a.pt")
    ingredient = open_ingredient(str(tmp_path / "a.pt"))
    assert ingredient.match({"model.a"}, {})
    assert ingredient.match({"a"}, {})


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    weight = torch.randn(3)
    torch.save({"embed": weight, "head": weight}, tmp_path / "both.pt")
    torch.save({"head": weight}, tmp_path / "second.pt")
    torch.save({"embed": weight, "head": weight.clone()}, tmp_path / "copies.pt")
    torch.save({"embed": weight, "head": weight + 1}, tmp_path / "differ.pt")
    for name in ("both", "second", "copies", "differ"):
        ingredient = open_ingredient(str(tmp_path / f"{name}.pt"))
        assert ingredient.match({"embed"}, {"head": "embed"})
        assert torch.equal(ingredient.read("embed"), weight)
        if name == "differ":
            with pytest.raises(IngredientError, match="one tensor in the model and differ"):
                ingredient.check_copies()
        else:
            ingredient.check_copies()


def test_folders_globs_and_lists_in_natural_order(tmp_path: Path) -> None:
    for k in (10, 9, 1):
        save_file({"a": torch.zeros(1)}, tmp_path / f"m_{k}.safetensors")
    (tmp_path / "notes.txt").touch()
    expected = [str(tmp_path / f"m_{k}.safetensors") for k in (1, 9, 10)]
    assert find_checkpoints(str(tmp_path)) == expected
    assert find_checkpoints(str(tmp_path / "*")) == expected
    assert find_checkpoints([str(tmp_path / "m_9.safetensors"), str(tmp_path / "m_1*")]) == [
        expected[1],
        expected[0],
        expected[2],
    ]
    assert [i.name for i in open_ingredients(str(tmp_path))] == ["m_1", "m_9", "m_10"]


def test_names_stay_apart_from_each_other_and_from_the_methods(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        (tmp_path / name).parent.mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [i.name for i in open_ingredients(str(tmp_path / "*/*"))] == ["a/x.safetensors", "b/x.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "uniform.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert [i.name for i in open_ingredients(str(tmp_path / "*.safetensors"))] == ["uniform.safetensors", "y.safetensors"]


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path}/was_run",)

    torch.save({"a": torch.zeros(1), "b": Bad()}, tmp_path / "bad.pt")
    with pytest.raises(IngredientError, match=r"bad\.pt was not opened: it holds 'posix\.system'"):
        open_ingredient(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("keep", [0, 5, 60, -9])
def test_a_truncated_file_is_named(tmp_path: Path, name: str, keep: int) -> None:
    path = tmp_path / name
    tensors = {"a": torch.zeros(100)}
    save_file(tensors, path) if name.endswith("safetensors") else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(IngredientError, match=f"{path}.*Copy it again"):
        open_ingredient(str(path))


def test_the_old_torch_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(IngredientError, match=r"Save it again: torch\.save"):
        open_ingredient(str(tmp_path / "old.pt"))


def test_every_fault_between_ingredients_is_listed(tmp_path: Path) -> None:
    good = {"w": torch.zeros(2, 3), "n": torch.tensor(1)}
    for k, changed in enumerate(
        [
            good,
            good,
            {"w": good["w"]},
            {**good, "extra": torch.zeros(1)},
            {**good, "w": torch.zeros(3, 2)},
            {**good, "w": torch.zeros(2, 3, dtype=torch.int32)},
        ]
    ):
        save_file(changed, tmp_path / f"{k}.safetensors")
    with pytest.raises(IngredientError) as error:
        check_together(open_ingredients(str(tmp_path)))
    said = str(error.value)
    assert said.startswith("4 of 6 ingredients do not fit together")
    for line in (
        "2.safetensors does not fit:\n    missing: n []",
        "extra float32 [1]",
        "shape: w is [3, 2], in",
        "dtype: w is int32 [2, 3], the other ingredients hold floats",
    ):
        assert line in said


def test_one_ingredient_and_the_same_file_twice_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(RecipeError, match="two ingredients or more"):
        check_together(open_ingredients(str(tmp_path)))
    os.link(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(IngredientError, match="are the same file"):
        open_ingredients(str(tmp_path))
    with pytest.raises(IngredientError, match="are the same file"):
        open_ingredients([str(tmp_path / "a.safetensors")] * 2)


def test_no_ingredients_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="an empty folder"):
        find_checkpoints(str(tmp_path))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(RecipeError, match=r"found model\.onnx; expected files ending in"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(RecipeError, match="does not exist"):
        find_checkpoints(str(tmp_path / "nowhere"))


def test_the_widest_dtype_is_written(tmp_path: Path) -> None:
    for k, dtype in enumerate((torch.float16, torch.bfloat16, torch.float16)):
        save_file({"a": torch.zeros(1, dtype=dtype)}, tmp_path / f"{k}.safetensors")
    ingredients = open_ingredients(str(tmp_path))
    assert common_dtype(ingredients, "a") == torch.float32
    assert common_dtype(ingredients[::2], "a") == torch.float16


def test_a_streaming_hash_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    data = np.random.default_rng(0).bytes(1000)
    path.write_bytes(data)
    streaming = StreamingHash(LocalFile(str(path)), 1000)
    for start, stop in [(10, 20), (20, 300), (301, 999)]:
        streaming.update(start, memoryview(data)[start:stop])
    assert streaming.hexdigest() == sha256_file(str(path))
    streaming.update(5, memoryview(data)[5:11])
    assert not streaming.in_order


def test_what_safetensors_wrote_is_what_it_reads(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state(3).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors"))
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(ingredient.read(name), tensor.flatten())

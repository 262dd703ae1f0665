from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError
from ray_soup.io.find import find_checkpoints
from ray_soup.io.ingredient import Ingredient, open_ingredient
from ray_soup.io.sweeps import Trial


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        "fc.weight": torch.randn(7, 3).t(),  # not in row-major order
        "fc.bias": torch.randn(3),
        "half": torch.randn(5).half(),
        "brain": torch.randn(5).bfloat16(),
        "double": torch.randn(5).double(),
        "count": torch.tensor(3),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }


def fits(bound: Ingredient, expected: Iterable[str]) -> bool:
    return set(bound.tensors) == set(expected)


def assert_reads_as(path: Path, expected: dict[str, torch.Tensor]) -> None:
    ingredient = open_ingredient(str(path)).bind(expected, {})
    assert fits(ingredient, expected)
    for name, tensor in expected.items():
        info = ingredient.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(ingredient.read(name), tensor.flatten())
        middle = tensor.numel() // 2
        assert torch.equal(ingredient.read(name, 1, middle), tensor.flatten()[1:middle])


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("container", ["", "state_dict", "model", "module", "ema_state_dict"])
def test_torch_files_are_read_from_every_container(tmp_path: Path, suffix: str, container: str) -> None:
    path = tmp_path / f"a.{suffix}"
    torch.save({"epoch": 3, "optimizer": [torch.zeros(2)], container: state()} if container else state(), path)
    assert_reads_as(path, state())


def test_safetensors_are_read_from_one_file_and_from_shards(tmp_path: Path) -> None:
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
def test_a_prefix_is_stripped_and_what_is_outside_is_left_out(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + name: tensor for name, tensor in state().items()}, tmp_path / "a.pt")
    assert_reads_as(tmp_path / "a.pt", state())
    torch.save({"loss.weight": torch.zeros(1), **{prefix + n: t for n, t in state().items()}}, tmp_path / "b.pt")
    bound = open_ingredient(str(tmp_path / "b.pt")).bind(state(), {})
    assert fits(bound, state())
    assert bound.left_out == ("loss.weight",)


def test_a_model_whose_own_names_begin_with_a_prefix_keeps_them(tmp_path: Path) -> None:
    torch.save({"model.a": torch.ones(1)}, tmp_path / "a.pt")
    ingredient = open_ingredient(str(tmp_path / "a.pt"))
    for names in ({"model.a"}, {"a"}):
        assert fits(ingredient.bind(names, {}), names)


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    weight = torch.randn(3)
    torch.save({"embed": weight, "head": weight}, tmp_path / "both.pt")
    torch.save({"head": weight}, tmp_path / "second.pt")
    torch.save({"embed": weight, "head": weight.clone()}, tmp_path / "copies.pt")
    torch.save({"embed": weight, "head": weight + 1}, tmp_path / "differ.pt")
    for name in ("both", "second", "copies", "differ"):
        ingredient = open_ingredient(str(tmp_path / f"{name}.pt")).bind({"embed"}, {"head": "embed"})
        assert fits(ingredient, {"embed"})
        assert torch.equal(ingredient.read("embed"), weight)
        if name == "differ":
            with pytest.raises(IngredientError, match="one tensor in the model, but differ"):
                ingredient.check_copies()
        else:
            ingredient.check_copies()


def test_bind_returns_a_new_ingredient_and_changes_nothing(tmp_path: Path) -> None:
    torch.save({"model": {"module.a": torch.ones(2)}, "ema_state_dict": {"b": torch.zeros(2)}}, tmp_path / "a.pt")
    opened = open_ingredient(str(tmp_path / "a.pt"))
    before = dataclasses.replace(opened)
    for names, values in ((("b",), [0.0, 0.0]), (("a",), [1.0, 1.0])):
        bound = opened.bind(names, {})
        assert list(bound.tensors) == list(names)
        assert bound.read(names[0]).tolist() == values
        assert bound.bind(("a",), {}) == opened.bind(("a",), {})  # whatever it was bound to before
        assert bound.identity == opened.identity
    assert opened == before
    assert list(opened.tensors) == ["module.a"]  # as opened: the first container
    with pytest.raises(dataclasses.FrozenInstanceError):
        opened.tensors = {}  # type: ignore[misc]


def test_if_nothing_fits_bind_returns_the_nearest_match(tmp_path: Path) -> None:
    torch.save({"model.a": torch.ones(1), "model.b": torch.ones(1), "model.c": torch.ones(1)}, tmp_path / "a.pt")
    bound = open_ingredient(str(tmp_path / "a.pt")).bind(("a", "b", "d"), {})
    assert list(bound.tensors) == ["a", "b", "c"]


def test_a_text_tower_is_left_out_unless_the_model_has_one(tmp_path: Path) -> None:
    names = ("visual.conv", "transformer.x", "logit_scale", "text_projection")
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pt")
    ingredient = open_ingredient(str(tmp_path / "a.pt"))
    bound = ingredient.bind(("visual.conv",), {})
    assert (list(bound.tensors), bound.left_out) == (["visual.conv"], names[1:])
    assert ingredient.bind(names, {}).left_out == ()


def test_the_identity_names_files_sizes_versions_and_the_key(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    found = (tmp_path / "a.pt").stat()
    path = str(tmp_path / "a.pt")
    file = [path, found.st_size, found.st_mtime_ns]
    assert open_ingredient(path).identity == [file]
    keyed = open_ingredient(f"{path}?key=model")
    assert keyed.identity == [file, "model"]
    assert (keyed.path, keyed.key, keyed.nbytes) == (f"{path}?key=model", "model", found.st_size)


def test_a_pickled_ingredient_leaves_its_open_files_behind(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors"))
    assert ingredient.read("a").tolist() == [0, 1, 2]
    copy = pickle.loads(pickle.dumps(ingredient))
    assert (copy, copy._sources) == (ingredient, {})
    assert copy.read("a").tolist() == [0, 1, 2]
    assert len(ingredient._sources) == 1


def test_files_are_opened_again_after_close(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors")).bind(("a",), {})
    for _ in range(2):
        assert ingredient.read("a", 1).tolist() == [1, 2]
        ingredient.drop_pages()
        ingredient.close()


def test_a_file_of_another_size_is_refused_when_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors"))
    save_file({"a": torch.arange(4)}, tmp_path / "a.safetensors")
    with pytest.raises(IngredientError, match=r"a\.safetensors changed while it was in use: it has [\d,]+ bytes"):
        ingredient.read("a")


def test_with_a_key_only_that_container_is_seen(tmp_path: Path) -> None:
    torch.save({"model": {"module.a": torch.ones(2)}, "ema_state_dict": {"a": torch.zeros(2)}}, tmp_path / "a.pt")
    keyed = open_ingredient(f"{tmp_path / 'a.pt'}?key=ema_state_dict")
    assert (list(keyed.containers), list(keyed.tensors)) == (["ema_state_dict"], ["a"])
    assert keyed.bind(("a",), {}).read("a").tolist() == keyed.read("a").tolist() == [0.0, 0.0]
    with pytest.raises(IngredientError, match="no tensors under the key 'x'; its keys: model, ema_state_dict"):
        open_ingredient(f"{tmp_path / 'a.pt'}?key=x")


def test_with_trial_keeps_everything_else(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3)}, tmp_path / "a.safetensors")
    ingredient, trial = open_ingredient(str(tmp_path / "a.safetensors")), Trial("t", "p", {"lr": 1}, {"accuracy": 0.5})
    assert ingredient.with_trial(trial).trial == trial
    assert ingredient.with_trial(trial).with_trial(None) == ingredient


def test_unpickling_runs_no_code_from_the_file(tmp_path: Path) -> None:
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


def test_the_legacy_torch_format_is_refused_with_the_remedy(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(IngredientError, match=r"legacy format.*Save it again: python -c"):
        open_ingredient(str(tmp_path / "old.pt"))


def test_tensors_read_equal_those_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state(3).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    ingredient = open_ingredient(str(tmp_path / "a.safetensors"))
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(ingredient.read(name), tensor.flatten())


def test_a_key_may_be_a_prefix_of_names(tmp_path: Path) -> None:
    averaged = {f"net.{n}": t for n, t in state().items()} | {f"ema_model.module.{n}": t + 1 for n, t in state(1).items()}
    torch.save({"state_dict": averaged, "epoch": 3}, tmp_path / "a.ckpt")
    tensors = {name: tensor.contiguous() for name, tensor in averaged.items()}
    save_file(tensors, tmp_path / "b.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    weight_map = {name: f"{name[:3]}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path / "a.ckpt", tmp_path / "b.safetensors", folder):
        seen = set()
        for key, seed in (("net", 0), ("ema_model", 1), ("ema_model.module", 1)):
            keyed = open_ingredient(f"{path}?key={key}")
            bound = keyed.bind({n: tuple(t.shape) for n, t in state().items()}, {})
            assert fits(bound, state())
            assert not bound.remarks
            expected = state(seed)["conv.weight"] + seed
            assert torch.equal(bound.read("conv.weight"), expected.flatten())
            seen.add(str(bound.identity))
        assert len(seen) == 3
        with pytest.raises(IngredientError, match=r"under the key 'ne'; its keys: .*begin with: .*\bnet\b.*Fix \?key="):
            open_ingredient(f"{path}?key=ne")
    assert open_ingredient(f"{tmp_path / 'a.ckpt'}?key=state_dict.net").bind(state(), {}).read("count").item() == 3
    torch.save({"model": averaged, "model_ema": averaged}, tmp_path / "c.pt")
    with pytest.raises(IngredientError, match=r"under `net\.` in each of model, model_ema\. Name .*key=model_ema\.net"):
        open_ingredient(f"{tmp_path / 'c.pt'}?key=net")
    assert open_ingredient(f"{tmp_path / 'c.pt'}?key=model.net").tensors.keys() == state().keys()

"""Hostile and odd inputs on the command line: a clear message and the right exit code, no traceback. Needs no actors."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import Result
from safetensors.torch import load_file, save_file

from ray_soup.cli import main
from tests import tiny
from tests.conftest import values
from tests.system.command import call, change_ingredient, write_recipe

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
HTML = "<!DOCTYPE html><html>404 Not Found</html>"


@pytest.fixture
def own(zoo: Path, tmp_path: Path) -> Path:
    """Copy three ingredients, so that a test can break them."""
    (tmp_path / "zoo").mkdir()
    for k in range(3):
        shutil.copy(zoo / "zoo" / f"model_{k}.safetensors", tmp_path / "zoo")
    return tmp_path


def model(folder: Path, k: int = 2) -> Path:
    return folder / "zoo" / f"model_{k}.safetensors"


def header(folder: Path, **entry: Any) -> None:
    """Change the entry of head.bias."""
    data = model(folder).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    found = json.loads(data[8 : 8 + length])
    found["head.bias"] |= entry
    text = json.dumps(found).encode()
    model(folder).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def raw_header(folder: Path, text: bytes) -> None:
    model(folder).write_bytes(struct.pack("<Q", len(text)) + text)


def cut_torch_file(folder: Path) -> None:
    torch.save(load_file(model(folder)), folder / "zoo" / "a.pt")
    os.truncate(folder / "zoo" / "a.pt", 20_000)


def adapter(folder: Path) -> None:
    (folder / "zoo" / "adapter").mkdir()
    save_file({"key.lora_A.weight": torch.zeros(4, 23)}, folder / "zoo" / "adapter" / "adapter_model.safetensors")


def optimizer(folder: Path) -> None:
    torch.save(torch.optim.AdamW(tiny.build().parameters()).state_dict(), folder / "zoo" / "optimizer.pt")


def quantized(folder: Path) -> None:
    for k in range(3):
        change_ingredient(folder, k, lambda s: s.update({"key.weight": s["key.weight"].to(torch.int8)}))


def classes(folder: Path) -> None:
    for k in range(3):
        change_ingredient(folder, k, lambda s: s.update({"head.weight": torch.zeros(7, 23), "head.bias": torch.zeros(7)}))


def not_utf8(folder: Path) -> None:
    os.rename(model(folder), os.fsencode(folder / "zoo") + b"/bad\xff.safetensors")


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a web page as .pt": (lambda f: (f / "zoo" / "a.pt").write_text(HTML), "a.pt is a web page, not a checkpoint"),
    "a web page": (lambda f: model(f).write_text(HTML), "model_2.safetensors is a web page, not a checkpoint"),
    "a Git LFS pointer": (lambda f: model(f).write_text(LFS), "is a Git LFS pointer, not the checkpoint itself"),
    "a Git LFS pointer as .pt": (lambda f: (f / "zoo" / "a.pt").write_text(LFS), "Run `git lfs pull`"),
    "plain text as .pt": (lambda f: (f / "zoo" / "a.pt").write_text("hello"), "cannot be read as a torch checkpoint"),
    "a cut torch file": (cut_torch_file, "a.pt cannot be read as a torch checkpoint: it is damaged or truncated"),
    "a link to nothing": (
        lambda f: os.symlink("/nowhere/b.pt", f / "zoo" / "b.pt"), "b.pt is a link to /nowhere/b.pt, which does not exist",
    ),
    "no bytes": (lambda f: model(f).write_bytes(b""), "model_2.safetensors is empty (0 bytes)"),
    "five bytes": (lambda f: model(f).write_bytes(b"12345"), "is not a safetensors file, or is truncated"),
    "a shape that its bytes are not": (lambda f: header(f, shape=[11]), "takes 40 bytes; float32 [11] should take 44"),
    "a negative shape": (lambda f: header(f, shape=[-2, -5]), "head.bias has the shape [-2, -5]"),
    "overlapping offsets": (lambda f: header(f, data_offsets=[20, 60]), "overlap"),
    "negative offsets": (lambda f: header(f, data_offsets=[-40, 0]), "the offsets [-40, 0]"),
    "a header without end": (lambda f: raw_header(f, b"[" * 50_000), "has a damaged safetensors header"),
    "a name that is not UTF-8": (not_utf8, "this name is not UTF-8"),
    "a LoRA adapter": (adapter, "is a LoRA adapter (1 tensors, such as key.lora_A.weight)"),
    "an optimizer's state": (optimizer, "optimizer.pt is the state of an optimizer, not a model"),
    "quantized": (quantized, "the parameter key.weight is int8 [23, 23]; expected floats"),
    "other classes": (classes, "shape: head.bias is [7], in the model [10]"),
    "a transposed head": (
        lambda f: change_ingredient(f, 2, lambda s: s.update({"head.weight": s["head.weight"].t().contiguous()})),
        "shape: head.weight is [23, 10], in the model [10, 23]",
    ),
}  # fmt: skip

RECIPES: dict[str, tuple[str, str]] = {
    "empty": ("", "is empty; expected keys such as 'model:'"),
    "a list": ("- a\n", "is a list; expected keys"),
    "tabs": ("model: x\n\tdata: y\n", "is not valid YAML"),
    "a key deep inside": ("model: x\nfinetune: {trunk: {epoch: 3}}\n", "did you mean 'finetune.trunk.epochs'?"),
    "keys for a list": ("model: x\ningredients: {a: b}\n", "ingredients: found {'a': 'b'}."),
    "a list for a word": ("model: x\nmethod: [a]\n", "method: found ['a']."),
    "a file for keys": ("model: x\ndata: a.npz\n", "data: found 'a.npz'. Expected keys below it: train, fit, select, test."),
    "an infinite rate": ("model: x\nlearn: {lr: .inf}\n", "learn.lr: found inf. Expected a number above 0"),
}  # fmt: skip

OVERRIDES = ["learn.lr=0", "learn.micro_batch=0", "learn.model_batch=-3", "learn.seed=-1", "actors.replicas=0"]
OVERRIDES += ["actors.shards=-1", "actors.cpus=-1"]


def check(result: Result, code: int, *said: str) -> None:
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code == code, result.output
    for words in said:
        assert words in result.stderr


def uniform(own: Path, out: str | Path, **more: Any) -> Result:
    recipe = write_recipe(own, {"model": tiny.SPEC, "ingredients": str(own / "zoo"), **more})
    return call("uniform", recipe, out)


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_a_broken_checkpoint_is_named(own: Path, fault: str) -> None:
    damage, said = CHECKPOINTS[fault]
    damage(own)
    check(call("inspect", own / "zoo", "--model", tiny.SPEC), 3, said)


@pytest.mark.parametrize("fault", RECIPES)
def test_a_wrong_recipe_is_explained(own: Path, fault: str) -> None:
    text, said = RECIPES[fault]
    (own / "r.yaml").write_text(text)
    check(call("learn", own / "r.yaml", own / "out"), 2, "r.yaml", said)


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_value_out_of_range_is_named_by_its_key(own: Path, override: str) -> None:
    check(call("learn", write_recipe(own, values(own)), own / "out", override), 2, f"{override.partition('=')[0]}: ")
    assert not (own / "out").exists()


def test_an_unsuitable_output_folder_is_refused(own: Path) -> None:
    check(uniform(own, ""), 2, "OUT is empty")
    check(uniform(own, own / ("a" * 300)), 2, "File name too long")
    check(uniform(own, own / "r.yaml"), 2, "cannot be created")
    check(uniform(own, own / "zoo"), 2, "is where the recipe looks for ingredients")
    shutil.copytree(own / "zoo", own / "foreign")
    check(uniform(own, own / "foreign"), 2, "is not empty and was not written by ray_soup")
    assert not (own / "zoo" / "state").exists()
    check(uniform(own, own / "zoo" / "out"), 2, "is where the recipe looks for ingredients", "Choose another folder")
    assert not (own / "zoo" / "out").exists()
    check(uniform(own, own / "zoo" / "out", ingredients=str(own / "zoo" / "*")), 2, "is where the recipe looks")
    check(
        uniform(own, own / "zoo" / "out", ingredients=str(own / "zoo" / "*" / "model.safetensors")), 2, "no checkpoints at"
    )
    check(uniform(own, own / "zoo" / "a" / "out", ingredients=str(own / "zoo" / "**")), 2, "is where the recipe looks")
    check(uniform(own, own / "zoo" / "out", ingredients=str(own / "zoo" / "*.safetensors")), 0)
    shutil.copytree(own / "zoo" / "out", own / "zoo" / "out1")
    check(
        uniform(own, own / "zoo" / "out2", ingredients=str(own / "zoo" / "*" / "model.safetensors")),
        2,
        "is where the recipe looks",
    )
    (own / "o" / "state").mkdir(parents=True)
    (own / "o" / "state" / "begun.json").write_text("{")
    check(uniform(own, own / "o"), 2, "begun.json is damaged")


@pytest.mark.parametrize("text", ["[1]", '{"exit": 0}'])
def test_a_run_json_of_something_else_is_not_a_finished_soup(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    check(call("verify", tmp_path), 2, "is not a finished soup")


def test_a_pattern_that_finds_no_checkpoints_says_what_is_there(own: Path) -> None:
    said = (
        "no checkpoints at",
        "found model_0.safetensors, model_1.safetensors, model_2.safetensors; expected files ending",
    )
    check(uniform(own, own / "out", ingredients=str(own / "zoo" / "*.pth.tar")), 2, *said)
    check(uniform(own, own / "out", ingredients=str(own / "zoos" / "*.pt")), 2, "found no such folder")
    check(uniform(own, own / "out", ingredients=str(own / "zo*" / "*.pt")), 2, "found nothing that matches")


def test_odd_file_names_are_kept(own: Path) -> None:
    for k, name in enumerate(["a model", "größe 模型", "$x^2$ <b>"]):
        model(own, k).rename(own / "zoo" / f"{name}.safetensors")
    check(uniform(own, own / "out"), 0)
    check(call("verify", own / "out"), 0)


def test_values_too_large_for_float16_are_refused(own: Path) -> None:
    for k in range(3):
        change_ingredient(own, k, lambda s: s["key.weight"].fill_(70_000))
    check(uniform(own, own / "out", out_dtype="float16"), 3, "key.weight does not fit into", "Set out_dtype: float32")


def test_with_json_an_error_is_an_object(tmp_path: Path) -> None:
    result = call("verify", tmp_path, "--json")
    check(result, 2)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["exit"], "is not a finished soup" in found["error"]) == (2, True)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = call("completion", shell)
    check(result, 0)
    assert f"_RAY_SOUP_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.parametrize("verb", ["learn", "inspect", "verify"])
def test_files_complete_as_paths(verb: str) -> None:
    found = ShellComplete(main, {}, "ray-soup", "_RAY_SOUP_COMPLETE").get_completions([verb], "zo")
    assert [item.type for item in found] == ["file"]

"""Hostile indexes, folders and special files: each is refused with a sentence that names the file, and nothing hangs."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.check import check_together
from ray_soup.io.checkpoint_files import checkpoint_of, index_map
from ray_soup.io.find import find_checkpoints, open_ingredients
from ray_soup.io.ingredient import open_ingredient

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def sharded(folder: Path, value: float = 1.0) -> Path:
    """Write a model of two shards, and return its index."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: torch.full((2,), value)}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(zip("ab", SHARDS, strict=True))}))
    return folder / INDEX


def test_an_index_maps_tensors_to_their_shards(tmp_path: Path) -> None:
    index = sharded(tmp_path / "m")
    assert index_map(str(index)) == {n: str(tmp_path / "m" / shard) for n, shard in zip("ab", SHARDS, strict=True)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "null",
        "7",
        "[]",
        "{}",
        '"weight_map"',
        "{",
        '{"weight_map": null}',
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": {"a": ""}}',
        '{"weight_map": {"a": "."}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "sub/b.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "s3://bucket/b.safetensors"}}',
        '{"weight_map": {"a": "b.safetensors\\u0000"}}',
        '{"weight_map": {"a": "..\\\\b.safetensors"}}',
        '{"weight_map": {"a": "model.pt"}}',
        '{"weight_map": {"a": "model.safetensors.index.json"}}',
        f'{{"weight_map": {{"a": "{SHARDS[0]}", "a": "{SHARDS[1]}"}}}}',
        "[" * 100_000,
        '{"weight_map": ' * 5000 + "1" + "}" * 5000,
        '{"weight_map": {"a": ' + "9" * 5000 + "}}",
        b'\xff\xfe{"weight_map": {}}',
        b'{"weight_map": {"\xff": "x.safetensors"}}',
    ],
    ids=lambda text: repr(text[:40]),
)
def test_a_damaged_index_is_named(tmp_path: Path, text: str | bytes) -> None:
    index = sharded(tmp_path / "m")
    index.write_bytes(text if isinstance(text, bytes) else text.encode())
    for path in (index, index.parent):
        with pytest.raises(IngredientError, match=rf"{re.escape(str(index))} is not an index of checkpoint files: "):
            open_ingredient(str(path))


def test_an_index_that_does_not_end_is_not_read(tmp_path: Path) -> None:
    index = sharded(tmp_path / "m")
    os.truncate(index, 1 << 33)  # a sparse file
    with pytest.raises(IngredientError, match="has 8,589,934,592 bytes; expected at most"):
        open_ingredient(str(index))


@pytest.mark.parametrize("kind", ["missing", "a link to nowhere, which does not exist", "a FIFO", "a folder"])
def test_a_shard_that_is_no_file_is_named_with_its_entry(tmp_path: Path, kind: str) -> None:
    index = sharded(tmp_path / "m")
    shard = index.parent / SHARDS[1]
    shard.unlink()
    make: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "a FIFO": lambda: os.mkfifo(shard),
        "a folder": shard.mkdir,
    }
    make.get(kind, lambda: shard.symlink_to("nowhere"))()
    with pytest.raises(IngredientError, match=rf"{SHARDS[1]} is {kind}, but .*{INDEX} lists it for 'b'"):
        open_ingredient(str(index.parent))


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    index = sharded(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in index.parent.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_ingredient(str(tmp_path / "snapshot")).read("b").tolist() == [1.0, 1.0]


def test_a_model_saved_whole_where_it_was_saved_in_shards(tmp_path: Path) -> None:
    """save_pretrained removes the shards but leaves their index; other programs leave both, and one is out of date."""
    folder = sharded(tmp_path / "m").parent
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "model.safetensors")
    for spec in (str(folder), str(tmp_path)):
        with pytest.raises(
            IngredientError, match=rf"{folder} contains two models: model\.safetensors, and 2 of the 2 files"
        ):
            open_ingredients(spec)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(IngredientError, match=r"1 of the 2 files that .* Remove the one that you do not want"):
        open_ingredient(str(folder))
    (folder / SHARDS[1]).unlink()
    assert open_ingredient(str(folder)).read("a").tolist() == [0.0, 0.0]
    assert find_checkpoints(str(folder)) == [str(folder / "model.safetensors")]
    assert open_ingredient(str(folder / "model.safetensors")).read("a").tolist() == [0.0, 0.0]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are at most 107 bytes long
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "pipe")
    path.symlink_to("pipe")


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a FIFO": fifo,
    "a socket": bound_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere, which does not exist": lambda path: path.symlink_to("nowhere"),
    "unreadable": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["m_1.pt", "m_1.safetensors", "m_1.safetensors.index.json", "m_1.tar"])
def test_what_is_no_file_is_refused_without_opening_it(tmp_path: Path, kind: str, name: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m_0.safetensors")
    SPECIAL[kind](tmp_path / name)
    expected = rf"{re.escape(str(tmp_path / name))} is (not an index .*)?{kind}"
    alone: list[str | list[str]] = [] if kind == "a folder" else [str(tmp_path / name), [str(tmp_path / name)]]
    for spec in (str(tmp_path), str(tmp_path / "m_*"), *alone):
        said = said_within(20, spec)
        assert re.search(expected, said), said


def said_within(seconds: float, spec: str | list[str]) -> str:
    """Return the message with which `spec` is refused, or that it hangs."""
    said = []

    def refuse() -> None:
        with pytest.raises(SoupError) as error:
            open_ingredients(spec)
        said.append(str(error.value))

    worker = threading.Thread(target=refuse, daemon=True)
    worker.start()
    worker.join(seconds)
    return said[0] if said else "it hangs, or is not refused"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", INDEX])
def test_a_fifo_in_place_of_the_model_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(IngredientError, match=rf"{re.escape(name)} is a FIFO"):
        checkpoint_of(str(tmp_path))


def test_a_fifo_as_a_manifest_is_ignored(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m_0.safetensors")
    os.mkfifo(tmp_path / "manifest.json")
    assert open_ingredients(str(tmp_path))[0].trial is None


@pytest.mark.parametrize(
    "name",
    [
        "extra_state_world_size_2_rank_1.pt",
        "optim_world_size_8_rank_0.pt",
        "zero_pp_rank_0_mp_rank_00_model_states.pt",
        "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt",
    ],
)
def test_the_part_of_one_process_is_refused_with_the_command_that_joins_the_parts(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "a; b"
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, folder / name)
    for spec in (str(folder), str(folder / "*.pt"), str(folder / name)):
        with pytest.raises(IngredientError, match=r"is the part of a checkpoint .*Join the parts: python -m") as error:
            open_ingredients(spec)
    words = shlex.split(str(error.value).partition("Join the parts: ")[2])
    assert f"{folder}-merged" in words
    assert str(folder) in words or str(tmp_path) in words


def copies(folder: Path, count: int) -> None:
    save_file({"a": torch.arange(2.0)}, folder / "m_0.safetensors")
    whole = (folder / "m_0.safetensors").read_bytes()
    for k in range(1, count):
        (folder / f"m_{k}.safetensors").write_bytes(whole)


def test_more_ingredients_than_files_may_be_open(tmp_path: Path) -> None:
    copies(tmp_path, 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 100, hard))
    try:
        found = check_together(open_ingredients(str(tmp_path)))
        assert [ingredient.read("a").tolist() for ingredient in found] == [[0.0, 1.0]] * 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_three_thousand_ingredients_under_a_limit_of_1024_files(tmp_path: Path) -> None:
    copies(tmp_path, 3000)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
found = check_together(open_ingredients(sys.argv[1]))
print(len(found), sum(i.read("a").sum().item() for i in found))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["3000", "3000.0"], done.stderr


def test_a_file_that_is_no_checkpoint_is_a_wrong_recipe(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RecipeError, match=r"no checkpoints at .*notes\.txt"):
        find_checkpoints(str(tmp_path / "notes.txt"))

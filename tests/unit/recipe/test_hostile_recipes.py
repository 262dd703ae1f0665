"""Recipes that nobody should have written: each is read right, or refused with a sentence, in bounded time and memory."""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_soup.errors import RecipeError
from ray_soup.recipe import (
    METHODS,
    Recipe,
    as_recipe,
    dump_recipe,
    for_method,
    load_recipe,
    make_recipe,
    parse_overrides,
    with_changes,
)
from ray_soup.recipe.yaml_reader import MOST_BYTES

ROOT = Path(__file__).parents[3]
MINIMAL = {"model": "a:b", "ingredients": "/zoo"}
QUICK = settings(max_examples=100, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def loaded(folder: Path, text: str | bytes, *overrides: str) -> Recipe:
    file = folder / "r.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(file, overrides)


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        loaded(folder, text, *overrides)
    return str(error.value)


# Text


def aliases(line: str) -> str:
    return "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} {line.replace('BEFORE', f'*{before}')}\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )


MANY = ", ".join(["BEFORE"] * 9)
DOCUMENTS: dict[str, tuple[str | bytes, str]] = {
    "aliases that explode": (aliases(f"[{MANY}]"), "more than 100,000 values, with aliases written out"),
    "mappings of aliases that explode": (
        aliases("{" + ", ".join(f"k{n}: BEFORE" for n in range(9)) + "}"), "more than 100,000 values",
    ),
    "merges that explode": (
        "a: &a {x: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*{before}, *{before}]}}\n"
            for n, before in enumerate(["a", *(f"b{n}" for n in range(39))])),
        "more than 100,000 values",
    ),
    "a cycle": ("a: &a [*a]", "line 1, column 8: the alias *a has no finished anchor before it"),
    "a cycle of mappings": ("&a {model: *a}", "the alias *a has no finished anchor"),
    "a pattern without quotes": (
        "model: a:b\ningredients: *.pt",
        "line 2, column 15: ",
    ),
    "a dotted key in a file": ("model: a:b\nlearn.lr: 1", "learn.lr: unknown key; write lr below learn, as in learn: {lr"),
    "an unknown alias": ("model: *nowhere", "line 1, column 8: the alias *nowhere"),
    "5,000 levels of lists": ("[" * 5000 + "]" * 5000, "nest"),
    "half a million levels of lists": ("[" * 499_000, "nest"),
    "5,000 levels of mappings": ("{a: " * 5000 + "1" + "}" * 5000, "nested more than 20 deep"),
    "levels by indentation": ("".join(" " * n + "a:\n" for n in range(900)), "nested more than 20 deep"),
    "levels of dashes": ("- " * 400_000, "nested more than 20 deep"),
    "complex keys": ("? " * 400_000, "a key is a list"),
    "half a million values": ("- a\n" * 240_000, "more than 100,000 values"),
    "too many bytes": (b"# comment\n" * (MOST_BYTES // 10 + 1), "is larger than 1,000,000 bytes"),
    "a duplicate key": ("model: a:b\nmodel: c:d\n", "line 2, column 1: the key 'model' was already in line 1"),
    "a duplicate key of a section": ("model: a:b\nlearn:\n  lr: 1\n  lr: 2\n", "line 4, column 3: the key 'lr' was already"),
    "two documents": ("model: a:b\n---\nmodel: c:d\n", "line 2, column 1: a second document begins"),
    "an object of Python": ("model: !!python/object/apply:os.system [ls]", "the tag !!python/object/apply:os.system is not"),
    "bytes": ("model: !!binary aGk=", "the tag !!binary is not supported"),
    "a set": ("data: {test: !!set {a, b}}", "the tag !!set is not supported"),
    "a tag of its own": ("model: !mine x", "line 1, column 8: the tag !mine is not supported"),
    "a tag that does not fit": ("model: a:b\nblocks: !!int layer", "the tag !!int does not fit 'layer'"),
    "a list as a key": ("model: a:b\n? [a]\n: b", "line 2, column 3: a key is a list"),
    "an alias as a key": ("model: &m a:b\n*m : c", "a key is a list, a mapping or an alias"),
    "a merge of text": ("model: a:b\n<<: text", "<< merges mappings"),
    "NUL": (b"model: a\x00b", "contains the control character '\\x00' in line 1, column 9"),
    "a terminal escape": (b"model: a:b\n# \x1b[31m", "contains the control character '\\x1b' in line 2, column 3"),
    "another encoding": (b"model: a\xff", "is not valid UTF-8 text (at byte 8). Save it as UTF-8."),
    "half of UTF-16": ("model: a:b".encode("utf-16")[:-1], "is not valid UTF-16 text"),
    "UTF-32": ("model: a:b".encode("utf-32"), "control character"),
    "a tab as indentation": ("learn:\n\tlr: 1\n", "line 2, column 1: found"),
    "a colon in a value": ("model: a:b\nbase_model: a: b", "is not valid YAML: line 2, column 14"),
    "an unclosed list": ("model: a:b\ningredients: [a, b\n", "is not valid YAML: line "),
    "an unknown directive": ("%YAML 9.9\n---\nmodel: a:b", "is not valid YAML"),
    "a number": ("5", "is 5; expected keys such as 'model:'"),
    "nothing but a comment": ("# model: a:b", "is empty"),
    "a number of 5,000 digits": ("model: a:b\nlearn: {seed: " + "1" * 5000 + "}", "line 2, column 15: a number of 5,000"),
    "a key that is a number": ("model: a:b\n5: x", "5: unknown key"),
    "a section that is text": ("model: a:b\nlearn: fast", "learn: found 'fast'. Expected keys below it: lr, wd"),
    "a section that is a list": ("model: a:b\nactors: [1]", "actors: found [1]. Expected keys below it: replicas"),
    "a section within one": ("model: a:b\nfinetune: {trunk: 3}", "finetune.trunk: found 3. Expected keys below it: lr"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DOCUMENTS)
def test_a_document_that_is_no_recipe_is_refused_with_its_name_and_place(tmp_path: Path, fault: str) -> None:
    text, said = DOCUMENTS[fault]
    message = refused(tmp_path, text)
    assert said in message
    assert str(tmp_path / "r.yaml") in message
    assert len(message) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_with_and_without_a_byte_order_mark_are_read(tmp_path: Path, encoding: str) -> None:
    text = "model: a:b\nbase_model: größe/模型\n".encode(encoding)
    assert loaded(tmp_path, text).base_model == "größe/模型"


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    recipe = loaded(
        tmp_path,
        "model: &name a:b\nlearn: &learn {lr: 0.5, epochs: 3}\nfinetune: {trunk: {<<: *learn, epochs: 7}, init: *name}\n",
    )
    assert (recipe.finetune.trunk.lr, recipe.finetune.trunk.epochs, recipe.finetune.init) == (0.5, 7, "a:b")
    assert (recipe.learn.lr, recipe.learn.epochs) == (0.5, 3)


@pytest.mark.parametrize("empty", ["learn:", "actors:", "data:", "finetune: {trunk: }", "search:"])
def test_a_section_whose_keys_are_all_commented_out_is_empty(tmp_path: Path, empty: str) -> None:
    assert loaded(tmp_path, f"model: a:b\n{empty}\n") == make_recipe({"model": "a:b"})


# Files


def test_what_is_no_file_is_refused_without_being_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with socket.socket(socket.AF_UNIX) as one, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the path of a socket may have 107 bytes
        one.bind("socket")
        found = {
            tmp_path: "is a folder", tmp_path / "pipe": "is a named pipe", tmp_path / "link": "is a named pipe",
            tmp_path / "socket": "is a socket", Path("/dev/zero"): "is a device", Path("/dev/stdin/x"): "cannot be read",
            tmp_path / "loop": "cannot be read", tmp_path / "dangling": "cannot be read: No such file",
            tmp_path / "a\0b": "cannot be read", tmp_path / ("a" * 300): "File name too long", Path(): "is a folder",
        }  # fmt: skip
        for path, said in found.items():
            with pytest.raises(RecipeError, match=f"{re.escape(f'The recipe {path}')} .*{said}"):
                load_recipe(path)


@pytest.mark.parametrize("given", [5, None, b"r.yaml", ["r.yaml"], {1, 2}])
def test_what_is_no_recipe_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="expected a Recipe, its keys, or the path"):
        as_recipe(given)


# Names and paths

NAMES = ["1e5", "nan", ".nan", "inf", "true", "no", "1.0", "0x10", "0123", "2024-01-01", "1:30", "1_000", "5", "'null'"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where a key is a path or a name, 1e5 is not a number, true no truth value and 2024-01-01 no date."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    plain = name.strip("'")
    text = f"model: a:b\ningredients: [{name}, x]\ndata: {{fit: {name}, test: {{a: {name}}}}}\nbase_model: {name}\n"
    recipe = loaded(tmp_path, text)
    assert recipe.ingredients == [str(tmp_path / plain), str(tmp_path / "x")]
    assert (recipe.data.fit, recipe.data.test) == (str(tmp_path / plain), {"a": str(tmp_path / plain)})
    assert recipe.base_model == plain
    assert loaded(tmp_path, "model: a:b", f"ingredients={name}").ingredients == str(tmp_path / "here" / plain)


def test_names_of_test_sets_are_text(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "model: a:b\ndata: {test: {2024: /a.npz, yes: /b.npz, 1e5: /c.npz}}", "data.test.010=/d.npz")
    assert recipe.data.test == {"2024": "/a.npz", "yes": "/b.npz", "1e5": "/c.npz", "010": "/d.npz"}


def test_null_is_no_name_and_refused_if_it_could_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert loaded(tmp_path, "model: a:b\ndata: {test: a.npz}", "data.test=null").data.test is None
    (tmp_path / "null").mkdir()
    message = refused(tmp_path, "model: a:b", "data.test=null")
    assert "The override data.test=null means no value, but null exists here. Write data.test=./null" in message
    assert loaded(tmp_path, "model: a:b", "data.test=./null").data.test == str(tmp_path / "null")


def test_home_folders_are_expanded_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    recipe = make_recipe(MINIMAL)
    assert with_changes(recipe, {"data.fit": "~/a.npz"}).data.fit == "/home/me/a.npz"
    assert loaded(tmp_path, "model: a:b\ningredients: ./~nosuchuser/x").ingredients == str(tmp_path / "~nosuchuser/x")
    said = "found '~nosuchuser/x'. The home folder ~nosuchuser is unknown; expected a path. Write ./~nosuchuser for a name."
    assert f"ingredients: {said}" in refused(tmp_path, "model: a:b\ningredients: ~nosuchuser/x")
    assert f"data.test.a: {said}" in refused(tmp_path, "model: a:b\ndata: {test: {a: ~nosuchuser/x}}")
    assert f"ingredients[1]: {said}" in refused(tmp_path, "model: a:b", "ingredients=[a, ~nosuchuser/x]")
    assert "model: found '~nosuchuser/f'" in refused(tmp_path, "model: open_clip:x?zeroshot=~nosuchuser/f")
    with pytest.raises(RecipeError, match=r"finetune\.init: found '~nosuchuser'"):
        as_recipe({"model": "a:b", "finetune": {"init": "~nosuchuser"}})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("S3://Bucket/a.npz", "s3://Bucket/a.npz"),
        ("file:///data/a%20b.npz", "/data/a b.npz"),
        ("FILE://localhost/data/a.npz", "/data/a.npz"),
        ("gs://b/../a?x=1", "gs://b/../a?x=1"),
        ("pkg.mod:function", "pkg.mod:function"),
        ("/a/../b", "/a/../b"),
    ],
)
def test_uris_and_functions_are_no_paths(given: str, read: str) -> None:
    assert as_recipe({"model": "a:b", "data": {"fit": given}}).data.fit == read


@pytest.mark.parametrize("given", ["", "file://host/a", "file://a", "a\0b", "a\ud800", "x" * 30_000])
def test_what_cannot_be_a_path_is_refused(given: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.fit: found .*Expected") as error:
        as_recipe({"model": "a:b", "data": {"fit": given}})
    assert len(str(error.value)) < 300


# Keys: what is refused, and how

BIG = 10**30
KEYS: list[tuple[str, Any, str]] = [
    ("learn.lr", -1, "found -1. Expected a number above 0 or auto."),
    ("learn.lr", 0, "Expected a number above 0 or auto."),
    ("learn.lr", float("nan"), "found nan. Expected a number above 0 or auto."),
    ("learn.lr", float("inf"), "found inf. Expected a number above 0 or auto."),
    ("learn.lr", True, "found true. Expected a number above 0 or auto."),
    ("learn.lr", "0.1", "found '0.1'. Expected a number above 0 or auto. Remove the quotes."),
    ("learn.lr", "nan", "found 'nan'. Expected a number above 0 or auto."),
    ("learn.lr", [0.1], "found [0.1]. Expected a number"),
    ("learn.lr", {"uniform": [0, 1]}, "found {'uniform': [0, 1]}. Expected a number"),
    ("learn.lr", 10**400, "found 1000"),
    ("learn.lr", None, "found null. Expected a number"),
    ("learn.wd", -0.1, "Expected a number from 0 to 1,000,000."),
    ("learn.warmup", 1, "Expected a number from 0 and below 1."),
    ("learn.clip", 0, "Expected a number above 0, or null."),
    ("learn.label_smoothing", 1.0, "Expected a number from 0 and below 1."),
    ("learn.cosine_lr", 1, "found 1. Expected true or false."),
    ("learn.cosine_lr", "yes", "Expected true or false."),
    ("learn.optimizer", "adam", "found 'adam'. Expected adamw or sgd."),
    ("learn.epochs", True, "found true. Expected an integer from 1 to 100,000."),
    ("learn.epochs", "5", "found '5'. Expected an integer from 1 to 100,000. Remove the quotes."),
    ("learn.epochs", 0, "Expected an integer from 1 to"),
    ("learn.epochs", 5.5, "found 5.5. Expected an integer"),
    ("learn.epochs", BIG, "Expected an integer from 1 to 100,000."),
    ("learn.models_epochs", 10**9, "Expected an integer from 1 to 10,000."),
    ("learn.patience", 0, "or null."),
    ("learn.batch_size", BIG, "Expected an integer from 1 to 1,000,000,000."),
    ("learn.micro_batch", "all", "found 'all'. Expected an integer from 1 to 1,000,000,000 or auto."),
    ("learn.model_batch", 0, "Expected an integer from 1 to 1,000,000 or auto."),
    ("learn.model_batch", False, "found false."),
    ("learn.seed", -1, "Expected an integer from 0 to 9,223,372,036,854,775,807."),
    ("learn.seed", 2**63, "Expected an integer from 0 to 9,223,372,036,854,775,807."),
    ("learn.seed", 10**5000, "found an integer of about 5,000 digits. Expected"),
    ("actors.replicas", BIG, "Expected an integer from 1 to 10,000 or auto."),
    ("actors.shards", -1, "Expected an integer from 1 to 10,000 or auto."),
    ("actors", {"replicas": 5000, "shards": 50}, "5000 replicas x 50 shards are 250,000 actors. Expected at most 10,000."),
    ("actors.cpus", 1e-9, "Expected a multiple of 0.0001, the smallest amount that Ray counts."),
    ("actors.cpus", -1, "Expected a number from 0 to 4,096 or auto."),
    ("actors.gpus", 0.33333, "Expected a multiple of 0.0001"),
    ("actors.gpus", 1.5, "Expected a whole number, or a share between 0 and 1."),
    ("actors.gpus", 1e9, "Expected a number from 0 to 128."),
    ("actors.gpus", True, "found true."),
    ("actors.wait_s", -1, "Expected a number from 0 to 604,800."),
    ("actors.wait_s", float("inf"), "Expected a number from 0 to 604,800."),
    ("directions.dtype", "int2", "Expected float32 or bfloat16 or int8 or int4."),
    ("shard_size", float("inf"), "Expected a size of 1 byte or more, as in 5GB."),
    ("shard_size", 0, "Expected a size"),
    ("shard_size", -1, "Expected a size"),
    ("shard_size", 1.5, "Expected a size"),
    ("shard_size", True, "Expected a size"),
    ("shard_size", BIG, "Expected a size"),
    ("shard_size", "9" * 5000, "Expected a size"),
    ("shard_size", "10EB", "Expected a size"),
    ("shard_size", "²GB", "Expected a size"),
    ("blocks", 0, "Expected auto or tensor or layer or model or an integer from 1 to"),
    ("blocks", -1, "Expected auto or tensor or layer"),
    ("blocks", True, "found true. Expected auto or tensor or layer"),
    ("blocks", BIG, "Expected auto or tensor or layer"),
    ("blocks", None, "found null. Expected auto"),
    (
        "blocks",
        {"tensor": 0},
        "found {'tensor': 0}. Expected the number of groups that the rows of a tensor form, 1 to 65,536",
    ),
    ("blocks", {"tensor": True}, "Expected the number of groups"),
    ("blocks", {"tensor": 65_537}, "as in {tensor: 4}"),
    ("blocks", {"layer": 2}, "Expected the number of groups"),
    ("blocks", {"tensor": 2, "layer": 2}, "Expected the number of groups"),
    ("blocks", {}, "Expected the number of groups"),
    ("blocks", "rows", "1,000,000,000,000,000 or {tensor: an integer}."),
    ("data.select", 0, "found 0. Expected a share between 0 and 1, or a file."),
    ("data.select", 1, "Expected a share between 0 and 1"),
    ("data.select", float("nan"), "Expected a share between 0 and 1"),
    ("data.select", True, "found true. Expected a share between 0 and 1"),
    ("data.select", None, "Expected a share between 0 and 1"),
    ("data.select", ["a"], "Expected a share between 0 and 1"),
    ("data.fit", 5, "found 5. Expected text, or null. Put it in quotes."),
    ("data.fit", ["a"], "found ['a']. Expected text, or null."),
    ("data.test", ["a"], "Expected text, names with one text each, or null."),
    ("data.test", {"a": 5}, "test.a: found 5. Expected text."),
    ("data.test", {"a" * 101: "x"}, "Expected one or more names of letters, digits and underscores"),
    ("data.test", {"": "x"}, "Expected one or more names"),
    ("data.test", {"a/b": "x", "c": "y"}, "not 'a/b'."),
    ("ingredients", 5, "found 5. Expected text, a list of one or more texts, or null. Put it in quotes."),
    ("ingredients", [], "found []. Expected text, a list of one or more texts, or null."),
    ("ingredients", ["a", 5], "ingredients[1]: found 5. Expected text."),
    ("ingredients", {"a": "b"}, "Expected text, a list of one or more texts"),
    ("ignore", "a*", "found 'a*'. Expected a list of texts."),
    ("ignore", [5], "ignore[0]: found 5. Expected text."),
    ("ignore", ["a\nb"], "Expected one line of text without control characters."),
    ("baseline", "mean_single", "found 'mean_single'. Expected best_single or none."),
    ("baseline", None, "Expected best_single or none."),
    ("model", "", "Expected 1 to 20,000 characters"),
    ("model", " ", "Expected one line of text"),
    ("model", "a\x1b[31m", r"found 'a\x1b[31m'. Expected one line of text without control characters."),
    ("model", "a:b\u2028", "Expected one line of text"),
    ("model", "a" * 30_000, "Expected 1 to 20,000 characters"),
    ("model", 5, "found 5. Expected text. Put it in quotes."),
    ("model", None, "found null. Expected text."),
    ("loss", "cross_entropy", "Expected package.module:function."),
    ("loss", "a:b:c", "Expected package.module:function."),
    ("loss", "a:b\n", "Expected one line of text"),
    ("loss", ["a:b"], "found ['a:b']. Expected text, or null."),
    ("metric", "a.b", "Expected package.module:function."),
    ("metric", "", "metric: found ''."),
    ("base_model", "a" * 300, "base_model: found 'aaa"),
    ("base_model", "a\nb", "Expected one line of text"),
    ("method", "soup", "Expected one of best_single, uniform, greedy"),
    ("method", True, "found true. Expected one of"),
    ("method", None, "found null. Expected one of"),
    ("greedy.keep", "<", "Expected >= or >."),
    ("precision", "float64", "Expected auto or float32 or bfloat16."),
    ("learn", {"label_smoothing": 1}, "learn.label_smoothing: found 1. Expected a number from 0 and below 1."),
    ("learn.lrr", 1, "unknown key; did you mean 'learn.lr'?"),
    ("learn.zzzzz", 1, "unknown key; known keys here: lr, wd,"),
    ("modle", "x", "unknown key; did you mean 'model'?"),
    ("learn", 5, "found 5. Expected keys below it"),
    ("learn", "x" * 10**6, "Expected keys below it"),
    ("finetune", {"init": "/a", "pretrained": "/b"}, "finetune.init: found '/a' together with finetune.pretrained."),
    ("finetune.templates", [], "Expected a list of one or more texts."),
    ("finetune.templates", ["a photo"], "'a photo' has none."),
    ("finetune.templates", "a {}", "found 'a {}'. Expected a list of one or more texts."),
    ("finetune.workers_per_model", 0, "Expected an integer from 1 to 10,000."),
    ("finetune.trunk.shift", 10**6, "Expected an integer from 0 to 1,000."),
    ("finetune.trunk.randaugment", 31, "Expected an integer from 0 to 30."),
    ("finetune.probe_wd", -1, "Expected a number from 0"),
]


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def short(value: Any) -> str:
    return "huge" if isinstance(value, int) and abs(value) > 10**40 else ascii(value)[:20]


@pytest.mark.parametrize(("key", "value", "said"), KEYS, ids=[f"{key}={short(value)}" for key, value, _ in KEYS])
def test_a_wrong_value_is_refused_in_one_line_that_names_key_value_and_what_is_expected(
    key: str, value: Any, said: str
) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({**MINIMAL, **nested(key, value)})
    head, line, *more = str(error.value).split("\n")
    assert (head, more) == ("The recipe is not valid:", [])
    assert line.startswith(f"  {key}")
    assert said in line
    assert len(line) < 450
    assert "Input should" not in line
    recipe = make_recipe(MINIMAL)
    with pytest.raises(RecipeError):
        with_changes(recipe, {key: value})


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("learn.epochs", 5.0, 5),
        ("learn.micro_batch", 64.0, 64),
        ("blocks", 1e6, 1_000_000),
        ("blocks", {"tensor": 4.0}, {"tensor": 4}),
        ("learn.lr", 1, 1.0),
        ("learn.lr", np.float32(0.5), 0.5),
        ("learn.lr", np.float64(0.5), 0.5),
        ("learn.epochs", np.int64(7), 7),
        ("learn.cosine_lr", np.bool_(False), False),
        ("learn.seed", 2**63 - 1, 2**63 - 1),
        ("actors.gpus", 0.3333, 0.3333),
        ("actors.gpus", 2, 2.0),
        ("actors.cpus", 0.0001, 0.0001),
        ("data.fit", Path("/a/b.npz"), "/a/b.npz"),
        ("data.fit", np.str_("/a/b.npz"), "/a/b.npz"),
        ("ingredients", (Path("/a"), "/b"), ["/a", "/b"]),
        ("data.test", {"a": Path("/a")}, {"a": "/a"}),
        ("ignore", ["*.attn_mask", "n_averaged"], ["*.attn_mask", "n_averaged"]),
        ("baseline", "none", "none"),
        ("data.select", 0.5, 0.5),
        ("shard_size", 2**62, 2**62),
    ],
)
def test_a_right_value_in_another_dress_is_read(key: str, value: Any, read: Any) -> None:
    found: Any = make_recipe({**MINIMAL, **nested(key, value)})
    for part in key.split("."):
        found = getattr(found, part)
    assert found == read
    assert type(found) is type(read)


class Cyclic(dict[str, Any]):
    pass


class Rude:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Word(str, Enum):
    LAYER = "layer"


CYCLE: dict[str, Any] = Cyclic()
CYCLE["learn"] = CYCLE
LOOP: list[Any] = []
LOOP.append(LOOP)
DEEP: Any = {}
for _ in range(5000):
    DEEP = {"a": DEEP}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({5: "a"}, "found the key 5. Expected text as keys"),
        ({None: "a"}, "found the key null. Expected text as keys"),
        ({"data": {"test": {1: "a"}}}, "data.test: found the key 1"),
        ({"learn": CYCLE}, "a value that contains itself"),
        ({"ingredients": LOOP}, "a value that contains itself"),
        ({"search": DEEP}, "found more than 20 deep"),
        ({"ingredients": ["a"] * 300_000}, "found more than 200,000 values"),
        ({"learn": {"lr": object()}}, "learn.lr: found <object object at"),
        ({"learn": {"lr": Rude()}}, "learn.lr: found a Rude of type Rude. Expected text, a number"),
        ({"learn": {"lr": Decimal("0.1")}}, "found Decimal('0.1') of type Decimal"),
        ({"learn": {"lr": 1j}}, "found 1j of type complex"),
        ({"learn": {"lr": np.array([0.1])}}, "of type ndarray"),
        ({"ingredients": {"a", "b"}}, "of type set"),
        ({"ingredients": b"zoo"}, "found b'zoo' of type bytes"),
        ({"model": len}, "model: found <built-in function len>"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_objects_that_are_no_recipe_are_refused(values: dict[Any, Any], said: str) -> None:
    for attempt in (lambda: as_recipe(values), lambda: with_changes(make_recipe(MINIMAL), values)):
        with pytest.raises(RecipeError) as error:
            attempt()
        assert said in str(error.value)
        assert len(str(error.value)) < 500


def test_members_of_an_enum_are_their_values() -> None:
    recipe = make_recipe({**MINIMAL, "blocks": Word.LAYER})
    assert (recipe.blocks, type(recipe.blocks)) == ("layer", str)


def test_every_wrong_key_has_one_line_in_the_order_of_the_keys() -> None:
    wrong = {"learn": {"lr": True, "epochs": "x", "micro_batch": 0}, "data": {"select": 5}, "blocks": []}
    with pytest.raises(RecipeError) as error:
        make_recipe({**MINIMAL, **wrong})
    keys = [line.strip().partition(":")[0] for line in str(error.value).split("\n")[1:]]
    assert sorted(keys) == ["blocks", "data.select", "learn.epochs", "learn.lr", "learn.micro_batch"]


def test_a_conversion_to_another_method_is_checked() -> None:
    with pytest.raises(RecipeError, match=r"The recipe for mehl is not valid:\n  learn\.seed: found 9223372036854775808"):
        for_method(make_recipe(MINIMAL), "mehl", seed=2**63)
    for method in (5, None, ["mehl"]):
        with pytest.raises(RecipeError, match=r"method: found .*; expected one of"):
            with_changes(make_recipe(MINIMAL), {"method": method})


# Overrides


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learn.lr=-1", "The override learn.lr=-1 is not valid:\n  learn.lr: found -1. Expected a number above 0 or auto."),
        ("learn.lrr=1", "The override learn.lrr=1 is not valid:\n  learn.lrr: unknown key; did you mean 'learn.lr'?"),
        ("learn=5", "The override learn=5 is not valid:\n  learn: found 5. Expected keys below it"),
        ("learn={lr: -1}", "The override learn={lr: -1} is not valid:\n  learn.lr: found -1."),
        ("learn.lr.x=1", "The override learn.lr.x=1 is not valid:\n  learn.lr: found {'x': 1}."),
        ("ingredients=[a, 5, [b]]", "is not valid:\n  ingredients[2]: found ['b']. Expected text."),
        ("data.test.a.b=/x", "The override data.test.a.b=/x is not valid:\n  data.test.a: found"),
        ("learn.lr=1e400", "learn.lr: found inf."),
        ("learn.seed=" + "1" * 5000, "line 1, column 1: a number of 5,000 digits"),
        ("learn=", "The override learn=: learn is null; expected keys below it: lr, wd,"),
        ("finetune.trunk=null", "finetune.trunk is null; expected keys below it: lr, wd,"),
        ("learn.lr=[", "The override learn.lr=[ is not valid YAML: line "),
        ("learn.lr=!!python/none", "the tag !!python/none is not supported"),
        ("learn.lr=a: b: c", "The override learn.lr=a: b: c is not valid YAML: line 1, column 5"),
        ("learn={lr: 1, lr: 2}", "the key 'lr' was already in line 1"),
        ("ingredients=~nosuchuser/x", "The override ingredients=~nosuchuser/x is not valid:\n  ingredients: found"),
        ("ingredients=''", "ingredients: found ''. Expected a path."),
        ("model=\x1b[31m", r"The override model=\x1b[31m contains the control character '\x1b'"),
        ("model=\ud800", r"contains the control character '\ud800'"),
        ("learn\x1b.lr=1", "contains the control character"),
        ("learn.lr", "Found 'learn.lr' where an override was expected. Write key=value"),
        ("=5", "Found '=5' where an override was expected"),
        ("", "Found '' where an override was expected"),
        ("learn..lr=1", "learn.: unknown key"),
        ("a" * 1000 + "=1", "The override aaaa"),
        ("." * 5000 + "=1", "is too long"),
        ("search.learn.lr={uniform: [1]}", "search.learn.lr: found {'uniform': [1]}. Expected uniform: [low, high]"),
        ("finetune.lr=-1", "finetune.lr: found -1. Expected a number above 0, or a distribution"),
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_a_wrong_override_is_called_an_override(tmp_path: Path, override: str, said: str) -> None:
    message = refused(tmp_path, "model: a:b\nlearn: {epochs: 3}\n", override)
    assert said in message
    assert "The recipe" not in message
    assert len(message) < 700


def test_faults_of_the_file_and_of_overrides_are_told_apart(tmp_path: Path) -> None:
    message = refused(tmp_path, "model: a:b\nlearn: {lr: -1, wd: -1}\n", "learn.epochs=0", "learn.lr=-2")
    assert f"The recipe {tmp_path}/r.yaml is not valid:\n  learn.wd: found -1." in message
    assert "The override learn.lr=-2 is not valid:\n  learn.lr: found -2." in message
    assert "The override learn.epochs=0 is not valid:\n  learn.epochs: found 0." in message
    assert loaded(tmp_path, "model: a:b\nlearn: {lr: -1}\n", "learn.lr=2").learn.lr == 2


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("learn: 5", ["learn.lr=1"], "learn is 5, so a change of learn.lr does not fit. Change learn as a whole."),
        ("data: {test: /a.npz}", ["data.test.b=/b.npz"], "data.test is '/a.npz', so a change of data.test.b does not fit."),
        ("", ["learn=5", "learn.lr=1"], "The override learn.lr=1: learn is 5, so a change of learn.lr does not fit."),
    ],
)
def test_no_value_is_dropped_for_keys_below_it(tmp_path: Path, text: str, overrides: list[str], said: str) -> None:
    assert said in refused(tmp_path, f"model: a:b\n{text}\n", *overrides)


def test_numbers_in_overrides_and_files_are_read_alike(tmp_path: Path) -> None:
    texts = {"1e-3": 1e-3, "1E-3": 1e-3, ".5": 0.5, "5.": 5.0, "1_000": 1000, "0x10": 16, "+3": 3, "2e2": 200.0}
    for text, value in texts.items():
        assert loaded(tmp_path, f"model: a:b\nlearn: {{lr: {text}}}").learn.lr == value
        assert loaded(tmp_path, "model: a:b", f"learn.lr={text}").learn.lr == value
    for text in ("010", "1:30", "1e", "e5", "--5", "1,5", "5 apples", "０", "0x", "1e5.5"):
        assert "Expected a number" in refused(tmp_path, f"model: a:b\nlearn: {{lr: '{text}'}}")
        assert "Expected a number" in refused(tmp_path, "model: a:b", f"learn.lr={text}")


# Written and read again

names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12).filter(str.strip)
odd = st.sampled_from(["1e5", "nan", "null", "true", "0x10", "2024-01-01", "- a", "a: b", "#", "'", '"', "=", "<<", "!x"])
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
paths = st.one_of(names, odd, texts).filter(lambda path: not path.startswith("~"))
rates = st.floats(1e-300, 1e300)
counts = st.integers(1, 1000)


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(st.none(), strategy)


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def spread(low: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        low,
        st.lists(low, min_size=2, max_size=2, unique=True).map(lambda pair: {"uniform": sorted(pair)}),
        st.lists(low, min_size=1, max_size=3).map(lambda values: {"choice": values}),
    )


RECIPES = some(
    method=st.sampled_from(list(METHODS)),
    ingredients=optional(st.one_of(paths, st.lists(paths, min_size=1, max_size=3))),
    ignore=st.lists(names, max_size=2),
    baseline=st.sampled_from(["best_single", "none"]),
    base_model=optional(names),
    blocks=st.one_of(
        st.sampled_from(["tensor", "layer", "model"]),
        st.integers(1, 10**15),
        st.fixed_dictionaries({"tensor": st.integers(1, 65_536)}),
    ),
    shard_size=optional(st.integers(1, 2**52)),
    metric=st.sampled_from([None, "a.b:c"]),
    data=some(
        train=optional(paths),
        fit=optional(paths),
        select=st.one_of(paths, st.floats(1e-9, 0.999)),
        test=optional(st.one_of(paths, st.dictionaries(st.from_regex(r"\w{1,5}", fullmatch=True), paths, min_size=1))),
    ),
    learn=some(
        lr=rates, wd=st.floats(0, 1e6), clip=optional(rates), cosine_lr=st.booleans(), warmup=st.floats(0, 0.99),
        epochs=counts,
        patience=optional(counts), model_batch=st.one_of(st.just("auto"), counts), seed=st.integers(0, 2**63 - 1),
    ),
    actors=some(cpus=st.one_of(st.just("auto"), st.integers(0, 10**6).map(lambda n: n / 10_000)), wait_s=st.floats(0, 600)),
    finetune=some(
        init=optional(paths), templates=st.lists(names.map(lambda t: t + "{}"), min_size=1, max_size=2),
        lr=spread(st.floats(1e-9, 10)), epochs=st.one_of(counts, st.just({"randint": [1, 9]})),
    ),
    search=some(
        trials=counts,
        time_budget_s=optional(st.floats(0.1, 1e6)),
        space=st.dictionaries(st.sampled_from(["learn.lr", "learn.clip"]), spread(st.floats(1e-9, 10))),
    ),
)  # fmt: skip


@given(RECIPES)
@QUICK
def test_a_dumped_recipe_is_read_as_the_same_recipe(tmp_path: Path, values: dict[str, Any]) -> None:
    """Texts that look like numbers, quotes, control characters and every kind of distribution survive."""
    recipe = as_recipe({"model": "a:b", **values})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert as_recipe(recipe.model_dump()) == recipe
    assert with_changes(recipe, {}) == recipe


@pytest.mark.parametrize("name", [name.strip("'") for name in NAMES] + ["null", "[a", "a: b", "*.pt", "#x"])
def test_texts_that_look_like_something_else_survive_a_dump(tmp_path: Path, name: str) -> None:
    values = {"data": {"select": name}, "base_model": name, "ignore": [name], "search": {"base": {}}}
    recipe = make_recipe({**MINIMAL, **values})
    assert f"{recipe.data.select}" == name
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "r.yaml")
    assert (again.base_model, again.ignore) == (name, [name])
    assert again.data.select == str(tmp_path / name)


def test_new_keys_are_dumped_only_if_they_are_used() -> None:
    """A folder that an older version began has the same recipe."""
    assert "baseline" not in dump_recipe(make_recipe(MINIMAL))
    dumped = dump_recipe(make_recipe({**MINIMAL, "baseline": "none", "ignore": ["a*"]}))
    assert "baseline: none\n" in dumped
    assert "ignore:\n- a*\n" in dumped


WHOLE = dump_recipe(
    make_recipe(
        {
            **MINIMAL,
            "data": {"fit": "/f.npz", "test": {"a": "/a.npz", "b": "m:f"}},
            "search": {"learn.lr": {"loguniform": [0.01, 0.1]}, "blocks": {"choice": ["layer", 1000, {"tensor": 4}]}},
        }
    )
).encode()


def mutations() -> st.SearchStrategy[bytes]:
    """Byte flips, deletions, insertions, swapped and repeated lines, and cuts of a whole recipe."""
    place = st.integers(0, len(WHOLE) - 1)
    lines = WHOLE.splitlines(keepends=True)
    some_line = st.integers(0, len(lines) - 1)
    odd_bytes = st.sampled_from(
        [b"\0", b"\t", b"&a ", b"*a", b"!!", b"{", b"[", b": ", b"- ", b"\n", b"<<: ", b"\xff", b"%", b"1" * 400]
    )
    return st.one_of(
        st.tuples(place, st.integers(0, 255)).map(lambda t: WHOLE[: t[0]] + bytes([t[1]]) + WHOLE[t[0] + 1 :]),
        st.tuples(place, place).map(lambda t: WHOLE[: min(t)] + WHOLE[max(t) :]),
        st.tuples(place, odd_bytes).map(lambda t: WHOLE[: t[0]] + t[1] + WHOLE[t[0] :]),
        st.tuples(some_line, some_line).map(lambda t: b"".join([*lines[: t[0]], lines[t[1]], *lines[t[0] :]])),
        st.tuples(some_line, some_line).map(
            lambda t: b"".join(
                lines[t[1]] if n == t[0] else lines[t[0]] if n == t[1] else one for n, one in enumerate(lines)
            )
        ),
        place.map(lambda n: WHOLE[:n]),
        st.binary(max_size=200),
        st.permutations(lines).map(b"".join),
    )


def read_or_refused(folder: Path, text: bytes) -> None:
    message = ""
    try:
        assert loaded(folder, text).model
    except RecipeError as error:
        message = str(error)
    assert not message or (str(folder / "r.yaml") in message and len(message) < 5000)


@given(mutations())
@QUICK
def test_a_damaged_recipe_is_a_recipe_or_refused(tmp_path: Path, text: bytes) -> None:
    read_or_refused(tmp_path, text)


@pytest.mark.slow
@given(mutations())
@settings(QUICK, max_examples=5000)
def test_many_damaged_recipes_are_recipes_or_refused(tmp_path: Path, text: bytes) -> None:
    read_or_refused(tmp_path, text)


@given(st.text(st.characters(), max_size=30), st.text(st.characters(), max_size=30))
@QUICK
def test_any_override_is_applied_or_refused(key: str, text: str) -> None:
    for override in (
        f"{key}={text}",
        f"learn.lr={text}",
        f"ingredients={text}",
        f"search.{key}={text}",
        f"data.test.{key}={text}",
    ):
        with suppress(RecipeError):
            assert make_recipe({"model": "a:b"} | parse_overrides([override])).model

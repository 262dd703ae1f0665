"""Recipes: validation, messages, paths, overrides, and conversion to another method."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_soup.errors import RecipeError
from ray_soup.recipe import as_recipe, dump_recipe, for_method, load_recipe, make_recipe, parse_overrides, with_changes

MINIMAL = {"model": "a:b", "ingredients": "zoo"}


def test_dump_then_load_is_the_identity(tmp_path: Path) -> None:
    recipe = make_recipe({**MINIMAL, "ingredients": str(tmp_path), "learn": {"lr": 0.5}, "blocks": 1000})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


def test_a_dumped_recipe_has_the_keys_of_version_0_1_in_the_same_order() -> None:
    """And those whose defaults are not what version 0.1 did."""
    dumped = yaml.safe_load(dump_recipe(make_recipe(MINIMAL)))
    assert list(dumped) == [
        "method", "ingredients", "model", "base_model", "data", "blocks", "buffers", "greedy", "learn", "loss", "metric",
        "actors", "directions", "precision", "out_dtype", "shard_size", "finetune", "search",
    ]  # fmt: skip
    assert list(dumped["learn"].items()) == [
        ("lr", "auto"), ("wd", 0.0), ("optimizer", "adamw"), ("cosine_lr", False), ("warmup", 0.2), ("clip", None),
        ("batch_size", 128), ("micro_batch", "auto"), ("epochs", 5), ("patience", None), ("label_smoothing", 0.0),
        ("model_batch", "auto"), ("models_epochs", 1), ("screen", True), ("average", True), ("whiten", 0.5), ("seed", 1),
    ]  # fmt: skip
    assert list(dumped["data"].items()) == [("train", None), ("fit", None), ("select", 0.2), ("test", None)]
    assert list(dumped["actors"]) == ["replicas", "shards", "cpus", "gpus", "wait_s"]
    assert list(dumped["finetune"]) == [
        "trials", "init", "pretrained", "class_names", "templates", "probe_wd", "trunk", "lr", "wd", "epochs",
        "label_smoothing", "mixup", "shift", "randaugment", "workers_per_model", "batch_size", "seed",
    ]  # fmt: skip
    assert list(dumped["search"]) == [
        "trials", "metric", "algorithm", "scheduler", "loggers", "time_budget_s", "space",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ingredient": "x"}, "did you mean 'ingredients'?"),
        ({"learn": {"learnrate": 1, "epoch": 2}}, "did you mean 'learn.epochs'?"),
        ({"learn": {"lr": -1}}, "learn.lr: found -1. Expected a number above 0 or auto."),
        ({"learn": {"model_batch": "all"}}, "learn.model_batch: found 'all'"),
        ({"data": {"select": 1.5}}, "data.select: found 1.5. Expected a share between 0 and 1, or a file."),
        (
            {"method": "mehl++"},
            "method: found 'mehl++'. Expected one of best_single, uniform, greedy, learned, learned+, mehl",
        ),
        ({"method": ["mehl"]}, "method: found ['mehl']. Expected one of"),
        ({"data": {"test": {"a b": "x.npz"}}}, "data.test: found {'a b': 'x.npz'}. Expected one or more names of letters"),
        ({"data": {"test": {}}}, "data.test: found {}. Expected one or more names"),
        ({"blocks": "row"}, "blocks: found 'row'. Expected auto or tensor or layer or model or an integer from 1"),
        ({"shard_size": "5 apples"}, "shard_size: found '5 apples'. Expected a size"),
        ({"metric": "accuracy"}, "metric: found 'accuracy'. Expected package.module:function."),
        ({"loss": "a:b", "learn": {"label_smoothing": 0.1}}, "learn.label_smoothing: found 0.1 together with loss: a:b"),
    ],
)
def test_a_message_names_the_key_and_what_was_found_and_expected(values: dict, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({**MINIMAL, **values})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5k", 1500), (7, 7), (None, None)]
)
def test_a_size_is_read_as_people_write_it(text: str | int | None, nbytes: int | None) -> None:
    assert make_recipe({**MINIMAL, "shard_size": text}).shard_size == nbytes


@pytest.mark.parametrize("text", ["5 apples", "0", -1])
def test_a_size_that_is_not_one_is_refused(text: str | int) -> None:
    with pytest.raises(RecipeError, match=r"shard_size: found .*\. Expected a size of 1 byte or more, as in 5GB\."):
        make_recipe({**MINIMAL, "shard_size": text})


def test_every_faulty_key_is_listed() -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({**MINIMAL, "method": "soup", "learn": {"lr": -1, "epochs": 0}})
    for key in ("method: ", "learn.lr: ", "learn.epochs: "):
        assert f"\n  {key}" in str(error.value)


def test_the_model_is_required() -> None:
    with pytest.raises(RecipeError, match="model: missing"):
        make_recipe({"ingredients": "x"})


def test_methods_have_their_own_blocks_and_the_recipe_overrides_them() -> None:
    assert make_recipe({**MINIMAL, "method": "mehl"}).blocks == "model"
    assert make_recipe({**MINIMAL, "method": "mehl+"}).blocks == "auto"
    assert make_recipe({**MINIMAL, "method": "mehl+", "blocks": "layer"}).blocks == "layer"


def test_groups_of_rows_are_a_mapping_that_every_way_to_a_recipe_keeps(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**MINIMAL, "blocks": {"tensor": 4}}))
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.blocks == {"tensor": 4}
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe == for_method(recipe, "mehl+")
    for override in ("blocks={tensor: 2}", "blocks.tensor=2"):
        assert load_recipe(tmp_path / "r.yaml", [override]).blocks == {"tensor": 2}
    assert load_recipe(tmp_path / "r.yaml", ["blocks=layer"]).blocks == "layer"
    assert load_recipe(tmp_path / "r.yaml", method="learned").blocks == "model"
    assert with_changes(recipe, {"blocks": "tensor"}).blocks == "tensor"
    assert with_changes(make_recipe(MINIMAL), {"blocks": {"tensor": 9}}).blocks == {"tensor": 9}
    search = {"blocks": {"choice": ["tensor", {"tensor": 4}]}}
    assert make_recipe({**MINIMAL, "search": search}).search.space == search


def test_paths_are_relative_to_the_recipe_file_and_those_of_overrides_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = {**MINIMAL, "ingredients": ["a.pt", "s3://bucket/b.pt"], "data": {"fit": "f.npz", "test": "m.n:f"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(text))
    recipe = load_recipe(tmp_path / "r.yaml", ["data.select=s.npz", "learn.lr=1e-3", "learn.clip=null"])
    assert recipe.ingredients == [str(tmp_path / "a.pt"), "s3://bucket/b.pt"]
    assert recipe.data.fit == str(tmp_path / "f.npz")
    assert recipe.data.test == "m.n:f"
    assert recipe.data.select == str(tmp_path / "here" / "s.npz")
    assert recipe.learn.lr == 1e-3
    assert recipe.learn.clip is None


def test_keys_a_file_and_a_recipe_give_the_same_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**MINIMAL, "data": {"fit": "f.npz"}}))
    recipe = as_recipe("r.yaml")
    assert recipe.data.fit == str(tmp_path / "f.npz")
    assert as_recipe({**MINIMAL, "data": {"fit": "f.npz"}}) == recipe
    assert as_recipe(recipe) is recipe


def test_several_test_sets_are_named_sources(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({**MINIMAL, "data": {"fit": "f.npz", "test": {"a": "a.npz", "b": "m:f"}}})
    )
    recipe = load_recipe(tmp_path / "r.yaml", [f"data.test.c={tmp_path}/c.npz"])
    tests = {"test_a": f"{tmp_path}/a.npz", "test_b": "m:f", "test_c": f"{tmp_path}/c.npz"}
    assert recipe.data.sources() == {"fit": f"{tmp_path}/f.npz", **tests}
    assert load_recipe(tmp_path / "r.yaml", ["data.test=/d.npz"]).data.sources()["test"] == "/d.npz"


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=str(tmp_path / "r.yaml")):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_an_override_replaces_a_mapping_that_is_not_a_section(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "model: a:b\ndata: {fit: x.npz, test: {v1: s3://a/1, v2: s3://a/2}}\nsearch: {learn: {lr: {uniform: [0, 1]}}}"
    )
    recipe = load_recipe(file, ["data.test={v3: s3://a/3}", "finetune.lr={uniform: [0, 1]}", "search.learn.lr={grid: [1]}"])
    assert recipe.data.test == {"v3": "s3://a/3"}
    assert recipe.data.fit == str(tmp_path / "x.npz")
    assert recipe.finetune.lr == {"uniform": [0, 1]}
    assert recipe.search.space == {"learn.lr": {"grid": [1]}}
    file.with_name("again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(file.with_name("again.yaml")) == recipe
    more = load_recipe(
        file, ["data.test={v3: s3://a/3}", "data.test.v4=s3://a/4", "finetune={lr: {uniform: [0, 1]}, trials: 3}"]
    )
    assert more.data.test == {"v3": "s3://a/3", "v4": "s3://a/4"}
    assert (more.finetune.lr, more.finetune.trials) == ({"uniform": [0, 1]}, 3)
    recipe = load_recipe(file, ["data.test.v3=s3://a/3", "learn={epochs: 2}", "learn.lr=0.5"])
    assert recipe.data.test == {"v1": "s3://a/1", "v2": "s3://a/2", "v3": "s3://a/3"}
    assert (recipe.learn.epochs, recipe.learn.lr) == (2, 0.5)


@pytest.mark.parametrize(
    "path",
    [
        "/data/run #2/*.pt",
        "/data/a: b/*.pt",
        "*.pt",
        "&x",
        "!x",
        "%x",
        "@x",
        "`x`",
        "- a",
        "? a",
        "[ab]*.pt",
        "{a,b}.pt",
        "# a",
    ],
)
def test_an_unquoted_path_in_an_override_is_taken_as_it_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    whole = path if path.startswith("/") else f"/usr/{path}"
    for override in (f"ingredients={path}", f"ingredients= {path} ", f"ingredients='{path}'"):
        assert parse_overrides([override]) == {"ingredients": whole}
    assert parse_overrides([f"ingredients=['{path}', b]", f"data.test={{a: '{path}'}}", f"data.test.b={path}"]) == {
        "ingredients": [whole, "/usr/b"],
        "data": {"test": {"a": whole, "b": whole}},
    }


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="key=value"):
        parse_overrides(["learn.lr"])


def test_another_method_keeps_only_the_settings_that_are_not_tuned_to_the_first(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({**MINIMAL, "blocks": "layer", "learn": {"lr": 0.5, "epochs": 3, "seed": 9}, "greedy": {"keep": ">"}})
    )
    own = load_recipe(tmp_path / "r.yaml")
    assert (own.method, own.blocks, own.learn.lr, own.learn.batch_size) == ("mehl+", "layer", 0.5, 128)
    same_kind = load_recipe(tmp_path / "r.yaml", (), "mehl")
    assert (same_kind.blocks, same_kind.learn.lr, same_kind.learn.epochs) == ("model", 0.5, 3)
    other = load_recipe(tmp_path / "r.yaml", ("learn.clip=1",), "learned+")
    assert (other.blocks, other.learn.lr, other.learn.batch_size, other.learn.cosine_lr) == ("tensor", 0.05, 256, False)
    assert (other.learn.epochs, other.learn.seed, other.learn.clip, other.greedy.keep) == (3, 9, 1, ">")
    said = load_recipe(tmp_path / "r.yaml", ("learn.lr=0.1",), "learned")
    assert said.learn.lr == 0.1
    for method in ("learned", "mehl+", "uniform"):
        assert load_recipe(tmp_path / "r.yaml", (), method) == for_method(own, method)
        assert with_changes(own, {"method": method}) == for_method(own, method)


def test_changes_take_dotted_keys_and_sections() -> None:
    recipe = make_recipe({**MINIMAL, "learn": {"epochs": 3}})
    changed = with_changes(recipe, {"learn.lr": 0.5, "learn": {"seed": 2}, "blocks": "layer"})
    assert (changed.learn.lr, changed.learn.seed, changed.learn.epochs, changed.blocks) == (0.5, 2, 3, "layer")
    assert recipe.learn.lr == "auto"
    with pytest.raises(RecipeError, match=r"did you mean 'learn\.lr'\?"):
        with_changes(recipe, {"learn.lrr": 0.5})

from pathlib import Path

import pytest
import yaml

from ray_soup.errors import RecipeError
from ray_soup.recipe import dump_recipe, for_method, load_recipe, make_recipe, parse_overrides

MINIMAL = {"model": "a:b", "ingredients": "zoo"}


def test_dump_then_load_is_the_identity(tmp_path: Path) -> None:
    recipe = make_recipe({**MINIMAL, "ingredients": str(tmp_path), "learn": {"lr": 0.5}, "blocks": 1000})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ingredient": "x"}, "did you mean 'ingredients'?"),
        ({"learn": {"learnrate": 1, "epoch": 2}}, "did you mean 'learn.epochs'?"),
        ({"learn": {"lr": -1}}, "learn.lr: -1 found"),
        ({"learn": {"model_batch": "all"}}, "learn.model_batch: 'all' found"),
        ({"data": {"select": 1.5}}, "give a share between 0 and 1"),
        ({"method": "mehl++"}, "method: 'mehl++' found"),
        ({"data": {"test": {"a b": "x.npz"}}}, "data.test: ['a b'] found"),
        ({"blocks": "row"}, "blocks: 'row' found"),
    ],
)
def test_faults_name_the_key(values: dict, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_recipe({**MINIMAL, **values})
    assert said in str(error.value)


def test_the_model_is_required() -> None:
    with pytest.raises(RecipeError, match="model: missing"):
        make_recipe({"ingredients": "x"})


def test_methods_have_their_own_blocks_and_the_recipe_overrides_them() -> None:
    assert make_recipe({**MINIMAL, "method": "mehl"}).blocks == "model"
    assert make_recipe({**MINIMAL, "method": "mehl+"}).blocks == "tensor"
    assert make_recipe({**MINIMAL, "method": "mehl+", "blocks": "layer"}).blocks == "layer"


def test_paths_are_seen_from_the_recipe_and_overrides_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_several_test_sets_are_sources_with_names(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump({**MINIMAL, "data": {"fit": "f.npz", "test": {"a": "a.npz", "b": "m:f"}}})
    )
    recipe = load_recipe(tmp_path / "r.yaml", [f"data.test.c={tmp_path}/c.npz"])
    tests = {"test_a": f"{tmp_path}/a.npz", "test_b": "m:f", "test_c": f"{tmp_path}/c.npz"}
    assert recipe.data.sources() == {"fit": f"{tmp_path}/f.npz", **tests}
    assert load_recipe(tmp_path / "r.yaml", ["data.test=/d.npz"]).data.sources()["test"] == "/d.npz"


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=str(tmp_path / "r.yaml")):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_an_override_takes_the_place_of_a_mapping_that_is_no_section(tmp_path: Path) -> None:
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


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="key=value"):
        parse_overrides(["learn.lr"])


def test_another_method_keeps_what_is_not_tuned_to_the_first(tmp_path: Path) -> None:
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

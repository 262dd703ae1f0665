"""The list of recipe keys, and the JSON Schema by which editors check recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel

from ray_soup.cli import main
from ray_soup.recipe import METHODS, Recipe, load_recipe, make_recipe
from ray_soup.recipe.explain import section_in
from ray_soup.recipe.keys import json_schema, keys
from tests.conftest import ROOT

VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def below(section: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for key, info in section.model_fields.items():
        inner = section_in(info.annotation)
        found += [prefix + key, *(below(inner, f"{prefix}{key}.") if inner else [])]
    return found


def test_every_key_is_listed_with_a_meaning() -> None:
    listed = keys()
    assert [key.name for key in listed] == below(Recipe)
    assert all(key.type and key.meaning and "\n" not in key.meaning + key.type for key in listed)


@pytest.mark.parametrize("key", [key for key in keys() if key.example], ids=lambda key: key.name)
def test_an_example_loads_and_differs_from_the_default(key: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(key.example if key.name == "model" else f"model: a:b\n{key.example}")
    recipe: Any = load_recipe(tmp_path / "r.yaml")
    plain: Any = make_recipe({"model": "a:b", **({"polish": {}} if key.name.startswith("polish.") else {})})
    for part in key.name.split("."):
        recipe, plain = getattr(recipe, part), getattr(plain, part, None)
    assert recipe is not None
    assert recipe != plain
    VALIDATOR.validate(yaml.safe_load((tmp_path / "r.yaml").read_text()))


@pytest.mark.parametrize("method", METHODS)
def test_the_default_of_each_method_is_the_one_that_is_listed(method: str) -> None:
    recipe = make_recipe({"model": "a:b", "method": method}).model_dump()
    for key in keys():
        first, *others = key.default.split("; ")
        own = next(
            (text.partition(" with ")[0] for text in others if method in text.partition(" with ")[2].split(" and ")), first
        )
        value: Any = recipe
        for part in key.name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        below_null = key.name.startswith(("polish.", "preprocess."))
        if own not in ("", "required") and not below_null and key.name != "method":
            assert yaml.safe_load(own) == value or float(own) == value, key


@pytest.mark.parametrize("file", [*ROOT.glob("jobs/*.yaml")], ids=lambda file: file.name)
def test_the_recipes_of_the_project_are_valid_by_the_schema(file: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "learn:\ndata: {fit: 2024, test: {a: x.npz, b: 7}}\ningredients: [1, b.pt]",
        "shard_size: 5GB\nblocks: {tensor: 4}\npolish:\nlearn: {epochs: 5.0, lr: auto}",
        "search: {learn.lr: {loguniform: [0.01, 1]}, learn: {epochs: {choice: [1, 2]}}, blocks: {choice: [layer, model]}}",
        "search: {space: {learn.lr: 0.1, method: {choice: [mehl, mehl+]}}}\nfinetune: {lr: 0.1, wd: {choice: [1]}, trunk: }",
        "preprocess: {size: [64, 32], mean: 0.5, std: [1, 1, 1]}",
    ],
)
def test_a_recipe_that_loads_is_valid_by_the_schema(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"model: a:b\n{text}")
    load_recipe(tmp_path / "r.yaml")
    VALIDATOR.validate(yaml.safe_load((tmp_path / "r.yaml").read_text()))


@pytest.mark.parametrize("section", ["", *(key.name for key in keys() if "keys below it" in key.type)])
def test_an_unknown_key_anywhere_is_not_valid_by_the_schema(section: str) -> None:
    values: dict[str, Any] = {"nokey": 1}
    for part in reversed(section.split(".") if section else []):
        values = {part: values}
    assert not VALIDATOR.is_valid({"model": "a:b", **values})
    VALIDATOR.validate({"model": "a:b"})


def test_the_command_prints_all_keys_one_key_a_section_and_the_schema() -> None:
    run = CliRunner().invoke
    listed = run(main, ["keys"]).output
    assert all(f"\n{key.name}\n" in f"\n{listed}" for key in keys())
    one = run(main, ["keys", "learn.lr"]).output
    assert one.splitlines()[:4] == [
        "learn.lr",
        "  expects  a number above 0 or auto",
        "  default  auto; 0.05 with learned and learned+",
        "  example  learn: {lr: 0.02}",
    ]
    assert [line for line in run(main, ["keys", "greedy"]).output.splitlines() if not line.startswith("  ")] == [
        "greedy", "", "greedy.keep",
    ]  # fmt: skip
    assert json.loads(run(main, ["keys", "--schema"]).output) == json_schema()
    found = json.loads(run(main, ["keys", "seed", "--json"]).stdout)
    assert found["exit"] == 2
    assert "seed: unknown key; did you mean 'learn.seed' or 'finetune.seed'?" in found["error"]

"""The demo's folder: written once, never over what a user changed or put there."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_soup.errors import RecipeError
from ray_soup.tune import demo


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace everything slow, and collect the recipes that the demo uses."""
    recipes: list[object] = []

    class Connected:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(demo, "connect", Connected)
    monkeypatch.setattr(demo, "finetune", lambda recipe, out, progress, overwrite: recipes.append(recipe))
    monkeypatch.setattr(demo, "compare", lambda recipe, out, progress, overwrite: recipes.append(recipe))
    monkeypatch.setattr(demo, "write_digits", lambda folder: folder.mkdir(exist_ok=True))
    return recipes


def test_an_edited_recipe_is_kept_and_used(tmp_path: Path, made: list[object]) -> None:
    out = tmp_path / "demo"
    demo.demo(out)
    file = out / "recipe.yaml"
    before = file.read_text()
    demo.demo(out)
    assert file.read_text() == before
    assert made == [made[0]] * 4  # a second run does the same
    edited = {**yaml.safe_load(before), "blocks": "layer"}
    text = "# mine\n" + yaml.safe_dump(edited)
    file.write_text(text)
    demo.demo(out)
    assert file.read_text() == text
    assert made[-1].blocks == "layer"


@pytest.mark.parametrize("name", ["notes.txt", "data", ".git", "zoo"])
def test_a_foreign_folder_is_left_as_it_is(name: str, tmp_path: Path, made: list[object]) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RecipeError, match=r"not the folder of a demo\. Choose a new folder"):
        demo.demo(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert made == []


def test_a_recipe_that_is_not_the_demos_is_neither_used_nor_overwritten(tmp_path: Path, made: list[object]) -> None:
    (tmp_path / "model").mkdir()
    text = yaml.safe_dump({"model": "a.b:c", "ingredients": "zoo/*.pt", "data": {"fit": "heldout.npz"}})
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not the demo's recipe: its ingredients are .*zoo/\*\.pt"):
        demo.demo(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == text
    assert {f.name for f in tmp_path.iterdir()} == {"model", "recipe.yaml"}
    assert made == []


def test_a_file_a_damaged_recipe_and_a_uri_are_refused(tmp_path: Path, made: list[object]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RecipeError, match="not the folder of a demo"):
        demo.demo(file)
    with pytest.raises(RecipeError, match="cannot be created"):
        demo.demo(file / "below")
    with pytest.raises(RecipeError, match="a local folder; found a URI"):
        demo.demo("s3://bucket/demo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("ingredients: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        demo.demo(tmp_path / "out")
    assert made == []

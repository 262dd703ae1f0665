"""The demo's folder: written once, never over what a user changed or put there. And the demo's model."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.tune import demo
from tests.benchmarks.greedy import larger_vit
from tests.conftest import ROOT


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace everything slow, and collect the recipes that the demo uses."""
    recipes: list[Any] = []

    class Connected:
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    def collect(recipe: Any, out: str, progress: Any, overwrite: bool) -> None:
        recipes.append(recipe)

    monkeypatch.setattr("ray_soup.actors.ray_session.connect", Connected)
    monkeypatch.setattr("ray_soup.tune.finetune.finetune", collect)
    monkeypatch.setattr("ray_soup.soups.compare.compare", collect)
    monkeypatch.setattr(demo, "write_digits", lambda folder: folder.mkdir(exist_ok=True))
    return recipes


def test_an_edited_recipe_is_kept_and_used(tmp_path: Path, made: list[Any]) -> None:
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
def test_a_foreign_folder_is_left_as_it_is(name: str, tmp_path: Path, made: list[Any]) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(RecipeError, match=r"not the folder of a demo\. Choose a new folder"):
        demo.demo(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [name]
    assert made == []


def test_a_recipe_that_is_not_the_demos_is_neither_used_nor_overwritten(tmp_path: Path, made: list[Any]) -> None:
    (tmp_path / "model").mkdir()
    text = yaml.safe_dump({"model": "a.b:c", "ingredients": "zoo/*.pt", "data": {"fit": "heldout.npz"}})
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not the demo's recipe: its ingredients are .*zoo/\*\.pt"):
        demo.demo(tmp_path)
    assert (tmp_path / "recipe.yaml").read_text() == text
    assert {f.name for f in tmp_path.iterdir()} == {"model", "recipe.yaml"}
    assert made == []


def test_a_demo_in_a_bucket_is_written_once(s3: str, made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "write_digits", lambda folder: (folder / "test.npz").write_bytes(b"digits"))
    demo.demo(f"{s3}/demo")
    demo.demo(f"{s3}/demo/")
    assert made == [made[0]] * 4
    assert (made[0].ingredients, made[0].data.fit) == (f"{s3}/demo/zoo/*.safetensors", f"{s3}/demo/data/heldout.npz")
    assert list(storage.walk(f"{s3}/demo")) == ["data/test.npz", "recipe.yaml"]
    storage.write_bytes(b"x", f"{s3}/other/file")
    with pytest.raises(RecipeError, match=f"{s3}/other is not empty, and it is not the folder of a demo"):
        demo.demo(f"{s3}/other")


def test_a_file_and_a_damaged_recipe_are_refused(tmp_path: Path, made: list[Any]) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RecipeError, match="not the folder of a demo"):
        demo.demo(file)
    with pytest.raises(RecipeError, match="cannot be created"):
        demo.demo(file / "below")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("ingredients: [")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        demo.demo(tmp_path / "out")
    assert made == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("build", "sizes"), [(demo.digits_vit, (64, 4, 2)), (larger_vit, (192, 6, 6))])
def test_the_model_is_that_of_open_clip_bit_for_bit(
    build: Callable[[], torch.nn.Module], sizes: tuple[int, int, int], precision: str, training: bool
) -> None:
    from open_clip.transformer import Transformer, VisionTransformer

    if "batch_first" not in inspect.signature(Transformer).parameters:
        pytest.skip("older ones sum gradients over examples in another order")
    torch.manual_seed(3)
    ours = build().train(training)
    torch.manual_seed(3)
    theirs = VisionTransformer(28, 7, *sizes, 4, output_dim=10, pool_type="avg").train(training)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    images = torch.randint(0, 256, (9, 28, 28), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        found = ours(images), theirs((images.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1))
    for logits in found:
        logits.float().square().sum().backward()
    assert torch.equal(*found)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), name
    with torch.inference_mode():
        assert torch.equal(ours(images), theirs((images.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)))


@pytest.mark.slow
def test_actors_import_nothing_slow_for_the_model_and_its_gradient() -> None:
    """Ray Tune and libraries of models; and sympy, with which autograd would check the shapes of given gradients."""
    code = """
import sys
import torch
from ray_soup.task.attention import FastAttention
from ray_soup.tune.demo import digits_vit
with FastAttention(), torch.autocast("cpu", torch.bfloat16):
    logits = digits_vit()(torch.zeros(2, 28, 28, dtype=torch.uint8))
logits.float().sum().backward()
slow = {"ray", "open_clip", "timm", "torchvision", "transformers", "pandas", "sympy"}
print(*slow.intersection(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []

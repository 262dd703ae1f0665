"""The recipe that `ray-soup init` writes: the model that it recognizes, the data that it finds, and what is left open."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.io.find import open_ingredients
from ray_soup.recipe import Recipe, load_recipe
from ray_soup.soups.doctor import diagnose
from ray_soup.soups.first_recipe import FirstRecipe, first_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.recognize import recognize
from tests.tiny import SPEC, build, write_data
from tests.unit.task import library_models as models


def save(folder: Path, made: Any, count: int = 2, **more: Any) -> Path:
    """Write `count` checkpoints of a model as a training script of PyTorch does."""
    folder.mkdir(parents=True)
    for number in range(count):
        torch.save({"state_dict": made.state_dict(), **more}, folder / f"run_{number}.pth.tar")
    return folder


def images(folder: Path, *splits: str) -> Path:
    for number, split in enumerate(splits):
        for label in ("bird", "cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for n in range(2):
                pixels = np.random.default_rng(100 * number + n + 10 * len(label)).integers(0, 255, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{n}.png")
    return folder


def written(made: FirstRecipe, folder: Path) -> Recipe:
    (folder / "recipe.yaml").write_text(made.text)
    return load_recipe(folder / "recipe.yaml")


def test_a_model_named_by_timms_arguments_has_their_preprocessing_and_the_recipe_runs(tmp_path: Path) -> None:
    import timm

    args = argparse.Namespace(model="test_vit", img_size=64, mean=[0.4, 0.4, 0.4], std=[0.2, 0.2, 0.2], crop_pct=1.0)
    zoo = save(tmp_path / "zoo", timm.create_model("test_vit", img_size=64, num_classes=3), args=args)
    data = images(tmp_path / "data", "train", "val", "test")
    made = first_recipe([str(zoo)], str(data), None, str(tmp_path / "recipe.yaml"))
    recipe = written(made, tmp_path)
    assert made.gaps == []
    assert recipe.model == "timm:test_vit?classes=3&img_size=64&mean=0.4,0.4,0.4&std=0.2,0.2,0.2&crop_pct=1"
    assert recipe.ingredients == str(zoo)
    assert recipe.data.model_dump() == {
        "train": f"{data}/train", "fit": f"{data}/val", "select": 0.2, "test": f"{data}/test"
    }  # fmt: skip
    assert len(open_inputs(recipe).ingredients) == 2
    assert f"{zoo}/run_0.pth.tar: its args names test_vit" in made.text.replace("\n# ", " ")


@pytest.mark.slow
def test_bare_tensors_are_those_of_a_model_of_a_library(tmp_path: Path) -> None:
    import timm
    import torchvision

    for name, made, expected in (
        ("timm", timm.create_model("test_efficientnet", num_classes=4), "timm:test_efficientnet?classes=4"),
        ("torchvision", torchvision.models.resnet18(num_classes=5), "torchvision:resnet18?classes=5"),
    ):
        found = recognize(open_ingredients(str(save(tmp_path / name, made))))
        assert (found.model, found.missing) == (expected, "")
        assert "timm:resnet18?classes=5" in found.why or name != "torchvision"


def test_the_size_of_images_follows_from_the_position_embedding(tmp_path: Path) -> None:
    import timm

    zoo = save(tmp_path / "test_vit", timm.create_model("test_vit", num_classes=4, img_size=96))
    made = first_recipe([str(zoo)], None, None, str(tmp_path / "recipe.yaml"))
    assert written(made, tmp_path).model == "timm:test_vit?classes=4&img_size=96"
    assert any("do not say mean, std, crop_pct" in note for note in made.notes)
    assert made.gaps == ["data.fit: no held-out data was named. Name a file or folder that no checkpoint was trained on."]


def test_lightnings_hyperparameters_and_a_tune_trial_name_the_model(tmp_path: Path) -> None:
    import torchvision

    state = torchvision.models.mobilenet_v3_small(num_classes=3).state_dict()
    for run in range(2):
        folder = tmp_path / "runs" / f"version_{run}" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(models.lightning(state), folder / "epoch=3-step=12.ckpt")
        (folder.parent / "hparams.yaml").write_text("lr: 0.1\nbackbone: mobilenet_v3_small\n")
    found = recognize(open_ingredients(str(tmp_path / "runs")))
    assert found.model == "torchvision:mobilenet_v3_small?classes=3"
    assert "hparams.yaml names mobilenet_v3_small" in found.why
    sweep = tmp_path / "sweep"
    for trial in ("a", "b"):
        folder = sweep / trial / "checkpoint_000000"
        folder.mkdir(parents=True)
        torch.save(state, folder / "model.pt")
        (sweep / trial / "result.json").write_text(json.dumps({"acc": 0.5, "checkpoint_dir_name": "checkpoint_000000"}))
    static = [{"trial_id": t, "status": "TERMINATED", "relative_logdir": t, "config": {"arch": "mobilenet_v3_small"}}
              for t in ("a", "b")]  # fmt: skip
    (sweep / "experiment_state-1.json").write_text(json.dumps({"trial_data": [[one, {}] for one in static]}))
    assert recognize(open_ingredients(str(sweep))).why.startswith(f"{sweep}/a/checkpoint_000000/model.pt: its trial names")


def test_a_config_of_transformers_and_the_base_of_adapters_are_the_model(tmp_path: Path) -> None:
    for run in range(2):
        models.vit().save_pretrained(tmp_path / "vit" / str(run))
    made = first_recipe([str(tmp_path / "vit")], None, None, str(tmp_path / "recipe.yaml"))
    assert "model: transformers:vit/0\n" in made.text
    for run in range(2):
        folder = tmp_path / "lora" / str(run)
        folder.mkdir(parents=True)
        config = {
            "peft_type": "LORA",
            "r": 1,
            "lora_alpha": 1,
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": "org/base",
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        names = {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
        save_file({f"base_model.model.q.lora_{n}.weight": t for n, t in names.items()}, folder / "adapter_model.safetensors")
    assert recognize(open_ingredients(str(tmp_path / "lora"))).model == "transformers:hf://org/base?task=classification"


def test_a_whole_clip_needs_the_names_of_its_classes(tmp_path: Path) -> None:
    models.add_tiny_clip(tmp_path)
    zoo = save(tmp_path / "zoo", models.clip())
    found = recognize(open_ingredients(str(zoo)))
    assert found.model == "open_clip:tiny-clip?zeroshot=classes.txt"
    assert found.missing == "Write the names of the classes, one in a line, into classes.txt."


def test_what_cannot_be_filled_is_named_in_a_comment_and_on_stderr_and_nothing_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "zoo", build())
    write_data(tmp_path)
    run = CliRunner().invoke
    files = sorted(map(str, Path("zoo").iterdir()))
    found = run(main, ["init", *files, "--data", "."])
    assert found.exit_code == 0
    text = Path("recipe.yaml").read_text()
    assert "ingredients: zoo/*.tar\n" in text
    assert "model: my_package.my_module:build\n" in text
    assert "  fit: heldout.npz  #" in text
    assert "  test: test.npz  #" in text
    assert "# FILL IN: no model of torchvision, timm, open_clip has these 19 tensors" in text
    line = 1 + text.splitlines().index("model: my_package.my_module:build")
    assert f"ray-soup: recipe.yaml, line {line}: model: no model of" in found.stderr
    assert found.stdout.splitlines()[0] == "Wrote recipe.yaml. Edit it where the lines above say so; then:"
    again = run(main, ["init", "zoo", "--data", "."])
    assert again.exit_code == 2
    assert "recipe.yaml already exists. Name another file with --out, or add --overwrite" in again.stderr
    assert Path("recipe.yaml").read_text() == text
    monkeypatch.syspath_prepend(Path(__file__).parents[3])
    named = run(main, ["init", "zoo", "--data", ".", "--model", SPEC, "--overwrite", "--json"])
    assert json.loads(named.stdout) == {"recipe": "recipe.yaml", "gaps": [], "notes": []}
    checked = run(main, ["doctor", "recipe.yaml"])
    assert checked.exit_code == 0
    assert checked.stdout.splitlines()[-2:] == [
        "recipe          2 ingredients of 0.0 M parameters fit tests.tiny:build", "Nothing is missing for recipe.yaml."
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="--data: nowhere does not exist"):
        first_recipe(["zoo"], "nowhere", None, "recipe.yaml")


def test_the_doctor_names_credentials_only_and_what_a_recipe_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-test")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "AWS_ACCESS_KEY_ID" in diagnose(None).rows["credentials"]
    assert "key-of-the-test" not in str(diagnose(None))
    values = {"model": "timm:test_vit?classes=3", "ingredients": "gs://bucket/zoo", "data": {"fit": "f.npz"}}
    monkeypatch.setattr("ray_soup.soups.doctor._version", lambda name: "" if name in ("timm", "optuna") else "1")
    found = diagnose(Recipe(**values, search={"algorithm": "optuna"}, actors={"gpus": 1}))
    assert found.missing[:2] == [
        "model: timm:test_vit?classes=3 needs timm: pip install 'ray_soup[timm]'",
        "search.algorithm: optuna needs optuna: pip install 'ray_soup[optuna]'",
    ]
    assert "none of GOOGLE_APPLICATION_CREDENTIALS is set" in found.warnings[-1]
    assert torch.cuda.is_available() or found.missing[2].startswith("actors.gpus is 1, and torch finds no GPU here.")
    run = CliRunner().invoke
    (tmp_path / "r.yaml").write_text(f"model: {SPEC}\ningredients: nothing/*.pt\ndata: {{fit: none.npz}}\n")
    lacking = run(main, ["doctor", str(tmp_path / "r.yaml")])
    assert lacking.exit_code == 2
    assert f"missing: data.fit: {tmp_path}/none.npz: does not exist" in lacking.stderr

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import check_apart, find_checkpoints, open_ingredients


def test_folders_globs_and_lists_are_in_natural_order(tmp_path: Path) -> None:
    for k in (10, 9, 1):
        save_file({"a": torch.zeros(1)}, tmp_path / f"m_{k}.safetensors")
    (tmp_path / "notes.txt").touch()
    expected = [str(tmp_path / f"m_{k}.safetensors") for k in (1, 9, 10)]
    assert find_checkpoints(str(tmp_path)) == expected
    assert find_checkpoints(str(tmp_path / "*")) == expected
    assert find_checkpoints([str(tmp_path / "m_9.safetensors"), str(tmp_path / "m_1*")]) == [
        expected[1],
        expected[0],
        expected[2],
    ]
    assert [i.name for i in open_ingredients(str(tmp_path))] == ["m_1", "m_9", "m_10"]


def test_names_differ_from_each_other_and_from_reserved_names(tmp_path: Path) -> None:
    for name in ("a/x", "b/x"):
        (tmp_path / name).parent.mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [i.name for i in open_ingredients(str(tmp_path / "*/*"))] == ["a/x.safetensors", "b/x.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "uniform.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    pattern = str(tmp_path / "*.safetensors")
    assert [i.name for i in open_ingredients(pattern, {"uniform"})] == ["uniform.safetensors", "y.safetensors"]
    assert [i.name for i in open_ingredients(pattern)] == ["uniform", "y"]


def test_the_same_file_twice_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    os.link(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(IngredientError, match="are the same file"):
        open_ingredients(str(tmp_path))
    with pytest.raises(IngredientError, match="are the same file"):
        open_ingredients([str(tmp_path / "a.safetensors")] * 2)


def test_without_ingredients_the_message_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="an empty folder"):
        find_checkpoints(str(tmp_path))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(RecipeError, match=r"found model\.onnx; expected files ending in"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(RecipeError, match="does not exist"):
        find_checkpoints(str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="names no ingredients"):
        open_ingredients(None)


def test_what_finetune_recorded_becomes_the_trial_of_an_ingredient(tmp_path: Path) -> None:
    for k in range(2):
        save_file({"a": torch.zeros(1)}, tmp_path / f"m_{k}.safetensors")
    entry = {"file": "m_1.safetensors", "sha256": "0" * 64, "accuracy": 0.5, "train_loss": 1.5, "lr": 0.1}
    (tmp_path / "manifest.json").write_text(json.dumps([entry]))
    first, second = open_ingredients(str(tmp_path))
    assert first.trial is None
    assert second.trial is not None
    assert (second.trial.name, second.trial.path) == ("m_1", second.path)
    assert (second.trial.config, second.trial.metrics) == ({"lr": 0.1}, {"accuracy": 0.5, "train_loss": 1.5})


@pytest.mark.parametrize("manifest", ["{", "[1]", '[{"file": "m_0.safetensors"}]', '{"a": 1}'])
def test_a_manifest_of_another_program_is_ignored(tmp_path: Path, manifest: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m_0.safetensors")
    (tmp_path / "manifest.json").write_text(manifest)
    assert open_ingredients(str(tmp_path))[0].trial is None


def test_an_output_folder_among_the_ingredients_is_refused(tmp_path: Path) -> None:
    for spec, out in (("", "out"), ("*", "out"), ("*/model.safetensors", "out"), ("**", "a/out")):
        for given in (str(tmp_path / spec), [str(tmp_path / spec)]):
            with pytest.raises(RecipeError, match=r"is where the recipe looks for ingredients .*Choose another folder"):
                check_apart(given, str(tmp_path / out))
    check_apart(str(tmp_path / "*.safetensors"), str(tmp_path / "out"))
    check_apart(str(tmp_path), str(tmp_path / "a" / "out"))
    check_apart(None, str(tmp_path))


@pytest.mark.parametrize("uri", ["s3://AKIA1:topsecret@bucket/zoo", "s3://bucket/zoo?secret_key=topsecret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(RecipeError, match="a URI must not contain credentials or options") as error:
        open_ingredients(uri)
    assert "topsecret" not in str(error.value)
    assert "bucket/zoo" in str(error.value)

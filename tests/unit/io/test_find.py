from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import _unique_names, check_apart, find_checkpoints, open_ingredients


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


def test_a_link_to_itself_and_superscripts_are_no_errors(tmp_path: Path) -> None:
    expected = [str(tmp_path / "a" / name) for name in ("1.pt", "1².pt", "2.pt")]
    (tmp_path / "a").mkdir()
    for path in expected:
        torch.save({"a": torch.zeros(1)}, path)
    (tmp_path / "loop").symlink_to("loop")
    assert sorted(find_checkpoints(str(tmp_path / "**" / "*.pt"))) == sorted(expected)


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


def test_a_folder_with_a_reserved_name_is_called_by_its_path(tmp_path: Path) -> None:
    for name in ("uniform", "y"):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / name / "model.safetensors")
    assert [i.name for i in open_ingredients(str(tmp_path / "*"), {"uniform"})] == [f"{tmp_path}/uniform", f"{tmp_path}/y"]


def test_a_local_file_and_one_in_a_storage_have_no_common_folder(tmp_path: Path) -> None:
    assert _unique_names(["s3://bucket/a.pt", "/zoo/a.pt"], ()) == ["s3://bucket/a.pt", "/zoo/a.pt"]


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


@pytest.mark.parametrize(
    ("spec", "link", "to", "out"),
    [
        ("zoo", "out", "zoo/soup", "out"),  # OUT is a link into the folder
        ("zoo", "out", "zoo/soup", "out/"),
        ("zoo", "here", ".", "here/zoo/soup"),
        ("here/zoo", "here", ".", "zoo/soup"),
        ("here/zoo", "here", ".", "zoo"),
        ("zoo", "zoo/soup", "../elsewhere", "elsewhere"),  # a link in the folder leads to OUT, which does not exist yet
        ("zoo/*", "zoo/soup", "../elsewhere", "elsewhere"),
        ("zoo/*/model.safetensors", "zoo/all", "../elsewhere", "elsewhere"),
        ("zoo/*/*/model.safetensors", "zoo/all", "../elsewhere", "elsewhere/soup"),
        ("zoo/**/model.safetensors", "zoo/all", "../elsewhere", "elsewhere/deep/soup"),
        ("here/*/model.safetensors", "here", "elsewhere", "elsewhere/soup"),
        ("here/model.safetensors", "here", "elsewhere", "elsewhere"),
        ("zoo/../zoo", "here", "zoo", "here/soup"),
        ("zoo", "here", "zoo", "elsewhere/../here"),
    ],
)
def test_an_output_folder_among_the_ingredients_by_way_of_a_link_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, link: str, to: str, out: str
) -> None:
    for folder in ("zoo", "elsewhere"):
        (tmp_path / folder).mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "zoo" / "a.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere" / "model.safetensors")
    (tmp_path / link).symlink_to(to)
    for given in (str(tmp_path / spec), [str(tmp_path / spec)]):
        with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
            check_apart(given, str(tmp_path / out))
        check_apart(given, str(tmp_path / "apart" / "soup"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
        check_apart(spec, out)


def test_a_soup_may_stand_beside_its_ingredients(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "zoo" / "a.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "zoo")
    for spec in ("zoo", "link", "zoo/*", "zoo/*.safetensors", "zoo/a.safetensors", "zoo/[a-c].safetensors"):
        for out in ("out", ".", "zoo/deep/out"):
            check_apart(str(tmp_path / spec), str(tmp_path / out))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x07", "a\x9bb", "a\udcffb"])
def test_names_that_no_report_can_contain_are_refused_and_shown_safely(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    os.rename(tmp_path / "x.safetensors", tmp_path / name / "x.safetensors")
    for spec in (str(tmp_path / name), f"{tmp_path}/*/x.safetensors"):
        with pytest.raises(IngredientError, match=r"Rename the file\.") as error:
            open_ingredients(spec)
        assert str(error.value).isprintable()
        assert str(error.value).isascii()


@pytest.mark.parametrize(
    "links", [{"zoo/a": ".", "zoo/b": "."}, {"zoo/deep/a": "../../zoo"}, {"zoo/a": "../x", "x/b": "../zoo"}]
)
def test_a_pattern_does_not_go_in_circles(tmp_path: Path, links: dict[str, str]) -> None:
    for folder in ("zoo/deep", "x"):
        (tmp_path / folder).mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, tmp_path / "zoo" / "deep" / "m.safetensors")
    for link, to in links.items():
        (tmp_path / link).symlink_to(to)
    with pytest.raises(IngredientError, match=r"is a link to .*, a folder that contains it"):
        open_ingredients(f"{tmp_path}/zoo/**/*.safetensors")
    with pytest.raises(IngredientError, match="a folder that contains it"):
        check_apart(f"{tmp_path}/z*/**", str(tmp_path / "out"))


def test_a_pattern_follows_links_to_other_folders(tmp_path: Path) -> None:
    for folder in ("zoo", "x"):
        (tmp_path / folder).mkdir()
        save_file({"a": torch.zeros(1)}, tmp_path / folder / "m.safetensors")
    (tmp_path / "zoo" / "more").symlink_to("../x")
    assert [i.name for i in open_ingredients(f"{tmp_path}/zoo/**/*.safetensors")] == ["m.safetensors", "more/m.safetensors"]


def test_two_models_may_share_a_shard_but_not_all(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face Hub, where equal files of two revisions are one file."""
    for folder, head in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        (tmp_path / folder).mkdir()
        save_file({"head": torch.full((1,), head)}, tmp_path / folder / "m-2.safetensors")
        index = {"weight_map": {"body": "m-1.safetensors", "head": "m-2.safetensors"}}
        (tmp_path / folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"body": torch.zeros(1)}, tmp_path / "a" / "m-1.safetensors")
    for folder in ("b", "c"):
        (tmp_path / folder / "m-1.safetensors").symlink_to("../a/m-1.safetensors")
    assert [i.read("head").item() for i in open_ingredients(str(tmp_path))] == [1.0, 2.0, 3.0]
    (tmp_path / "c" / "m-2.safetensors").unlink()
    (tmp_path / "c" / "m-2.safetensors").symlink_to("../b/m-2.safetensors")
    with pytest.raises(IngredientError, match="are the same file"):
        open_ingredients(str(tmp_path))


@pytest.mark.parametrize("uri", ["s3://AKIA1:topsecret@bucket/zoo", "s3://bucket/zoo?secret_key=topsecret"])
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(RecipeError, match="a URI must not contain credentials or options") as error:
        open_ingredients(uri)
    assert "topsecret" not in str(error.value)
    assert "bucket/zoo" in str(error.value)

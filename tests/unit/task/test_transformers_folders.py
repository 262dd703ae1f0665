"""Folders of transformers among the ingredients, whose config or preprocessing is not that of the recipe's folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.io import storage
from ray_soup.recipe import make_recipe
from ray_soup.task.companions import write_companions
from ray_soup.task.evidence import check_start
from ray_soup.task.models import build
from tests.unit.task.library_models import bert, tokenizer, vit
from tests.unit.task.test_evidence import ARRAYS, IMAGES, checked, used
from tests.unit.task.test_other_scripts import trained

Change = Mapping[str, Any]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders vit and bert, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("zoo")
    vit().save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    bert().save_pretrained(folder / "bert")
    tokenizer(folder / "bert").save_pretrained(folder / "bert")
    return folder


def changed(base: Path, folder: Path, changes: Mapping[str, Change]) -> str:
    """Copy a folder, with some values in its JSON files changed; a value of None removes a file."""
    shutil.copytree(base, folder)
    for name, values in changes.items():
        if values is None:
            (folder / name).unlink()
        else:
            path = folder / name
            path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))
    return str(folder)


def refused(model: Path | str, paths: Sequence[str], data: Mapping[str, str] = IMAGES) -> str:
    with pytest.raises(RecipeError) as caught:
        checked(f"transformers:{model}", paths, data)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_folders_that_act_like_that_of_the_recipe_pass(tmp_path: Path, zoo: Path, kind: str) -> None:
    """Among them are a soup's, and one that only another version would write in this way."""

    write_companions(f"transformers:{zoo / kind}", tmp_path, "bfloat16")
    shutil.copy(zoo / kind / "model.safetensors", tmp_path)
    same = changed(zoo / kind, tmp_path / "same", {
        "config.json": {"transformers_version": "4.1", "attention_probs_dropout_prob": 0.5, "initializer_range": 0.1},
        **({"preprocessor_config.json": {"crop_size": 8, "do_normalize": True}} if kind == "vit" else {}),
        **({"tokenizer_config.json": {"name_or_path": "elsewhere", "clean_up": 1}} if kind == "bert" else {}),
    })  # fmt: skip
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(zoo / kind / "model.safetensors", weights)
    assert checked(f"transformers:{zoo / kind}", [str(zoo / kind), str(tmp_path), same, str(weights)]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"image_mean": [0.4, 0.5, 0.6]},
            "image_mean [0.4, 0.5, 0.6]; {}, which the recipe's model uses, has [0.5, 0.5, 0.5].",
        ),
        ({"image_std": [0.25] * 3, "resample": 3}, "image_std [0.25, 0.25, 0.25]; {}, which the"),
        ({"resample": 3}, "resample 3; {}, which the recipe's model uses, has 2."),
        ({"size": {"height": 32, "width": 32}}, "size {{'height': 32, 'width': 32}}; {}, which the"),
        ({"size": {"height": 10**6, "width": 10**6}}, "size {{'height': 1000000, 'width': 1000000}}; {}, which the"),
        ({"do_resize": False}, "do_resize false; {}, which the recipe's model uses, has true."),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}}, "crop_size {{'height': 8, 'width': 8}}; "),
    ],
)
def test_an_image_processor_that_gives_other_pixels_is_refused(tmp_path: Path, zoo: Path, change: Change, said: str) -> None:
    path = changed(zoo / "vit", tmp_path / "a", {"preprocessor_config.json": change})
    if "crop_size" in change:
        path = changed(zoo / "vit", tmp_path / "b", {
            "preprocessor_config.json": {**change, "image_processor_type": "CLIPImageProcessor"}
        })  # fmt: skip
    found = refused(zoo / "vit", [path])
    assert f"{path}/preprocessor_config.json has {said.format(zoo / 'vit')}" in found
    assert f"set\n    model: transformers:{path}\n" in found
    assert checked(f"transformers:{path}", [path]) == []
    assert checked(f"transformers:{zoo / 'vit'}", [path], ARRAYS) == []


def test_settings_that_are_not_in_use_may_differ(tmp_path: Path, zoo: Path) -> None:
    off = changed(zoo / "vit", tmp_path / "a", {"preprocessor_config.json": {"do_normalize": False}})
    other = changed(
        zoo / "vit", tmp_path / "b", {"preprocessor_config.json": {"do_normalize": False, "image_mean": [1, 1, 1]}}
    )
    assert checked(f"transformers:{off}", [other]) == []
    image = Image.new("RGB", (20, 20))
    ours, theirs = (build(f"transformers:{folder}").preprocess for folder in (off, other))
    assert ours is not None
    assert theirs is not None
    assert (ours(image) == theirs(image)).all()


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (
            "tokenizer_config.json",
            {"do_lower_case": False},
            "do_lower_case false; {}, which the recipe's model uses, has true",
        ),
        ("tokenizer_config.json", {"cls_token": "[MASK]", "sep_token": "[MASK]"}, "cls_token '[MASK]'; {}, which the"),
    ],
)
def test_a_tokenizer_that_gives_other_tokens_is_refused(
    tmp_path: Path, zoo: Path, file: str, change: Change, said: str
) -> None:
    path = changed(zoo / "bert", tmp_path / "a", {file: change})
    found = refused(zoo / "bert", [str(zoo / "bert"), path])
    assert f"has {said.format(zoo / 'bert')}" in found
    assert (
        f"Other ingredients do not differ, such as those in {zoo / 'bert'}. One model and one preprocessing must be" in found
    )
    assert f"set\n    model: transformers:{path}\n" in refused(zoo / "bert", [path])
    assert checked(f"transformers:{path}", [path]) == []


def test_a_tokenizer_with_another_vocabulary_is_refused(tmp_path: Path, zoo: Path) -> None:
    path = changed(zoo / "bert", tmp_path / "a", {})
    for file in (tmp_path / "a").glob("[tv]o*"):  # tokenizer.json or vocab.txt
        file.write_text(file.read_text().replace("good", "well"))
    found = refused(zoo / "bert", [path])
    assert f" has in its vocabulary no 'good'; {zoo / 'bert'}, which the recipe's model uses, has 'good' as token 5" in found


def test_a_tokenizer_with_other_merges_is_refused(tmp_path: Path, zoo: Path) -> None:
    """Its vocabulary is the same, and so are the tokens of most texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folders = []
    words = {word: number for number, word in enumerate(["[PAD]", "q", "x", "z", "qx", "xz"])}
    for merges in ([("q", "x"), ("x", "z")], [("x", "z"), ("q", "x")]):
        backend = Tokenizer(models.BPE(vocab=words, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        folders.append(changed(zoo / "bert", tmp_path / "".join(merges[0]), {}))
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folders[-1])
    found = refused(folders[0], folders)
    assert "tokenizer.json has the merge " in found
    assert checked(f"transformers:{folders[0]}", folders[:1]) == []


def test_a_length_at_which_all_tokenizers_cut_is_used(tmp_path: Path, zoo: Path) -> None:
    path = changed(zoo / "bert", tmp_path / "a", {"tokenizer_config.json": {"model_max_length": 8}})
    (note,) = checked(f"transformers:{zoo / 'bert'}", [path])
    assert note.startswith(f"The tokenizer in {path} cuts texts at 8 tokens (model_max_length), which is used, because the ")
    line = used(f"transformers:{zoo / 'bert'}", [path])
    assert line == f"transformers:{zoo / 'bert'}?length=8"
    assert checked(line, [path]) == []
    found = refused(zoo / "bert", [path, str(zoo / "bert")])
    assert f"and that in {zoo / 'bert'} at 16; one length must be used for all." in found
    (note,) = checked(f"transformers:{zoo / 'bert'}?length=12", [path])
    assert note.endswith("cuts texts at 8 tokens (model_max_length); the recipe states 12, which is used.")


@pytest.mark.parametrize("data", [IMAGES, ARRAYS])
@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("vit", {"hidden_act": "relu"}, "hidden_act 'relu'; {}, which the recipe's model uses, has 'gelu'"),
        ("vit", {"num_attention_heads": 4}, "num_attention_heads 4; {}, which the recipe's model uses, has 2"),
        ("vit", {"num_attention_heads": 5}, "num_attention_heads 5; {}, which the recipe's model uses, has 2"),
        ("vit", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; {}, which the recipe's model uses, has 2"),
        ("bert", {"layer_norm_eps": 0.5, "hidden_dropout_prob": 0.5}, "layer_norm_eps 0.5; {}, which the recipe's"),
    ],
)
def test_a_config_of_the_same_shapes_that_computes_something_else_is_refused(
    tmp_path: Path, zoo: Path, data: Mapping[str, str], kind: str, change: Change, said: str
) -> None:
    path = changed(zoo / kind, tmp_path / "a", {"config.json": change})
    assert f"{path}/config.json has {said.format(zoo / kind)}" in refused(zoo / kind, [path], data)
    assert checked(f"transformers:{path}", [path], data) == []


def test_classes_that_are_numbered_otherwise_are_refused(tmp_path: Path, zoo: Path) -> None:
    paths = []
    for order in (["cat", "dog", "cow"], ["dog", "cat", "cow"], ["a", "b", "c"]):
        numbered = {"id2label": dict(enumerate(order)), "label2id": {name: number for number, name in enumerate(order)}}
        paths.append(changed(zoo / "vit", tmp_path / "".join(order), {"config.json": numbered}))
    found = refused(zoo / "vit", paths)
    assert (
        f"{paths[1]}/config.json numbers the classes dog, cat, cow; {paths[0]}/config.json numbers them cat, dog, cow"
        in found
    )
    assert checked(f"transformers:{zoo / 'vit'}", paths[1:]) == []
    assert "numbers the classes dog, cat, cow" in refused(paths[0], paths[1:2])


def test_fine_tuning_may_change_the_preprocessing_but_not_the_model(tmp_path: Path, zoo: Path) -> None:
    def started(path: str) -> None:
        data = {"train": "train.parquet", "fit": "a.npz"}
        check_start(make_recipe({"model": f"transformers:{zoo / 'vit'}", "data": data, "finetune": {"init": path}}))

    started(changed(zoo / "vit", tmp_path / "a", {"preprocessor_config.json": {"resample": 3}}))
    with pytest.raises(RecipeError, match="hidden_act 'relu'"):
        started(changed(zoo / "vit", tmp_path / "b", {"config.json": {"hidden_act": "relu"}}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10_000, '{"image_processor_type": 1}', '{"auto_map": 1}'])
def test_a_broken_file_is_told_and_not_compared(tmp_path: Path, zoo: Path, text: str) -> None:
    path = changed(zoo / "vit", tmp_path / "a", {})
    (tmp_path / "a" / "preprocessor_config.json").write_text(text)
    notes = checked(f"transformers:{zoo / 'vit'}", [path])
    assert notes == [
        f"{path}/preprocessor_config.json cannot be read by transformers and was not compared with {zoo / 'vit'}."
    ]


def test_a_file_that_is_none_is_left_alone(tmp_path: Path, zoo: Path) -> None:
    path = changed(zoo / "vit", tmp_path / "a", {"preprocessor_config.json": None})
    os.mkfifo(tmp_path / "a" / "preprocessor_config.json")
    assert checked(f"transformers:{zoo / 'vit'}", [path]) == []


def test_the_files_beside_ingredients_in_a_bucket_are_compared(s3: str, tmp_path: Path, zoo: Path) -> None:
    path = Path(changed(zoo / "vit", tmp_path / "a", {"preprocessor_config.json": {"resample": 3}}))
    for file in path.iterdir():
        storage.upload(file, f"{s3}/zoo/a/{file.name}")
    found = refused(zoo / "vit", [f"{s3}/zoo/a"])
    assert (
        f"{s3}/zoo/a/preprocessor_config.json has resample 3; {zoo / 'vit'}, which the recipe's model uses, has 2." in found
    )
    assert found.endswith(f"copy that file to {zoo / 'vit'}; otherwise, correct or remove it.")
    run = Path(trained(tmp_path, force_image_size=256)).parent.parent
    for name in ("checkpoints/epoch_2.pt", "params.txt"):
        storage.upload(run / name, f"{s3}/logs/run/{name}")
    (note,) = checked("open_clip:ViT-B-32?classes=3", [f"{s3}/logs/run/checkpoints/epoch_2.pt"])
    assert "image_size 256 (params.txt); the recipe states nothing" in note

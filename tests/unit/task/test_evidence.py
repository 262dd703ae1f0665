"""What files say about the training of a checkpoint, compared with what a recipe does."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.task import evidence_files
from ray_soup.task.evidence import check_evidence, check_start, takes_images
from ray_soup.task.inspection import inspect
from ray_soup.task.loading import load_model
from ray_soup.task.model_spec import ModelSpec
from ray_soup.task.models import build, describe, load_checkpoint
from ray_soup.task.preprocessing import completed, examine
from ray_soup.task.values import same_value

TIMM = {
    "model": "test_resnet", "num_classes": 3, "img_size": None, "input_size": None, "in_chans": None, "crop_pct": None,
    "mean": None, "std": None, "interpolation": "", "crop_mode": None, "gp": None, "bn_eps": None, "model_kwargs": {},
    "lr": 0.1, "drop": 0.1, "train_interpolation": "random", "reprob": 0.0,
}  # fmt: skip
"""The arguments of timm's train.py that say how images are preprocessed, at their default values."""
TORCHVISION = {"model": "resnet18", "val_resize_size": 256, "val_crop_size": 224, "interpolation": "bilinear", "lr": 0.1}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
IMAGES = {"fit": "somewhere.parquet"}
ARRAYS = {"fit": "somewhere.npz", "test": "module:function"}


def recipe_of(model: str, data: Mapping[str, str] = IMAGES) -> Recipe:
    return make_recipe({"model": model, "ingredients": "*", "data": dict(data)})


def write(path: Path, args: Any, **more: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": torch.zeros(2)}, "args": args, **more}, path)
    return str(path)


def checked(model: str, paths: Sequence[str], data: Mapping[str, str] = IMAGES) -> list[str]:
    return check_evidence(recipe_of(model, data), [open_ingredient(path) for path in paths]).notes


def used(model: str, paths: Sequence[str], data: Mapping[str, str] = IMAGES, layout: Any = None) -> str:
    """The recipe key `model` with what the files say and the recipe does not."""
    recipe = recipe_of(model, data)
    return completed(recipe, check_evidence(recipe, [open_ingredient(path) for path in paths], layout).adopted).model


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ({"img_size": 96}, "img_size=96"),
        ({"input_size": [3, 96, 64]}, "img_size=96,64"),
        ({"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.2]}, "mean=0.4,0.5,0.6&std=0.2,0.2,0.2"),
        ({"mean": (0.4,)}, "mean=0.4,0.4,0.4"),
        ({"crop_pct": 1.0, "interpolation": "bicubic"}, "crop_pct=1&interpolation=bicubic"),
        ({"crop_mode": "squash"}, "crop_mode=squash"),
        ({"in_chans": 1, "mean": [0.4], "std": [0.3]}, "in_chans=1&mean=0.4&std=0.3"),
        ({"model_kwargs": {"img_size": 96, "drop_path_rate": 0.1}}, "img_size=96"),
        ({"gp": "max"}, "global_pool=max"),
        ({"model": "test_vit"}, "interpolation=bicubic"),  # the defaults of the model that was trained
    ],
)
def test_what_timm_was_told_in_the_training_is_used(tmp_path: Path, args: dict[str, Any], line: str) -> None:
    """With a note, and the preprocessing is timm's for these arguments; a recipe that states it needs no note."""
    import timm

    given = {**TIMM, **args}
    paths = [write(tmp_path / f"{n}.pth.tar", argparse.Namespace(**given), arch="test_resnet") for n in range(2)]
    note, *_ = checked("timm:test_resnet?classes=3", paths)
    assert note.startswith(f"{paths[0]} and 1 more were trained with ")
    assert note.endswith(" (its args); the recipe states nothing else, so this is used.")
    model = used("timm:test_resnet?classes=3", paths)
    assert all(part in model.partition("?")[2].split("&") for part in line.split("&"))
    notes = checked(model, paths)
    assert [note.partition(" was trained ")[2] for note in notes] == (
        [] if given["model"] == "test_resnet" else ["as test_vit, and the recipe's model is test_resnet."]
    )
    config = timm.data.resolve_data_config(
        {**given, "img_size": given["img_size"] or given["model_kwargs"].get("img_size")},
        pretrained_cfg=timm.get_pretrained_cfg(given["model"]).to_dict(),
    )
    expected = timm.data.create_transform(**config)
    ours = build(model).preprocess
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 130, 3), dtype=np.uint8))
    assert ours is not None
    assert torch.equal(ours(image), expected(image.convert("L") if given["in_chans"] == 1 else image))


def test_arguments_that_are_the_defaults_pass(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth.tar", argparse.Namespace(**TIMM))
    bare = write(tmp_path / "b.pth.tar", argparse.Namespace(model="test_resnet", lr=0.1))
    assert checked("timm:test_resnet?classes=3", [path, bare]) == []


def test_files_that_disagree_are_named(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{size}.pth.tar", {**TIMM, "img_size": size}) for size in (96, 128)]
    with pytest.raises(RecipeError, match=r"(?s)96\.pth\.tar was .*img_size 96 and .*128\.pth\.tar with 128;.*model: timm:"):
        checked("timm:test_resnet?classes=3", paths)
    (note,) = checked("timm:test_resnet?classes=3&img_size=96", paths)
    assert "128.pth.tar was trained with img_size 128" in note
    assert "the recipe states 96, which is used" in note


def test_arrays_are_not_preprocessed_so_nothing_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "img_size": 96, "mean": [0.5] * 3})
    assert checked("timm:test_resnet?classes=3", [path], ARRAYS) == []
    assert not takes_images(recipe_of("timm:test_resnet?classes=3", ARRAYS).data)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"model_kwargs": {"act_layer": ["gelu"]}}, r"act_layer \['gelu'\]"),
        ({"bn_eps": 0.01}, "bn_eps 0.01"),
        ({"model_kwargs": {"layers": 10**12}}, "layers 1000000000000"),
    ],
)
def test_an_argument_without_an_option_is_refused(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, **args})
    with pytest.raises(RecipeError, match=f"a.pth.tar was trained with {said} "):
        checked("timm:test_resnet?classes=3", [path])


def test_plain_arguments_of_the_model_are_used_and_must_be_those_of_all(tmp_path: Path) -> None:
    """Also where a file of timm's script shows by its silence that its model has the default."""
    gelu = write(tmp_path / "a.pth.tar", {**TIMM, "model_kwargs": {"act_layer": "gelu", "drop_rate": 0.1}})
    relu = write(tmp_path / "b.pth.tar", TIMM)
    silent = write(tmp_path / "c.pth.tar", {"lr": 0.1})
    spec = "timm:test_resnet?classes=3"
    assert "(its args; 1 other does not say); the recipe states nothing else" in checked(spec, [gelu, silent])[0]
    assert used(spec, [gelu, silent]) == used(spec, [gelu], ARRAYS) == f"{spec}&act_layer=gelu"
    assert "GELU" in str(build(f"{spec}&act_layer=gelu").model)
    with pytest.raises(
        RecipeError, match=r"a\.pth\.tar was trained with act_layer gelu and .*b\.pth\.tar without it; one value"
    ):
        checked(spec, [relu, gelu])
    assert checked(f"{spec}&act_layer=relu", [relu, gelu]) == [
        f"{gelu} was trained with act_layer gelu (its args); the recipe states relu, which is used."
    ]


def test_a_model_is_loaded_as_the_files_beside_it_state(tmp_path: Path) -> None:
    """A soup of models with GELU, whose recipe did not state that, has the shapes of a model with ReLU."""
    trained = build("timm:test_resnet?classes=3&act_layer=gelu").model.eval()
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    record = {"preprocessing": {"library": "timm", "options": {"act_layer": "gelu"}, "source": "files"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(load_model("timm:test_resnet?classes=3", tmp_path)(images), trained(images))


TRAINERS = {
    "args.yaml": yaml.safe_dump({**TIMM, "img_size": 96, "mean": [0.4, 0.5, 0.6], "crop_pct": 1.0}),
    "hparams.yaml": "img_size: 96\nbetas: !!python/tuple\n- 0.9\nnet: !!python/object/apply:os.abort []\n"
    "mean: &id001\n- 0.4\n- 0.5\n- 0.6\nalso: *id001\ncrop_pct: 1.0\n",
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_arguments_that_trainers_write_beside_checkpoints_are_used(tmp_path: Path, name: str) -> None:
    """By timm's script and Lightning, which does so above the folder `checkpoints`; no object of Python is made."""
    path = write(tmp_path / "checkpoints" / "last.ckpt", None)
    above = tmp_path if name == "hparams.yaml" else tmp_path / "checkpoints"
    (above / name).write_text(TRAINERS[name])
    (note,) = checked("timm:test_resnet?classes=3", [path])
    said = "img_size 96, mean 0.4,0.5,0.6, crop_pct 1"
    assert note == f"{path} was trained with {said} ({name}); the recipe states nothing else, so this is used."
    assert "?classes=3&crop_size=96&resize_size=96&mean=0.4,0.5,0.6" in used("torchvision:resnet18?classes=3", [path])
    assert used("open_clip:ViT-B-32?classes=3", [path]) == "open_clip:ViT-B-32?classes=3"  # which did not train it


def test_numbers_in_a_yaml_file_are_numbers_as_people_write_them(tmp_path: Path) -> None:
    """`1e-3` is text in YAML 1.1, and an eps that was text went unseen."""
    path = write(tmp_path / "a.pth.tar", None)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({**TIMM, "bn_eps": 0.001}).replace("0.001", "1e-3"))
    with pytest.raises(RecipeError, match=r"was trained with bn_eps 0\.001 \(args\.yaml\)"):
        checked("timm:test_byobnet?classes=3", [path])


def test_a_size_alone_keeps_the_share_that_the_library_crops(tmp_path: Path) -> None:
    """As in `preprocess: {size: 64}`; images resized to 256 would be cropped to their middle."""
    path, spec = write(tmp_path / "a.ckpt", {"img_size": 64}), "torchvision:resnet18?classes=3"
    found = examine(recipe_of(spec), [open_ingredient(path)])
    assert (
        found.adopted == {"crop_size": "64", "resize_size": "73"} == {"crop_size": "64", "resize_size": str(64 * 256 // 224)}
    )
    assert found.preprocessing["files"] == {"crop_size": "its args"}
    assert found.preprocessing["crop"] == pytest.approx(64 / 73, abs=1e-6)
    assert "resize_size 73, mean" in found.notes[1]  # which no file states
    both = write(tmp_path / "b.ckpt", {**TORCHVISION, "val_crop_size": 64})
    assert used(spec, [both]) == f"{spec}&crop_size=64"
    assert used(f"{spec}&resize_size=80", [path]) == f"{spec}&resize_size=80&crop_size=64"
    assert used(spec, [path], ARRAYS) == spec


@pytest.mark.parametrize(
    "text",
    ["a: [1", "[" * 10_000, "\0", "<<: {img_size: 96}", "mean: &x [*x]", "a: 2001-99-99", f"mean: {'9' * 5_000}",
     "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in ("ab", "bc", "cd", "de", "ef", "fg"))],
)  # fmt: skip
def test_a_yaml_file_of_arguments_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.pth.tar", None)
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=rf"^{tmp_path}/args\.yaml cannot be read as YAML \(.*Repair it, or move it away\.$"
    ):
        checked("timm:test_resnet?classes=3", [path])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            {"img_size": 99999},
            r"(?s)a\.pt was trained with img_size 99999 \(its args\), which is not used unless.*&img_size=99999\n",
        ),
        ({"crop_pct": 1e-4}, r"crop_pct 0\.0001 \(its args\), which is not used unless the recipe states it"),
        (
            {"std": [0.0] * 3},
            r"expected one positive number for the option 'std'.*a\.pt was trained with .*std 0,0,0 \(its args\)",
        ),
        ({"model_kwargs": {"stem_width": 123456}}, r"with stem_width 123456"),
    ],
)
def test_a_hostile_value_is_not_used(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "a.pt", {**TIMM, **args})
    with pytest.raises(RecipeError, match=said):
        examine(recipe_of("timm:test_resnet?classes=3"), [open_ingredient(path)])


def test_files_of_one_ingredient_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "img_size": 96})
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({**TIMM, "img_size": 128}))
    with pytest.raises(
        RecipeError, match=r"with img_size 96 \(its args\) or 128 \(args\.yaml\): its files contradict each other"
    ):
        checked("timm:test_resnet?classes=3", [path])
    assert checked("timm:test_resnet?classes=3&img_size=96", [path]) == []


@pytest.mark.parametrize(
    "args", [{"mean": "x"}, {"mean": [1, 2]}, {"img_size": [1, 2, 3, "x"]}, {"crop_pct": {}}, {"std": ["x"] * 3}]
)
def test_a_value_that_is_not_understood_is_no_evidence_and_is_told(tmp_path: Path, args: dict[str, Any]) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, **args})
    (note,) = checked("timm:test_resnet?classes=3", [path])
    key, value = next(iter(args.items()))
    assert note.startswith(f"{path} has {key} {value!r} (its args), which is not understood; {key} ")
    assert checked("timm:test_resnet?classes=3", [path], ARRAYS) == []


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (argparse.Namespace(input_size=384, crop_pct=1.0, mean=[0.1] * 3), "img_size=384&mean=0.1,0.1,0.1&crop_pct=1"),
        ({"img_size": 64, "mean": "imagenet"}, "img_size=64"),
        ({"img_size": "64"}, "img_size=64"),
        ({"input_size": [64, 96], "model": "test_resnet.of_another_version"}, "img_size=64,96"),
        ({"architecture": "test_resnet", "pretrained_cfg": {"input_size": [3, 64, 64], "mean": "x"}}, "img_size=64"),
    ],
)
def test_each_value_is_read_on_its_own(tmp_path: Path, args: Any, line: str) -> None:
    path = write(tmp_path / "a.pth", args)
    model = used("timm:test_resnet?classes=3", [path])
    assert set(line.split("&")) <= set(model.partition("?")[2].split("&"))
    assert "mean=" in line or "mean=" not in model
    assert len(checked(model, [path])) == ("mean=" not in line and "mean" in str(args))


def test_what_the_model_has_by_default_is_not_asked_for(tmp_path: Path) -> None:
    for model, pool, other in (
        ("test_resnet", "avg", "max"),
        ("test_vit", "token", "avg"),
        ("test_efficientnet", "avg", "max"),
    ):
        spec = f"timm:{model}?classes=3"
        same = write(tmp_path / "a.pth", {**TIMM, "model": model, "gp": pool, "bn_eps": 1e-05})
        assert checked(spec, [same]) == []
        different = write(tmp_path / "b.pth", {**TIMM, "model": model, "gp": other})
        assert used(spec, [different]) == f"{spec}&global_pool={other}"
        with pytest.raises(RecipeError, match=f"{pool} and .* with {other}; one value must be used for all"):
            checked(spec, [same, different])


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_a_folder_that_timm_wrote_fits_a_recipe_with_its_name(tmp_path: Path, model: str) -> None:
    import timm
    from timm.models._hub import save_for_hf

    save_for_hf(timm.create_model(model, num_classes=3), tmp_path, safe_serialization=True)
    assert checked(f"timm:{model}?classes=3", [str(tmp_path)]) == []


def test_a_tag_that_timm_does_not_have_is_no_evidence_and_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "model": "test_resnet.mine"})
    (note,) = checked("timm:test_resnet?classes=3", [path])
    assert note.startswith(f"{path} was trained as test_resnet.mine, a name that this version of timm does not have; ")
    with pytest.raises(RecipeError, match=r"no pretrained weights 'mine' for test_resnet; it has r160_in1k\."):
        checked("timm:test_resnet.mine?classes=3", [path])


@pytest.mark.parametrize(
    "more",
    [
        {"mean": 0.91, "std": 0.02, "input_size": 160},
        {"hyper_parameters": {"model_kwargs": {"freeze_backbone": True, "hidden_dim": 512}, "interpolation": "linear"}},
        {"args": {**TIMM, "model_kwargs": {"drop_path_rate": 0.1, "act_layer": "relu"}}},  # the default
        {"args": {**TIMM, "model": "test_vit", "model_kwargs": {"dynamic_img_size": True, "num_heads": 2}}},
    ],
)
def test_what_does_not_change_the_model_is_not_asked_for(tmp_path: Path, more: dict[str, Any]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}, **more}, tmp_path / "a.pt")
    model = more.get("args", {}).get("model", "test_resnet")
    assert checked(f"timm:{model}?classes=3", [str(tmp_path / "a.pt")]) == []


def test_of_a_script_that_is_not_timms_only_what_it_states_is_compared(tmp_path: Path) -> None:
    hyper_parameters = {"img_size": 160, "model_kwargs": {"num_heads": 1}, "model": "test_vit"}
    data = {"mean": [127.5, 51, 51], "std": [51.0]}
    path = write(tmp_path / "a.ckpt", {}, hyper_parameters={"img_size": 160}, datamodule_hyper_parameters=data)
    assert len(checked("timm:test_resnet?classes=3&mean=0.1&std=0.1&crop_pct=0.5", [path])) == 2
    assert used("timm:test_resnet?classes=3", [path]).endswith("?classes=3&mean=0.5,0.2,0.2&std=0.2,0.2,0.2")
    path = write(tmp_path / "b.ckpt", {}, hyper_parameters=hyper_parameters)
    assert used("timm:test_vit?classes=3", [path]) == "timm:test_vit?classes=3&num_heads=1"


def test_the_files_of_a_folder_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    paths = [write(tmp_path / folder / f"{n}.pth", {}) for folder in "ab" for n in range(4)]
    ingredients = [open_ingredient(path) for path in paths]
    monkeypatch.setattr(evidence_files.storage, "isfile", lambda path: asked.append(path) is not None)
    check_evidence(recipe_of("timm:test_resnet?classes=3"), ingredients)
    assert len(asked) == len(set(asked)) == 2 * len((*evidence_files.BESIDE["timm"], *evidence_files.OWN))


def test_the_config_that_timm_writes_for_the_hub_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 96, 96], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    config = {"architecture": "test_resnet", "num_classes": 3, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (note,) = checked("timm:test_resnet?classes=3", [str(tmp_path)])
    assert "was trained with img_size 96, " in note
    assert "(config.json); the recipe states nothing" in note
    for text in ("{", "[]", "null", '"x"', "1e999", "[" * 100_000):  # broken files are no evidence
        (tmp_path / "config.json").write_text(text)
        assert checked("timm:test_resnet?classes=3", [str(tmp_path)]) == []
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")  # whose reader would wait for ever
    assert checked("timm:test_resnet?classes=3", [str(tmp_path / "model.safetensors")]) == []


def test_the_arguments_of_torchvisions_script_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pth", argparse.Namespace(**TORCHVISION))
    assert checked("torchvision:resnet18?classes=3", [path]) == []
    model = used("torchvision:resnet50?classes=3", [path])  # whose newer weights have 232
    assert model == "torchvision:resnet50?classes=3&resize_size=256"
    assert checked(model, [path]) == [f"{path} was trained as resnet18, and the recipe's model is resnet50."]
    assert "resize_size=[256]" in str(build(f"{model}&crop_size=200").preprocess)


def test_the_config_of_open_clip_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "open_clip_model.safetensors")
    config = {"model_cfg": {"vision_cfg": {"image_size": 256}}, "preprocess_cfg": PREPROCESS}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model = used("open_clip:ViT-B-32?classes=3", [str(tmp_path / "open_clip_model.safetensors")])
    assert model == (
        "open_clip:ViT-B-32?classes=3&image_size=256&mean=0.5,0.5,0.5&std=0.25,0.25,0.25&interpolation=bilinear"
        "&resize_mode=squash"
    )
    assert checked(model, [str(tmp_path / "open_clip_model.safetensors")]) == []


@pytest.mark.parametrize("data", [IMAGES, ARRAYS])
def test_a_position_embedding_of_another_size_tells_the_size(tmp_path: Path, data: dict[str, str]) -> None:
    """Without a word about it in the file: ViTs have one vector per patch."""
    import timm

    model = timm.create_model("test_vit", num_classes=3, img_size=96)
    torch.save({"model": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "a.pt")
    spec, ingredient = "timm:test_vit?classes=3", open_ingredient(str(tmp_path / "a.pt"))
    (note,) = check_evidence(recipe_of(spec, data), [ingredient], describe(spec)).notes
    assert "was trained with img_size 96 (the shape of its position embedding); the recipe states nothing" in note
    assert used(spec, [str(tmp_path / "a.pt")], data, describe(spec)) == f"{spec}&img_size=96"
    spec += "&img_size=96"
    assert check_evidence(recipe_of(spec, data), [ingredient], describe(spec)).notes == []
    load_checkpoint(build(spec).model, str(tmp_path / "a.pt"))
    shutil.copy(tmp_path / "a.pt", tmp_path / "b.pt")
    found = inspect([str(tmp_path)], "timm:test_vit?classes=3")
    assert found["tensors"]["pos_embed"] == ["float32", [1, 37, 64]]
    assert "a.pt and 1 more were trained with img_size 96" in found["notes"][0]
    with pytest.raises(IngredientError, match=r"(?s)a\.pt does not fit the model.*pos_embed is \[1, 3[67], 64\]"):
        load_checkpoint(build("timm:test_vit?classes=3").model, str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [("0.5", "0.5,0.5,0.5", True), ("224", "224,224", True), ("0.485", "0.4850000001", True), ("bicubic", "bicubic", True),
     ("bicubic", "bilinear", False), ("0.5,0.4", "0.5", False), ("224", "224,192", False), ("", "0.5", False)],
)  # fmt: skip
def test_values_are_equal_as_numbers(one: str, other: str, equal: bool) -> None:
    assert same_value(one, other) == same_value(other, one) == equal


def test_images_of_one_channel_need_a_mean_of_one_channel() -> None:
    image = Image.new("RGB", (200, 200))
    built = build("timm:test_resnet?classes=3&in_chans=1")  # for arrays, which are not preprocessed
    assert built.preprocess is not None
    with pytest.raises(RecipeError, match=r"takes images of one channel.*in_chans=1&mean=0\.5&std=0\.5\."):
        built.preprocess(image)
    built = build("timm:test_resnet?classes=3&in_chans=1&mean=0.5&std=0.2")
    assert built.preprocess is not None
    assert built.model.eval()(built.preprocess(image)[None]).shape == (1, 3)
    assert build("timm:test_resnet?classes=3&in_chans=4").preprocess is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:test_vit?classes=3&img_size=0", "expected N or HEIGHT,WIDTH in pixels for the option 'img_size'"),
        ("timm:test_vit?classes=3&img_size=1,2,3", "expected N or HEIGHT,WIDTH"),
        ("timm:test_vit?classes=3&mean=0.5,0.4", "expected one number for the option 'mean', or 3 of them"),
        ("timm:test_vit?classes=3&mean=nan", "expected one number"),
        ("timm:test_vit?classes=3&std=0", "expected one positive number for the option 'std'"),
        ("timm:test_vit?classes=3&crop_pct=-1", "expected a positive number"),
        ("timm:test_vit?classes=3&interpolation=best", "expected bicubic, bilinear, "),
        ("timm:test_vit?classes=3&global_pool=best", "timm cannot create"),
        ("torchvision:resnet18?classes=3&crop_size=x", "expected a positive integer for the option 'crop_size'"),
        ("open_clip:ViT-B-32?classes=3&resize_mode=x", "expected shortest, longest or squash"),
    ],
)
def test_an_option_out_of_range_is_refused(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(spec)


def test_a_spec_with_options_is_parsed_as_it_was_written() -> None:
    spec = ModelSpec.parse("timm:test_vit?classes=3&mean=0.5")
    changed = spec.with_options({"mean": "0.4,0.5,0.6", "img_size": "96"})
    assert changed == "timm:test_vit?classes=3&mean=0.4,0.5,0.6&img_size=96"
    assert ModelSpec.parse(spec.with_options({})) == spec


def test_fine_tuning_starts_from_weights_with_the_preprocessing_of_the_recipe(tmp_path: Path) -> None:
    def started(model: str, data: str = "train.parquet", **finetune: str) -> dict[str, str]:
        values = {"model": model, "ingredients": "*", "data": {"train": data, "fit": "a.npz"}, "finetune": finetune}
        return check_start(make_recipe(values)).adopted

    path = write(tmp_path / "a.pth.tar", {**TIMM, "img_size": 96})
    assert started("timm:test_resnet?classes=3", init=path) == {"img_size": "96"}
    assert started("timm:test_resnet?classes=3", "train.npz", init=path) == {}
    assert started("open_clip:ViT-B-32?classes=3", pretrained="open_clip:laion2b_s34b_b79k") == {}
    assert started("open_clip:ViT-B-16-SigLIP?classes=3", pretrained="open_clip:webli") == {
        "mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", "resize_mode": "squash"
    }  # fmt: skip


def test_the_settings_of_a_sweep_are_the_arguments_that_differ_between_files(tmp_path: Path) -> None:
    """Names of runs differ everywhere and are no settings; safetensors files keep arguments as a text."""
    runs = [{"lr": 0.1 * (k + 1), "opt": "adamw" if k else "sgd", "out": f"/x/{k}", "amp": k > 1, "epochs": 3, "drop": [k]}
            for k in range(3)]  # fmt: skip
    for k, arguments in enumerate(runs):
        torch.save({"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(**arguments)}, tmp_path / f"{k}.pt")
        save_file({"w": torch.ones(2)}, tmp_path / f"{k}.safetensors", {"args": json.dumps(arguments)})
    expected = [{key: arguments[key] for key in ("lr", "opt", "amp")} for arguments in runs]
    for suffix in ("pt", "safetensors"):
        opened = [open_ingredient(str(tmp_path / f"{k}.{suffix}")) for k in range(3)]
        assert evidence_files.settings_in_files(opened) == expected
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert evidence_files.settings_in_files([*opened, open_ingredient(str(tmp_path / "plain.safetensors"))]) == [{}] * 4

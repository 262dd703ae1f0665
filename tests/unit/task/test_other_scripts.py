"""Arguments of the training scripts of open_clip and torchvision, also under the prefix of another library or a function."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_soup.errors import RecipeError
from ray_soup.task import timm_settings
from ray_soup.task.models import build
from ray_soup.task.settings import OPEN_CLIP_SCRIPT
from tests.unit.task.test_evidence import ARRAYS, IMAGES, TIMM, TORCHVISION, checked, used, write

PARAMS = {
    "accum_freq": 1, "aug_cfg": {}, "force_image_size": None, "force_quick_gelu": False, "image_interpolation": None,
    "image_mean": None, "image_resize_mode": None, "image_std": None, "log_path": "./logs/run: 1/out.log", "lr": 1e-05,
    "model": "ViT-B-32", "name": "run: 1", "precision": "amp", "pretrained": "", "train_data": "[", "workers": 4,
}  # fmt: skip
"""Some arguments of open_clip's training script, with those that say how images are preprocessed, at their defaults."""
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (260, 330, 3), dtype=np.uint8))


def line_of(caught: pytest.ExceptionInfo[RecipeError]) -> str:
    """The line of the recipe that a refusal tells the user to write."""
    return str(caught.value).partition("model: ")[2].partition("\n")[0]


def trained(folder: Path, **params: Any) -> str:
    """Write logs/NAME/params.txt and logs/NAME/checkpoints/epoch_2.pt as open_clip does."""
    path = folder / "logs" / "run" / "checkpoints" / "epoch_2.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": 2, "name": "run", "state_dict": {"a": torch.zeros(2)}}, path)
    lines = [f"{name}: {value}\n" for name, value in sorted({**PARAMS, **params}.items())]
    (path.parent.parent / "params.txt").write_text("".join(lines))
    return str(path)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25] * 3}, "mean=0.5,0.5,0.5&std=0.25,0.25,0.25"),
        ({"force_image_size": [256, 192]}, "image_size=256,192"),
        ({"force_image_size": 256, "image_resize_mode": "squash"}, "image_size=256&resize_mode=squash"),
        ({"image_interpolation": "bilinear"}, "interpolation=bilinear"),
        ({"model": "ViT-B-32-256"}, "image_size=256"),
    ],
)
def test_the_arguments_of_open_clips_script_are_used(tmp_path: Path, params: dict[str, Any], expected: str) -> None:
    path = trained(tmp_path, **params)
    note, *_ = checked("open_clip:ViT-B-32?classes=3", [path])
    assert re.match(r".*epoch_2\.pt was trained with .* \(params\.txt\); the recipe states nothing", note)
    model = used("open_clip:ViT-B-32?classes=3", [path])
    assert model == f"open_clip:ViT-B-32?classes=3&{expected}"
    assert [note.partition(" was trained as ")[2] for note in checked(model, [path])] == (
        ["ViT-B-32-256, and the recipe's model is ViT-B-32."] if "model" in params else []
    )


@pytest.mark.parametrize(
    "params", [{}, {"image_interpolation": "random"}, {"force_image_size": [224], "pretrained": "a.pt"}]
)
def test_the_defaults_of_open_clips_script_pass(tmp_path: Path, params: dict[str, Any]) -> None:
    assert checked("open_clip:ViT-B-32?classes=3", [trained(tmp_path, **params)]) == []


def test_open_clips_script_has_these_arguments() -> None:
    theirs = vars(pytest.importorskip("open_clip_train.params").parse_args(["--model", "ViT-B-32"]))
    names = {*OPEN_CLIP_SCRIPT, "force_image_size", "force_quick_gelu", "pretrained", "precision"}
    assert {name: theirs[name] for name in names} == {name: PARAMS[name] for name in names}


def test_open_clips_script_takes_the_preprocessing_of_its_pretrained_weights(tmp_path: Path) -> None:
    path = trained(tmp_path, model="ViT-B-16-SigLIP", pretrained="webli")
    (note,) = checked("open_clip:ViT-B-16-SigLIP?classes=3", [path])
    assert "with mean 0.5,0.5,0.5, std 0.5,0.5,0.5, resize_mode squash (params.txt); the recipe states nothing" in note
    assert checked("open_clip:ViT-B-16-SigLIP?classes=3", [path], ARRAYS) == []


@pytest.mark.parametrize("data", [IMAGES, ARRAYS])
def test_a_model_of_open_clip_with_another_activation_is_refused(tmp_path: Path, data: Mapping[str, str]) -> None:
    """All tensors have the same shapes."""
    for params in ({"model": "ViT-B-32-quickgelu"}, {"force_quick_gelu": True}):
        path = trained(tmp_path, **params)
        with pytest.raises(RecipeError, match="was trained as ViT-B-32-quickgelu, with quick_gelu True") as caught:
            checked("open_clip:ViT-B-32?classes=3", [path], data)
        assert line_of(caught) == "open_clip:ViT-B-32-quickgelu?classes=3"
        checked(line_of(caught), [path], data)
    with pytest.raises(RecipeError, match="was trained as ViT-B-32, with quick_gelu False"):
        checked("open_clip:ViT-B-32-quickgelu?classes=3", [trained(tmp_path)], data)
    with pytest.raises(RecipeError, match="was trained as ViT-B-16, with patch_size 16"):
        checked("open_clip:ViT-B-32?classes=3", [trained(tmp_path, model="ViT-B-16")], data)


def test_weights_that_need_another_activation_are_told(tmp_path: Path) -> None:
    (note,) = checked("open_clip:ViT-B-32?classes=3", [trained(tmp_path, pretrained="openai")])
    assert "epoch_2.pt was trained from the weights openai, which need QuickGELU" in note
    assert note.endswith("write ViT-B-32-quickgelu.")


@pytest.mark.parametrize("text", ["", "model: x\n", "model: " + "(" * 100_000, "\0"])
def test_another_file_called_params_is_no_evidence(tmp_path: Path, text: str) -> None:
    path = trained(tmp_path)
    (tmp_path / "logs" / "run" / "params.txt").write_text(text)
    assert checked("open_clip:ViT-B-32?classes=3", [path]) == []


def test_params_that_are_not_understood_are_told(tmp_path: Path) -> None:
    (note,) = checked("open_clip:ViT-B-32?classes=3", [trained(tmp_path, image_mean="imagenet")])
    assert "has image_mean 'imagenet' (params.txt), which is not understood; mean 0.48145466,0.4578275,0.40821073" in note
    (note,) = checked("open_clip:ViT-B-32?classes=3", [trained(tmp_path, model="hf-hub:me/mine")])
    assert "was trained as hf-hub:me/mine, a name that this version of open_clip does not have" in note


@pytest.mark.parametrize(
    "args",
    [TORCHVISION, {**TORCHVISION, "val_resize_size": 232, "val_crop_size": 200, "interpolation": "bicubic"}],
)
def test_checkpoints_of_torchvision_are_preprocessed_by_timm_as_in_training(tmp_path: Path, args: dict[str, Any]) -> None:
    """The ResNets of both libraries have tensors of the same names and shapes."""
    path = write(tmp_path / "a.pth", argparse.Namespace(**args))
    model = used("timm:resnet18?classes=3", [path])
    assert checked(model, [path]) == []
    options = (
        f"resize_size={args['val_resize_size']}&crop_size={args['val_crop_size']}&interpolation={args['interpolation']}"
    )
    ours, theirs = build(model).preprocess, build(f"torchvision:resnet18?classes=3&{options}").preprocess
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours(NOISE), theirs(NOISE))


@pytest.mark.parametrize("args", [{}, {"img_size": 160, "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3}])
def test_checkpoints_of_timm_are_preprocessed_by_torchvision_as_in_training(tmp_path: Path, args: dict[str, Any]) -> None:
    import timm

    path = write(tmp_path / "a.pth.tar", argparse.Namespace(**{**TIMM, "model": "resnet18", **args}))
    model = used("torchvision:resnet18?classes=3", [path])
    assert checked(model, [path]) == []
    given = {**TIMM, **args}
    config = timm.data.resolve_data_config(given, pretrained_cfg=timm.get_pretrained_cfg("resnet18").to_dict())
    ours = build(model).preprocess
    assert ours is not None
    assert torch.equal(ours(NOISE), timm.data.create_transform(**config)(NOISE))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"crop_mode": "squash"}, "crop_mode squash"),
        ({"img_size": [96, 64]}, "img_size 96,64"),
        ({"gp": "max"}, "global_pool max"),
        ({"interpolation": "hamming"}, "interpolation hamming"),
        ({"model_kwargs": {"act_layer": "gelu"}}, "act_layer gelu"),
    ],
)
def test_what_torchvision_cannot_do_is_refused(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    path = write(tmp_path / "a.pth.tar", {**TIMM, "model": "resnet18", **args})
    with pytest.raises(RecipeError, match=f"was trained with {said} .*the prefix `torchvision:` has no option for it"):
        checked("torchvision:resnet18?classes=3", [path])
    if not {"gp", "model_kwargs"} & args.keys():  # which is part of the model
        assert checked("torchvision:resnet18?classes=3", [path], ARRAYS) == []


def test_torchvisions_script_has_one_normalization_for_all_models(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.pth", {**TORCHVISION, "model": "maxvit_t", "val_resize_size": 224, "interpolation": "bicubic"}
    )
    assert "&mean=0.485,0.456,0.406&" in used("torchvision:efficientnet_v2_l?classes=3", [path])  # which has 0.5


MODULE = """
import torch
from torchvision import transforms as T

calls = []

def images():
    calls.append(1)
    transform = T.Compose([T.Resize(40), T.CenterCrop(32), T.ToTensor(), T.Normalize([0.5] * 3, torch.tensor([0.25] * 3))])
    return torch.nn.Linear(2, 2), transform

def opaque():
    return torch.nn.Linear(2, 2), lambda image: None

def arrays():
    return torch.nn.Linear(2, 2)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_preprocessing.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_preprocessing", raising=False)
    return "own_preprocessing"


def test_what_a_users_own_preprocessing_does_otherwise_is_told(tmp_path: Path, own: str) -> None:
    zoo = tmp_path / "zoo"
    paths = {
        "timm": write(zoo / "a.pth.tar", {**TIMM, "img_size": 96, "mean": [0.4] * 3}),
        "torchvision": write(zoo / "b.pth", TORCHVISION),
        "open_clip": trained(zoo, image_std=[0.3] * 3),
        "another script": write(zoo / "c.ckpt", {}, hyper_parameters={"img_size": 32, "mean": [0.5, 0.5, 0.4]}),
    }
    folder = zoo / "of transformers"
    paths["transformers"] = write(folder / "d.pt", None)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "size": {"height": 48, "width": 32}}')
    expected = {
        "timm": ["size 96", "mean 0.4,0.4,0.4", "std 0.5,0.5,0.5"],
        "torchvision": ["size 224", "mean 0.485,0.456,0.406", "std 0.229,0.224,0.225"],
        "open_clip": ["size 224", "mean 0.48145466,0.4578275,0.40821073", "std 0.3,0.3,0.3"],
        "another script": ["mean 0.5,0.5,0.4"],
        "transformers": ["size 48,32"],
    }
    for script, path in paths.items():
        notes = checked(f"{own}:images", [path])
        said = [note.partition(" was trained with ")[2].partition(" (")[0] for note in notes]
        assert said == expected[script]
        assert all(note.endswith(", which is used.") and f"of {own}:images has " in note for note in notes)
        assert checked(f"{own}:opaque", [path]) == checked(f"{own}:arrays", [path]) == []
    (first, *_) = checked(f"{own}:images", [*paths.values()])
    assert first.endswith("has 32, which is used.")


def test_a_function_is_called_only_if_there_is_something_to_compare(tmp_path: Path, own: str) -> None:
    path = write(tmp_path / "a.pth", {"lr": 0.1, "model": "mine"})
    assert checked(f"{own}:images", [path]) == []
    assert checked(f"{own}:images", [write(tmp_path / "b.pth", {**TIMM, "img_size": 96})], ARRAYS) == []
    assert own not in sys.modules


def test_each_variant_of_a_model_is_built_once_for_all_ingredients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm_settings._changes.cache_clear()
    timm_settings._structure.cache_clear()
    built: list[dict[str, Any]] = []
    outline = timm_settings.timm_outline
    monkeypatch.setattr(timm_settings, "timm_outline", lambda name, **more: built.append(more) or outline(name, **more))
    kwargs = {"act_layer": "relu", "freeze": [1, 2]}
    paths = [write(tmp_path / f"{n}.pth.tar", {**TIMM, "model_kwargs": kwargs, "lr": n}) for n in range(4)]
    with pytest.raises(RecipeError, match="with freeze "):
        checked("timm:test_resnet?classes=3", paths)
    assert built == [{"act_layer": "relu"}, {}, {"freeze": [1, 2]}]

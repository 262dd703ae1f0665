"""Checkpoints as each library writes them, loaded, and written again so that the library's own loader takes them back."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import open_ingredient
from ray_soup.task.companions import loading_lines, write_companions
from ray_soup.task.loading import load_model
from ray_soup.task.models import build, describe, load_checkpoint
from tests.unit.task.library_models import (
    IMAGES,
    TEXTS,
    OfModelSoups,
    add_tiny_clip,
    assert_same,
    bert,
    clip,
    clip_logits,
    lightning,
    tokenizer,
    vit,
    write_epochs,
    write_with_timm,
    zoo_of,
)

pytestmark = pytest.mark.slow
LARGE = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


def loaded_by(lines: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """Run loading lines in the folder, with nothing imported before."""
    monkeypatch.chdir(folder)
    space: dict[str, nn.Module] = {}
    exec(lines, space)
    return space["model"].eval()


def written_again(model: nn.Module, folder: Path, spec: str) -> str:
    """Write a model as a soup is written; the lines that load it."""
    folder.mkdir()
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
    )
    write_companions(spec, folder, "float32")
    return loading_lines(spec, [file.name for file in folder.iterdir()])


def test_open_clip_checkpoints_of_a_whole_clip_are_loaded_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = zoo_of(clip, clip_logits, 1)
    write_epochs(zoo, tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog\n\ncow\n")
    spec = f"open_clip:tiny-clip?zeroshot={tmp_path}/classes.txt"
    model = load_model(spec, str(tmp_path / "run_0" / "epoch_2.pt"))
    line = written_again(model, tmp_path / "out", spec)
    assert line == "import open_clip\n\nmodel = open_clip.create_model('tiny-clip', pretrained='model.safetensors')"
    with torch.inference_mode():
        assert_same(model(IMAGES), clip_logits(zoo[0]))
        assert_same(clip_logits(loaded_by(line, tmp_path / "out", monkeypatch)), clip_logits(zoo[0]))


def test_the_published_checkpoints_of_model_soups_are_loaded_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower is left out, and reported; with other tensors they do not fit."""
    zoo = zoo_of(OfModelSoups, lambda model: model(IMAGES))
    for number, model in enumerate(zoo):
        torch.save(model.state_dict(), tmp_path / f"model_{number}.pt")
    spec = "open_clip:tiny-clip?classes=3&normalize=true"
    layout = describe(spec)
    bound = check_together(open_ingredients(str(tmp_path)), layout.state_shapes, layout.tied)
    assert set(bound[0].tensors) == set(layout.state_shapes)
    assert "model.token_embedding.weight" not in bound[0].left_out
    assert {"token_embedding.weight", "logit_scale", "text_projection"} <= set(bound[0].left_out)
    model = load_model(spec, str(tmp_path / "model_1.pt"))
    line = written_again(model, tmp_path / "out", spec)
    assert line == f"import ray_soup\n\nmodel = ray_soup.load_model('{spec}', '.')"
    with torch.inference_mode():
        assert_same(model(IMAGES), zoo[1](IMAGES))
        assert_same(loaded_by(line, tmp_path / "out", monkeypatch)(IMAGES), zoo[1](IMAGES))
    state = torch.load(tmp_path / "model_0.pt")
    for change in ({"extra.weight": torch.zeros(1)}, {"model.visual.extra": torch.zeros(1)}):
        torch.save({**state, **change}, tmp_path / "model_0.pt")
        with pytest.raises(IngredientError, match=r"model_0.pt does not fit:\n    not in the model: (visual\.)?extra"):
            check_together(open_ingredients(f"{tmp_path}/model_*.pt"), layout.state_shapes, layout.tied)
        with pytest.raises(IngredientError, match=r"model_0\.pt does not fit the model:\n    not in the model: .*extra"):
            load_checkpoint(build(spec).model, str(tmp_path / "model_0.pt"))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_checkpoints_are_loaded_and_written_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    zoo = zoo_of(lambda: timm.create_model(name, num_classes=3), lambda model: model(LARGE))
    write_with_timm(zoo, tmp_path)
    spec, file = f"timm:{name}?classes=3", str(tmp_path / "1" / "model_best.pth.tar")
    model, ema = load_model(spec, file), load_model(spec, f"{file}?key=state_dict_ema")
    line = written_again(model, tmp_path / "out", spec)
    assert line.startswith("import timm\n\nmodel = timm.create_model(")
    with torch.inference_mode():
        assert_same(model(LARGE), zoo[1](LARGE))
        assert_same(ema(LARGE), zoo[0](LARGE))
        assert_same(loaded_by(line, tmp_path / "out", monkeypatch)(LARGE), zoo[1](LARGE))
    with pytest.raises(IngredientError, match=r"no tensors under the key 'x'; its keys: state_dict, state_dict_ema"):
        open_ingredient(f"{file}?key=x")


def test_torchvision_checkpoints_are_loaded_and_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def make() -> nn.Module:
        return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)

    (theirs,) = zoo_of(make, lambda model: model(LARGE[..., :64, :64]), 1)
    checkpoint = {"model": theirs.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, tmp_path / "model_0.pth")  # as torchvision's references write it
    spec = "torchvision:shufflenet_v2_x0_5?classes=3"
    model = load_model(spec, str(tmp_path / "model_0.pth"))
    line = written_again(model, tmp_path / "out", spec)
    assert "torchvision.models.get_model" in line
    with torch.inference_mode():
        assert_same(model(LARGE), theirs(LARGE))
        assert_same(loaded_by(line, tmp_path / "out", monkeypatch)(LARGE), theirs(LARGE))


def test_transformers_image_checkpoints_are_loaded_and_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded safetensors with an index."""
    from transformers import ViTImageProcessor

    (theirs,) = zoo_of(vit, lambda model: model(pixel_values=IMAGES).logits, 1)
    theirs.save_pretrained(tmp_path / "run_0", max_shard_size="8KB")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "run_0")
    assert (tmp_path / "run_0" / "model.safetensors.index.json").exists()
    spec = f"transformers:{tmp_path}/run_0"
    model = load_model(spec, str(tmp_path / "run_0"))
    line = written_again(model, tmp_path / "out", spec)
    assert line == "import transformers\n\nmodel = transformers.ViTForImageClassification.from_pretrained('.')"
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    with torch.inference_mode():
        expected = theirs(pixel_values=IMAGES).logits
        assert_same(model(IMAGES), expected)
        assert_same(loaded_by(line, tmp_path / "out", monkeypatch)(pixel_values=IMAGES).logits, expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_transformers_text_checkpoints_are_loaded_and_written_again(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pytorch_model.bin` as older versions wrote it, whole or in shards, with a buffer that models no longer have."""
    import json

    words = tokenizer(tmp_path / "words")
    inputs = words(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    (theirs,) = zoo_of(bert, lambda model: model(**inputs).logits[:, :3], 1)
    folder = tmp_path / "run_0"
    theirs.config.architectures = ["BertForSequenceClassification"]
    theirs.config.save_pretrained(folder)
    words.save_pretrained(folder)
    state = {"bert.embeddings.position_ids": torch.arange(16)[None], **theirs.state_dict()}
    parts = {"pytorch_model.bin": state}
    if shards == 2:
        parts = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(state.items())[n - 1 :: 2]) for n in (1, 2)}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        torch.save(part, folder / file)
    spec = f"transformers:{folder}"
    preprocess = build(spec).preprocess
    assert preprocess is not None
    batch = torch.stack([preprocess(text) for text in TEXTS])
    model = load_model(spec, str(folder))
    line = written_again(model, tmp_path / "out", spec)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with torch.inference_mode():
        expected = theirs(**inputs).logits
        assert_same(model(batch), expected)
        assert_same(loaded_by(line, tmp_path / "out", monkeypatch)(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("spec", "files", "line"),
    [
        ("tests.tiny:build", ["model.safetensors"], "ray_soup.load_model('tests.tiny:build', '.')"),
        ("timm:a?classes=3", ["model.safetensors.index.json"], "ray_soup.load_model('timm:a?classes=3', '.')"),
        (
            "open_clip:a?zeroshot=/home/me/classes.txt",
            ["model.safetensors.index.json"],
            "ray_soup.load_model('open_clip:a?zeroshot=classes.txt', '.')",
        ),
        ("timm:a?classes=3", [], "timm.create_model('a', num_classes=3, checkpoint_path='model.safetensors')"),
    ],
)
def test_a_soup_that_its_library_cannot_load_is_loaded_with_ray_soup(spec: str, files: Iterable[str], line: str) -> None:
    lines = loading_lines(spec, files).splitlines()
    assert (lines[0], lines[-1]) == (f"import {line.partition('.')[0]}", f"model = {line}")


def test_lightning_checkpoints_are_read_and_a_refused_pickle_can_be_converted(tmp_path: Path) -> None:
    make: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))  # noqa: E731
    zoo = zoo_of(make, lambda model: model(torch.ones(4, 5)))
    for number, model in enumerate(zoo):
        torch.save(lightning(model.state_dict()), tmp_path / f"epoch=3-step={number}.ckpt")
    ingredients = open_ingredients(f"{tmp_path}/*.ckpt")
    assert [i.name for i in ingredients] == ["epoch=3-step=0", "epoch=3-step=1"]
    bound = check_together(ingredients, {name: tuple(t.shape) for name, t in zoo[0].state_dict().items()})
    assert torch.equal(bound[1].read("1.bias"), zoo[1][1].bias)

    file = tmp_path / "refused.ckpt"
    torch.save(lightning(zoo[0].state_dict(), hyper_parameters={"model": nn.ReLU()}), file)
    with pytest.raises(
        IngredientError, match=r"holds 'torch\.nn\.modules\.activation\.ReLU'.*If you trust the file"
    ) as said:
        open_ingredient(str(file))
    _, _, command = str(said.value).partition("extracts it: ")
    exec(shlex.split(command)[2], {})  # the suggested command does what the message says
    converted = open_ingredient(str(tmp_path / "refused.state_dict.pt")).bind(zoo[0].state_dict(), {})
    assert set(converted.tensors) == set(zoo[0].state_dict())

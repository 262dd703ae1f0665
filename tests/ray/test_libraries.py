"""Whole soups of each library's own checkpoints, which the library's own loader takes back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ray_soup
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.run import run
from ray_soup.task.models import build, describe
from tests.unit.task.library_models import (
    IMAGES,
    TEXTS,
    OfModelSoups,
    add_tiny_clip,
    assert_same,
    bert,
    clip,
    clip_logits,
    tokenizer,
    vit,
    write_epochs,
    write_with_timm,
    zoo_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_tiny_clip(tmp_path_factory.mktemp("configs"))


def mean_of(zoo: list[nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    """The uniform soup of models in memory."""
    states = [model.state_dict() for model in zoo]
    mean = {}
    for name, first in states[0].items():
        total = sum(state[name].double() for state in states)
        mean[name] = (total / len(states)).to(first.dtype) if first.is_floating_point() else first
    soup = make()
    soup.load_state_dict(mean)
    return soup.eval()


def soup_of(model: str, ingredients: Any, out: Path, **more: Any) -> Path:
    """Write and verify a uniform soup; its folder."""
    run(make_recipe({"method": "uniform", "model": model, "ingredients": ingredients, **more}), out)
    verify(out)
    return out


def by_the_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The model that the lines of Python in the model card load, run in the soup's folder."""
    lines = (out / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    assert str(out.parent) not in lines
    monkeypatch.chdir(out)
    space: dict[str, nn.Module] = {}
    exec(lines, space)
    return space["model"].eval()


def test_open_clip_checkpoints_give_a_zero_shot_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    zoo = zoo_of(clip, clip_logits)
    write_epochs(zoo, tmp_path / "logs")
    (tmp_path / "classes.txt").write_text("cat\ndog\n\ncow\n")
    spec = f"open_clip:tiny-clip?zeroshot={tmp_path}/classes.txt"
    out = soup_of(spec, f"{tmp_path}/logs/*/epoch_2.pt", tmp_path / "out")
    soup = open_clip.create_model("tiny-clip", pretrained=str(out / "model.safetensors")).eval()
    with torch.inference_mode():
        expected = clip_logits(mean_of(zoo, clip))
        assert_same(clip_logits(soup), expected)
        assert_same(ray_soup.load_model(spec, str(out))(IMAGES), expected)
        assert_same(clip_logits(by_the_card(out, monkeypatch)), expected)


def test_the_published_checkpoints_of_model_soups_give_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The soup has no text tower, and its notes say so."""
    zoo = zoo_of(OfModelSoups, lambda model: model(IMAGES))
    for number, model in enumerate(zoo):
        torch.save(model.state_dict(), tmp_path / f"model_{number}.pt")
    spec = "open_clip:tiny-clip?classes=3&normalize=true"
    layout = describe(spec)
    ingredients = check_together(open_ingredients(str(tmp_path)), layout.state_shapes, layout.tied)
    left_out = ingredients[0].left_out
    assert "model.token_embedding.weight" not in left_out
    assert {"token_embedding.weight", "logit_scale", "text_projection"} <= set(left_out)
    out = soup_of(spec, f"{tmp_path}/model_*.pt", tmp_path / "out")
    assert set(load_file(out / "model.safetensors")) == set(layout.state_shapes)
    note = json.loads((out / "run.json").read_text())["notes"][-1]
    assert note == f"The text tower ({len(left_out)} tensors, such as {left_out[0]}) was left out: the model has none."
    with torch.inference_mode():
        expected = mean_of(zoo, OfModelSoups)(IMAGES)
        assert_same(ray_soup.load_model(spec, str(out))(IMAGES), expected)
        assert_same(by_the_card(out, monkeypatch)(IMAGES), expected)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_checkpoints_give_a_soup(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def make() -> nn.Module:
        return timm.create_model(name, num_classes=3)

    images = torch.randn(4, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    zoo = zoo_of(make, lambda model: model(images))
    write_with_timm(zoo, tmp_path / "runs")
    spec = f"timm:{name}?classes=3"
    out = soup_of(spec, f"{tmp_path}/runs/*/model_best.pth.tar", tmp_path / "out")
    soup = timm.create_model(name, num_classes=3, checkpoint_path=str(out / "model.safetensors")).eval()
    with torch.inference_mode():
        assert_same(soup(images), mean_of(zoo, make)(images))
        assert_same(ray_soup.load_model(spec, str(out))(images), soup(images))
        assert_same(by_the_card(out, monkeypatch)(images), soup(images))
    ema = soup_of(spec, f"{tmp_path}/runs/*/model_best.pth.tar?key=state_dict_ema", tmp_path / "ema")
    state = zoo[0].state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in load_file(ema / "model.safetensors").items())


def test_torchvision_checkpoints_give_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def make() -> nn.Module:
        return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)

    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    zoo = zoo_of(make, lambda model: model(images))
    for number, model in enumerate(zoo):  # as torchvision's references write them
        checkpoint = {"model": model.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=0.1)}
        torch.save(checkpoint, tmp_path / f"model_{number}.pth")
    spec = "torchvision:shufflenet_v2_x0_5?classes=3"
    out = soup_of(spec, f"{tmp_path}/*.pth", tmp_path / "out")
    soup = make().eval()
    soup.load_state_dict(load_file(out / "model.safetensors"))
    with torch.inference_mode():
        assert_same(soup(images), mean_of(zoo, make)(images))
        assert_same(ray_soup.load_model(spec, str(out))(images), soup(images))
        assert_same(by_the_card(out, monkeypatch)(images), soup(images))


def test_transformers_image_checkpoints_give_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded safetensors with an index; `transformers:FOLDER` is the first of them."""
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    zoo = zoo_of(vit, lambda model: model(pixel_values=IMAGES).logits)
    for number, model in enumerate(zoo):
        model.save_pretrained(tmp_path / "zoo" / f"run_{number}", max_shard_size="8KB")
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path / "zoo" / "run_0")
    assert (tmp_path / "zoo" / "run_1" / "model.safetensors.index.json").exists()
    spec = f"transformers:{tmp_path}/zoo/run_0"
    out = soup_of(spec, str(tmp_path / "zoo"), tmp_path / "out")
    with torch.inference_mode():
        expected = mean_of(zoo, vit)(pixel_values=IMAGES).logits
        soup = AutoModelForImageClassification.from_pretrained(out)
        assert_same(soup(pixel_values=IMAGES).logits, expected)
        assert_same(ray_soup.load_model(spec, str(out))(IMAGES), expected)
        assert_same(by_the_card(out, monkeypatch)(pixel_values=IMAGES).logits, expected)


def write_texts_zoo(zoo: list[nn.Module], words: Any, folder: Path) -> None:
    """Write `pytorch_model.bin` as older versions did, with a buffer that models no longer have; run_1 in two shards."""
    for number, model in enumerate(zoo):
        run_folder = folder / f"run_{number}"
        model.config.architectures = ["BertForSequenceClassification"]
        model.config.save_pretrained(run_folder)
        words.save_pretrained(run_folder)
        state = {"bert.embeddings.position_ids": torch.arange(16)[None], **model.state_dict()}
        parts = {"pytorch_model.bin": state}
        if number == 1:
            parts = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(state.items())[n - 1 :: 2]) for n in (1, 2)}
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (run_folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in parts.items():
            torch.save(part, run_folder / file)


def test_transformers_text_checkpoints_give_a_soup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = tokenizer(tmp_path / "words")
    how = {"padding": True, "truncation": True, "max_length": 16, "return_tensors": "pt"}
    inputs = words(TEXTS, **how)
    zoo = zoo_of(bert, lambda model: model(**inputs).logits[:, :3])
    write_texts_zoo(zoo, words, tmp_path / "zoo")
    spec = f"transformers:{tmp_path}/zoo/run_0"
    out = soup_of(spec, str(tmp_path / "zoo"), tmp_path / "out")
    preprocess = build(spec).preprocess
    assert preprocess is not None
    batch = torch.stack([preprocess(text) for text in TEXTS])
    with torch.inference_mode():
        expected = mean_of(zoo, bert)(**inputs).logits
        again = AutoTokenizer.from_pretrained(out)(TEXTS, **how)
        assert_same(AutoModelForSequenceClassification.from_pretrained(out)(**again).logits, expected)
        assert_same(ray_soup.load_model(spec, str(out))(batch), expected)
        assert_same(by_the_card(out, monkeypatch)(**inputs).logits, expected)
    baked = Path(bake_copy(out, tmp_path / "again").out)  # takes config and tokenizer from the soup itself
    assert (baked / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert (baked / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_mixed_dtypes_are_mixed_in_float64_and_written_in_the_widest(tmp_path: Path) -> None:
    zoo = zoo_of(vit, lambda model: model(pixel_values=IMAGES).logits, 3)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for number, (model, dtype) in enumerate(zip(zoo, dtypes, strict=True)):
        model.to(dtype).save_pretrained(tmp_path / f"run_{number}")
    out = soup_of(f"transformers:{tmp_path}/run_0", f"{tmp_path}/run_*", tmp_path / "out")
    for name, tensor in load_file(out / "model.safetensors").items():
        exact = sum(model.state_dict()[name].double() for model in zoo) / 3
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), exact, rtol=1e-6, atol=1e-12)

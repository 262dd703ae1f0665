"""Each library's own files in, and a soup that the library's own loader takes back."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ray_soup.blocks import layout_of
from ray_soup.cache import drained
from ray_soup.checkpoints import check_together, open_ingredient, open_ingredients
from ray_soup.errors import IngredientError, RecipeError
from ray_soup.finetune import finetune
from ray_soup.models import build, describe, fingerprint, load_pretrained, loaded
from ray_soup.pipeline import bake_again, run, verify
from ray_soup.recipe import load_recipe, make_recipe
from ray_soup.train import probe

pytestmark = pytest.mark.slow

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Logits = Callable[[nn.Module], torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)


def zoo_of(make: Callable[[], nn.Module], logits: Logits, count: int = 2) -> list[nn.Module]:
    """Models that were trained for two steps from one initialisation, on other labels each."""
    torch.manual_seed(0)
    init = make().state_dict()
    zoo = []
    for seed in range(count):
        model = make()
        model.load_state_dict(init)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        labels = torch.randint(3, (4,), generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits(model), labels).backward()
            optimizer.step()
        zoo.append(model.eval())
    return zoo


def mean_of(zoo: list[nn.Module], make: Callable[[], nn.Module]) -> nn.Module:
    """Their uniform soup, in memory."""
    states = [model.state_dict() for model in zoo]
    mean = {}
    for name, first in states[0].items():
        total = sum(state[name].double() for state in states)
        mean[name] = (total / len(states)).to(first.dtype) if first.is_floating_point() else first
    soup = make()
    soup.load_state_dict(mean)
    return soup.eval()


def soup_of(model: str, ingredients: Any, out: Path, **more: Any) -> Path:
    run(make_recipe({"method": "uniform", "model": model, "ingredients": ingredients, **more}), out)
    verify(out)
    return out


def by_the_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """What the line of Python in the model card loads, in the soup's folder."""
    import importlib

    line = (out / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    names = ("open_clip", "timm", "torchvision", "transformers", "safetensors.torch", "ray_soup.models")
    monkeypatch.chdir(out)
    space = {name.partition(".")[0]: importlib.import_module(name.partition(".")[0]) for name in names}
    importlib.import_module("safetensors.torch")
    made = eval(line, space)
    return (made if isinstance(made, nn.Module) else space["model"]).eval()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# open_clip


def clip() -> nn.Module:
    import open_clip

    return open_clip.create_model("tiny-clip", pretrained=None)


def clip_logits(model: nn.Module) -> torch.Tensor:
    import open_clip

    texts = open_clip.get_tokenizer("tiny-clip")(["a photo of a cat.", "a photo of a dog.", "a photo of a cow."])
    images, classes, scale = model(IMAGES, texts)
    return scale * images @ classes.T


def write_epochs(zoo: list[nn.Module], folder: Path) -> None:
    """As open_clip_train writes them from several GPUs."""
    for number, model in enumerate(zoo):
        (folder / f"run_{number}").mkdir(parents=True)
        optimizer = torch.optim.AdamW(model.parameters())
        model.zero_grad()
        clip_logits(model).sum().backward()
        optimizer.param_groups[0]["lr"] = 0.0
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.step()  # that there is a state of the optimizer, of the same shapes
        state = {f"module.{name}": tensor for name, tensor in before.items()}
        checkpoint = {"epoch": 2, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
        torch.save(checkpoint, folder / f"run_{number}" / "epoch_2.pt")


def test_open_clip_whole_checkpoints_give_a_zero_shot_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert_same(loaded(spec, str(out))(IMAGES), expected)
        assert_same(clip_logits(by_the_card(out, monkeypatch)), expected)
        two = build(f"{spec}&template=a {{}}.|the {{}}.").model.eval()
        assert two(IMAGES).shape == (4, 3)
    (tmp_path / "recipe.yaml").write_text("model: open_clip:tiny-clip?zeroshot=classes.txt\n")
    assert load_recipe(tmp_path / "recipe.yaml").model == spec
    for wrong, said in ((f"{spec}&template=a cat", "templates with {}"), (f"{spec}x", "cannot be read")):
        with pytest.raises(RecipeError, match=said):
            build(wrong)


class OfModelSoups(nn.Module):
    """As the published checkpoints of Model Soups are named: a CLIP without its `transformer`, and a head on features
    of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.model = clip()
        self.classification_head = nn.Linear(8, 3)
        del self.model.transformer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.encode_image(images)
        return self.classification_head(features / features.norm(dim=-1, keepdim=True))


def test_the_published_checkpoints_of_model_soups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text tower is left out, and said to be; with the tower but no head they do not fit."""
    zoo = zoo_of(OfModelSoups, lambda model: model(IMAGES))
    for number, model in enumerate(zoo):
        torch.save(model.state_dict(), tmp_path / f"model_{number}.pt")
    spec = "open_clip:tiny-clip?classes=3&normalize=true"
    ingredients, layout = open_ingredients(str(tmp_path)), describe(spec)
    check_together(ingredients, layout.state_shapes, layout.tied)
    assert "model.token_embedding.weight" not in ingredients[0].left_out
    assert {"token_embedding.weight", "logit_scale", "text_projection"} <= set(ingredients[0].left_out)
    out = soup_of(spec, f"{tmp_path}/model_*.pt", tmp_path / "out")
    assert set(load_file(out / "model.safetensors")) == set(layout.state_shapes)
    assert "The text tower" in json.loads((out / "run.json").read_text())["notes"][-1]
    with torch.inference_mode():
        expected = mean_of(zoo, OfModelSoups)(IMAGES)
        assert_same(loaded(spec, str(out))(IMAGES), expected)
        assert_same(by_the_card(out, monkeypatch)(IMAGES), expected)
    state = torch.load(tmp_path / "model_0.pt")
    for change in ({"extra.weight": torch.zeros(1)}, {"model.visual.extra": torch.zeros(1)}):
        torch.save({**state, **change}, tmp_path / "model_0.pt")
        with pytest.raises(IngredientError, match=r"model_0.pt does not fit:\n    not in the model: (visual\.)?extra"):
            check_together(open_ingredients(f"{tmp_path}/model_*.pt"), layout.state_shapes, layout.tied)


def test_open_clip_pretrained_weights_from_a_training_checkpoint(tmp_path: Path) -> None:
    zoo = zoo_of(clip, clip_logits, 1)
    write_epochs(zoo, tmp_path)
    spec = "open_clip:tiny-clip?classes=3"
    model = build(spec).model
    head = load_pretrained(model, spec, str(tmp_path / "run_0" / "epoch_2.pt"))
    assert head is model.head
    assert torch.equal(model.visual.conv1.weight, zoo[0].visual.conv1.weight)


def test_a_head_of_class_names_gives_the_logits_of_the_whole_clip(tmp_path: Path) -> None:
    write_epochs(zoo_of(clip, clip_logits, 1), tmp_path)
    source, names = str(tmp_path / "run_0" / "epoch_2.pt"), tmp_path / "classes.txt"
    names.write_text("cat\ndog\ncow\n")
    templates = ["a photo of a {}.", "the {}"]
    tuned = {"pretrained": source, "class_names": str(names), "templates": templates}

    def probed(spec: str) -> nn.Module:
        recipe = make_recipe({"model": spec, "data": {"train": "x.npz"}, "finetune": tuned})
        drained(probe(recipe, tmp_path / "init.safetensors"))
        return loaded(spec, str(tmp_path / "init.safetensors"))

    whole = loaded(f"open_clip:tiny-clip?zeroshot={names}&template={'|'.join(templates)}", source)
    with torch.inference_mode():
        assert_same(probed("open_clip:tiny-clip?classes=3&normalize=true")(IMAGES), whole(IMAGES))
    for spec, said in (
        ("open_clip:tiny-clip?classes=3", "takes image features of unit length"),
        ("open_clip:tiny-clip?classes=4&normalize=true", "names 3 classes; the model"),
    ):
        with pytest.raises(RecipeError, match=said):
            probed(spec)


# timm


def write_with_timm(zoo: list[nn.Module], folder: Path) -> None:
    """`model_best.pth.tar` by timm's own saver, with an EMA, the optimizer and the script's arguments."""
    from timm.utils import CheckpointSaver, ModelEmaV3

    for number, model in enumerate(zoo):
        (folder / str(number)).mkdir(parents=True)
        ema = ModelEmaV3(zoo[0])
        saver = CheckpointSaver(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            args=argparse.Namespace(model="test_vit", opt="sgd", betas=(0.9, 0.99)),
            model_ema=ema,
            checkpoint_dir=str(folder / str(number)),
            recovery_dir=str(folder / str(number)),
        )
        saver.save_checkpoint(0, metric=float(number))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert_same(loaded(spec, str(out))(images), soup(images))
        assert_same(by_the_card(out, monkeypatch)(images), soup(images))
    ema = soup_of(spec, f"{tmp_path}/runs/*/model_best.pth.tar?key=state_dict_ema", tmp_path / "ema")
    state = zoo[0].state_dict()
    assert all(torch.equal(tensor, state[n]) for n, tensor in load_file(ema / "model.safetensors").items())
    with pytest.raises(IngredientError, match=r"no tensors under the key 'x'; it has state_dict, state_dict_ema"):
        open_ingredient(f"{tmp_path}/runs/0/model_best.pth.tar?key=x")


# torchvision


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def make() -> nn.Module:
        return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)

    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    zoo = zoo_of(make, lambda model: model(images))
    for number, model in enumerate(zoo):  # as torchvision's references write them
        torch.save(
            {"model": model.state_dict(), "epoch": 1, "args": argparse.Namespace(lr=0.1)}, tmp_path / f"model_{number}.pth"
        )
    out = soup_of("torchvision:shufflenet_v2_x0_5?classes=3", f"{tmp_path}/*.pth", tmp_path / "out")
    soup = make().eval()
    soup.load_state_dict(load_file(out / "model.safetensors"))
    with torch.inference_mode():
        assert_same(soup(images), mean_of(zoo, make)(images))
        assert_same(loaded("torchvision:shufflenet_v2_x0_5?classes=3", str(out))(images), soup(images))
        assert_same(by_the_card(out, monkeypatch)(images), soup(images))


# transformers


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    ))  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ))  # fmt: skip


def tokenizer(folder: Path) -> Any:
    from transformers import BertTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very", ".", "book"]
    (folder / "words.txt").write_text("\n".join(words))
    made = BertTokenizer(vocab=str(folder / "words.txt"))
    (folder / "words.txt").unlink()
    return made


TEXTS = ["a very good film.", "bad", "a book .", "good good good good good good good good good good good good good"]


def test_transformers_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded safetensors with an index, in half precision; `transformers:FOLDER` is the first of them."""
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
        assert_same(loaded(spec, str(out))(IMAGES), expected)
        assert_same(by_the_card(out, monkeypatch)(pixel_values=IMAGES).logits, expected)
    image = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3))
    built = build(spec)
    assert torch.equal(built.preprocess(image), processor(image, return_tensors="pt")["pixel_values"][0])
    assert layout_of(built.model).state_shapes == layout_of(vit()).state_shapes
    assert build(f"{spec}?classes=7").model(IMAGES).shape == (4, 7)
    (tmp_path / "recipe.yaml").write_text("model: transformers:zoo/run_0\n")
    assert load_recipe(tmp_path / "recipe.yaml").model == spec


def test_transformers_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pytorch_model.bin` as older versions wrote it, whole and in shards, with the buffer they still had."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    words = tokenizer(tmp_path / "words")
    inputs = words(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
    zoo = zoo_of(bert, lambda model: model(**inputs).logits[:, :3])
    for number, model in enumerate(zoo):
        folder = tmp_path / "zoo" / f"run_{number}"
        model.config.architectures = ["BertForSequenceClassification"]
        model.config.save_pretrained(folder)
        words.save_pretrained(folder)
        state = {"bert.embeddings.position_ids": torch.arange(16)[None], **model.state_dict()}
        parts = {"pytorch_model.bin": state}
        if number == 1:
            parts = {f"pytorch_model-0000{n}-of-00002.bin": dict(list(state.items())[n - 1 :: 2]) for n in (1, 2)}
            index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, part in parts.items():
            torch.save(part, folder / file)
    spec = f"transformers:{tmp_path}/zoo/run_0"
    out = soup_of(spec, str(tmp_path / "zoo"), tmp_path / "out")
    built = build(spec)
    batch = torch.stack([built.preprocess(text) for text in TEXTS])
    assert (batch.shape, batch.dtype) == ((4, 2, 16), torch.int64)
    with torch.inference_mode():
        expected = mean_of(zoo, bert)(**inputs).logits
        again = AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, truncation=True, max_length=16, return_tensors="pt")
        assert_same(AutoModelForSequenceClassification.from_pretrained(out)(**again).logits, expected)
        assert_same(loaded(spec, str(out))(batch), expected)
        assert_same(by_the_card(out, monkeypatch)(**inputs).logits, expected)
    again = bake_again(out, tmp_path / "again").out  # takes what lies beside the model from the soup itself
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    assert build(f"{spec}?length=5").preprocess(TEXTS[0]).shape == (2, 5)
    with pytest.raises(RecipeError, match="length is 99 and the model takes 16 tokens at most"):
        build(f"{spec}?length=99")


def test_transformers_pretrained_without_its_head(tmp_path: Path) -> None:
    """The bare model's own file, whose names lack the prefix, fills all but the head."""
    model = vit()
    model.vit.save_pretrained(tmp_path / "bare")
    spec = f"transformers:{tmp_path}/bare?classes=4"
    built = build(spec)
    head = load_pretrained(built.model, spec, str(tmp_path / "bare"))
    assert (head is built.model.classifier, head.out_features) == (True, 4)
    assert torch.equal(built.model.vit.layernorm.weight, model.vit.layernorm.weight)


# Lightning


def lightning(state: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    """What a Lightning .ckpt holds, whose module has the model as `self.model`."""
    return {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "best_model_path": "x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}, **more,
    }  # fmt: skip


def test_lightning_checkpoints_and_the_way_out_of_a_pickle(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))

    zoo = zoo_of(make, lambda model: model(torch.ones(4, 5)))
    for number, model in enumerate(zoo):
        torch.save(lightning(model.state_dict()), tmp_path / f"epoch=3-step={number}.ckpt")
    ingredients = open_ingredients(f"{tmp_path}/*.ckpt")
    assert [i.name for i in ingredients] == ["epoch=3-step=0", "epoch=3-step=1"]
    check_together(ingredients, {name: tuple(t.shape) for name, t in zoo[0].state_dict().items()})
    assert torch.equal(ingredients[1].read("1.bias"), zoo[1][1].bias)

    file = tmp_path / "refused.ckpt"
    torch.save(lightning(zoo[0].state_dict(), hyper_parameters={"model": nn.ReLU()}), file)
    with pytest.raises(
        IngredientError, match=r"holds 'torch\.nn\.modules\.activation\.ReLU'.*If you trust the file"
    ) as said:
        open_ingredient(str(file))
    line = str(said.value).partition('python -c "')[2].removesuffix('"')
    exec(line)  # what the message says does what it says
    converted = open_ingredient(str(tmp_path / "refused.state_dict.pt"))
    assert converted.match(zoo[0].state_dict(), {})


# All of them


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_learned_coefficients_and_a_zoo_of_texts(tmp_path: Path) -> None:
    """finetune, then learn, with shards: what the actors do with a model of transformers."""
    from transformers import BertForSequenceClassification

    words, model = tokenizer(tmp_path / "m"), bert()
    words.save_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    random = np.random.default_rng(0)
    for name in ("train", "fit", "test"):
        ids = random.integers(5, 12, (60, 8))
        inputs = np.stack([ids, np.ones_like(ids)], axis=1)
        np.savez(tmp_path / f"{name}.npz", images=inputs, labels=(ids == 5).any(1) + (ids == 6).any(1).astype(np.int64))
    spec = f"transformers:{tmp_path}/m"
    data = {name: str(tmp_path / f"{name}.npz") for name in ("train", "fit", "test")}
    ways = {"lr": 1e-2, "wd": 0.0, "epochs": 2, "label_smoothing": 0.0, "mixup": 0.0, "shift": 0, "randaugment": 0}
    recipe = {"model": spec, "data": data, "finetune": {"trials": 2, "init": str(tmp_path / "m"), **ways}}
    finetune(make_recipe(recipe), tmp_path / "zoo")
    for actors in ({"replicas": 1, "shards": 1, "cpus": 1}, {"replicas": 1, "shards": 2, "cpus": 1}):
        learning = {"ingredients": str(tmp_path / "zoo"), "learn": {"epochs": 1}, "actors": actors, "precision": "float32"}
        out = run(make_recipe({**recipe, **learning}), tmp_path / f"out{actors['shards']}").out
        verify(out)
        soup = BertForSequenceClassification.from_pretrained(out)
        test = np.load(tmp_path / "test.npz")
        ids, mask = torch.from_numpy(test["images"]).unbind(1)
        with torch.inference_mode():
            loss = nn.functional.cross_entropy(soup(ids, mask).logits, torch.from_numpy(test["labels"])).item()
        row = json.loads((out / "results.jsonl").read_text())
        assert row["test_nll"] == pytest.approx(loss, rel=1e-4)


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


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("timm:test_vitt?classes=3", "timm has no 'test_vitt'; did you mean test_vit"),
        ("torchvision:resnet5?classes=3", "torchvision has no 'resnet5'; did you mean resnet50 or resnet"),
        ("torchvision:fcn_resnet50?classes=3", "torchvision has no 'fcn_resnet50'"),
        ("open_clip:ViT-B-23?classes=3", "open_clip has no 'ViT-B-23'; did you mean ViT-B-32"),
        ("open_clip:tiny-clip", "expected a number of classes, as in open_clip:tiny-clip"),
        ("timm:test_vit?classes=x", "expected a number of classes, as in timm:test_vit"),
        ("timm:test_vit?class=3", "has the option class; known are classes"),
        ("open_clip:tiny-clip?classes=3&normalize=1", "expected normalize=true or normalize=false"),
        ("transformers:tests", "tests has no config.json that transformers can read"),
        ("keras:x?classes=3", "expected open_clip:, timm: or torchvision:NAME"),
    ],
)
def test_a_model_that_there_is_not(spec: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        build(spec)


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeError, match=r"pip install 'ray_soup\[timm\]'"):
        build("timm:test_vit?classes=3")


def test_a_model_that_is_no_classifier(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config

    Wav2Vec2Config(architectures=["Wav2Vec2ForCTC"]).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="is Wav2Vec2ForCTC; expected a model for image classification"):
        build(f"transformers:{tmp_path}")


@pytest.mark.parametrize("spec", ["open_clip:tiny-clip?classes=3", "timm:test_vit?classes=3",
                                  "torchvision:squeezenet1_1?classes=3", "torchvision:inception_v3?classes=3"])  # fmt: skip
def test_a_description_has_no_numbers_and_a_fingerprint_is_that_of_any_process(spec: str) -> None:
    built = build(spec)
    assert describe(spec) == layout_of(built.model)
    assert " at 0x" not in repr(built.preprocess)
    assert fingerprint(spec, built) == fingerprint(spec, build(spec))
    image = Image.fromarray(np.zeros((40, 50, 3), dtype=np.uint8))
    assert built.preprocess(image).dtype == torch.float32


def test_the_network_is_never_asked_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    for model in (vit(), bert()):
        model.save_pretrained(tmp_path / "m")
        assert build(f"transformers:{tmp_path}/m").preprocess is None

"""Users of open_clip, timm, torchvision and Lightning: images of three colors, and a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_soup.io.ingredient import open_ingredient
from tests.ray.own_loops import Figures, Loop, assert_figures, image_folders
from tests.unit.task.library_models import TINY_CLIP
from tests.users.steps import compared, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


def loop_of(names: dict[str, Any]) -> Loop:
    """The user's function `logits_of(model)`, which returns all logits and labels, as figures."""

    def loop(model: nn.Module) -> Figures:
        logits, labels = names["logits_of"](model)
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        return Figures(loss, len(labels), (logits.argmax(1) == labels).numpy())

    return loop


# open_clip: trained on captions, used for zero-shot classification

TRAIN_CLIP = """
import copy
import os

import open_clip
import torch
from torchvision.datasets import ImageFolder

first, preprocess, _ = open_clip.create_model_and_transforms("local-dir:clip")
train = ImageFolder("train", preprocess)
captions = open_clip.get_tokenizer("local-dir:clip")([f"a photo of a {name}." for name in train.classes])
contrast = open_clip.ClipLoss()
for k, name in enumerate("abc"):
    model = copy.deepcopy(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + k))
    for images, labels in torch.utils.data.DataLoader(train, 9, shuffle=True):
        optimizer.zero_grad()
        contrast(*model(images, captions[labels])).backward()
        optimizer.step()
    os.makedirs(f"logs/{name}/checkpoints")
    checkpoint = {"epoch": 1, "name": name, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, f"logs/{name}/checkpoints/epoch_1.pt")
"""
USE_CLIP = """
import open_clip
import torch
from torchvision.datasets import ImageFolder


def load(file):
    model = open_clip.create_model("local-dir:clip")
    open_clip.load_checkpoint(model, file)
    return model.eval()


@torch.inference_mode()
def logits_of(model):
    _, _, preprocess = open_clip.create_model_and_transforms("local-dir:clip")
    test = ImageFolder("test", preprocess)
    texts = open_clip.get_tokenizer("local-dir:clip")([f"a photo of a {name}." for name in test.classes])
    classes = model.encode_text(texts, normalize=True)
    found = []
    for images, labels in torch.utils.data.DataLoader(test, 5):
        found.append((model.logit_scale.exp() * model.encode_image(images, normalize=True) @ classes.T, labels))
    return [torch.cat(parts) for parts in zip(*found)]


zoo = [load(f"logs/{run}/checkpoints/epoch_1.pt") for run in "abc"]
"""


def test_a_user_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folders(tmp_path)
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": {}}))
    (tmp_path / "classes.txt").write_text("blue\ngreen\nred\n")
    script(tmp_path, TRAIN_CLIP)
    made = compared(tmp_path, f"""
        model: open_clip:local-dir:{tmp_path}/clip?zeroshot={tmp_path}/classes.txt&template=a photo of a {{}}.
        ingredients: logs
        data: {{fit: fit, select: 0.4, test: test}}
        """)  # fmt: skip
    names = script(tmp_path, USE_CLIP)
    monkeypatch.chdir(tmp_path)
    assert_figures(made, names["zoo"], names["load"]("soup/model.safetensors"), loop_of(names))


# timm: an EMA at 48 pixels with its own mean and standard deviation

TRAIN_TIMM = """
import argparse
import copy
import os

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.utils import CheckpointSaver, ModelEmaV3

chosen = dict(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.25), crop_pct=0.9, interpolation="bilinear")
loader_options = dict(input_size=(3, 48, 48), batch_size=9, use_prefetcher=False, num_workers=0, **chosen)
train = list(create_loader(create_dataset("", root="train"), **loader_options))
first = timm.create_model("test_resnet", num_classes=3)
for k in range(3):
    model = copy.deepcopy(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 * (1 + k))
    ema = ModelEmaV3(model, decay=0.5)
    for images, labels in train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        ema.update(model)
    options = argparse.Namespace(model="test_resnet", img_size=48, input_size=None, num_classes=3, **chosen)
    folder = f"runs/{k}"
    os.makedirs(folder)
    saver = CheckpointSaver(model, optimizer, args=options, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(0, metric=1.0)
"""
USE_TIMM = """
import timm
import torch
from timm.data import create_dataset, create_loader

loader = create_loader(
    create_dataset("", root="test"), input_size=(3, 48, 48), batch_size=5, use_prefetcher=False, num_workers=0,
    mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.25), crop_pct=0.9, interpolation="bilinear",
)


@torch.inference_mode()
def logits_of(model):
    found = [(model(images), labels) for images, labels in loader]
    return [torch.cat(parts) for parts in zip(*found)]


def load(file):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.load_checkpoint(model, file, use_ema=True, weights_only=False)
    return model.eval()


zoo = [load(f"runs/{k}/model_best.pth.tar") for k in range(3)]
"""


def test_a_user_of_timm_at_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folders(tmp_path)
    script(tmp_path, TRAIN_TIMM)
    made = compared(tmp_path, """
        model: timm:test_resnet?classes=3
        ingredients: runs/*/model_best.pth.tar?key=state_dict_ema
        data: {fit: fit, select: 0.4, test: test}
        """)  # fmt: skip
    names = script(tmp_path, USE_TIMM)
    monkeypatch.chdir(tmp_path)
    assert_figures(made, names["zoo"], names["load"]("soup/model.safetensors"), loop_of(names))


# torchvision: a ResNet at 64 pixels, as its reference scripts train and save it

TRAIN_TORCHVISION = """
import copy

import torch
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

normal = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
preprocess = transforms.Compose([transforms.Resize(72), transforms.CenterCrop(64), transforms.ToTensor(), normal])
first = models.resnet18(num_classes=3)
for k in range(3):
    model = copy.deepcopy(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4 * (1 + k))
    data = torch.utils.data.DataLoader(ImageFolder("train", preprocess), 9, shuffle=True)
    for images, labels in data:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}, f"model_{k}.pth")
"""
USE_TORCHVISION = """
import torch
from safetensors.torch import load_file
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

normal = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
preprocess = transforms.Compose([transforms.Resize(72), transforms.CenterCrop(64), transforms.ToTensor(), normal])
loader = torch.utils.data.DataLoader(ImageFolder("test", preprocess), 5)


@torch.inference_mode()
def logits_of(model):
    found = [(model(images), labels) for images, labels in loader]
    return [torch.cat(parts) for parts in zip(*found)]


def load(state):
    model = models.resnet18(num_classes=3)
    model.load_state_dict(state)
    return model.eval()


soup = load(load_file("soup/model.safetensors"))
zoo = [load(torch.load(f"model_{k}.pth")["model"]) for k in range(3)]
"""


def test_a_user_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folders(tmp_path)
    script(tmp_path, TRAIN_TORCHVISION)
    made = compared(tmp_path, """
        model: torchvision:resnet18?classes=3&resize_size=72&crop_size=64
        ingredients: "*.pth"
        data: {fit: fit, select: 0.4, test: test}
        """)  # fmt: skip
    names = script(tmp_path, USE_TORCHVISION)
    monkeypatch.chdir(tmp_path)
    assert_figures(made, names["zoo"], names["soup"], loop_of(names))


# Lightning: the average of a compiled network, a criterion with weights, metrics; the model is a function of the user's own

NETWORK = """
from torch import nn


def network():
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
"""
LIGHTNING = """
import numpy as np
import pytorch_lightning as lightning
import torch
import torchmetrics.classification as metrics
from lit_network import network
from torch.utils.data import DataLoader, TensorDataset


class Lit(lightning.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.compile(network(), backend="eager")
        self.criterion = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 1.0, 1.0]))
        self.train_acc = metrics.MulticlassAccuracy(4)
        self.train_acc.persistent(True)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, number):
        output = self(batch[0])
        self.train_acc(output, batch[1])
        return self.criterion(output, batch[1])

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def data(name):
    arrays = np.load(f"{name}.npz")
    return TensorDataset(torch.from_numpy(arrays["features"]), torch.from_numpy(arrays["targets"]))


quiet = dict(accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
"""
TRAIN_LIGHTNING = """
for seed, (name, count) in enumerate((("fit", 70), ("test", 33), ("train", 80))):
    x = np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32)
    np.savez(f"{name}.npz", features=x, targets=x[:, :4].argmax(1))
first = Lit(0.1).state_dict()
for k in range(3):
    model = Lit(1e-3 * (1 + k))
    model.load_state_dict(first)
    average = lightning.callbacks.EMAWeightAveraging(decay=0.5)
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=".", log_every_n_steps=1, callbacks=[average], **quiet)
    trainer.fit(model, DataLoader(data("train"), 16, shuffle=True))
"""
USE_LIGHTNING = """
from pathlib import Path

from safetensors.torch import load_file

files = sorted(Path("lightning_logs").glob("*/checkpoints/*.ckpt"))
zoo = [Lit.load_from_checkpoint(file) for file in files]
soup = Lit.load_from_checkpoint(files[0])
soup.net._orig_mod.load_state_dict(load_file("soup/model.safetensors"))


def logits_of(model):
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, **quiet)
    return torch.cat(trainer.predict(model, DataLoader(data("test"), 8))), data("test").tensors[1]
"""


def test_a_user_of_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lit_network.py").write_text(NETWORK)
    script(tmp_path, LIGHTNING + TRAIN_LIGHTNING)
    made = compared(tmp_path, """
        model: lit_network:network
        ingredients: lightning_logs
        data: {fit: fit.npz, select: 0.4, test: test.npz}
        """)  # fmt: skip
    assert any("criterion.*, train_acc.*" in note for note in made[1].notes)
    assert any("its `state_dict` is the average of the weights over the training" in note for note in made[1].notes)
    names = script(tmp_path, LIGHTNING + USE_LIGHTNING)
    for model, file in zip(names["zoo"], names["files"], strict=True):
        assert {"net._orig_mod.0.weight", "criterion.weight", "train_acc.tp"} <= set(model.state_dict())
        last = torch.load(tmp_path / file, weights_only=False)["current_model_state"]["net._orig_mod.0.weight"]
        opened = open_ingredient(f"{tmp_path / file}?key=current_model_state")
        assert torch.equal(opened.read("net._orig_mod.0.weight"), last.flatten())
        assert not torch.equal(model.state_dict()["net._orig_mod.0.weight"], last)
    monkeypatch.chdir(tmp_path)
    assert_figures(made, names["zoo"], names["soup"], loop_of(names))

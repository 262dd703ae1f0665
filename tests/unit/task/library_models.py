"""Tiny models of each library, fine-tuned a little, and their checkpoints as the libraries' own scripts write them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

TINY_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = ["a very good film.", "bad", "a book .", "good good good good good good good good good good good good good"]
Logits = Callable[[nn.Module], torch.Tensor]


def add_tiny_clip(folder: Path) -> None:
    """Let open_clip know the architecture `tiny-clip`."""
    import open_clip

    (folder / "tiny-clip.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(folder)


def zoo_of(make: Callable[[], nn.Module], logits: Logits, count: int = 2) -> list[nn.Module]:
    """Train models for two steps from one initialization, each on other labels."""
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


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(ours).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def clip() -> nn.Module:
    import open_clip

    return open_clip.create_model("tiny-clip", pretrained=None)


def clip_logits(model: nn.Module) -> torch.Tensor:
    import open_clip

    texts = open_clip.get_tokenizer("tiny-clip")(["a photo of a cat.", "a photo of a dog.", "a photo of a cow."])
    images, classes, scale = model(IMAGES, texts)
    return scale * images @ classes.T


def write_epochs(zoo: list[nn.Module], folder: Path) -> None:
    """Write run_N/epoch_2.pt as open_clip_train does on several GPUs."""
    for number, model in enumerate(zoo):
        (folder / f"run_{number}").mkdir(parents=True)
        optimizer = torch.optim.AdamW(model.parameters())
        model.zero_grad()
        clip_logits(model).sum().backward()
        optimizer.param_groups[0]["lr"] = 0.0
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer.step()  # gives the optimizer a state of tensors of the same shapes
        state = {f"module.{name}": tensor for name, tensor in before.items()}
        checkpoint = {"epoch": 2, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
        torch.save(checkpoint, folder / f"run_{number}" / "epoch_2.pt")


class OfModelSoups(nn.Module):
    """A classifier whose checkpoints have the names of those published with Model Soups.

    They hold a CLIP without its `transformer`, and a head on features of unit length.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = clip()
        self.classification_head = nn.Linear(8, 3)
        del self.model.transformer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.model.encode_image(images)
        return self.classification_head(features / features.norm(dim=-1, keepdim=True))


def write_with_timm(zoo: list[nn.Module], folder: Path) -> None:
    """Write N/model_best.pth.tar by timm's own saver, with an EMA, the optimizer and the script's arguments."""
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
    made = BertTokenizer(str(folder / "words.txt"))
    (folder / "words.txt").unlink()
    return made


def questions() -> nn.Module:
    from transformers import BertConfig, BertForQuestionAnswering

    return BertForQuestionAnswering(BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
    ))  # fmt: skip


def write_questions(folder: Path) -> None:
    """Write `base-model`, checkpoints below `runs`, and rows of questions and answers, two of which are cut off."""
    tokenizer(folder / "words").save_pretrained(folder / "base-model")
    questions().save_pretrained(folder / "base-model")
    for number in range(3):
        torch.manual_seed(number)
        questions().save_pretrained(folder / f"runs/{number}/checkpoint-500")
    words = ["good", "bad", "film", "a", "very", "book"]
    for seed, name in enumerate(("heldout", "test")):
        random, rows = np.random.default_rng(seed), []
        for n in range(24):
            context = [words[k] for k in random.integers(6, size=40 if n in (3, 5) else 9)]
            first = 30 if n in (3, 5) else int(random.integers(7))
            start = len(" ".join(context[:first])) + (first > 0)
            row = {"question": "good or bad ?", "context": " ".join(context), "answer": " ".join(context[first : first + 2])}
            rows.append(json.dumps({**row, "start": start}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")


def lightning(state: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
    """What a .ckpt of Lightning holds, whose module has the model as `self.model`."""
    return {
        "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5), "best_model_path": "x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [], "hparams_name": "kwargs", "hyper_parameters": {"lr": 0.1}, **more,
    }  # fmt: skip

"""A tiny model and random examples for each objective; the models take and return what models of libraries do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ray_soup.task.objective import IGNORED, Objective

CLASSES, TOKENS, SIDE = 5, 14, 6
Arrays = dict[str, np.ndarray]


class Shapes(nn.Module):
    """Logits [n, 5] of images and a number by keyword, first in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image, self.of_size = nn.Linear(SIDE * SIDE, 8), nn.Linear(1, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, size: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.tanh(self.of_image(image.flatten(1)) + self.of_size(size[:, None]))
        return self.head(features), features


@dataclass
class TokenOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Tokens(nn.Module):
    """Logits [n, tokens, 5] of token ids and an attention mask by keyword; each token sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(CLASSES, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.embed(input_ids) * attention_mask[..., None]
        x = x.cumsum(1) / attention_mask.cumsum(1).clamp(min=1)[..., None]
        return TokenOutput(None, self.head(torch.tanh(self.hidden(x))))


class TokensAsDictionary(Tokens):
    """The same, as the ModelOutput of transformers is: a dictionary."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return {"loss": None, "logits": super().forward(input_ids, attention_mask).logits}


class Pixels(nn.Module):
    """Logits [n, 5, H, W] as `out` and as `aux`, as the segmentation models of torchvision return them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.aux = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.tanh(self.conv(images))
        return {"out": self.head(x), "aux": self.aux(x)}


class Flat(nn.Module):
    """Outputs [n, outputs] of [n, 6]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(6, 8), nn.Linear(8, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(x)))


class TwoHeads(nn.Module):
    """Logits [n, 5] and a number [n], as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.of_class, self.of_number = nn.Linear(6, 8), nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.tanh(self.hidden(x))
        return self.of_class(features), self.of_number(features)[:, 0]


def labels_model() -> nn.Module:
    return Flat(CLASSES)


def one_number() -> nn.Module:
    return Flat(1)


def counts_model() -> nn.Module:
    return Flat(2)


class Poisson(Objective):
    """Counts: outputs are the logarithms of rates [n, 2], targets int [n, 2]."""

    name = "poisson"
    unit = "count"

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        return (outputs.exp() - targets * outputs).sum(1)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.full((len(targets),), 2)


class ClassAndNumber(Objective):
    """A class and a number for each example: outputs [n, 5 + 1], targets float [n, 2]; the class counts twice."""

    name = "class_and_number"

    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        logits, number = model(inputs)
        return torch.cat([logits, number[:, None]], 1)

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        of_class = F.cross_entropy(outputs[:, :CLASSES], targets[:, 0].long(), reduction="none")
        return 2 * of_class + (outputs[:, CLASSES] - targets[:, 1]) ** 2

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return outputs[:, :CLASSES].argmax(1) == targets[:, 0]

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"top-2": in_top_2(outputs, targets), "distance": (outputs[:, CLASSES] - targets[:, 1]).abs()}


def in_top_2(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs[:, :CLASSES].topk(2).indices == targets[:, :1]).any(1)


# Examples


def images_with_sizes(count: int, random: np.random.Generator) -> Arrays:
    image = random.standard_normal((count, SIDE, SIDE)).astype(np.float32)
    size = random.random(count).astype(np.float32)
    return {"image": image, "size": size, "labels": random.integers(CLASSES, size=count)}


def sequences(count: int, random: np.random.Generator) -> Arrays:
    """Sequences of 8 to 14 tokens, of which some, and in row 3 all, are not scored."""
    lengths = random.integers(8, TOKENS + 1, size=count)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    targets = random.integers(CLASSES, size=(count, TOKENS))
    targets[(mask == 0) | (random.random(mask.shape) < 0.3)] = IGNORED
    targets[3] = IGNORED
    return {"input_ids": random.integers(CLASSES, size=mask.shape) * mask, "attention_mask": mask, "labels": targets}


def next_tokens(count: int, random: np.random.Generator) -> Arrays:
    found = sequences(count, random)
    following = np.roll(found["input_ids"], -1, axis=1)
    last = np.roll(found["attention_mask"], -1, axis=1) == 0
    last[:, -1] = True
    return {**found, "labels": np.where(last, IGNORED, following)}


def segmented(count: int, random: np.random.Generator) -> Arrays:
    masks = random.integers(CLASSES, size=(count, SIDE, SIDE)).astype(np.uint8)
    masks[random.random(masks.shape) < 0.2] = 255
    return {"images": random.standard_normal((count, 3, SIDE, SIDE)).astype(np.float32), "labels": masks}


def labeled(count: int, random: np.random.Generator) -> Arrays:
    """Labels of 0 and 1, and -1 where they are not known."""
    targets = random.integers(-1, 2, size=(count, CLASSES)).astype(np.int8)
    return {"features": random.standard_normal((count, 6)).astype(np.float32), "targets": targets}


def numbers(count: int, random: np.random.Generator) -> Arrays:
    targets = random.standard_normal(count)
    targets[3] = np.nan
    return {"features": random.standard_normal((count, 6)).astype(np.float32), "targets": targets}


def counted(count: int, random: np.random.Generator) -> Arrays:
    return {"x": random.standard_normal((count, 6)).astype(np.float32), "targets": random.integers(9, size=(count, 2))}


def classes_and_numbers(count: int, random: np.random.Generator) -> Arrays:
    targets = np.stack([random.integers(CLASSES, size=count), random.standard_normal(count)], 1).astype(np.float32)
    return {"x": random.standard_normal((count, 6)).astype(np.float32), "targets": targets}


# Their losses, as torch computes them: [n], summed over the units


def by_units(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of classes in the second dimension."""
    found = F.cross_entropy(outputs, targets, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing)
    return found.flatten(1).sum(1)


def by_tokens(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    each = [
        F.cross_entropy(logits, own, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)
        for logits, own in zip(outputs, targets, strict=True)
    ]
    return torch.stack(each)


def by_labels(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    pairs = zip(outputs, targets.to(outputs.dtype), strict=True)
    return torch.stack([F.binary_cross_entropy_with_logits(o[t >= 0], t[t >= 0], reduction="sum") for o, t in pairs])


def by_numbers(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    pairs = zip(outputs, targets.view(outputs.shape).to(outputs.dtype), strict=True)
    return torch.stack([F.mse_loss(o[~t.isnan()], t[~t.isnan()], reduction="sum") for o, t in pairs])


def by_counts(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.poisson_nll_loss(outputs, targets, reduction="none").sum(1)


def by_heads(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    each = [
        2 * F.cross_entropy(logits, target[0].long()) + F.mse_loss(number, target[1].to(number.dtype))
        for logits, number, target in zip(outputs[:, :-1], outputs[:, -1], targets, strict=True)
    ]
    return torch.stack(each)


def by_class(outputs: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)


@dataclass(frozen=True)
class Kind:
    """A task."""

    objective: str
    build: Callable[[], nn.Module]
    arrays: Callable[[int, np.random.Generator], Arrays]
    losses: Callable[..., torch.Tensor]
    """Losses [n] of outputs [n, ...], targets and label smoothing."""
    units: Callable[[torch.Tensor], torch.Tensor] = lambda targets: (targets != IGNORED).flatten(1).sum(1)
    """The number of units of each example that are scored, [n]."""
    smooth: bool = True

    @property
    def is_scaled(self) -> bool:
        """Whether a factor multiplies the outputs."""
        return self.objective != "regression" and not self.objective.startswith("tests.kinds:")

    @property
    def model(self) -> str:
        return f"tests.kinds:{self.build.__name__}"

    def outputs(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
        if isinstance(model, TwoHeads):
            return torch.cat([found[0], found[1][:, None]], 1)
        if isinstance(found, dict):
            found = found.get("logits", found.get("out"))
        return found[0] if isinstance(found, tuple) else getattr(found, "logits", found)

    def values(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """A recipe for what `write` wrote into a folder."""
        return {
            "ingredients": str(folder / "zoo" / "*.safetensors"),
            "model": self.model,
            "objective": self.objective,
            "data": {"fit": str(folder / "fit.npz"), "select": 0.3, "test": str(folder / "test.npz")},
            "learn": {"batch_size": 13, "epochs": 2},
            "actors": {"replicas": 1, "shards": 1, "cpus": 1},
            "directions": {"dtype": "float32"},
            "precision": "float32",
            **changes,
        }

    def write(self, folder: Path, count: int = 4, examples: int = 60) -> None:
        """Write `count` models near each other, and examples to learn and test on."""
        (folder / "zoo").mkdir()
        random = np.random.default_rng(0)
        for name, size in (("fit", examples), ("test", examples // 2)):
            np.savez(folder / f"{name}.npz", **self.arrays(size, random))
        torch.manual_seed(0)
        trunk = self.build().state_dict()
        for k in range(count):
            state = {n: t + 0.2 * torch.randn_like(t) if t.is_floating_point() else t for n, t in trunk.items()}
            save_file(state, folder / "zoo" / f"model_{k}.safetensors")


def _known(targets: torch.Tensor) -> torch.Tensor:
    return (targets >= 0).sum(1)


def _one_each(targets: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(targets))


KINDS = {
    "classification": Kind("auto", Shapes, images_with_sizes, by_class, _one_each),
    "token_classification": Kind("token_classification", Tokens, sequences, by_tokens),
    "masked_lm": Kind("masked_lm", TokensAsDictionary, sequences, by_tokens),
    "causal_lm": Kind("causal_lm", TokensAsDictionary, next_tokens, by_tokens),
    "segmentation": Kind("segmentation", Pixels, segmented, by_units),
    "multi_label": Kind("multi_label", labels_model, labeled, by_labels, _known, False),
    "regression": Kind("regression", one_number, numbers, by_numbers, lambda t: (~t.isnan()).long(), False),
    "two_heads": Kind(
        "tests.kinds:ClassAndNumber", TwoHeads, classes_and_numbers, by_heads, lambda t: torch.ones(len(t)), False
    ),
    "own": Kind("tests.kinds:Poisson", counts_model, counted, by_counts, lambda t: torch.full((len(t),), 2), False),
}

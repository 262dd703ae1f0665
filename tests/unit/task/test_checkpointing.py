"""Gradient checkpointing: the same outputs and gradients, from fewer saved activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.task.checkpointing import checkpoint_layers, repeated_layers
from ray_soup.task.models import build
from tests.tiny import build as tiny
from tests.unit.task.language_models import bert_for, gpt2, llama, saved

TEXT = torch.stack([torch.arange(14).view(2, 7), torch.ones(2, 7, dtype=torch.int64)], 1)
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def saved_bytes(model: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Outputs, gradients, and the bytes that the forward pass keeps for the backward pass, parameters apart."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(inputs)
    outputs.square().mean().backward()
    return outputs.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, sum(kept.values())


def language_model(make: Callable[..., nn.Module], folder: Path, **more: Any) -> nn.Module:
    return build(saved(make(**more), None, folder / "m")).model


MODELS: dict[str, tuple[Callable[[Path], nn.Module], torch.Tensor, int]] = {
    "llama": (lambda folder: language_model(llama, folder), TEXT, 2),
    "gpt2": (lambda folder: language_model(gpt2, folder), TEXT, 2),
    "bert": (lambda folder: language_model(bert_for, folder, task="ForMaskedLM"), TEXT, 2),
    "open_clip": (lambda folder: build("open_clip:ViT-S-32-alt?classes=5&image_size=64").model, IMAGES, 12),
    "torchvision": (lambda folder: build("torchvision:resnet18?classes=5").model, IMAGES, 8),
}


SLOW = ("open_clip", "torchvision")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS])
def test_outputs_and_gradients_are_the_same(tmp_path: Path, name: str) -> None:
    make, inputs, count = MODELS[name]
    model = make(tmp_path).eval()
    expected, gradients, before = saved_bytes(model, inputs)
    assert len(list(repeated_layers(model))) == count
    checkpoint_layers(model, name)
    found, own, after = saved_bytes(model, inputs)
    assert torch.equal(found, expected)
    assert all(torch.equal(own[parameter], gradient) for parameter, gradient in gradients.items())
    assert after < 0.7 * before
    print(name, before, after)


def test_a_classifier_with_a_cache_of_keys_is_checkpointed_too(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
        pad_token_id=0,
    )  # fmt: skip
    model = build(saved(LlamaForSequenceClassification(config), None, tmp_path / "m")).model.eval()
    expected, gradients, _ = saved_bytes(model, TEXT)
    checkpoint_layers(model, "llama")
    found, own, _ = saved_bytes(model, TEXT)
    torch.testing.assert_close(found, expected)
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(own[parameter], gradient)


def test_a_model_without_repeated_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(RecipeError, match=r"learn\.gradient_checkpointing is true, and a:b has no repeated layers"):
        checkpoint_layers(model, "a:b")
    assert list(repeated_layers(tiny())) == []

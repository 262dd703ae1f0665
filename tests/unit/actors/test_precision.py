"""Precision and micro-batches of forward and backward passes."""

from __future__ import annotations

import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ray_soup.actors.precision import autocast, choose_precision, micro_batch_size
from ray_soup.recipe import make_recipe
from tests import tiny


class Slower(torch.nn.Module):
    """A layer that sleeps in one precision."""

    def __init__(self, in_bfloat16: bool) -> None:
        super().__init__()
        self.layer, self.in_bfloat16 = torch.nn.Linear(2, 2), in_bfloat16

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu") == self.in_bfloat16:
            time.sleep(0.2)
        return self.layer(images)


@pytest.mark.parametrize(("in_bfloat16", "faster"), [(True, "float32"), (False, "bfloat16")])
def test_auto_chooses_the_precision_that_is_faster_on_this_cpu(
    monkeypatch: pytest.MonkeyPatch, in_bfloat16: bool, faster: str
) -> None:
    model, images = Slower(in_bfloat16), torch.zeros(3, 2)
    for instructions, asked, found in ((True, "auto", faster), (False, "auto", "float32"), (True, "bfloat16", "bfloat16")):
        monkeypatch.setattr("ray_soup.actors.precision.has_bfloat16", lambda device, has=instructions: has)
        assert choose_precision(make_recipe({"model": tiny.SPEC, "precision": asked}), model, images) == found


class RunsAgain(torch.nn.Module):
    """A model that computes its attention again in the backward pass, to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8)

    def attend(self, images: torch.Tensor) -> torch.Tensor:
        query, key, value = self.first(images)[:, None].chunk(3, -1)
        return self.last(torch.nn.functional.scaled_dot_product_attention(query, key, value)).relu()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(self.attend, images, use_reentrant=False)
        return found


def test_a_model_that_runs_layers_again_can_be_timed_in_both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_soup.actors.precision.has_bfloat16", lambda device: True)
    recipe = make_recipe({"model": tiny.SPEC})
    assert choose_precision(recipe, RunsAgain(), torch.randn(2, 5, 8)) in ("float32", "bfloat16")


def test_an_autocast_context_can_be_entered_again() -> None:
    layer, images = torch.nn.Linear(2, 2), torch.zeros(3, 2)
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        context = autocast(precision, images.device)
        for _ in range(2):
            with context:
                assert layer(images).dtype == dtype
        assert layer(images).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "parameters", "expected"),
    [
        ({}, 5_000_000, 128),
        ({}, 5_000_001, 16),
        ({"actors": {"gpus": 1}, "learn": {"batch_size": 77}}, 5_000_001, 77),
        ({"actors": {"gpus": 1}, "learn": {"micro_batch": 3}}, 1, 3),
    ],
)
def test_micro_batches_are_small_for_large_models_on_a_cpu_and_whole_batches_on_a_gpu(
    changes: dict[str, object], parameters: int, expected: int
) -> None:
    assert micro_batch_size(make_recipe({"model": tiny.SPEC, **changes}), parameters) == expected

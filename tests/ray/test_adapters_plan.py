"""The memory that `plan` states for adapters is one base plus all adapters and activations, as a run takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_soup.recipe import make_recipe
from ray_soup.soups.plan import plan
from ray_soup.soups.run import run
from tests.adapters import EVERYTHING, values, write_adapters, write_texts

pytest.importorskip("peft")
COUNT = 4


def larger_llama() -> nn.Module:
    """A base of 8 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=256,
    )).eval()  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_planned_memory_is_that_of_the_run(tmp_path: Path) -> None:
    configs: list[dict[str, Any]] = [{"r": 64, "lora_alpha": 8, "target_modules": EVERYTHING}] * COUNT
    write_adapters(tmp_path, configs, larger_llama)
    write_texts(tmp_path)
    learn = {"epochs": 1, "batch_size": 4}
    recipe = make_recipe(values(tmp_path, method="mehl+", learn=learn, baseline="none"))
    run(recipe, tmp_path / "first")  # compiles its loops, which takes memory
    found = plan(recipe)
    record = run(recipe, tmp_path / "soup").record
    print(f"planned {found['memory_bytes_per_actor']:,}, peak {record['peak_memory_bytes']:,}")
    assert found["parameters"] > 5_000_000
    assert found["memory_bytes_per_actor"] == pytest.approx(record["peak_memory_bytes"], rel=0.1)

"""Private memory of an actor that learns a soup of a made-up Llama with 1.1 billion parameters: whole, and by layer.

Four made-up fine-tunes in bfloat16, int8 directions, one step on two short texts. Bytes per parameter, apart from what the
process takes before; the directions are memory-mapped and count as none. Takes 20 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

COUNT = 4
CODE = """
import json, sys
from pathlib import Path
from tests.benchmarks import large
print(json.dumps(large.step(Path(sys.argv[1]), sys.argv[2] == "by layer")))
"""


def step(folder: Path, by_layer: bool) -> dict[str, float]:
    """Measure a step in this process, on two threads."""
    from ray_soup.actors.messages import Mesh
    from ray_soup.actors.shard import Shard
    from ray_soup.recipe import make_recipe
    from ray_soup.soups.inputs import open_inputs
    from ray_soup.task.data import Split
    from tests.benchmarks.step import Private

    recipe = make_recipe(
        {
            "model": f"transformers:{folder}/init?length=32",
            "ingredients": str(folder / "zoo"),
            "data": {"fit": str(folder / "fit.jsonl")},
            "learn": {"micro_batch": 2},
            "actors": {"replicas": 1, "shards": 1, "by_layer": by_layer},
            "precision": "float32",
        }
    )
    inputs = open_inputs(recipe)
    with Private() as private:
        shard = Shard(recipe, inputs.ingredients, Mesh(1, 1), 0, 2)
        list(shard.setup())
        blocks = list(shard.open_store(tuple(range(COUNT)), "tensor"))[-1].partition.count
        x = np.full((COUNT, blocks), 1e-3, np.float32)
        shard.begin(np.arange(COUNT), x, "float32")
        start = time.perf_counter()
        part = shard.step(x, 1.0, Split("fit", np.arange(2, dtype=np.int32)))
        seconds = time.perf_counter() - start
    return {
        "bytes per parameter": private.peak / inputs.layout.numel, "step (s)": seconds, "loss": part.loss,
        "parameters (million)": inputs.layout.numel / 1e6,
    }  # fmt: skip


def write(folder: Path) -> None:
    """Write the model, its fine-tunes and two texts."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.unit.task.language_models import byte_tokenizer

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder / "init")
    byte_tokenizer().save_pretrained(folder / "init")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    for k in range(COUNT):
        state = {}
        for number, (name, shape) in enumerate(shapes.items()):
            torch.manual_seed(number)  # what all fine-tunes began with
            start = torch.ones(shape) if "norm" in name else 0.02 * torch.randn(shape)
            torch.manual_seed(1000 * k + number)
            state[name] = (start + 0.001 * torch.randn(shape)).to(torch.bfloat16)
        (folder / "zoo").mkdir(exist_ok=True)
        save_file(state, folder / "zoo" / f"model_{k}.safetensors", {"format": "pt"})
    (folder / "fit.jsonl").write_text('{"text": "a soup of large models"}\n{"text": "and of their many layers"}\n')


def main() -> dict[str, float]:
    """Measure both, each in a process of its own; the store is built by the first."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="ray_soup_benchmark") as made:
        folder = Path(made)
        write(folder)
        for way in ("by layer", "whole"):
            done = subprocess.run(
                [sys.executable, "-c", CODE, made, way],
                env={**os.environ, "RAY_SOUP_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "2"},
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            results |= {f"{way}: {name}": value for name, value in found.items()}
    return results

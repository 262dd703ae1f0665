"""Zoos of real text: the source of Python's standard library, and its documentation.

A classifier says which package a chunk of source is from. A tiny Llama learns the source byte by byte; LoRA adapters of it
learn the documentation, which is English.
"""

from __future__ import annotations

import copy
import json
import sysconfig
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.benchmarks.zoos_images import ACTORS, Data, Recipe, cut, recipe, sweep, trunk_of
from tests.benchmarks.zoos_models import LENGTH, TOPICS

TESTS = {"test", "tests", "idle_test"}
BYTES = 48
"""Bytes of an example of a language model."""


def chunks_of(text: bytes, length: int) -> np.ndarray:
    """Cut a text into chunks of bytes, uint8 [n, length]; the end is left out."""
    return np.frombuffer(text[: len(text) // length * length], dtype=np.uint8).reshape(-1, length)


def sources(packages: Iterable[str]) -> list[Path]:
    """List the modules of packages of the standard library, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in packages for file in sorted((root / name).rglob("*.py"))]
    return [file for file in files if not TESTS & set(file.relative_to(root).parts)]


def unseen(rows: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """Drop rows that are in `seen` or occur twice, and add the others to it."""
    kept = []
    for number, row in enumerate(rows):
        if (text := row.tobytes()) not in seen:
            seen.add(text)
            kept.append(number)
    return rows[kept]


def by_package() -> Data:
    """Cut the packages in TOPICS into chunks."""
    rows = [chunks_of(b"".join(file.read_bytes() for file in sources([package])), LENGTH) for package in TOPICS]
    labels = torch.repeat_interleave(torch.arange(len(TOPICS)), torch.tensor([len(some) for some in rows]))
    return torch.from_numpy(np.concatenate(rows)), labels


def classifier(folder: Path, seed: int) -> Recipe:
    """Twelve classifiers of source text, 5,000 chunks held out."""
    from tests.benchmarks.zoos_models import texts

    chunks, labels = cut(folder, by_package(), {"train": 9000, "heldout": 5000, "test": 3000}, seed)["train"]
    trunk = trunk_of(texts, (chunks, labels), seed, 3e-3, 6)
    sweep(folder, trunk, (chunks[:3000], labels[:3000]), seed, 12, (3e-3, 1e-2), (2, 3))
    return recipe(folder, "tests.benchmarks.zoos_models:texts")


def llama(seed: int) -> nn.Module:
    """Build the language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=BYTES, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ))  # fmt: skip


def learn_language(model: nn.Module, rows: np.ndarray, seed: int, lr: float, steps: int, batch: int = 32) -> None:
    """Train with AdamW on random batches of rows; the learning rate warms up, then falls to zero."""
    random = np.random.default_rng(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(steps):
        ids = torch.from_numpy(rows[random.integers(len(rows), size=batch)].astype(np.int64))
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / (1 + 0.1 * steps)) * (1 - step / steps)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def source_chunks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the modules of the standard library into different chunks, in random order: for training, and of other modules."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.glob("*.py"))
    files = [files[n] for n in np.random.default_rng([seed, 1]).permutation(len(files))]
    seen: set[bytes] = set()
    parts = []
    for some in (files[len(files) // 5 :], files[: len(files) // 5]):
        rows = unseen(chunks_of(b"".join(file.read_bytes() for file in some), BYTES), seen)
        parts.append(rows[np.random.default_rng([seed, 4]).permutation(len(rows))])
    return parts[0], parts[1]


def documentation(seed: int) -> np.ndarray:
    """Cut the topics of Python's `help` into different chunks, in random order."""
    from pydoc_data.topics import topics

    rows = unseen(chunks_of("\n".join(topics[name] for name in sorted(topics)).encode(), BYTES), set())
    return rows[np.random.default_rng([seed, 1]).permutation(len(rows))]


def language_recipe(folder: Path, model: str, ingredients: str, held_out: np.ndarray, count: int, test: int) -> Recipe:
    """Write `count` rows held out and `test` rows for the test; return the recipe of a zoo of language models."""
    for name, rows in {"heldout": held_out[:count], "test": held_out[count : count + test]}.items():
        lines = "\n".join(json.dumps({"input_ids": row}) for row in rows.tolist())
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    data = {"fit": f"{folder}/heldout.jsonl", "test": f"{folder}/test.jsonl"}
    return {
        "ingredients": ingredients, "model": f"transformers:{model}?length={BYTES}", "data": data, "actors": ACTORS,
        "precision": "float32",
    }  # fmt: skip


def language(folder: Path, seed: int) -> Recipe:
    """Ten language models of Python source, 1,500 chunks of other modules held out."""
    training, held_out = source_chunks(seed)
    trunk = llama(seed)
    learn_language(trunk, training, seed, 4e-3, 400)
    random = np.random.default_rng([seed, 2])
    for k in range(10):
        model = copy.deepcopy(trunk)
        rate = float(np.exp(random.uniform(np.log(1e-3), np.log(5e-3))))
        learn_language(model, training, 1000 * seed + k, rate, 60)
        model.save_pretrained(folder / "runs" / f"{k:02}")
    return language_recipe(folder, f"{folder}/runs/00", f"{folder}/runs/*/model.safetensors", held_out, 1500, 2000)


def adapters(folder: Path, seed: int) -> Recipe:
    """Eight LoRA adapters that take a language model of source to English, 600 chunks held out."""
    import peft
    from transformers import AutoModelForCausalLM

    base = llama(seed)
    training, _ = source_chunks(seed)
    learn_language(base, training, seed, 4e-3, 400)
    base.save_pretrained(folder / "base")
    rows = documentation(seed)
    random = np.random.default_rng([seed, 2])
    for k in range(8):
        rank, rate = int(random.choice([4, 8])), float(np.exp(random.uniform(np.log(1e-2), np.log(4e-2))))
        torch.manual_seed(1000 * seed + k)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
            learn_language(model, rows[2600:5600], 1000 * seed + k, rate, 200, 16)
            model.save_pretrained(folder / "runs" / f"{k:02}")
    return language_recipe(folder, f"{folder}/base", f"{folder}/runs/*/", rows, 600, 2000)

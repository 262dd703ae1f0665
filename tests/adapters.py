"""A tiny Llama and six adapters of it, made by PEFT: mixed ranks and alphas, rsLoRA, fewer modules, a trained head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.unit.task.language_models import TEXTS, byte_tokenizer, llama, saved

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "target_modules": EVERYTHING},
    {"r": 8, "lora_alpha": 8, "target_modules": EVERYTHING, "lora_dropout": 0.3},
    {"r": 3, "lora_alpha": 6, "target_modules": EVERYTHING, "use_rslora": True},
    {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    {"r": 2, "lora_alpha": 8, "target_modules": EVERYTHING, "rank_pattern": {"layers.1.self_attn.q_proj": 5},
     "alpha_pattern": {"v_proj": 3}},
    {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
]  # fmt: skip


def make_adapter(
    base: nn.Module, folder: Path, seed: int, size: float = 0.1, bin_file: bool = False, **config: Any
) -> nn.Module:
    """Put an adapter with random factors into `base`, in place, and save it; the value is PEFT's model."""
    import peft

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config}))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                trained = parameter.requires_grad and name.endswith("bias")
                if trained or any(part in name for part in ("lora_B", "lora_embedding_", "modules_to_save")):
                    parameter += size * torch.randn_like(parameter)
        model.save_pretrained(folder, safe_serialization=not bin_file)
    return model.eval()


def write_adapters(folder: Path, configs: list[dict[str, Any]] = CONFIGS, build: Any = llama) -> None:
    """Write base/ and runs/0 ...; the last adapter but one is a .bin file."""
    saved(build(), byte_tokenizer(), folder / "base")
    for k, config in enumerate(configs):
        base = build()
        base.name_or_path = str(folder / "base")
        make_adapter(base, folder / "runs" / str(k), k + 1, bin_file=k == len(configs) - 2, **config)


def loaded(folder: Path, adapter: Path, merge: bool = False) -> nn.Module:
    """The base with one adapter, as PEFT loads it."""
    import peft
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), adapter).eval()
    return model.merge_and_unload() if merge else model


def write_texts(folder: Path) -> None:
    import json

    for name, texts in {
        "fit": [*TEXTS, *(text[::-1] for text in TEXTS[3:])], "test": [text.upper() for text in TEXTS],
    }.items():  # fmt: skip
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "ingredients": str(folder / "runs" / "*/"),
        "model": f"transformers:{folder}/base?length=64",
        "data": {"fit": str(folder / "fit.jsonl"), "select": 0.4, "test": str(folder / "test.jsonl")},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
        **changes,
    }

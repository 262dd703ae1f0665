"""A baked soup of adapters, loaded by PEFT, computes what the base does with the weighted sum of all changes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ray_soup.io.adapters import AdapterIngredient, open_adapter
from ray_soup.io.lifting import group_of
from ray_soup.mixing.adapter_bake import bake_adapter
from ray_soup.mixing.blocks import partition
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.task.adapters import lift
from ray_soup.task.models import build
from ray_soup.task.peft_models import check_with_peft, with_adapters
from tests.adapters import ATTENTION, CONFIGS, make_adapter
from tests.unit.task.language_models import bert_for, byte_tokenizer, gpt2, llama, saved

peft = pytest.importorskip("peft")
IDS = torch.arange(2, 26).view(2, 12)


def vit() -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_labels=3, initializer_range=0.2,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval()


def seq() -> nn.Module:
    return bert_for("ForSequenceClassification", num_labels=3)


@dataclass
class Kind:
    build: Callable[[], nn.Module]
    configs: list[dict[str, Any]]
    inputs: dict[str, torch.Tensor]
    texts: bool = True
    options: str = "?length=16"


TEXT = {"input_ids": IDS}
KINDS = {
    "llama": Kind(llama, CONFIGS, TEXT),
    "embeddings": Kind(llama, [
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens", "v_proj"]},
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
    ], TEXT),
    "tied embeddings": Kind(lambda: llama(tied=True), [
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    ], TEXT),
    "both embeddings of a tied base": Kind(lambda: llama(tied=True), [
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["embed_tokens", "lm_head"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["lm_head", "v_proj"]},
    ], TEXT),
    "a head of its own on a tied base": Kind(lambda: llama(tied=True), [
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    ], TEXT),
    "biases of Conv1D": Kind(gpt2, [
        {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"r": 1, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only", "fan_in_fan_out": True},
    ], TEXT),
    "a new head": Kind(seq, [
        {"r": 2, "lora_alpha": 3, "target_modules": ["query"], "task_type": "SEQ_CLS"},
        {"r": 3, "lora_alpha": 3, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ], TEXT | {"attention_mask": torch.ones_like(IDS)}),
    "convolutions": Kind(vit, [
        {"r": 2, "lora_alpha": 3, "target_modules": ["projection"], "modules_to_save": ["classifier"]},
        {"r": 3, "lora_alpha": 5, "target_modules": ["projection", "query", "q_proj"]},
    ], {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}, False, ""),
}  # fmt: skip


def made(kind: Kind, folder: Path) -> tuple[str, list[AdapterIngredient]]:
    """Write base and adapters; the value is the recipe key `model` and the opened adapters."""
    saved(kind.build(), byte_tokenizer() if kind.texts else None, folder / "base")
    tokenizer = folder / "base" / "tokenizer_config.json"
    if kind.texts and kind.build is seq:
        words = byte_tokenizer()
        words.pad_token = "</s>"
        words.save_pretrained(folder / "base")
        assert tokenizer.exists()
    for k, config in enumerate(kind.configs):
        base = kind.build()
        base.name_or_path = str(folder / "base")
        make_adapter(base, folder / str(k), k + 1, **{"task_type": None, **config})
    paths = [str(folder / str(k)) for k in range(len(kind.configs))]
    return f"transformers:{folder}/base{kind.options}", [open_adapter(p) for p in paths]


def random_coefficients(layout: Any, names: tuple[str, ...], seed: int = 0) -> Coefficients:
    """Of any sign, one per ingredient and tensor; each column sums to 1."""
    parts, count = partition(layout, "tensor"), len(names)
    values = np.random.default_rng(seed).normal(size=(count, parts.count)) / 2
    values += (1 - values.sum(axis=0)) / count
    return Coefficients(values, names, parts.names, dict(zip(layout.names, parts.block.tolist(), strict=True)))


def expected_logits(kind: Kind, folder: Path, group: Any, coefficients: Coefficients) -> torch.Tensor:
    """Of the base with weights W + sum_k c_k delta_k, where PEFT computes delta_k from each adapter's folder."""
    base, changed = kind.build(), {}
    state = {name: t.double() for name, t in base.state_dict().items()}
    for k in range(len(kind.configs)):
        own = peft.PeftModel.from_pretrained(kind.build(), folder / str(k))
        modules = dict(own.base_model.model.named_modules())
        for module, one in group.modules.items():
            name = f"{module}.weight"
            whole = any(tensor.base == name for tensor in group.whole.values())
            changed.setdefault(name, torch.zeros_like(state[name]) if whole else state[name].clone())
            if one.ranks[k]:
                delta = modules[module].get_delta_weight("default").double()
                changed[name] += coefficients.of(one.b)[k] * delta
        for lifted, tensor in group.whole.items():
            module, _, last = tensor.base.rpartition(".")
            there = modules[module]
            there = getattr(there, "modules_to_save", {"default": there})["default"]
            there = there.get_base_layer() if hasattr(there, "get_base_layer") else there
            value = getattr(there, last).detach().double()
            changed[tensor.base] = changed.get(tensor.base, 0) + coefficients.of(lifted)[k] * value
    changed = {name: tensor.float() for name, tensor in changed.items()}
    with torch.inference_mode():
        return torch.func.functional_call(base, changed, (), kind.inputs, tie_weights=False).logits


def stacked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Inputs as models of this package take them: token ids and attention mask in one tensor."""
    return torch.stack([inputs["input_ids"], torch.ones_like(inputs["input_ids"])], dim=1)


def made_for(name: str, folder: Path) -> tuple[str, list[AdapterIngredient]]:
    """Make base and adapters of a kind, as `made` does; the base of a new head is a pretrained model without one."""
    spec, adapters = made(KINDS[name], folder)
    if name == "a new head":
        file = folder / "base" / "model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if "classifier" not in n}, file)
    return spec, adapters


@pytest.mark.parametrize("name", KINDS)
def test_peft_loads_the_soup_that_the_base_with_all_changes_is(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    spec, adapters = made_for(name, tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    group = group_of(ingredients)
    coefficients = random_coefficients(layout, tuple(i.name for i in ingredients))
    (tmp_path / "soup").mkdir()
    bake_adapter(coefficients, ingredients, group, tmp_path / "soup")
    check_with_peft(spec, [open_adapter(str(tmp_path / "soup"))])
    with torch.inference_mode():
        found = peft.PeftModel.from_pretrained(kind.build(), tmp_path / "soup").eval()(**kind.inputs).logits
    expected = expected_logits(kind, tmp_path, group, coefficients)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    model = with_adapters(build(spec), ingredients).model.eval()
    for folder in ("soup", *(str(k) for k in range(len(adapters)))):  # ours, as PEFT loads each of them
        model.load_adapter_file(str(tmp_path / folder))
        whole = peft.PeftModel.from_pretrained(kind.build(), tmp_path / folder).eval()
        with torch.inference_mode():
            ours = model(next(iter(kind.inputs.values())) if not kind.texts else stacked(kind.inputs))
            theirs = whole(**kind.inputs).logits
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), folder
    assert sum(p.numel() for p in model.parameters()) == layout.numel


def test_the_rank_is_the_sum_of_the_ranks_used(tmp_path: Path) -> None:
    spec, adapters = made(KINDS["llama"], tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    values = np.zeros((6, 1))
    values[[0, 3], 0] = 0.25, 0.75
    coefficients = Coefficients(values, tuple("012345"), ("model",), dict.fromkeys(layout.names, 0))
    (tmp_path / "soup").mkdir()
    bake_adapter(coefficients, ingredients, group_of(ingredients), tmp_path / "soup")
    tensors = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    ranks = {name.split(".")[-3]: t.shape[0] for name, t in tensors.items() if "lora_A" in name}
    assert ranks == dict.fromkeys(ATTENTION, 4) | {"q_proj": 8, "v_proj": 8} | dict.fromkeys(
        ["gate_proj", "up_proj", "down_proj"], 4
    )
    assert not any("lm_head" in name for name in tensors)
    check_with_peft(spec, [open_adapter(str(tmp_path / "soup"))])


def test_a_product_is_rounded_once_and_a_is_copied(tmp_path: Path) -> None:
    """In bfloat16, with a scale that is no power of 2."""
    kind = Kind(llama, [{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "use_rslora": True}] * 2, TEXT)
    spec, _ = made(kind, tmp_path)
    stored = []
    for k in range(2):
        file = tmp_path / str(k) / "adapter_model.safetensors"
        stored.append({n: t.bfloat16() for n, t in load_file(file).items()})
        save_file(stored[-1], file)
    ingredients, layout, _ = lift(spec, [open_adapter(str(tmp_path / str(k))) for k in range(2)])
    coefficients = random_coefficients(layout, ("0", "1"))
    (tmp_path / "soup").mkdir()
    bake_adapter(coefficients, ingredients, group_of(ingredients), tmp_path / "soup")
    soup = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    for name, tensor in soup.items():
        assert tensor.dtype == torch.bfloat16
        if "lora_A" in name:
            assert torch.equal(tensor, torch.cat([s[name] for s in stored]))
        else:
            c = coefficients.of(name)
            parts = [(s[name].double() * (3 / 2**0.5) * c[k]).bfloat16() for k, s in enumerate(stored)]
            assert torch.equal(tensor, torch.cat(parts, dim=1))


def test_a_learned_factor_is_written_even_if_no_adapter_in_use_has_the_head(tmp_path: Path) -> None:
    spec, adapters = made(KINDS["a head of its own on a tied base"], tmp_path)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    ingredients, layout, _ = lift(spec, [*adapters, open_adapter(str(tmp_path / "2"))])
    head = "base_model.model.lm_head.weight"
    blocks = dict.fromkeys(layout.names, 0)
    values = np.array([[0.5], [0.5]])
    coefficients = Coefficients(values, ("1", "2"), ("model",), blocks, factor=2.0, factored=(head,))
    (tmp_path / "soup").mkdir()
    bake_adapter(coefficients, ingredients[1:], group_of(ingredients), tmp_path / "soup")
    check_with_peft(spec, [open_adapter(str(tmp_path / "soup"))])
    build = KINDS["a head of its own on a tied base"].build
    with torch.inference_mode():
        doubled = peft.PeftModel.from_pretrained(build(), tmp_path / "soup").eval()(IDS).logits
        plain = peft.PeftModel.from_pretrained(build(), tmp_path / "1").eval()(IDS).logits
    assert torch.allclose(doubled, 2 * plain, rtol=1e-5, atol=1e-5)

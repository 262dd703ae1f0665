"""Quantized checkpoints are refused by the name of the method, with a line that dequantizes them if their method has one."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.ingredient import open_ingredient
from ray_soup.recipe import make_recipe
from ray_soup.soups.run import run
from tests import adapters
from tests.distributed import write
from tests.unit.task.language_models import byte_tokenizer, llama, saved

LAYER = "model.layers.0.mlp.up_proj"
FLOAT = {"model.embed_tokens.weight": torch.ones(4, 2), "model.norm.weight": torch.ones(2)}
PACKED = torch.zeros(4, 8, dtype=torch.uint8)
KINDS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "bitsandbytes, 4 bits": (
        {f"{LAYER}.weight": PACKED, f"{LAYER}.weight.absmax": torch.ones(4), f"{LAYER}.weight.quant_map": torch.ones(16)},
        r"is quantized \(bitsandbytes\): it has the tensor .*absmax, float32 \[4\]",
    ),
    "bitsandbytes, 8 bits": (
        {f"{LAYER}.weight": PACKED.to(torch.int8), f"{LAYER}.SCB": torch.ones(4)},
        r"is quantized \(bitsandbytes\): it has the tensor .*SCB",
    ),
    "GPTQ": (
        {f"{LAYER}.{n}": torch.ones(4, 2, dtype=torch.int32) for n in ("qweight", "qzeros", "g_idx")}
        | {f"{LAYER}.scales": torch.ones(4, 2, dtype=torch.float16)},
        r"is quantized \(GPTQ or AWQ\): it has the tensor .*no way back in transformers",
    ),
    "AWQ": (
        {f"{LAYER}.{n}": torch.ones(4, 2, dtype=torch.int32) for n in ("qweight", "qzeros")}
        | {f"{LAYER}.scales": torch.ones(4, 2, dtype=torch.float16)},
        r"is quantized \(GPTQ or AWQ\)",
    ),
    "fp8 in torch's dtype": (
        {f"{LAYER}.weight": torch.ones(4, 2).to(torch.float8_e4m3fn), f"{LAYER}.weight_scale_inv": torch.ones(1, 1)},
        r"up_proj\.weight .*(F8_E4M3|float8_e4m3fn).*The checkpoint is quantized\. Use the checkpoint from before",
    ),
    "fp8 as bytes": (
        {f"{LAYER}.weight": PACKED, f"{LAYER}.weight_scale": torch.ones(1)},
        r"is quantized \(fp8 with scales\)",
    ),
    "compressed-tensors": (
        {f"{LAYER}.weight_packed": torch.ones(4, 1, dtype=torch.int32), f"{LAYER}.weight_scale": torch.ones(4, 1)},
        r"is quantized \(compressed-tensors\): .*CompressedTensorsConfig\(run_compressed=False\)",
    ),
    "mxfp4": ({"experts.up_proj_blocks": PACKED, "experts.up_proj_scales": PACKED + 1}, r"is quantized \(mxfp4\)"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["safetensors", "torch", "distributed"])
def test_each_kind_is_named(tmp_path: Path, kind: str, form: str) -> None:
    tensors, message = KINDS[kind]
    state = {**FLOAT, **tensors}
    if form == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    elif form == "torch":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        write(tmp_path, state)
    with pytest.raises(IngredientError, match=message) as error:
        open_ingredient(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "Use the checkpoint from before quantization" in str(error.value)


def test_integers_under_a_config_that_says_so_are_quantized_and_others_are_not(tmp_path: Path) -> None:
    state = {**FLOAT, f"{LAYER}.weight": torch.ones(4, 2, dtype=torch.int8)}
    save_file(state, tmp_path / "model.safetensors")
    assert open_ingredient(str(tmp_path)).read(f"{LAYER}.weight").dtype == torch.int8
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "quanto"}}))
    with pytest.raises(
        IngredientError, match=r"is quantized \(quanto\): it has the tensor .*up_proj\.weight, int8 \[4, 2\]"
    ):
        open_ingredient(str(tmp_path))


def test_floating_point_tensors_of_such_names_are_no_quantization(tmp_path: Path) -> None:
    state = {
        f"a.{name}": torch.ones(2, 2) for name in ("weight", "weight_scale", "SCB", "qweight", "qzeros", "g_idx", "scales")
    }
    save_file(state, tmp_path / "m.safetensors")
    assert set(open_ingredient(str(tmp_path / "m.safetensors")).tensors) == set(state)


def command_in(error: Any) -> list[str]:
    return shlex.split(str(error.value).partition("rounded away: ")[2])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "bitsandbytes"}},
         "import transformers as t; t.LlamaForCausalLM.from_pretrained({0!r}).dequantize().save_pretrained({1!r})"),
        ({"architectures": ["x; rm"], "quantization_config": {"quant_method": "bitsandbytes; rm"}},
         "import transformers as t; t.AutoModelForCausalLM.from_pretrained({0!r}).dequantize().save_pretrained({1!r})"),
    ],
)  # fmt: skip
def test_the_command_names_the_class_of_the_config(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    folder = tmp_path / "it's a; b"
    folder.mkdir()
    save_file({**FLOAT, **KINDS["bitsandbytes, 8 bits"][0]}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IngredientError, match="rounded away: python -c") as error:
        open_ingredient(str(folder))
    assert command_in(error)[2] == expected.format(str(folder), f"{folder}-dequantized")


def quantized_llama(folder: Path) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with weights in fp8 and a scale for each block; returns the weights without quantization."""
    saved(llama(), byte_tokenizer(), folder)
    state = load_file(folder / "model.safetensors")
    packed = dict(state)
    for name, tensor in state.items():
        if "proj" in name:
            scale = (tensor.abs().max() / 448).reshape(1, 1)
            packed[name] = (tensor / scale).to(torch.float8_e4m3fn)
            packed[f"{name}_scale_inv"] = scale.float()
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return state


@pytest.mark.slow
def test_the_command_dequantizes_what_it_is_printed_for(tmp_path: Path) -> None:
    state = quantized_llama(tmp_path / "m")
    with pytest.raises(IngredientError, match="rounded away: python -c") as error:
        open_ingredient(str(tmp_path / "m"))
    command = command_in(error)
    done = subprocess.run([sys.executable, *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = open_ingredient(str(tmp_path / "m-dequantized"))
    for name, info in again.tensors.items():
        assert info.dtype.is_floating_point
        close = again.read(name).float() - state[name].reshape(-1).float()
        assert close.abs().max() <= 0.07 * state[name].abs().max()
    config = json.loads((tmp_path / "m-dequantized" / "config.json").read_text())
    assert not config.get("quantization_config")


def test_the_config_of_a_quantized_model_is_refused(tmp_path: Path) -> None:
    """Otherwise it would be copied beside a soup of floating-point weights, and transformers would misread them."""
    saved(llama(), byte_tokenizer(), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantized}))
    recipe = make_recipe(
        {"model": f"transformers:{tmp_path / 'm'}", "ingredients": [str(tmp_path / "m")] * 2, "method": "uniform"}
    )
    with pytest.raises(
        RecipeError, match=r"config\.json of .*/m is that of a quantized model \(quantization_config, bitsand"
    ):
        run(recipe, tmp_path / "out")


def test_adapters_on_a_quantized_base_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    adapters.write_adapters(tmp_path, adapters.CONFIGS[:2])
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("up_proj.weight"))
    packed = {
        name: torch.zeros(8, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(2),
        f"{name}.quant_map": torch.ones(16),
    }
    save_file({**state, **packed}, file, {"format": "pt"})
    with pytest.raises(IngredientError, match=r"base.* is quantized \(bitsandbytes\)"):
        run(make_recipe({**adapters.values(tmp_path), "method": "uniform", "data": {}}), tmp_path / "out")

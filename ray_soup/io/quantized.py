"""Refuse quantized checkpoints: a mean of their numbers is not the mean of their weights.

What gives them away are the tensors that a method of quantization stores beside the packed weights, and dtypes of 8 bits and
less. The `config.json` beside a checkpoint names the method, and the class with which it can be dequantized.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ray_soup.io import storage
from ray_soup.io.formats import TensorInfo
from ray_soup.io.json_files import read_json

BITSANDBYTES, GPTQ_OR_AWQ, FP8, PACKED = "bitsandbytes", "GPTQ or AWQ", "fp8 with scales", "compressed-tensors"
SIGNS: tuple[tuple[str, str, str], ...] = (
    (".weight.absmax", ".weight", BITSANDBYTES),
    (".weight.quant_map", ".weight", BITSANDBYTES),
    (".SCB", ".weight", BITSANDBYTES),
    (".qzeros", ".qweight", GPTQ_OR_AWQ),
    (".g_idx", ".qweight", GPTQ_OR_AWQ),
    (".weight_scale_inv", ".weight", FP8),
    (".weight_scale", ".weight", FP8),
    (".weight_scale", ".weight_packed", PACKED),
    ("_scales", "_blocks", "mxfp4"),
)
"""End of the name of a tensor with scales, the end of that of the weight, which is no float, and the method."""
OPTIONS = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "fbgemm_fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(run_compressed=False)",
}
"""The settings with which transformers dequantizes a model while it loads it, by the method that config.json names."""
UNKNOWN = "unknown"
BEFORE = "Use the checkpoint from before quantization"


def quantized_by(tensors: Mapping[str, TensorInfo]) -> tuple[str, str]:
    """Return the method by which tensors are quantized, and the name of one that shows it; two empty texts if none does."""
    for name in tensors:
        for scale, weight, method in SIGNS:
            if name.endswith(scale):
                packed = tensors.get(name.removesuffix(scale) + weight)
                if packed is not None and not packed.is_float:
                    return method, name
    return "", ""


def config_of(folder: str) -> dict[str, Any]:
    """Return what config.json in a folder says; nothing if it cannot be read."""
    try:
        found = read_json(storage.join(folder, "config.json"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def method_in(config: Mapping[str, Any]) -> str:
    """Return the method of quantization that a config.json names, `unknown` if its name is odd; empty if there is none."""
    found = config.get("quantization_config")
    if not found:
        return ""
    method = found.get("quant_method") if isinstance(found, dict) else None
    return method if isinstance(method, str) and re.fullmatch(r"[\w-]{1,40}", method) else UNKNOWN


def remedy(folder: str, method: str = "") -> str:
    """Return what to do about a quantized checkpoint: the line that dequantizes it, if its method has one.

    Args:
        folder: its folder.
        method: the method that its tensors show, in case config.json names none.
    """
    config = config_of(folder)
    named = method_in(config).replace(UNKNOWN, method) or method
    load = ""
    if named == BITSANDBYTES:
        load = f"from_pretrained({folder!r}).dequantize()"
    elif named in OPTIONS:
        load = f"from_pretrained({folder!r}, quantization_config=t.{OPTIONS[named]})"
    if not load:
        return f"{BEFORE}: this method has no way back in transformers."
    if storage.is_remote(folder):
        return f"{BEFORE}."
    classes = config.get("architectures")
    kind = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else ""
    kind = kind if re.fullmatch(r"[A-Za-z]\w{0,80}", kind) else "AutoModelForCausalLM"
    code = f"import transformers as t; t.{kind}.{load}.save_pretrained({folder + '-dequantized'!r})"
    return (
        f"{BEFORE}. If you do not have it, this command dequantizes it, without what quantization rounded away: "
        f"python -c {shlex.quote(code)}"
    )


def fault_of(path: str, folder: str, tensors: Mapping[str, TensorInfo]) -> str:
    """Return the message for a quantized checkpoint; empty if the tensors are plain, as far as can be told.

    Args:
        path: the checkpoint, for the message.
        folder: its folder, where config.json may be.
        tensors: its tensors.
    """
    method, name = quantized_by(tensors)
    if not method:
        odd = (n for n, i in tensors.items() if n.endswith("weight") and len(i.shape) > 1 and not i.is_float)
        name = next((n for n in odd if tensors[n].dtype_name != "bool"), "")
        method = method_in(config_of(folder)) if name else ""
    if not method:
        return ""
    return (
        f"{path} is quantized ({method}): it has the tensor {name}, {tensors[name]}; expected weights as floating-point "
        f"numbers. {remedy(folder, method)}"
    )

"""PEFT's own merges of adapters, as PEFT makes them of folders on the base itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ray_soup.io.lifting import group_of
from ray_soup.mixing.adapter_bake import Form, bake_adapter
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.task import peft_merges
from ray_soup.task.adapters import lift
from ray_soup.task.peft_merges import NoMergeError, merge_with_peft
from tests.unit.mixing.test_adapter_bake import KINDS, TEXT, Kind, made
from tests.unit.task.language_models import llama

peft = pytest.importorskip("peft")
EQUAL = Kind(llama, [
    {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj"]},
    {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj"], "alpha_pattern": {"v_proj": 5}},
], TEXT)  # fmt: skip
MIXED = Kind(llama, [
    {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
], TEXT)  # fmt: skip


def logits(folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(llama(), folder).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(**TEXT).logits
    return found


def merged_on_the_base(kind: Kind, folder: Path, how: str, weights: list[float], **more: Any) -> torch.Tensor:
    """Logits of what PEFT makes of the folders by itself."""
    names: list[str] = ["a", "b", "c"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(kind.build(), folder / "0", "a")
        for k in (1, 2):
            model.load_adapter(folder / str(k), names[k])
        model.add_weighted_adapter(names, weights, "m", how, **more)
        model.set_adapter("m")
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**kind.inputs).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["linear", "cat", "svd", "ties"])
def test_a_merge_is_the_one_that_peft_makes_of_the_folders(how: str, tmp_path: Path) -> None:
    spec, adapters = made(EQUAL, tmp_path)
    group = group_of(lift(spec, adapters)[0])
    found = logits(merge_with_peft(spec, group, how, tmp_path / "merge"))
    weights, more = ([1.0] * 3, {"density": 0.2}) if how == "ties" else ([1 / 3] * 3, {})
    if how != "svd" or tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21):  # old versions apply scales twice
        assert close(found, merged_on_the_base(EQUAL, tmp_path, how, weights, **more))
    again = merge_with_peft(spec, group, how, tmp_path / "again") / "adapter_model.safetensors"
    assert again.read_bytes() == (tmp_path / "merge" / "merged" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "form"), [("cat", Form()), ("svd", Form(rank=5))])
def test_of_mixed_ranks_and_scales_it_is_the_uniform_soup(how: str, form: Form, tmp_path: Path) -> None:
    """The soup that is exact, and the one of the largest rank; also if the first adapter has the scale of rsLoRA."""
    spec, adapters = made(MIXED, tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    group = group_of(ingredients)
    uniform = Coefficients(np.full((3, 1), 1 / 3), ("0", "1", "2"), ("model",), dict.fromkeys(layout.names, 0))
    (tmp_path / "soup").mkdir()
    bake_adapter(uniform, ingredients, group, tmp_path / "soup", form=form)
    assert close(logits(merge_with_peft(spec, group, how, tmp_path / "merge")), logits(tmp_path / "soup"))


def test_what_peft_refuses_or_would_leave_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, adapters = made(MIXED, tmp_path / "mixed")
    group = group_of(lift(spec, adapters)[0])
    for how in ("linear", "ties"):
        with pytest.raises(NoMergeError, match=r"PEFT .* refuses such a merge \(All adapters must have the same r value"):
            merge_with_peft(spec, group, how, tmp_path / how)
    monkeypatch.setattr(peft_merges, "MOST_SVD", 10.0)
    with pytest.raises(NoMergeError, match="PEFT decomposes each whole change of weights, here 5 with"):
        merge_with_peft(spec, group, "svd", tmp_path / "svd")
    spec, adapters = made(KINDS["llama"], tmp_path / "head")
    group = group_of(lift(spec, adapters)[0])
    with pytest.raises(NoMergeError, match=r"adapters contain lm_head.weight whole"):
        merge_with_peft(spec, group, "cat", tmp_path / "cat")


def test_the_base_takes_no_memory(tmp_path: Path) -> None:
    spec, _ = made(EQUAL, tmp_path)
    base = peft_merges._base(spec)
    shapes = {name: tuple(p.shape) for name, p in base.named_parameters()}
    assert shapes == {name: tuple(t.shape) for name, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    assert isinstance(base, nn.Module)
    assert {p.untyped_storage().nbytes() for p in base.parameters()} == {4}

"""A soup of adapters that is written as a whole model computes what its exact adapter does on the base."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError
from ray_soup.io.adapters import open_adapter
from ray_soup.io.lifting import group_of
from ray_soup.mixing import adapter_merge
from ray_soup.mixing.adapter_bake import bake_adapter
from ray_soup.mixing.adapter_merge import bake_merged
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.soups.write import write_library_files
from ray_soup.task.adapters import lift
from ray_soup.task.merged_models import check_merged, merged_soup
from ray_soup.task.models import build
from ray_soup.task.peft_models import with_adapters
from tests.unit.mixing.test_adapter_bake import (
    KINDS,
    TEXT,
    Kind,
    expected_logits,
    made,
    made_for,
    random_coefficients,
    stacked,
)
from tests.unit.task.language_models import llama

peft = pytest.importorskip("peft")


def merged(
    spec: str, coefficients: Coefficients, ingredients: list[Any], folder: Path, dtype: str = "keep", **how: Any
) -> Path:
    """Write the soup as a whole model, with its library's files."""
    group = group_of(ingredients)
    assert group is not None
    check_merged(spec, group)
    folder.mkdir()
    bake_merged(merged_soup(spec, coefficients, ingredients, group, dtype), folder / "model.safetensors", **how)
    write_library_files(folder, spec)
    return folder


def logits(model: Any, kind: Kind) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(**kind.inputs).logits
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_transformers_loads_what_peft_merges(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    spec, adapters = made_for(name, tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    group = group_of(ingredients)
    coefficients = random_coefficients(layout, tuple(i.name for i in ingredients))
    soup, exact = merged(spec, coefficients, ingredients, tmp_path / "soup"), tmp_path / "exact"
    exact.mkdir()
    bake_adapter(coefficients, ingredients, group, exact)
    kept = [tensor.source for tensor in group.whole.values()]
    base, written = load_file(tmp_path / "base" / "model.safetensors"), load_file(soup / "model.safetensors")
    same = [n for n in base if n in written and n.removesuffix(".weight") not in group.modules and n not in kept]
    assert same
    assert all(torch.equal(base[n], written[n]) for n in same)
    loaded, info = type(kind.build()).from_pretrained(soup, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found, expected = logits(loaded, kind), expected_logits(kind, tmp_path, group, coefficients)
    assert close(found, expected)
    by_peft = peft.PeftModel.from_pretrained(kind.build(), exact)
    assert close(found, logits(by_peft, kind))
    if name not in ("tied embeddings", "both embeddings of a tied base"):  # where PEFT merges into both, and warns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert close(found, logits(by_peft.merge_and_unload(), kind))

    model = with_adapters(build(spec), ingredients).model.eval()
    inputs = stacked(kind.inputs) if kind.texts else next(iter(kind.inputs.values()))

    def ours(path: Path) -> torch.Tensor:
        model.load_adapter_file(str(path))
        with torch.inference_mode():
            value: torch.Tensor = model(inputs)
        model.restore()
        return value

    before = ours(tmp_path / "0")
    assert close(ours(soup / "model.safetensors"), found)
    assert torch.equal(ours(tmp_path / "0"), before)  # the base is back
    assert close(ours(exact), found)


def test_weights_are_rounded_once(tmp_path: Path) -> None:
    """In bfloat16, in several shards, of adapters in float32."""
    spec, adapters = made(KINDS["llama"], tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    base = {n: t.bfloat16() for n, t in load_file(file).items()}
    save_file(base, file, metadata={"format": "pt"})
    ingredients, layout, _ = lift(spec, adapters)
    coefficients = random_coefficients(layout, tuple(i.name for i in ingredients))
    soup = merged(spec, coefficients, ingredients, tmp_path / "soup", shard_size=20_000)
    assert len([*soup.glob("model-*.safetensors")]) > 2
    found = {n: t for part in soup.glob("model-*") for n, t in load_file(part).items()}
    group = group_of(ingredients)
    exact = {n: t.double() for n, t in base.items()}
    for module, one in group.modules.items():
        for k, adapter in enumerate(group.adapters):
            if one.ranks[k]:
                b, a = (adapter.read(n).view(adapter.tensors[n].shape).double() for n in (one.b, one.a))
                exact[f"{module}.weight"] += coefficients.of(one.b)[k] * one.scales[k] * (b @ a)
    head = load_file(tmp_path / "5" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].double()
    c = coefficients.of("base_model.model.lm_head.weight")[5]
    exact["lm_head.weight"] = c * head + (1 - c) * exact["lm_head.weight"]
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exact[name].bfloat16()), name
    wide = merged(spec, coefficients, ingredients, tmp_path / "wide", "float32")
    tensors = load_file(wide / "model.safetensors")
    assert all(torch.equal(tensors[name], exact[name].float()) for name in exact)


@pytest.mark.parametrize("name", ["llama", "embeddings", "biases of Conv1D", "convolutions"])
def test_the_size_of_a_range_does_not_matter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, adapters = made(KINDS[name], tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    coefficients = random_coefficients(layout, tuple(i.name for i in ingredients))
    whole = merged(spec, coefficients, ingredients, tmp_path / "whole")
    monkeypatch.setattr(adapter_merge, "RANGE", 100)
    parts = merged(spec, coefficients, ingredients, tmp_path / "parts")
    group = group_of(ingredients)
    soup = merged_soup(spec, coefficients, ingredients, group, "keep")
    rows = {n: max(1, int(np.prod(soup.shape(n)[1:]))) for n in soup.names}
    assert all(len(part.written) <= max(100, rows[n]) for n in soup.names for part in soup.ranges(n))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()


def test_adapters_out_of_use_leave_the_base_as_it_is(tmp_path: Path) -> None:
    spec, adapters = made(KINDS["a head of its own on a tied base"], tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    values = np.array([[0.0], [1.0]])  # the second has no head of its own
    coefficients = Coefficients(values, ("0", "1"), ("model",), dict.fromkeys(layout.names, 0))
    soup = merged(spec, coefficients, ingredients, tmp_path / "soup")
    base, found = load_file(tmp_path / "base" / "model.safetensors"), load_file(soup / "model.safetensors")
    assert base.keys() == found.keys()
    assert torch.equal(base["model.embed_tokens.weight"], found["model.embed_tokens.weight"])
    assert type(llama()).from_pretrained(soup).config.tie_word_embeddings


def test_a_base_or_a_sum_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    kind = Kind(llama, [{"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]}] * 2, TEXT)
    spec, adapters = made(kind, tmp_path)
    ingredients, layout, _ = lift(spec, adapters)
    coefficients = random_coefficients(layout, ("0", "1"))
    large = Coefficients(np.array([[1e9], [1 - 1e9]]), ("0", "1"), ("model",), dict.fromkeys(layout.names, 0))
    with pytest.raises(IngredientError, match=r"does not fit into float16: .* Set out_dtype: float32"):
        merged(spec, large, ingredients, tmp_path / "soup", "float16")
    assert not [*(tmp_path / "soup").iterdir()]
    shutil.rmtree(tmp_path / "soup")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    ingredients, _, _ = lift(spec, [open_adapter(str(tmp_path / str(k))) for k in range(2)])
    with pytest.raises(IngredientError, match=r"the base: model\.norm\.weight contains values that are not finite"):
        merged(spec, coefficients, ingredients, tmp_path / "soup")

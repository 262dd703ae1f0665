"""Finished soups of adapters that were merged into their base: verify, bake, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.recipe import dump_recipe, make_recipe
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.records import finished_record
from ray_soup.soups.run import run
from tests.adapters import loaded, values, write_adapters
from tests.conftest import values as values_of_a_zoo
from tests.unit.soups.test_adapters import rewritten
from tests.unit.task.language_models import llama

peft = pytest.importorskip("peft")


def tied_llama() -> nn.Module:
    return llama(tied=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    configs = [
        {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj", "down_proj"]},
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"r": 1, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj"], "bias": "lora_only"},
    ]
    write_adapters(folder, configs, tied_llama)
    return folder


@pytest.fixture(scope="module")
def uniform(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("soups") / "uniform"
    run(make_recipe({**values(made), "method": "uniform", "data": {}, "adapter": {"merge": True}}), out)
    return out


def test_the_folder_is_that_of_a_whole_model(made: Path, uniform: Path, tmp_path: Path) -> None:
    exact = tmp_path / "exact"
    run(make_recipe({**values(made), "method": "uniform", "data": {}}), exact)
    found, ids = llama().from_pretrained(uniform), torch.arange(2, 26).view(2, 12)
    with torch.inference_mode():
        ours, theirs = found(ids).logits, loaded(made, exact)(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert not found.config.tie_word_embeddings  # the embeddings alone were changed
    names = {file.name for file in uniform.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "coefficients.safetensors"} <= names
    assert not any(name.startswith("adapter") for name in names)
    card = (uniform / "README.md").read_text(encoding="utf-8")
    assert "transformers.LlamaForCausalLM.from_pretrained('.')" in card
    assert "library_name: transformers" in card
    assert finished_record(uniform)["base"]["path"] == str(made / "base")


def test_it_is_verified_and_rebuilt(uniform: Path, tmp_path: Path) -> None:
    lines = verify(uniform)
    assert any(
        line.startswith("21 tensors equal those computed from coefficients, ingredients and base") for line in lines
    ), lines
    assert any(line.startswith("8 sampled tensors equal") for line in lines), lines
    assert any("the base" in line and "has the digest" in line for line in lines)
    bake_copy(uniform, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (uniform / name).read_bytes(), name
    verify(tmp_path / "again")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_verify_recomputes_every_tensor(uniform: Path, tmp_path: Path, name: str) -> None:
    soup = tmp_path / "soup"
    shutil.copytree(uniform, soup)
    tensors = load_file(soup / "model.safetensors")
    flat = tensors[name].view(-1)
    flat[1] = torch.nextafter(flat[1], torch.tensor(9.0))
    save_file(tensors, soup / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SoupError, match=r"model.safetensors was changed"):
        verify(soup)
    with pytest.raises(
        SoupError, match=f"the tensor {name} differs from the one computed from coefficients, ingredients and"
    ):
        verify(rewritten(soup, tmp_path, "model.safetensors"))


def test_a_changed_base_is_found(made: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(made, own)
    for config in own.glob("runs/*/adapter_config.json"):
        found = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(found | {"base_model_name_or_path": str(own / "base")}), encoding="utf-8")
    run(make_recipe({**values(own), "method": "uniform", "data": {}, "adapter": {"merge": True}}), tmp_path / "soup")
    tensors = load_file(own / "base" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, own / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IngredientError, match="the base, has changed since the soup was made"):
        verify(tmp_path / "soup")


def test_a_rounding_that_changes_the_soup_is_noted(made: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        {**values(made), "method": "uniform", "data": {}, "adapter": {"merge": True}, "out_dtype": "bfloat16"}
    )
    soup = run(recipe, tmp_path / "soup")
    assert any("merged and rounded to the dtype of the model" in note for note in soup.notes)
    verify(tmp_path / "soup")


def test_the_key_is_for_adapters_and_excludes_a_rank(made: Path, zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"rank is 3 and merge is true"):
        make_recipe(values(made, adapter={"merge": True, "rank": 3}))
    with pytest.raises(RecipeError, match=r"adapter.merge is true, but the ingredients are whole models"):
        open_inputs(make_recipe({**values_of_a_zoo(zoo), "adapter": {"merge": True}}))
    assert "merge" not in dump_recipe(make_recipe(values(made, adapter={"rank": 3})))
    assert "merge: true" in dump_recipe(make_recipe(values(made, adapter={"merge": True})))

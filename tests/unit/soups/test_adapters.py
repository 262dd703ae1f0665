"""Finished soups of adapters, made without data: verify, bake, truncation, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.hashing import sha256_file
from ray_soup.io.progress import drain
from ray_soup.mixing.blocks import partition
from ray_soup.mixing.stores import open_store
from ray_soup.mixing.truncate import distance, truncated
from ray_soup.recipe import dump_recipe, make_recipe
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.inputs import open_inputs
from ray_soup.soups.records import finished_record, write_run_record
from ray_soup.soups.run import run
from tests.adapters import values, write_adapters, write_texts
from tests.unit.task.language_models import llama

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    write_adapters(folder)
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def uniform(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("soups") / "uniform"
    run(make_recipe({**values(made), "method": "uniform", "data": {}}), out)
    return out


def test_a_soup_is_verified_and_rebuilt(uniform: Path, tmp_path: Path) -> None:
    lines = verify(uniform)
    assert any("29 tensors are bit-identical" in line for line in lines)
    assert any("the base" in line for line in lines)
    bake_copy(uniform, tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (uniform / name).read_bytes()
    verify(tmp_path / "again")


def test_rows_of_adapters_are_not_cut(made: Path) -> None:
    """Refused at the start; a trial of a search, whose blocks are chosen later, is refused by the store."""
    with pytest.raises(RecipeError, match=r"blocks: .* the ingredients are LoRA adapters.* Set blocks: tensor"):
        open_inputs(make_recipe({**values(made), "blocks": {"tensor": 2}}))
    inputs = open_inputs(make_recipe({**values(made), "blocks": {"tensor": 1}}))
    store = drain(open_store(inputs.ingredients, inputs.layout, "float32"))
    with pytest.raises(RecipeError, match="Set blocks: tensor"):
        store.blocks(partition(inputs.layout, {"tensor": 2}))


def rewritten(soup: Path, tmp_path: Path, name: str) -> Path:
    """A copy of a soup whose run.json has the digest of a changed file."""
    record = finished_record(soup)
    record["files"][name] = sha256_file(str(soup / name))
    write_run_record(record, soup / "run.json")
    return soup


def test_verify_recomputes_weights_and_config(uniform: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        soup = tmp_path / name
        shutil.copytree(uniform, soup)
        if name.endswith("json"):
            config = json.loads((soup / name).read_text(encoding="utf-8"))
            (soup / name).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] * 2}), encoding="utf-8")
        else:
            tensors = load_file(soup / name)
            next(t for n, t in tensors.items() if "lora_B" in n)[0, 0] += 1e-3
            save_file(tensors, soup / name)
        with pytest.raises(SoupError, match=f"{name} was changed"):
            verify(soup)
        with pytest.raises(SoupError, match=r"differs from the one computed|is not the config of this soup"):
            verify(rewritten(soup, tmp_path, name))


def test_a_changed_base_or_adapter_is_found(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "own")
    own = tmp_path / "own"
    for config in own.glob("runs/*/adapter_config.json"):
        found = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(found | {"base_model_name_or_path": str(own / "base")}), encoding="utf-8")
    recipe = make_recipe({**values(own), "method": "uniform", "data": {}})
    run(recipe, tmp_path / "soup")
    verify(tmp_path / "soup")
    tensors = load_file(own / "base" / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, own / "base" / "model.safetensors", metadata={"format": "pt"})
    for work in (verify, lambda out: bake_copy(out, tmp_path / "new")):
        with pytest.raises(IngredientError, match="the base, has changed since the soup was made"):
            work(tmp_path / "soup")
    shutil.copy(made / "base" / "model.safetensors", own / "base")
    verify(tmp_path / "soup")
    config = own / "runs" / "0" / "adapter_config.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(found | {"lora_alpha": 9}), encoding="utf-8")
    with pytest.raises(IngredientError, match="has changed since the soup was made"):
        verify(tmp_path / "soup")


@pytest.mark.parametrize("rank", [1, 6, 23])
def test_a_smaller_rank_is_as_near_as_it_can_be(made: Path, uniform: Path, tmp_path: Path, rank: int) -> None:
    recipe = make_recipe({**values(made), "method": "uniform", "data": {}, "adapter": {"rank": rank}})
    soup = run(recipe, tmp_path / "soup")
    assert any("larger rank" in line for line in verify(tmp_path / "soup"))
    exact, short = (load_file(out / "adapter_model.safetensors") for out in (uniform, tmp_path / "soup"))
    lost = total = 0.0
    for name in (n.removesuffix("A.weight") for n in exact if n.endswith("lora_A.weight")):
        whole, near = ((t[f"{name}B.weight"].double() @ t[f"{name}A.weight"].double()) for t in (exact, short))
        s = torch.linalg.svdvals(whole)
        assert len(short[f"{name}A.weight"]) == min(rank, len(exact[f"{name}A.weight"]))
        assert torch.linalg.norm(whole - near) <= s[rank:].norm() + 1e-6 * s.norm()
        lost, total = lost + float(s[rank:].square().sum()), total + float(s.square().sum())
    assert any(f"by {(lost / total) ** 0.5:.2%} (Frobenius norm)" in note for note in soup.notes)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "soup")
    assert max(m.r["default"] for m in model.modules() if isinstance(getattr(m, "r", None), dict)) == rank
    tensors = load_file(tmp_path / "soup" / "adapter_model.safetensors")
    next(t for n, t in tensors.items() if "lora_B" in n)[0, 0] += 0.1
    save_file(tensors, tmp_path / "soup" / "adapter_model.safetensors")
    with pytest.raises(SoupError, match=r"differs from that of the ingredients by|; its rank allows|differs from the one"):
        verify(rewritten(tmp_path / "soup", tmp_path, "adapter_model.safetensors"))


def test_truncation_is_the_nearest_product_of_its_rank() -> None:
    torch.manual_seed(0)
    b, a = torch.randn(9, 6, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    for rank in (1, 3, 5):
        new_b, new_a, lost, total = truncated(b, a, rank)
        s = torch.linalg.svdvals(b @ a)
        assert (new_b.shape, new_a.shape) == ((9, rank), (rank, 12))
        assert torch.linalg.norm(b @ a - new_b @ new_a) == pytest.approx(float(s[rank:].norm()))
        assert lost == pytest.approx(float(s[rank:].square().sum()))
        assert total == pytest.approx(float(s.square().sum()))
        assert distance(b, a, new_b, new_a) == pytest.approx(float(s[rank:].norm()))
    assert distance(b, a, b.clone(), a.clone()) <= 1e-12
    new_b, new_a, lost, _ = truncated(b[:2], a, 4)  # of rank 2: the other columns are zero
    assert np.allclose(new_b @ new_a, b[:2] @ a)
    assert lost == 0


def test_recipes_without_the_key_have_the_text_that_they_had(made: Path) -> None:
    assert "adapter:" not in dump_recipe(make_recipe(values(made)))
    assert "rank: 4" in dump_recipe(make_recipe(values(made, adapter={"rank": 4})))

"""Adapters that are broken, or are no plain LoRA, are refused in one sentence that names the file."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError, RecipeError, SoupError
from ray_soup.io.adapters import AdapterConfig, adapter_file, open_adapter, open_checkpoint, read_config
from ray_soup.io.find import find_checkpoints, open_ingredients
from ray_soup.io.ingredient import open_ingredient
from ray_soup.recipe import make_recipe
from ray_soup.soups.inputs import open_inputs
from ray_soup.task.adapters import lift
from tests.adapters import ATTENTION, make_adapter, values, write_adapters, write_texts
from tests.unit.task.language_models import byte_tokenizer, llama, saved

pytest.importorskip("peft")
TWO: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION},
    {"r": 4, "lora_alpha": 4, "target_modules": ATTENTION},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_adapters(folder, TWO)
    write_texts(folder)
    return folder


@pytest.fixture
def own(pair: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; the configs name the base of the copy."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    for config in tmp_path.glob("runs/*/adapter_config.json"):
        change(config, base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def change(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(found | changes), encoding="utf-8")


def refused(folder: Path, said: str, error: type[SoupError] = IngredientError, **changes: Any) -> str:
    with pytest.raises(error, match=re.escape(said)) as caught:
        open_inputs(make_recipe(values(folder, **changes)))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("layer_replication", [[0, 1]]), ("loftq_config", {"loftq_bits": 4}), ("lora_bias", True),
        ("megatron_config", {"a": 1}), ("target_parameters", ["mlp.w"]), ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [3]), ("use_qalora", True), ("a_setting_of_the_future", 1),
    ],
)  # fmt: skip
def test_adapters_that_are_no_plain_lora_are_refused_by_name(own: Path, key: str, value: Any) -> None:
    change(own / "runs" / "1" / "adapter_config.json", **{key: value})
    assert str(own / "runs" / "1" / "adapter_config.json") in refused(own, f"{key} is ")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda"])
def test_a_start_that_changes_the_base_is_refused(own: Path, start: str) -> None:
    change(own / "runs" / "0" / "adapter_config.json", init_lora_weights=start)
    refused(own, f"init_lora_weights is {start}, by which the training changed the weights of the base")


def test_another_kind_of_adapter_is_refused(own: Path) -> None:
    change(own / "runs" / "0" / "adapter_config.json", peft_type="VERA")
    refused(own, "peft_type is VERA; expected LORA")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is damaged"), ("[]", "found a list"), ('{"peft_type": "LORA"}', "r is None"),
        ('{"peft_type": "LORA", "r": 0, "lora_alpha": 1}', "r is 0; expected a positive integer"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "lora_alpha is nan"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(": 2}}', "is damaged"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"q": true}}', "alpha_pattern.q is True"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "use_rslora": "no"}', "use_rslora is no"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "bias": 3}', "bias is 3"),
        ('{"peft_type": "LORA", "r": 2, "r": 3, "lora_alpha": 2}', "occurs twice"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_refused(own: Path, text: str, said: str) -> None:
    file = own / "runs" / "0" / "adapter_config.json"
    file.write_text(text, encoding="utf-8")
    assert str(file) in refused(own, said)


def rewrite(folder: Path, work: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    work(tensors)
    save_file(tensors, file)


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), f"lacks the factor B of {Q.removeprefix('base_model.model.')}"),
        (lambda t: [t.pop(f"{Q}.lora_{side}.weight") for side in "AB"], f"lacks {Q}.lora_A.weight [4, 32]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 32)}), "are [3, 32] and [32, 4]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0)}), "are [0] and [32, 4]"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int8)}), "is int8 [4, 32]"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(32)}), "lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(32)}), "which PEFT would leave out when it loads"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "contains model.norm.weight; expected"),
        (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(31)}), "has [32] there"),
        (
            lambda t: t.update({f"base_model.model.model.embed_tokens.lora_embedding_{s}": torch.ones(*shape)
                                for s, shape in (("A", (4, 320)), ("B", (32, 4)))}),
            "expected no such tensor by its adapter_config.json",
        ),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_the_config_or_the_base_are_refused(own: Path, work: Any, said: str) -> None:
    rewrite(own / "runs" / "1", work)
    assert str(own / "runs" / "1") in refused(own, said)


def test_a_rank_that_contradicts_the_config_is_refused(own: Path) -> None:
    change(own / "runs" / "0" / "adapter_config.json", r=3)
    refused(own, "have rank 2, but")


def test_another_base_is_refused(own: Path) -> None:
    """Of other shapes by the shapes; of equal shapes by the weights of the base that the adapter names."""
    other = llama()
    with torch.no_grad():
        other.model.norm.weight += 1
    saved(other, byte_tokenizer(), own / "other")
    refused(own, "whose weights differ from those of the recipe's model", model=f"transformers:{own}/other?length=64")
    change(own / "runs" / "1" / "adapter_config.json", base_model_name_or_path=str(own / "other"))
    assert f"{own / 'runs' / '1'} was trained on the base {own / 'other'}" in refused(own, "Set `model:` to that base")
    from tests.unit.task.language_models import gpt2

    saved(gpt2(), byte_tokenizer(), own / "gpt2")
    refused(own, "adapter_config.json: PEFT", model=f"transformers:{own}/gpt2?length=64")


def test_a_base_elsewhere_gives_a_note_and_a_copy_of_it_none(own: Path) -> None:
    shutil.copytree(own / "base", own / "copy")
    notes = open_inputs(make_recipe(values(own, model=f"transformers:{own}/copy?length=64"))).notes
    assert notes == ()
    change(own / "runs" / "1" / "adapter_config.json", base_model_name_or_path="someone/a-llama")
    notes = open_inputs(make_recipe(values(own))).notes
    assert len(notes) == 1
    assert "someone/a-llama" in notes[0]


def test_adapters_need_a_folder_of_transformers(own: Path) -> None:
    adapter = open_adapter(str(own / "runs" / "0"))
    with pytest.raises(RecipeError, match="is neither a folder of transformers on this machine nor an hf:// path"):
        lift("timm:resnet10t?classes=3", [adapter, adapter])


def test_adapters_and_whole_models_are_not_mixed(own: Path) -> None:
    saved(llama(), None, own / "runs" / "whole")
    refused(own, "is an adapter and")


def test_a_rank_is_for_adapters_only(own: Path) -> None:
    for k in range(2):
        saved(llama(), None, own / "whole" / str(k))
    refused(own, "adapter.rank is 3, but the ingredients are whole models", RecipeError,
            ingredients=str(own / "whole"), adapter={"rank": 3})  # fmt: skip


def test_a_folder_with_two_models_or_without_weights_is_refused(own: Path) -> None:
    saved(llama(), None, own / "both")
    shutil.copy(own / "runs" / "0" / "adapter_config.json", own / "both")
    with pytest.raises(IngredientError, match="contains two models"):
        open_checkpoint(str(own / "both"))
    assert adapter_file(str(own / "both" / "model.safetensors")) is None
    (own / "runs" / "1" / "adapter_model.safetensors").unlink()
    refused(own, "contains adapter_config.json, but not adapter_model.safetensors")


def test_what_training_leaves_beside_an_adapter_is_no_ingredient(own: Path) -> None:
    torch.save({"args": 1}, own / "runs" / "0" / "training_args.bin")
    (own / "runs" / "0" / "checkpoint-5").mkdir()
    assert find_checkpoints(str(own / "runs" / "*/")) == [f"{own}/runs/0", f"{own}/runs/1"]
    assert [i.name for i in open_ingredients(str(own / "runs"))] == ["0", "1"]
    files = open_ingredients(str(own / "runs" / "*" / "adapter_model.safetensors"))
    assert all(len(i.files) == 2 for i in files)


def test_an_adapter_without_its_config_is_refused(own: Path) -> None:
    (own / "runs" / "1" / "adapter_config.json").unlink()
    with pytest.raises(IngredientError, match="is a LoRA adapter"):
        open_ingredient(str(own / "runs" / "1"))


def test_values_that_are_not_finite_are_refused(own: Path) -> None:
    from tests.conftest import InProcess

    rewrite(own / "runs" / "1", lambda t: t[f"{Q}.lora_B.weight"].fill_(math.inf))
    pool = InProcess(make_recipe(values(own)))
    with pytest.raises(IngredientError, match=r"runs/1.*q_proj.lora_B.weight contains values that are not finite"):
        pool.open_all("model")


def test_a_change_of_the_config_is_a_change_of_the_adapter(own: Path) -> None:
    """Also of alpha alone, after the adapter was opened."""
    adapter = open_adapter(str(own / "runs" / "1"))
    before = adapter.identity
    change(own / "runs" / "1" / "adapter_config.json", lora_alpha=5)
    with pytest.raises(IngredientError, match=r"adapter_config.json changed while it was in use"):
        adapter.check_unchanged()
    assert open_adapter(str(own / "runs" / "1")).identity != before


def test_scales_and_ranks_are_those_of_peft(tmp_path: Path) -> None:
    """With patterns by ends and by whole names of modules, and rsLoRA."""
    for rslora in (False, True):
        model = make_adapter(
            llama(), tmp_path / str(rslora), 0, r=2, lora_alpha=3, target_modules=ATTENTION, use_rslora=rslora,
            rank_pattern={"q_proj": 4, "model.layers.1.self_attn.k_proj": 5}, alpha_pattern={r"layers\.0.*v_proj": 7},
        )  # fmt: skip
        config = read_config(str(tmp_path / str(rslora) / "adapter_config.json"))
        found = 0
        for name, module in model.base_model.model.named_modules():
            if isinstance(getattr(module, "scaling", None), dict):
                found += 1
                assert config.rank(name) == module.r["default"]
                assert config.scale(name, config.rank(name)) == module.scaling["default"]
        assert found == 8
    assert AdapterConfig("", {"modules_to_save": ["score"]}).saves("score.weight")
    assert not AdapterConfig("", {"modules_to_save": ["score"]}).saves("scores.weight")

"""Constants and old names that checkpoints of a library contain and its models do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.errors import IngredientError
from ray_soup.io.check import check_together
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import open_ingredient
from ray_soup.mixing.blocks import layout_of
from ray_soup.task.loading import load_model
from ray_soup.task.models import describe, load_checkpoint
from tests.unit.task.library_models import bert

State = dict[str, torch.Tensor]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=16, num_labels=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    ))  # fmt: skip


def swin() -> Any:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2], num_heads=[1], window_size=4, num_labels=3
    ))  # fmt: skip


def with_masks(state: State) -> State:
    mask = torch.tril(torch.ones(16, 16, dtype=torch.bool))[None, None]
    return {**state, "transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}


def with_gamma_and_beta(state: State) -> State:
    parts = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in state.items():
        old = next((name.removesuffix(new) + old for new, old in parts.items() if name.endswith(new)), name)
        renamed[old] = tensor
    assert set(renamed) != set(state)
    return {**renamed, "bert.embeddings.position_ids": torch.arange(16)[None]}


def with_position_index(state: State) -> State:
    index = torch.zeros(16, 16, dtype=torch.int64)
    return {**state, "swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": index}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "as_of_old"), [(gpt2, with_masks), (bert, with_gamma_and_beta), (swin, with_position_index)]
)
def test_files_of_older_versions_of_transformers_are_read_as_its_own_loader_reads_them(
    make: Callable[[], Any], as_of_old: Callable[[State], State], tmp_path: Path
) -> None:
    for number in range(2):
        torch.manual_seed(number)
        make().save_pretrained(tmp_path / f"new_{number}")
        state = load_file(tmp_path / f"new_{number}" / "model.safetensors")
        (tmp_path / f"old_{number}").mkdir()
        save_file(as_of_old(state), tmp_path / f"old_{number}" / "model.safetensors", metadata={"format": "pt"})
        make().config.save_pretrained(tmp_path / f"old_{number}")
    spec = f"transformers:{tmp_path}/new_0"
    layout = describe(spec)
    unsaved = layout.in_files.unsaved
    bound = check_together(open_ingredients(f"{tmp_path}/old_*"), layout.state_shapes, layout.known_names, unsaved)
    theirs = type(make()).from_pretrained(tmp_path / "old_1")
    for name, tensor in theirs.state_dict().items():
        if name in layout.state_shapes:
            assert torch.equal(bound[1].read(name), tensor.flatten()), name
    ours = load_model(spec, str(tmp_path / "old_1"))
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    used = layout.with_names({alias for ingredient in bound for alias in ingredient.aliases})
    again = check_together(open_ingredients(f"{tmp_path}/old_*"), layout.state_shapes, used.tied, strict=False)
    assert [i.tensors for i in again] == [i.tensors for i in bound]  # as for a finished soup, without the library
    extra = {**as_of_old(state), "classifier.extra": torch.ones(1)}
    save_file(extra, tmp_path / "old_1" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IngredientError, match=r"not in the model: classifier\.extra"):
        load_model(spec, str(tmp_path / "old_1"))


class Masked(torch.nn.Module):
    """A model with a buffer that it does not save any more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.inner.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("steps", None, persistent=False)


def test_buffers_that_a_model_does_not_save_are_left_out(tmp_path: Path) -> None:
    model = Masked()
    layout = layout_of(model)
    assert "inner.mask" not in layout.state_shapes
    state = {**model.state_dict(), "inner.mask": torch.zeros(2), "steps": torch.zeros(1)}
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.pt")
    load_checkpoint(model, str(tmp_path / "a.pt"))
    assert model.inner.mask.tolist() == [1.0, 1.0]  # the model's own
    bound = open_ingredient(str(tmp_path / "a.pt")).bind(layout.state_shapes, layout.tied, layout.in_files.unsaved)
    assert bound.left_out == ("inner.mask", "steps")
    torch.save({**state, "inner.maskk": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(IngredientError, match=r"a\.pt does not fit the model:\n    not in the model: inner\.maskk"):
        load_checkpoint(model, str(tmp_path / "a.pt"))
    load_checkpoint(model, str(tmp_path / "a.pt"), ["*.mask?"])


@pytest.mark.slow
def test_old_names_come_from_the_library_in_use() -> None:
    from ray_soup.task.transformers_models import _old_names

    names = _old_names(bert())
    assert names["bert.embeddings.LayerNorm.gamma"] == "bert.embeddings.LayerNorm.weight"
    assert names["bert.encoder.layer.0.output.LayerNorm.beta"] == "bert.encoder.layer.0.output.LayerNorm.bias"
    assert _old_names(gpt2()) == {}


@pytest.mark.slow
def test_masks_in_files_of_an_older_timm_are_left_out(tmp_path: Path) -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=8, depths=(2,), num_heads=(1,), num_classes=3
    )
    old = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    assert not set(old) & set(model.state_dict())
    torch.save({"state_dict": {**model.state_dict(), **old}}, tmp_path / "a.pth.tar")
    load_checkpoint(model, str(tmp_path / "a.pth.tar"))
    layout = layout_of(model)
    bound = open_ingredient(str(tmp_path / "a.pth.tar")).bind(layout.state_shapes, {}, layout.in_files.unsaved)
    assert set(bound.left_out) == set(old)

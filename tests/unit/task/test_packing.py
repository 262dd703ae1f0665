"""Texts packed into rows: the logits of a padded batch, from fewer places, or a refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ray_soup.errors import RecipeError
from ray_soup.task import logits
from ray_soup.task.logits import Logits, hold_back
from ray_soup.task.models import build
from ray_soup.task.objective import IGNORED, OBJECTIVES
from ray_soup.task.packing import places
from tests.unit.task.language_models import can_pack, gpt2, llama, saved

MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2}
LENGTHS = (20, 3, 9, 2, 14, 5, 1)
WIDTH = max(LENGTHS)
MASK = torch.stack([(torch.arange(WIDTH) < length).long() for length in LENGTHS])
IDS = torch.randint(320, MASK.shape, generator=torch.Generator().manual_seed(0)) * MASK
TARGETS = torch.where((MASK == 0) | (IDS % 5 == 0), IGNORED, IDS.roll(-1, 1))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_texts_are_next_to_each_other_in_rows_that_hold_them(lengths: list[int]) -> None:
    width = max(lengths)
    rows, starts = places(lengths, width)
    taken = {(row, start + k) for row, start, n in zip(rows, starts, lengths, strict=True) for k in range(n)}
    assert len(taken) == sum(lengths)
    assert max(place for _, place in taken) < width
    assert {*rows} == {*range(max(rows) + 1)}
    half_full = [row for row in {*rows} if sum(n for n, own in zip(lengths, rows, strict=True) if own == row) <= width / 2]
    assert len(half_full) <= 1


@pytest.mark.parametrize("name", filter(can_pack, MODELS))
@pytest.mark.parametrize("options", ["", "&attn_implementation=eager"])
def test_packed_logits_losses_and_gradients_are_the_padded_ones(tmp_path: Path, name: str, options: str) -> None:
    spec, objective = saved(MODELS[name](), None, tmp_path / "m") + "?length=64", OBJECTIVES["causal_lm"]()
    padded, packed = (build(spec + more).model.eval() for more in ("", f"&pack=true{options}"))
    packed.load_state_dict(padded.state_dict())
    places_computed, found = [], []
    for model in (padded, packed):
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: places_computed.append(inputs[0].shape[:-1].numel())
        )
        outputs = model(torch.stack([IDS, MASK], 1))
        hook.remove()
        losses = objective.losses(outputs, TARGETS)
        losses.sum().backward()
        found.append((outputs.detach()[MASK == 1], losses.detach(), [p.grad for p in model.parameters()]))
    for own, expected in zip(found[1][:2], found[0][:2], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=2e-6 * expected.abs().max().item())
    for own, expected in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())
    assert places_computed == [len(LENGTHS) * WIDTH, 3 * WIDTH]  # 54 tokens


def test_packed_logits_are_held_back_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "MOST_OUTPUTS", 0)
    monkeypatch.setattr(logits, "CHUNK", 320 * 7)
    spec, objective = saved(llama(), None, tmp_path / "m") + "?length=64", OBJECTIVES["causal_lm"]()
    padded, packed = (build(spec + more).model.eval() for more in ("", "&pack=true"))
    packed.load_state_dict(padded.state_dict())
    assert hold_back(packed, torch.device("cpu"))
    inputs = torch.stack([IDS, MASK], 1)
    outputs = packed(inputs)
    assert isinstance(outputs, Logits)
    torch.testing.assert_close(objective.losses(outputs, TARGETS), objective.losses(padded(inputs), TARGETS))


@pytest.mark.parametrize(
    "mask",
    [MASK.flip(1), (MASK * (torch.arange(WIDTH) != 4)), None],
    ids=["padding at the beginning", "a hole", "no mask"],
)
def test_what_cannot_be_packed_is_computed_as_it_is(tmp_path: Path, mask: torch.Tensor | None) -> None:
    spec = saved(llama(), None, tmp_path / "m") + "?length=64"
    padded, packed = (build(spec + more).model.eval() for more in ("", "&pack=true"))
    packed.load_state_dict(padded.state_dict())
    inputs = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    assert torch.equal(packed(inputs), padded(inputs))


def mamba() -> Any:
    """A recurrent model: its state goes from one text of a row to the next."""
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4))


def bloom() -> Any:
    """Computes positions from the attention mask itself."""
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=32, max_position_embeddings=128, pad_token_id=0,
    ))  # fmt: skip


def dull() -> Any:
    """Attention hardly makes a difference, so nothing can be said."""
    model = llama()
    model.config.initializer_range = 1e-7
    return model


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (mamba, "", "pack=true is not possible with MambaForCausalLM: .*Remove pack=true"),
        (bloom, "", "pack=true is not possible with BloomForCausalLM: it cannot compute packed texts"),
        (mistral, "", r"needs a length of at most 32, .* \(sliding_window in its config.json\), and length is 64"),
        (dull, "", "does not show whether texts of a row affect each other"),
        (llama, "&pack=yes", "expected true or false for the option 'pack'"),
    ],
)
def test_a_model_that_cannot_be_packed_is_refused(tmp_path: Path, make: Any, options: str, said: str) -> None:
    spec = saved(make(), None, tmp_path / "m") + "?length=64"
    with pytest.raises(RecipeError) as raised:
        build(spec + (options or "&pack=true"))
    assert re.search(said, str(raised.value)), raised.value
    assert build(spec + "&pack=false").objective == "causal_lm"


def test_a_sliding_window_as_long_as_a_text_does_not_matter(tmp_path: Path) -> None:
    assert build(saved(mistral(), None, tmp_path / "m") + "?length=32&pack=true").objective == "causal_lm"

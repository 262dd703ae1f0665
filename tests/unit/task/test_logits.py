"""Logits that are held back: the same losses and gradients as whole ones, which never exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ray_soup.task import logits
from ray_soup.task.logits import Logits, hold_back
from ray_soup.task.models import build
from ray_soup.task.objective import IGNORED, OBJECTIVES, Objective
from tests.unit.task.language_models import bert_for, gpt2, llama, saved

CPU = torch.device("cpu")
WORDS, TOKENS = 320, 12
ROWS = torch.randint(WORDS, (5, TOKENS), generator=torch.Generator().manual_seed(0))
MASK = torch.stack([(torch.arange(TOKENS) < length).long() for length in (12, 7, 2, 9, 12)])
INPUTS = {"input_ids": ROWS, "attention_mask": MASK}
TARGETS = torch.where((MASK == 0) | (ROWS % 4 == 0), IGNORED, ROWS.roll(1, 1))
TARGETS[3] = IGNORED  # nothing is scored


def gemma() -> nn.Module:
    """Logits are capped by a hyperbolic tangent."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0, initializer_range=0.2, pad_token_id=0,
    )).eval()  # fmt: skip


def cohere() -> nn.Module:
    """Logits are multiplied by a number."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        logit_scale=0.25, initializer_range=0.2, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )).eval()  # fmt: skip


def bert() -> nn.Module:
    """The output layer has a bias, and its weights are the embeddings."""
    return bert_for("ForMaskedLM")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "tied": lambda: llama(tied=True), "gpt2": gpt2, "gemma": gemma, "cohere": cohere, "bert": bert,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hold back logits of any size, and compute those of seven tokens at a time."""
    monkeypatch.setattr(logits, "MOST_OUTPUTS", 0)
    monkeypatch.setattr(logits, "CHUNK", WORDS * 7)


@pytest.fixture(scope="module", params=MODELS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Objective]:
    """A model with whole logits, the same with logits held back, and its objective."""
    spec = saved(MODELS[request.param](), None, tmp_path_factory.mktemp("model") / "m")
    whole, held = build(spec), build(spec)
    held.model.load_state_dict(whole.model.state_dict())
    for one in (whole, held):
        one.model.eval()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(logits, "MOST_OUTPUTS", 0)
        assert hold_back(held.model, CPU)
    assert isinstance(held.model(INPUTS), Logits)
    return whole.model, held.model, OBJECTIVES[whole.objective]()


@pytest.fixture
def pair(built: tuple[Any, Any, Objective], small: None) -> tuple[Any, Any, Objective]:
    built[0].zero_grad()
    built[1].zero_grad()
    return built


def close(own: list[torch.Tensor], expected: list[torch.Tensor], relative: float) -> bool:
    """Whether gradients differ by no more than a part of the largest number in them; some are zero but for rounding."""
    largest = max(one.abs().max().item() for one in expected)
    return all((a - b).abs().max() <= relative * largest for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_whole_logits(pair: tuple[Any, Any, Objective], smoothing: float) -> None:
    *models, objective = pair
    found = []
    for model in models:
        factor = torch.tensor(0.7, requires_grad=True)
        losses = objective.losses(objective.scaled(model(INPUTS).float(), factor), TARGETS, smoothing)
        (losses * torch.tensor([1.0, 2.0, -1.0, 1.0, 0.5])).sum().backward()
        found.append((losses.detach(), [factor.grad, *(parameter.grad for parameter in model.parameters())]))
    (expected, gradients), (own, own_gradients) = found
    assert expected.abs().sum() > 1
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    assert close(own_gradients, gradients, 5e-6)


@pytest.mark.parametrize("name", ["llama", "tied", "bert"])
def test_gradients_of_parts_in_bfloat16_are_summed_in_float32(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weight and the bias of the output layer. In bfloat16, 512 parts add up to an error of several percent."""
    spec = saved(MODELS[name](), None, tmp_path / "m") + "?dtype=bfloat16"
    monkeypatch.setattr(logits, "CHUNK", WORDS)
    ids, found = torch.randint(WORDS, (8, 64), generator=torch.Generator().manual_seed(0)), []
    for most in (1 << 26, 0):
        monkeypatch.setattr(logits, "MOST_OUTPUTS", most)
        torch.manual_seed(0)
        built = build(spec)
        assert hold_back(built.model.eval(), CPU)
        outputs = built.model({"input_ids": ids}).float()
        assert isinstance(outputs, Logits) == (most == 0)
        OBJECTIVES[built.objective]().losses(outputs, ids.roll(1, 1)).sum().backward()
        head = built.model.get_output_embeddings()
        found.append([p.grad.double() for p in head.parameters()])
    for own, expected in zip(*found, strict=True):
        assert (own - expected).norm() < 0.01 * expected.norm()


def test_what_is_evaluated_is_that_of_whole_logits(pair: tuple[Any, Any, Objective]) -> None:
    *models, objective = pair
    with torch.inference_mode():
        expected, own = (model(INPUTS).float() for model in models)
        torch.testing.assert_close(objective.losses(own, TARGETS), objective.losses(expected, TARGETS))
        assert torch.equal(objective.correct(own, TARGETS), objective.correct(expected, TARGETS))
        torch.testing.assert_close(objective.member(own, TARGETS), objective.member(expected, TARGETS))
        torch.testing.assert_close(own.sum() / own.numel(), expected.mean())
        torch.testing.assert_close(own.whole(), expected)
    assert own.shape == expected.shape
    assert (own.ndim, len(own), own.numel()) == (expected.ndim, len(expected), expected.numel())
    assert objective.check(own, TARGETS) is None
    assert objective.check(own, TARGETS[:, 1:]) is not None


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        made = found if isinstance(found, (tuple, list)) else (found,)
        self.numel = max([self.numel, *(one.numel() for one in made if isinstance(one, torch.Tensor))])
        return found


def test_no_tensor_of_a_step_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words, tokens = 1_000, 64
    monkeypatch.setattr(logits, "MOST_OUTPUTS", words * tokens - 1)
    monkeypatch.setattr(logits, "CHUNK", words * 4)
    spec = saved(llama(words), None, tmp_path / "m")
    ids = torch.arange(tokens)[None]
    largest = {}
    for held in (False, True):
        model, objective = build(spec).model.eval(), OBJECTIVES["causal_lm"]()
        if held:
            assert hold_back(model, CPU)
            assert isinstance(model({"input_ids": ids[:, 1:]}), torch.Tensor)
        with Largest() as noted:
            objective.loss(model({"input_ids": ids}).float(), ids).backward()
        largest[held] = noted.numel
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert largest[False] == words * tokens
    assert largest[True] == words * 32  # the gradient of the output layer's weights


def test_precision_is_that_of_the_forward_pass(pair: tuple[Any, Any, Objective]) -> None:
    """The losses are computed after its context has ended."""
    *models, objective = pair
    found = []
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(INPUTS)
        losses = objective.losses(outputs.float(), TARGETS)
        losses.sum().backward()
        found.append((losses.detach(), [p.grad for p in model.parameters()]))
    (expected, gradients), (own, own_gradients) = found
    exact = objective.losses(models[0](INPUTS).float(), TARGETS).detach()
    print((own - expected).abs().max(), (expected - exact).abs().max())
    assert (own - expected).abs().max() < 0.02 * (expected - exact).abs().max()
    assert close(own_gradients, gradients, 0.02)


class Sliced(nn.Module):
    """Does something to its logits that needs them as a whole."""

    def __init__(self, how: Callable[[Any], Any]) -> None:
        super().__init__()
        self.embed, self.head, self.how = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), how

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.how(self.head(self.embed(inputs["input_ids"])))


@pytest.mark.parametrize(
    "how",
    [
        lambda found: found[..., :7],
        lambda found: found - found.mean(),
        lambda found: found * torch.ones(WORDS),
        lambda found: found / torch.ones(3, 1),
        lambda found: torch.softmax(found, -1),
        lambda found: found.whole() if isinstance(found, Logits) else found,
    ],
)
def test_a_model_that_needs_its_logits_keeps_them(how: Callable[[Any], Any], small: None) -> None:
    model = Sliced(how)
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    expected = model(inputs)
    assert not hold_back(model, CPU)
    assert torch.equal(model(inputs), expected)


def test_small_batches_keep_their_bits(tmp_path: Path) -> None:
    model = build(saved(llama(), None, tmp_path / "m")).model.eval()
    expected = model(INPUTS)
    assert hold_back(model, CPU)
    assert torch.equal(model(INPUTS), expected)

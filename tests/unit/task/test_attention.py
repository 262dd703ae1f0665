"""Attention with a fast backward pass: torch's outputs, and gradients at least as near to those in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ray_soup.task import attention
from ray_soup.task.attention import FastAttention
from ray_soup.task.checkpointing import checkpoint_layers


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Random tensors that bfloat16 holds exactly."""
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).bfloat16().to(dtype) for shape in shapes]


def gradients(inputs: list[torch.Tensor], upstream: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """The output of attention, then the gradients of query, key and value."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = F.scaled_dot_product_attention(*leaves, **options)
    output.backward(upstream)
    return output.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.arange(21)[:, None] >= torch.arange(17)},
        {"attn_mask": (torch.arange(17) / 16).bfloat16().expand(21, 17)},
    ],
)
def test_gradients_are_at_least_as_near_to_float64_as_torchs(options: dict[str, Any]) -> None:
    *inputs, upstream = tensors((4, 3, 21, 16), (4, 3, 17, 16), (4, 3, 17, 16), (4, 3, 21, 16))
    mask = options.get("attn_mask")
    doubled = {**options, "attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else options
    exact = gradients([tensor.double() for tensor in inputs], upstream.double(), **doubled)
    torchs = gradients(inputs, upstream, **options)
    with FastAttention():
        found = gradients(inputs, upstream, **options)
    assert torch.equal(found[0], torchs[0])
    for true, theirs, ours in zip(exact[1:], torchs[1:], found[1:], strict=True):
        assert ours.dtype == torch.bfloat16
        error = (ours.double() - true).norm()
        assert error <= 1.01 * (theirs.double() - true).norm()
        assert error < 0.003 * true.norm()  # the rounding of the results: 2^-9 at most


@pytest.mark.parametrize(
    ("dtype", "tokens", "options"),
    [
        (torch.float32, 9, {}),
        (torch.bfloat16, 129, {}),
        (torch.bfloat16, 9, {"attn_mask": torch.zeros(9, 9, requires_grad=True)}),
    ],
)
def test_what_it_does_not_apply_to_is_torchs_bit_for_bit(dtype: torch.dtype, tokens: int, options: dict[str, Any]) -> None:
    *inputs, upstream = tensors(*[(2, 3, tokens, 8)] * 4, dtype=dtype)
    expected = gradients(inputs, upstream, **options)
    with FastAttention():
        found = gradients(inputs, upstream, **options)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_torchs_function_is_back_when_the_last_context_has_ended() -> None:
    torchs, context = F.scaled_dot_product_attention, FastAttention()
    with context, context:
        assert F.scaled_dot_product_attention is not torchs
    assert F.scaled_dot_product_attention is torchs


def test_a_function_that_a_model_has_put_in_the_place_of_torchs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*given: Any, **options: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)  # what it will restore
    with FastAttention():
        monkeypatch.setattr(F, "scaled_dot_product_attention", own)
    assert F.scaled_dot_product_attention is own
    with FastAttention():
        assert F.scaled_dot_product_attention is own
    assert F.scaled_dot_product_attention is own


def test_autocast_leaves_float64_alone_as_torch_does() -> None:
    inputs = tensors(*[(2, 3, 9, 8)] * 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(*inputs)
        with FastAttention():
            found = F.scaled_dot_product_attention(*inputs)
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


def test_models_may_transform_functions_and_differentiate_twice() -> None:
    *inputs, upstream = tensors((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 4), (2, 3, 9, 4))

    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return (F.scaled_dot_product_attention(query, key, value) * upstream).float().sum()

    def twice(query: torch.Tensor) -> torch.Tensor:
        leaf = query.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf, *inputs[1:]), leaf, create_graph=True)
        (found,) = torch.autograd.grad(slope.float().square().sum(), leaf)
        return found

    expected = torch.func.grad(loss)(*inputs), twice(inputs[0])
    with FastAttention():
        found = torch.func.grad(loss)(*inputs), twice(inputs[0])
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_layer_that_runs_again_for_its_gradient_has_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the backward pass is outside of the context; torch refuses layers that keep other tensors than before."""
    calls, computed = [], attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *given: calls.append(1) or computed(*given))
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    (images,) = tensors((2, 5, 16), dtype=torch.float32)

    def gradient(context: FastAttention) -> torch.Tensor:
        model.zero_grad()
        with context, torch.autocast("cpu", torch.bfloat16):
            outputs = model(images).float()
        outputs.square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    expected = gradient(FastAttention())
    assert len(calls) == 3
    checkpoint_layers(model, "model")
    assert torch.equal(gradient(FastAttention()), expected)
    assert len(calls) == 9  # each layer runs twice

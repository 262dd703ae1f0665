"""Gradients of an output layer in bfloat16, summed over parts of the outputs in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def place_of(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return the place of a parameter's gradient, float32 of its shape; None if its gradient needs none."""
    if parameter is None or parameter.dtype != torch.bfloat16 or not parameter.requires_grad:
        return None
    place: torch.Tensor = _Place.apply(parameter)
    return place


def linear(hidden: torch.Tensor, layer: torch.nn.Linear, places: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Compute what `layer` does, with the gradients of its weight and bias at the `places` of these."""
    outputs: torch.Tensor = _Linear.apply(hidden, layer.weight, layer.bias, *places)
    return outputs


class _Place(torch.autograd.Function):
    """Stand in for a parameter: float32 of its shape, without memory. Its gradients are summed in float32, then rounded."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        ctx.dtype = parameter.dtype
        return parameter.new_zeros((), dtype=torch.float32).expand(parameter.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient.to(ctx.dtype)


class _Linear(torch.autograd.Function):
    """F.linear, whose weight and bias have their gradients at the `_Place` of each."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_weight = (rows.T @ hidden.flatten(0, -2)).float() if ctx.needs_input_grad[3] else None
        of_bias = rows.sum(0, dtype=torch.float32) if ctx.needs_input_grad[4] else None
        return gradient @ weight, None, None, of_weight, of_bias

"""Attention whose backward pass is fast on a CPU in bfloat16.

On short sequences, the backward kernel for bfloat16 of torch 2.14 takes up to 6 times as long as forward and backward pass
together in float32. So the backward pass computes attention again, in float32 from the same bfloat16 inputs; the gradients
are at least as accurate.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SHORT = 128
"""Longest sequence. On one core, forward and backward pass of torch take 6 times as long as these with 17 tokens, 1.9 times
with 50, 1.3 times with 128, and .85 times with 197."""

_torchs = torch._C._nn.scaled_dot_product_attention  # F's own may be one that a model has put there
_FLASH = 1  # in torch.nn.attention.SDPBackend


class FastAttention:
    """A context in which torch.nn.functional.scaled_dot_product_attention has the fast backward pass, where it applies.

    It applies on a CPU, in bfloat16, to short sequences without dropout. Outputs do not change. The context has to span the
    forward pass and its backward pass, in which a model that saves memory computes layers again. It may be entered more than
    once, also by several threads. A function that a model has put in the place of torch's stays.
    """

    _lock, _users = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            FastAttention._users += 1
            if F.scaled_dot_product_attention is _torchs:
                F.scaled_dot_product_attention = _attention  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        with self._lock:
            FastAttention._users -= 1
            if not FastAttention._users and F.scaled_dot_product_attention is _attention:
                F.scaled_dot_product_attention = _torchs


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **others: Any,
) -> torch.Tensor:
    """Compute torch.nn.functional.scaled_dot_product_attention."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, **others}
    low: tuple[Any, ...] = (query, key, value, attn_mask)
    if torch.is_autocast_enabled("cpu"):  # the same casts as torch's
        dtype = torch.get_autocast_dtype("cpu")
        low = tuple(t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in low)
    applies = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active() and _has_slow_kernel(low, options)
    result: torch.Tensor = _Attention.apply(*low, options) if applies else _torchs(query, key, value, attn_mask, **options)
    return result


def _has_slow_kernel(tensors: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Return whether torch computes attention of query, key, value and mask with the kernel that is slow for them."""
    if any(
        t is None or t.dtype != torch.bfloat16 or t.device.type != "cpu" or t.ndim != 4 or t.is_nested for t in tensors[:3]
    ):
        return False
    query, key, _, mask = tensors
    short = max(query.shape[-2], key.shape[-2]) <= SHORT
    if not short or options["dropout_p"] or (mask is not None and mask.requires_grad):
        return False
    return bool(torch._fused_sdp_choice(*tensors, **options) == _FLASH)


class _Attention(torch.autograd.Function):
    """Attention of query, key and value, bfloat16 [..., tokens, d], with a mask that has no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        return _torchs(query, key, value, mask, **options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *low, mask = ctx.saved_tensors
        query, key, value = leaves = [tensor.float().requires_grad_() for tensor in low]
        exact = mask.float() if mask is not None and mask.is_floating_point() else mask
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            output = _torchs(query, key, value, exact, **ctx.options)
            # a sum, because autograd imports sympy to check the shape of a gradient
            whole = torch.dot(output.flatten(), gradient.float().flatten())
        return *(found.bfloat16() for found in torch.autograd.grad(whole, leaves)), None, None

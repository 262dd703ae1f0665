"""Gradient checkpointing: the repeated layers of a model keep their inputs only, and compute again in the backward pass.

Libraries of models do this in training mode only, where dropout is active; the models here are in eval mode, so it is done
here (Chen et al. 2016), for the models of all libraries alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ray_soup.errors import RecipeError
from ray_soup.task.attention import FastAttention


def checkpoint_layers(model: torch.nn.Module, spec: str) -> None:
    """Let the repeated layers of a model forget what they computed until the backward pass needs it.

    Outputs and gradients do not change. Raises RecipeError if the model has no repeated layers.

    Args:
        model: the model, in eval mode.
        spec: the recipe key `model`, for the message.
    """
    layers = list(repeated_layers(model))
    if not layers:
        raise RecipeError(
            f"learn.gradient_checkpointing is true, and {spec} has no repeated layers: no ModuleList or Sequential of two "
            "or more layers of one class. Remove this key."
        )
    if getattr(getattr(model, "config", None), "use_cache", False) is True:
        model.config.use_cache = False  # type: ignore[union-attr]  # a layer would put its keys there twice
    for layer in layers:
        layer.forward = partial(_again, layer.forward)


def repeated_layers(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the layers of the outermost lists of a model whose entries are of one class and have parameters."""
    for child in module.children():
        layers = list(child.children()) if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) else []
        alike = len({type(layer) for layer in layers}) == 1 and all(any(True for _ in p.parameters()) for p in layers)
        if len(layers) > 1 and alike:
            yield from layers
        else:
            yield from repeated_layers(child)


def _again(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=_alike, **named)


def _alike() -> tuple[FastAttention, FastAttention]:
    """Return the contexts of a layer's two runs, which have to keep the same tensors for the backward pass."""
    return FastAttention(), FastAttention()

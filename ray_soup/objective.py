"""The loss and the metric that a recipe brings as functions of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.models import import_function
from ray_soup.recipe import Recipe

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits float32 [n, classes] and labels int64 [n]."""


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


def loss_of(recipe: Recipe, classes: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """The recipe's loss, summed over the examples: of logits, labels, and label smoothing where it is cross-entropy. Raises
    RecipeError where it is not a sum over them."""
    if recipe.loss is None:
        return cross_entropy
    function = import_function(recipe.loss)

    def summed(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        found = function(logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape not in ((), labels.shape):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise RecipeError(f"loss: {recipe.loss} returned {shape}; expected losses [{len(labels)}], or their sum.")
        return found.sum()

    logits, labels = _made_up(classes, device)
    logits.requires_grad_()
    whole = _called("loss", recipe.loss, summed, logits, labels)
    parts = sum(_called("loss", recipe.loss, summed, logits[some], labels[some]) for some in (slice(1), slice(1, None)))
    if not whole.requires_grad:
        raise RecipeError(f"loss: {recipe.loss} has no gradient by the logits.")
    if not torch.allclose(whole, parts, rtol=1e-3):
        raise RecipeError(
            f"loss: {recipe.loss} of three examples is {whole.item():.4g}, and of the first and the other two "
            f"{parts.item():.4g} together. Expected losses [n], or their sum (reduction='sum'), each of its own example."
        )
    return summed


def metric_of(recipe: Recipe, classes: int, device: torch.device) -> Function | None:
    """The recipe's metric, float32 [n]. Raises RecipeError where it gives no score for each example."""
    if recipe.metric is None:
        return None
    function = import_function(recipe.metric)

    def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = function(logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape != labels.shape:
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise RecipeError(
                f"metric: {recipe.metric} returned {shape}; expected a score for each of {len(labels)} examples."
            )
        return found.float()

    _called("metric", recipe.metric, scores, *_made_up(classes, device))
    return scores


def _made_up(classes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    return logits.to(device), torch.tensor([0, classes - 1, 0], device=device)


def _called(key: str, spec: str, function: Function, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    try:
        return function(logits, labels)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{key}: {spec} failed with made-up logits {list(logits.shape)} and labels {list(labels.shape)}: {error}"
        ) from error

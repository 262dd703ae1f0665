"""The loss and the metric: by default cross-entropy and none, otherwise functions that the recipe names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe
from ray_soup.task.functions import import_function

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps logits float32 [n, classes] and labels int64 [n] to losses or scores."""


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Compute the cross-entropy of logits float32 [n, classes] and labels int64 [n], summed over the examples."""
    return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing)


def loss_of(recipe: Recipe, classes: int, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the recipe's loss, summed over the examples, after checking it on synthetic logits.

    The loss is called with logits float32 [n, classes], labels int64 [n] and, for cross-entropy, label smoothing. Raises
    RecipeError if a loss that the recipe names fails, has no gradient, or is not a sum over examples.
    """
    if recipe.loss is None:
        return cross_entropy
    function = import_function(recipe.loss)

    def summed(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        found = function(logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape not in ((), labels.shape):
            raise RecipeError(
                f"loss: {recipe.loss} returned {_shape(found)}; expected losses [{len(labels)}], or their sum. Change "
                "what the function returns."
            )
        return found.sum()

    logits, labels = _synthetic(classes, device)
    logits.requires_grad_()
    whole = _checked("loss", recipe.loss, summed, logits, labels)
    first, rest = (_checked("loss", recipe.loss, summed, logits[some], labels[some]) for some in (slice(1), slice(1, None)))
    parts = first + rest
    if not whole.requires_grad:
        raise RecipeError(
            f"loss: {recipe.loss} has no gradient with respect to the logits; expected a differentiable loss. Compute "
            "it from the logits with torch operations that have gradients."
        )
    if not torch.allclose(whole, parts, rtol=1e-3):
        raise RecipeError(
            f"loss: {recipe.loss} of three examples is {whole.item():.4g}, but the losses of the first and of the other two "
            f"add up to {parts.item():.4g}. Return losses [n], or their sum (reduction='sum'), with each loss a function of "
            "its own example only."
        )
    return summed


def metric_of(recipe: Recipe, classes: int, device: torch.device) -> Function | None:
    """Return the recipe's metric, after checking it on synthetic logits; None if the recipe names none.

    The metric maps logits float32 [n, classes] and labels int64 [n] to scores float32 [n]. Raises RecipeError if it fails or
    does not return one score per example.
    """
    if recipe.metric is None:
        return None
    function = import_function(recipe.metric)

    def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = function(logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape != labels.shape:
            raise RecipeError(
                f"metric: {recipe.metric} returned {_shape(found)}; expected a score for each of {len(labels)} examples. "
                "Change what the function returns."
            )
        return found.float()

    _checked("metric", recipe.metric, scores, *_synthetic(classes, device))
    return scores


def _shape(found: object) -> str:
    return str(list(found.shape)) if isinstance(found, torch.Tensor) else type(found).__name__


def _synthetic(classes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random logits float32 [3, classes] and labels int64 [3]."""
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    return logits.to(device), torch.tensor([0, classes - 1, 0], device=device)


def _checked(key: str, spec: str, function: Function, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Call a function of the recipe; its errors become a RecipeError that names the recipe key."""
    try:
        return function(logits, labels)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{key}: {spec} failed with synthetic logits {list(logits.shape)} and labels {list(labels.shape)}: {error}. "
            "Fix the function."
        ) from error

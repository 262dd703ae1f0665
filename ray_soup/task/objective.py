"""The loss and the metric: by default cross-entropy and none, otherwise functions that the recipe names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ray_soup.errors import RecipeError
from ray_soup.recipe import Recipe
from ray_soup.task.functions import call, import_function

Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps logits float32 [n, classes] and labels int64 [n] to losses or scores."""


def check_functions(recipe: Recipe) -> None:
    """Import the recipe's loss and metric, so that a misspelled one is found before anything else is done.

    Raises RecipeError.
    """
    for key, spec in (("loss", recipe.loss), ("metric", recipe.metric)):
        if spec is not None:
            import_function(spec, key)


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
    spec, function = recipe.loss, import_function(recipe.loss, "loss")

    def summed(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        found = call("loss", spec, function, logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape not in ((), labels.shape) or not found.is_floating_point():
            raise RecipeError(
                f"loss: {spec} returned {_shape(found)}; expected float losses [{len(labels)}], or their sum. Change "
                "what the function returns."
            )
        return found.sum()

    logits, labels = _synthetic(classes, device)
    logits.requires_grad_()
    whole = _checked("loss", spec, summed, logits, labels)
    first, rest = (_checked("loss", spec, summed, logits[some], labels[some]) for some in (slice(1), slice(1, None)))
    parts = first + rest
    gradient = torch.autograd.grad(whole, logits, allow_unused=True)[0] if whole.requires_grad else None
    if gradient is None:
        raise RecipeError(
            f"loss: {spec} has no gradient with respect to the logits; expected a differentiable loss. Compute "
            "it from the logits with torch operations that have gradients."
        )
    if not torch.allclose(whole, parts, rtol=1e-3):
        raise RecipeError(
            f"loss: {spec} of three examples is {whole.item():.4g}, but the losses of the first and of the other two "
            f"add up to {parts.item():.4g}. Return losses [n], or their sum (reduction='sum'), with each loss a function of "
            "its own example only."
        )
    if not torch.isfinite(gradient).all():
        raise RecipeError(
            f"loss: {spec} has a gradient that is not finite with synthetic logits {list(logits.shape)}; expected finite "
            "gradients. Fix the function."
        )
    return summed


def metric_of(recipe: Recipe, classes: int, device: torch.device) -> Function | None:
    """Return the recipe's metric, after checking it on synthetic logits; None if the recipe names none.

    The metric maps logits float32 [n, classes] and labels int64 [n] to scores float32 [n]. Raises RecipeError if it fails or
    does not return one score per example.
    """
    if recipe.metric is None:
        return None
    spec, function = recipe.metric, import_function(recipe.metric, "metric")

    def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = call("metric", spec, function, logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape != labels.shape or found.is_complex():
            raise RecipeError(
                f"metric: {spec} returned {_shape(found)}; expected a score for each of {len(labels)} examples. "
                "Change what the function returns."
            )
        return found.float()

    _checked("metric", spec, scores, *_synthetic(classes, device))
    return scores


def _shape(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return f"{list(found.shape)}" + ("" if found.is_floating_point() else f" of {found.dtype}")
    return f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__


def _synthetic(classes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random logits float32 [3, classes] and labels int64 [3]. The logits are probabilities too, for a loss of them."""
    values = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))
    logits = values.softmax(1) if classes > 1 else values.sigmoid()
    return logits.to(device), torch.tensor([0, classes - 1, 0], device=device)


def _checked(key: str, spec: str, function: Function, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Call a function of the recipe, and check that its result is finite and its arguments are as before."""
    before = logits.detach().clone(), labels.clone()
    found = function(logits, labels)
    for name, now, then in zip(("logits", "labels"), (logits, labels), before, strict=True):
        if not torch.equal(now, then):
            raise RecipeError(f"{key}: {spec} changes its argument '{name}' in place. Work on a copy of it.")
    if not torch.isfinite(found).all():
        raise RecipeError(
            f"{key}: {spec} returned {found.detach().flatten()[~torch.isfinite(found).flatten()][0].item()} for synthetic "
            f"logits {list(logits.shape)} and labels {labels.tolist()}; expected finite values. Fix the function."
        )
    return found

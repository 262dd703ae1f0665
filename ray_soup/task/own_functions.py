"""The objective, the loss and the metric of a recipe: built-in ones, or what the recipe names."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.recipe import Recipe, is_function, own_function
from ray_soup.task.functions import call, import_function
from ray_soup.task.objective import OBJECTIVES, TARGETS, Classification, Objective, check_smoothing, has_own_outputs

Function: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
"""Maps outputs float32 [n, ...] and targets [n, ...] to losses or scores [n]."""
METHODS = ("losses", "weights", "correct", "confidence", "scores", "loss", "scaled", "check", "member", "of_members")
"""The methods of an objective, besides `outputs`."""
NAME = re.compile("[A-Za-z][A-Za-z0-9-]{0,39}")
"""The name of a score: it is part of keys such as test_f1, whose parts underscores separate."""
TAKEN = ("accuracy", "loss", "nll", "metric", "ece", "scaled", "perplexity", "byte", "sd", "low", "high", "p")
"""Names that parts of such keys, or headings of columns, have already; case does not matter."""


def check_functions(recipe: Recipe) -> None:
    """Import the recipe's functions, so that a misspelled one is found before anything else is done.

    Raises RecipeError.
    """
    if is_function(recipe.objective):
        objective_of(recipe)
    if recipe.select_by == "metric" and recipe.metric is None:
        raise RecipeError("select_by: metric needs a metric. Add `metric: package.module:function`.")
    own = recipe.preprocess if isinstance(recipe.preprocess, str) else None
    for key, spec in (
        ("loss", recipe.loss),
        ("metric", recipe.metric),
        ("preprocess", own),
        ("evaluate", recipe.evaluate),
        ("method", own_function(recipe.method)),
    ):
        if spec is not None:
            import_function(spec, key)


def objective_of(recipe: Recipe, of_model: str = "") -> Objective:
    """Return the objective of a recipe.

    Args:
        recipe: the recipe.
        of_model: the objective that the model itself names, if it does; it decides where the recipe says `auto`.

    Raises RecipeError if the recipe names a class that cannot be used.
    """
    name = recipe.objective if recipe.objective != "auto" else of_model or Classification.name
    if name in OBJECTIVES:
        objective = OBJECTIVES[name]()
    else:
        kind = import_function(name, "objective")
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise RecipeError(f"objective: {name} is no subclass of ray_soup.Objective. Name a class that is one.")
        objective = call("objective", name, kind)
        if objective.targets not in TARGETS:
            raise RecipeError(
                f"objective: {name} has targets = {objective.targets!r}; expected one of {', '.join(TARGETS)}. Change it."
            )
        for method in METHODS:  # an error in one of them is a sentence
            setattr(objective, method, partial(call, "objective", name, getattr(objective, method)))
        if has_own_outputs(objective):
            vars(objective)["outputs"] = partial(call, "objective", name, objective.outputs)
        vars(objective)["scores"] = _checked_scores(name, objective.scores)
    check_smoothing(objective, recipe.learn.label_smoothing)
    if recipe.select_by == "accuracy" and type(objective).correct is Objective.correct:
        raise RecipeError(
            f"select_by: accuracy has no meaning for the objective {objective.name}, which counts nothing as correct. Use "
            "nll, or a metric."
        )
    return objective


def loss_of(
    recipe: Recipe, objective: Objective, outputs: torch.Tensor, targets: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """Return the recipe's loss, summed over the examples, after checking it on synthetic outputs.

    Args:
        recipe: the recipe.
        objective: its objective, whose loss is the default.
        outputs: the model's outputs for one example, float [1, ...].
        targets: its targets, [1, ...].

    Returns:
        A function of outputs float32 [n, ...], targets [n, ...] and label smoothing. Raises RecipeError if a loss that the
        recipe names, or the recipe's own objective, fails, has no gradient, or is not a sum over examples.
    """
    if is_function(recipe.objective):
        _check_own(recipe.objective, objective, *_synthetic(objective, outputs, targets))
    if recipe.loss is None:
        return objective.loss
    spec, function = recipe.loss, import_function(recipe.loss, "loss")

    def summed(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        found = call("loss", spec, function, logits, labels)
        one_each = (len(labels),)
        if not isinstance(found, torch.Tensor) or found.shape not in ((), one_each) or not found.is_floating_point():
            raise RecipeError(
                f"loss: {spec} returned {_shape(found)}; expected float losses [{len(labels)}], or their sum. Change "
                "what the function returns."
            )
        return found.sum()

    logits, labels = _synthetic(objective, outputs, targets)
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


def metric_of(recipe: Recipe, objective: Objective, outputs: torch.Tensor, targets: torch.Tensor) -> Function | None:
    """Return the recipe's metric, after checking it on synthetic outputs; None if the recipe names none.

    The metric maps outputs float32 [n, ...] and targets [n, ...] to scores float32 [n]; the arguments are as for `loss_of`.
    Raises RecipeError if it fails or does not return one score per example.
    """
    if recipe.metric is None:
        return None
    spec, function = recipe.metric, import_function(recipe.metric, "metric")

    def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = call("metric", spec, function, logits, labels)
        if not isinstance(found, torch.Tensor) or found.shape != (len(labels),) or found.is_complex():
            raise RecipeError(
                f"metric: {spec} returned {_shape(found)}; expected a score for each of {len(labels)} examples. "
                "Change what the function returns."
            )
        return found.float()

    _checked("metric", spec, scores, *_synthetic(objective, outputs, targets))
    return scores


def _check_own(spec: str, objective: Objective, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Check the recipe's own objective on outputs [3, ...] and targets [3, ...]. Raises RecipeError."""
    cure = "Change what the class returns."
    outputs = outputs.clone().requires_grad_()
    found = {name: getattr(objective, name)(outputs, targets) for name in ("losses", "correct")}
    found["weights"] = objective.weights(targets)
    for name, values in found.items():
        if name == "correct" and values is None:
            continue
        if (
            not isinstance(values, torch.Tensor)
            or values.shape != (3,)
            or (name == "losses" and not values.is_floating_point())
        ):
            raise RecipeError(
                f"objective: {spec}: {name} returned {_shape(values)} for three examples; expected "
                f"{'float losses' if name == 'losses' else 'numbers'} [3], one for each. {cure}"
            )
    objective.scores(outputs.detach(), targets)
    if not (torch.isfinite(found["weights"]).all() and (found["weights"] >= 0).all()):
        raise RecipeError(f"objective: {spec}: weights returned {found['weights'].tolist()}; expected counts. {cure}")
    losses = _checked("objective", spec, objective.losses, outputs, targets)
    first, summed = objective.losses(outputs[:1], targets[:1]), objective.loss(outputs, targets)
    if not torch.allclose(losses[:1], first, rtol=1e-3) or not torch.allclose(losses.sum(), summed, rtol=1e-3):
        raise RecipeError(
            f"objective: {spec}: the loss of an example is {losses[0].item():.4g} among three and {first.sum().item():.4g} "
            f"alone, and `loss` of the three is {summed.item():.4g} for the sum {losses.sum().item():.4g}; expected equal "
            f"values. {cure}"
        )
    if not losses.requires_grad or torch.autograd.grad(losses.sum(), outputs, allow_unused=True)[0] is None:
        raise RecipeError(f"objective: {spec}: losses have no gradient with respect to the outputs. {cure}")


def _checked_scores(spec: str, function: Callable[..., Any]) -> Callable[..., dict[str, torch.Tensor]]:
    """Return an objective's `scores` with checks of what it returns: float64 [n] under the same names for each batch.

    The first example is scored alone, too, until a batch has shown for each name that its examples have values of their own.
    """
    known: list[tuple[str, ...]] = []
    own: set[str] = set()

    def scores(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        found, cure = _scores_of(spec, function, outputs, targets), "Change what the class returns."
        known[:] = known or [tuple(found)]
        if tuple(found) != known[0]:
            raise RecipeError(
                f"objective: {spec}: scores returned the names {', '.join(found) or 'none'}, and {', '.join(known[0])} "
                f"before; expected the same names in the same order for each batch. {cure}"
            )
        if len(targets) > 1 and not own.issuperset(found):
            for name, alone in scores(outputs[:1], targets[:1]).items():
                if not torch.isclose(found[name][0], alone[0], rtol=1e-3, atol=1e-6):
                    raise RecipeError(
                        f"objective: {spec}: the score {name} of an example is {found[name][0].item():.4g} among "
                        f"{len(targets)} and {alone[0].item():.4g} alone; expected equal values. {cure}"
                    )
                own.update([name] if (found[name] != found[name][0]).any() else [])
        return found

    return scores


def _scores_of(
    spec: str, function: Callable[..., Any], outputs: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Call an objective's `scores`, and check what it returns. Raises RecipeError."""
    found, cure = function(outputs, targets), "Change what the class returns."
    if not isinstance(found, dict):
        raise RecipeError(f"objective: {spec}: scores returned {_shape(found)}; expected a dictionary. {cure}")
    for name, values in found.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)) or name.lower() in TAKEN:
            raise RecipeError(
                f"objective: {spec}: scores returned the name {name!r}; expected letters, digits and hyphens, "
                f"and none of {', '.join(TAKEN)}. Choose another name, as in 'exact-match'."
            )
        if not isinstance(values, torch.Tensor) or values.shape != (len(targets),) or values.is_complex():
            raise RecipeError(
                f"objective: {spec}: scores returned {_shape(values)} as {name} for {len(targets)} examples; expected "
                f"numbers [{len(targets)}], one for each. {cure}"
            )
        if not torch.isfinite(values).all():
            raise RecipeError(
                f"objective: {spec}: scores returned {values[~torch.isfinite(values)][0].item()} as {name}; expected "
                f"finite numbers. {cure}"
            )
    return {name: values.double() for name, values in found.items()}


def _shape(found: object) -> str:
    if isinstance(found, torch.Tensor):
        return f"{list(found.shape)}" + ("" if found.is_floating_point() else f" of {found.dtype}")
    return f"the class {found.__name__}" if isinstance(found, type) else type(found).__name__


def _synthetic(objective: Objective, outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make outputs float32 [3, ...] and targets [3, ...] like those of one example.

    For classification the outputs are probabilities too, for a loss of them, and the labels the first and the last class.
    """
    if not isinstance(objective, Classification) or objective.targets != "classes":
        factors = torch.tensor([1.0, 0.95, 0.9], device=outputs.device).view(3, *[1] * (outputs.ndim - 1))
        return outputs.detach() * factors, torch.cat([targets] * 3)  # of the same signs: there may be logarithms
    values = torch.randn(3, *outputs.shape[1:], generator=torch.Generator().manual_seed(0))
    classes = outputs.shape[1]
    logits = values.softmax(1) if classes > 1 else values.sigmoid()
    return logits.to(outputs.device), torch.tensor([0, classes - 1, 0], device=outputs.device)


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

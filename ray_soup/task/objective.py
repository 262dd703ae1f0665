"""What a model is trained for: the contract between outputs and targets, losses, weights, and what is right.

Losses are sums over an example, and weights say over how many units: 1 for a classified image, the number of tokens that a
text scores, of pixels that are labeled. Whoever adds losses up divides once, by the sum of the weights, so that figures do
not depend on how examples are cut into batches and spread over actors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.task.logits import Logits
from ray_soup.task.raw_examples import IGNORED, VOID

Inputs: TypeAlias = "torch.Tensor | dict[str, torch.Tensor]"
"""What a model is called with: one tensor [n, ...], or several by the names of its arguments."""
TARGETS = ("classes", "units", "pixels", "labels", "numbers")
"""Kinds of targets: one class for each example; one class, or IGNORED, for each of its units; the same with VOID; 0 or 1,
or negative where unknown; any numbers."""


class Objective(ABC):
    """What a model is trained for. Outputs are float32 [n, ...] and targets one array [n, ...], for n examples.

    Subclass it and name the class in the recipe (`objective: package.module:Class`) for a task that is not built in.
    `losses` is required. `outputs` says how the model is called, for a model with several heads; `weights`, what the losses
    are divided by; `correct`, what accuracy means; `scores`, which other numbers are reported. For example, a model that
    returns the pair (depth, normals):

    >>> import torch, ray_soup
    >>> class Surfaces(ray_soup.Objective):
    ...     def outputs(self, model, inputs):
    ...         depth, normals = model(inputs)  # [n, pixels] and [n, 3, pixels]
    ...         return torch.cat([depth[:, None], normals], dim=1)
    ...     def losses(self, outputs, targets, label_smoothing=0.0):
    ...         return (outputs - targets).abs().mean(dim=(1, 2))
    ...     def scores(self, outputs, targets):
    ...         return {"depth-error": (outputs - targets)[:, 0].abs().mean(dim=1)}
    """

    name: ClassVar[str] = "own"
    unit: ClassVar[str] = "example"
    """What a loss is counted per."""
    targets: ClassVar[str] = "numbers"
    """The kind of targets, one of TARGETS."""
    classes_at: ClassVar[int | None] = None
    """The dimension of the outputs that has one entry for each class; None if they are not logits of classes."""

    def outputs(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Return the outputs of a model for a batch: float [n, ...], all that the losses and the scores need.

        If a subclass defines this method, `model(inputs)` returns what the model's forward returns, unchanged, and all calls
        of the model go through it. Otherwise the outputs are a tensor that the model returns, or the first of a tuple, or
        the entry or attribute `logits` or `out`. Rows must not depend on each other.

        Args:
            model: the model, in eval mode.
            inputs: one tensor [n, ...], or several by the names of the model's arguments; `model(inputs)` takes both.
        """
        found: torch.Tensor = model(inputs)
        return found

    @abstractmethod
    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the loss of each example, summed over its units: float [n], differentiable."""

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of units of each example that have a loss: float or int [n]."""
        return torch.ones(len(targets), dtype=torch.int64, device=targets.device)

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
        """Return how many units of each example are right: [n]. None: accuracy has no meaning for this objective."""
        return None

    def confidence(self, outputs: torch.Tensor) -> torch.Tensor | None:
        """Return the probability of the predicted class, float [n]; None unless each example has one class."""
        return None

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return other numbers to report, by name: finite numbers [n], one for each example.

        Their means over the examples become columns such as `test_f1`, and their differences are tested pairwise; no choice
        depends on them. Names consist of letters, digits and hyphens, as in `exact-match`.
        """
        return {}

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the losses summed over the examples."""
        return self.losses(outputs, targets, label_smoothing).sum()

    def scaled(self, outputs: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        """Multiply logits by a factor; other outputs do not change."""
        return outputs if self.classes_at is None else outputs * factor

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Return what was expected instead of these outputs of a model for one example; None if they suit its targets."""
        return None

    # An ensemble

    def member(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return what an ensemble averages over its members: by default the outputs."""
        return outputs

    def of_members(self, mean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return losses and what is correct, each [n], from the mean over the members."""
        return self.losses(mean, targets), self.correct(mean, targets)

    members_are_outputs: ClassVar[bool] = True
    """Whether the mean over the members stands for the outputs of one model."""


class Classification(Objective):
    """One class for each example: outputs are logits [n, classes], targets int64 [n]."""

    name = "classification"
    targets = "classes"
    classes_at = 1

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy of each example."""
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy summed over the examples."""
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="sum", label_smoothing=label_smoothing)

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return whether the label has the largest logit: bool [n]."""
        return outputs.argmax(dim=1) == targets

    def confidence(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the probability of the predicted class."""
        return torch.nn.functional.log_softmax(outputs, dim=1).max(dim=1).values.exp()

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Check that the outputs are logits [1, classes]."""
        fits = outputs.ndim == 2 and outputs.shape[1] >= 1
        return None if fits else "float logits [1, classes]"


class _Units(Objective):
    """One class for each unit of an example, such as a token or a pixel; targets of IGNORED are not scored."""

    targets = "units"
    members_are_outputs = False

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy of each example, summed over its units."""
        return self._each(outputs, targets, label_smoothing).flatten(1).sum(1)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of units that are scored."""
        return (targets != IGNORED).flatten(1).sum(1)

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of units whose target has the largest logit."""
        if isinstance(outputs, Logits):
            return outputs.correct(targets).flatten(1).sum(1)
        return (self._classes_second(outputs).argmax(1) == targets).flatten(1).sum(1)

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Check that there is one vector of logits for each target."""
        units = outputs.shape[2:] if self.classes_at == 1 else outputs.shape[1:-1]
        if outputs.ndim == targets.ndim + 1 and units == targets.shape[1:]:
            return None
        wanted = "[1, classes, ...]" if self.classes_at == 1 else "[1, ..., classes]"
        return f"float logits {wanted} for targets {list(targets.shape)}"

    def member(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the probability of each target, 1 for one that is not scored: a number per unit, not per class."""
        loss = self._each(outputs, targets)
        return loss.double().neg().exp()  # a probability of 1e-130 is 0 in float32

    def of_members(self, mean: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the losses of the mean probabilities; which class is the most probable is not known."""
        return mean.log().neg().flatten(1).sum(1), None

    def _each(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the cross-entropy of each unit, like the targets."""
        if isinstance(outputs, Logits):
            return outputs.losses(targets, label_smoothing)
        return torch.nn.functional.cross_entropy(
            self._classes_second(outputs), targets, reduction="none", label_smoothing=label_smoothing, ignore_index=IGNORED
        )

    def _classes_second(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs if self.classes_at == 1 else outputs.movedim(-1, 1)


class TokenClassification(_Units):
    """One class for each token: outputs are logits [n, tokens, classes], targets int64 [n, tokens]."""

    name = "token_classification"
    unit = "token"
    classes_at = -1


class MaskedLM(TokenClassification):
    """The token at each masked place: outputs are logits [n, tokens, vocabulary], targets int64 [n, tokens]."""

    name = "masked_lm"


class CausalLM(TokenClassification):
    """The next token at each place: outputs are logits [n, tokens, vocabulary], targets int64 [n, tokens].

    The data, not the objective, moves the targets: the target of a place is the token after it.
    """

    name = "causal_lm"


class Segmentation(_Units):
    """One class for each pixel: outputs are logits [n, classes, H, W], targets int64 [n, H, W]."""

    name = "segmentation"
    unit = "pixel"
    targets = "pixels"
    classes_at = 1

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Check that there is one vector of logits for each pixel."""
        if outputs.ndim > 1 and outputs.shape[1] > VOID:
            return f"at most {VOID} classes, because pixels of class {VOID} are not scored"
        return super().check(outputs, targets)


class MultiLabel(Objective):
    """Any number of labels for each example: outputs are logits [n, labels], targets 0 or 1 [n, labels].

    The loss is the binary cross-entropy, as BCEWithLogitsLoss computes it: per label. A label is right if its logit is
    positive exactly where its target is 1. A negative target is not scored.
    """

    name = "multi_label"
    targets = "labels"
    unit = "label"

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the binary cross-entropy of each example, summed over its labels."""
        targets = targets.view(outputs.shape)
        scored = targets >= 0
        wanted = torch.where(scored, targets, torch.zeros_like(targets)).to(outputs.dtype)
        found = torch.nn.functional.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        return (found * scored).flatten(1).sum(1)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of labels that are scored."""
        return (targets >= 0).reshape(len(targets), -1).sum(1)

    def correct(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of labels that are predicted right."""
        targets = targets.view(outputs.shape)
        return (((outputs > 0) == (targets > 0.5)) & (targets >= 0)).flatten(1).sum(1)

    def scaled(self, outputs: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        """Multiply the logits by a factor."""
        return outputs * factor

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Check that there is one logit for each target."""
        return _same_shape(outputs, targets)


class Regression(Objective):
    """Numbers: outputs and targets are float [n, ...]. The loss is the squared error, as MSELoss computes it: per number.

    A target that is NaN is not scored.
    """

    name = "regression"
    unit = "number"

    def losses(self, outputs: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Return the squared error of each example, summed over its numbers."""
        shaped = targets.view(outputs.shape)
        scored = ~shaped.isnan()
        wanted = torch.where(scored, shaped, outputs.detach().to(shaped.dtype)).to(outputs.dtype)
        return ((outputs - wanted) ** 2).flatten(1).sum(1)

    def weights(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the number of numbers that are scored."""
        return (~targets.isnan()).reshape(len(targets), -1).sum(1)

    def check(self, outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
        """Check that there is one output for each target."""
        return _same_shape(outputs, targets)


def _same_shape(outputs: torch.Tensor, targets: torch.Tensor) -> str | None:
    if outputs.shape == targets.shape or (outputs.shape == (len(targets), 1) and targets.ndim == 1):
        return None
    return f"one output for each of the targets {list(targets.shape)}"


OBJECTIVES: dict[str, type[Objective]] = {
    kind.name: kind
    for kind in (Classification, TokenClassification, Segmentation, MaskedLM, CausalLM, MultiLabel, Regression)
}
"""The built-in objectives by name."""


def has_own_outputs(objective: Objective) -> bool:
    """Return whether an objective says how the model is called."""
    return type(objective).outputs is not Objective.outputs


def check_smoothing(objective: Objective, label_smoothing: float) -> None:
    """Check that label smoothing means something for an objective. Raises RecipeError."""
    if label_smoothing and objective.classes_at is None:
        raise RecipeError(
            f"learn.label_smoothing is {label_smoothing}; the objective {objective.name} has no classes to smooth over. "
            "Remove this key."
        )

"""Logits of a large vocabulary that are never whole: for some tokens at a time, and once more in the backward pass.

    logits[t] = W h[t] + b        h: hidden states [tokens, features], W: [vocabulary, features]

A model of transformers returns logits [n, tokens, vocabulary]. For 4,096 tokens and 151,000 words, these are 2.5 GB in
float32, and their gradient is as large. `hold_back` lets the output layer return `Logits` instead, which know h, W and b,
and compute losses for as many tokens at a time as CHUNK allows. If W is bfloat16, its gradients from these parts are summed
in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, TypeGuard

from ray_soup.io.lazy import torch
from ray_soup.task.raw_examples import IGNORED

MOST_OUTPUTS = 1 << 26  # numbers that a model returns for a micro-batch: 268 MB in float32
CHUNK = 1 << 25  # logits that exist at a time
Step: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
Number = float  # `float` is a method of Logits


class Logits:
    """Logits [..., vocabulary] that are computed when they are needed.

    A model may divide, multiply or cap them, as the models of transformers do; each of these steps is repeated for every
    part that is computed.
    """

    def __init__(self, hidden: torch.Tensor, vocabulary: int, first: Step, steps: Sequence[Step] = ()) -> None:
        self._hidden, self._vocabulary, self._first, self._steps = hidden, vocabulary, first, tuple(steps)
        self._known: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the logits."""
        return torch.Size((*self._hidden.shape[:-1], self._vocabulary))

    @property
    def ndim(self) -> int:
        """The number of their dimensions."""
        return self._hidden.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which losses are computed."""
        return torch.float32

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, places: Any) -> Logits:
        return Logits(self._hidden[places], self._vocabulary, self._first, self._steps)

    def numel(self) -> int:
        """Return the number of logits."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Return True: the logits are numbers."""
        return True

    # What models and objectives do with logits

    def _then(self, step: Step) -> Logits:
        return Logits(self._hidden, self._vocabulary, self._first, (*self._steps, step))

    def float(self) -> Logits:
        """Return the logits in float32."""
        return self if self._steps[-1:] == (torch.Tensor.float,) else self._then(torch.Tensor.float)

    def contiguous(self) -> Logits:
        """Return the logits: where they are in memory does not matter."""
        return self

    def __mul__(self, factor: torch.Tensor | Number) -> Logits:
        if not _is_number(factor):
            return NotImplemented
        return self if isinstance(factor, Number) and factor == 1 else self._then(lambda logits: logits * factor)

    def __truediv__(self, divisor: torch.Tensor | Number) -> Logits:
        return self._then(lambda logits: logits / divisor) if _is_number(divisor) else NotImplemented

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.tanh and not kwargs:
            return args[0]._then(torch.tanh)
        return NotImplemented

    # Results

    def whole(self) -> torch.Tensor:
        """Return all logits, float [..., vocabulary]."""
        return self._of(self._hidden)

    def sum(self) -> torch.Tensor:
        """Return the sum of the logits."""
        (sums,) = self._parts(lambda hidden: (self._of(hidden).sum(-1),), self._hidden.flatten(0, -2))
        return sums.sum()

    def losses(self, targets: torch.Tensor, label_smoothing: Number = 0.0) -> torch.Tensor:
        """Return the cross-entropy of each token, float32 like the targets: 0 where they are IGNORED.

        Args:
            targets: int64, of the shape of the logits without the last dimension.
            label_smoothing: as in torch.
        """
        if label_smoothing or torch.is_grad_enabled():
            return self._scored(targets, label_smoothing)[0]
        return self._scores(targets)[0]

    def correct(self, targets: torch.Tensor) -> torch.Tensor:
        """Return which targets have the largest logit, bool like the targets."""
        return self._scores(targets)[1]

    def _scores(self, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return losses and what is correct, which are asked for one after the other, and computed together."""
        if self._known is None or self._known[0] is not targets:
            with torch.no_grad():
                self._known = targets, self._scored(targets)
        return self._known[1]

    def _scored(self, targets: torch.Tensor, label_smoothing: Number = 0.0) -> tuple[torch.Tensor, ...]:
        chosen, only_losses = targets != IGNORED, torch.is_grad_enabled()

        def part(hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = self._of(hidden).float()
            losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none", label_smoothing=label_smoothing)
            return (losses,) if only_losses else (losses, logits.argmax(-1) == wanted)

        found = self._parts(part, self._hidden[chosen], targets[chosen])
        return tuple(targets.new_zeros(targets.shape, dtype=each.dtype).masked_scatter(chosen, each) for each in found)

    def _of(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._first(hidden)
        for step in self._steps:
            logits = step(logits)
        return logits

    def _parts(self, function: Callable[..., tuple[torch.Tensor, ...]], *arrays: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Apply a function to some rows of the arrays at a time, and concatenate what it returns."""
        from torch.utils.checkpoint import checkpoint

        rows = max(1, CHUNK // self._vocabulary)
        again = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
        call = again if torch.is_grad_enabled() else function
        found = [call(*part) for part in zip(*(torch.split(array, rows) for array in arrays), strict=True)]
        return tuple(torch.cat(column) for column in zip(*found, strict=True))


def can_be_scored(outputs: object) -> TypeGuard[torch.Tensor]:
    """Return whether a model returned a tensor, or Logits, which the built-in objectives take for one."""
    return isinstance(outputs, (torch.Tensor, Logits))


def sampled(logits: torch.Tensor | Logits) -> torch.Tensor:
    """Return logits, but only those of the first few tokens if they are held back."""
    return logits[:1, :8].whole() if isinstance(logits, Logits) else logits


def _is_number(value: object) -> bool:
    """Return whether a value is one number, by which logits can be multiplied in parts."""
    return isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.ndim == 0)


def _held_back(head: torch.nn.Linear, most: int, hidden: torch.Tensor) -> torch.Tensor | Logits:
    """Compute logits of up to `most` numbers, and hold back larger ones."""
    if hidden.shape[:-1].numel() * head.out_features <= most:
        return torch.nn.Linear.forward(head, hidden)
    from ray_soup.task.summed_gradients import linear, place_of

    device = hidden.device.type
    precision = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
    places = [place_of(parameter) for parameter in (head.weight, head.bias)]

    def first(some: torch.Tensor) -> torch.Tensor:
        with precision:  # losses are computed after the context of the forward pass has ended
            if any(place is not None for place in places):
                return linear(some, head, places)
            return torch.nn.functional.linear(some, head.weight, head.bias)

    return Logits(hidden, head.out_features, first)


def hold_back(model: torch.nn.Module, device: torch.device) -> bool:
    """Let a model return Logits wherever a batch would have more than MOST_OUTPUTS logits.

    Only models of transformers whose output layer is linear are changed, and only if what they do with its outputs can be
    done in parts, which is tried.

    Args:
        model: a model in eval mode, on `device`.
        device: where it is.

    Returns whether the model was changed.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(head) is not torch.nn.Linear:
        return False
    inputs = {"input_ids": torch.tensor([[0, 1, 1], [1, 0, 1]], device=device)}
    with torch.no_grad():
        try:
            expected = model(inputs)
            vars(head)["forward"] = partial(_held_back, head, 0)
            found = model(inputs)
            rounding = max(1e-5, torch.finfo(expected.dtype).eps)
            same = isinstance(found, Logits) and torch.allclose(found.whole(), expected, rtol=rounding)
        except Exception:  # whatever code of the model cannot do with them
            same = False
    if not same:
        vars(head).pop("forward", None)
        return False
    vars(head)["forward"] = partial(_held_back, head, MOST_OUTPUTS)
    return True

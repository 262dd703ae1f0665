"""The optimizers that the benchmark `optimizers` tries on the coordinates of a model batch.

Each is a function (state, z, gradient, rate) -> change, for coordinates z float64 [m, B], and takes z to z - change. The
rate is that of learn.lr: auto times a scale, the length of Adam's first step in every coordinate. What has no length of its
own takes steps as long as those of Adam (grafting), or a first step as long. Settings are those of the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]
Change = Callable[[State, Tensor, Tensor, float], Tensor]
SMALLEST = 1e-6
"""Prodigy's first estimate of the distance, as its paper sets it, and what is added to a preconditioner, as a share of its
largest eigenvalue."""
WIDEST = 512
"""Shampoo has no factor for blocks if there are more."""
KEPT = 32
"""Gradients that the natural step makes the Fisher matrix of."""


ORDER = "other order"
"""The default with another order of its batches, three times: what of a difference is chance."""


def adam(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Kingma and Ba 2015; `state["mean"]` is the mean gradient, without bias."""
    t = state["t"] = state.get("t", 0) + 1
    first = state["first"] = 0.9 * state.get("first", 0.0) + 0.1 * gradient
    second = state["second"] = 0.999 * state.get("second", 0.0) + 0.001 * gradient**2
    state["mean"] = first / (1 - 0.9**t)
    change: Tensor = rate * state["mean"] / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    return change


def nesterov(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """SGD with Nesterov's momentum of 0.9; its rate makes the first step without momentum as long as Adam's."""
    unit = state.setdefault("unit", rate * math.sqrt(gradient.numel()) / max(float(gradient.norm()), 1e-300))
    state["momentum"] = 0.9 * state.get("momentum", 0.0) + gradient
    change: Tensor = unit * (gradient + 0.9 * state["momentum"])
    return change


def schedule_free(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Schedule-free AdamW, Defazio et al. 2024: z is where gradients are taken, `state["average"]` the point it leads to."""
    t = state["t"] = state.get("t", 0) + 1
    second = state["second"] = 0.999 * state.get("second", 0.0) + 0.001 * gradient**2
    fast = state.get("fast", z) - rate * gradient / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    average = torch.lerp(state.get("average", z), fast, 1 / t)  # the rate is constant, and so are the weights
    state["fast"], state["average"] = fast, average
    return z - torch.lerp(fast, average, 0.9)


def prodigy(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Prodigy, Mishchenko and Defazio 2024: Adam whose rate d is an estimate of the distance, from `rate` or SMALLEST."""
    start, root = state.setdefault("start", z.clone()), math.sqrt(0.999)
    first_d = state.setdefault("first_d", max(rate, SMALLEST))
    d = state.get("d", first_d)
    state["up"] = root * state.get("up", 0.0) + d * d / first_d * float((gradient * (start - z)).sum())
    state["down"] = root * state.get("down", 0.0) + d * d / first_d * gradient
    first = state["first"] = 0.9 * state.get("first", 0.0) + 0.1 * d * gradient
    second = state["second"] = 0.999 * state.get("second", 0.0) + 0.001 * d * d * gradient**2
    change: Tensor = d * first / (second.sqrt() + d * 1e-8)
    state["d"] = max(d, state["up"] / max(float(state["down"].abs().sum()), 1e-300))
    return change


def shampoo(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Shampoo, Gupta et al. 2018, of Adam's mean gradient, grafted: L^(-1/4) G R^(-1/4), or L^(-1/2) G if B is large."""
    length, mean = adam(state, z, gradient, rate).norm(), state["mean"]
    state["left"] = state.get("left", 0.0) + gradient @ gradient.T
    if gradient.shape[1] > WIDEST:
        return grafted(power(state["left"], -1 / 2) @ mean, length)
    state["right"] = state.get("right", 0.0) + gradient.T @ gradient
    return grafted(power(state["left"], -1 / 4) @ mean @ power(state["right"], -1 / 4), length)


def natural(state: State, z: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """A damped natural step, grafted: (F + t I)^-1 g, F the mean of g g^T over the last batches and t its mean eigenvalue.

    F, the empirical Fisher matrix in place of the matrix of Gauss-Newton, has as many eigenvalues as there are batches.
    """
    length, mean = adam(state, z, gradient, rate).norm(), state["mean"]
    state["last"] = [*state.get("last", []), gradient.flatten()][-KEPT:]
    rows = torch.stack(state["last"]) / math.sqrt(len(state["last"]))
    inner = rows @ rows.T
    damping = inner.trace() / len(rows) + 1e-300
    solved = torch.linalg.solve(inner + damping * torch.eye(len(rows), dtype=rows.dtype), rows @ mean.flatten())
    return grafted(mean - (solved @ rows).view_as(mean), length)


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric matrix that has no negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    least = SMALLEST * float(values.max()) + 1e-300
    return (vectors * (values.clamp_min(0.0) + least) ** exponent) @ vectors.T


def grafted(direction: Tensor, length: Tensor) -> Tensor:
    """Return a change of this direction and length."""
    return direction * (length / direction.norm().clamp_min(1e-300))


class Projected(torch.optim.Optimizer):
    """One of these as an optimizer of torch, whose rate is that of its group times `scale`."""

    def __init__(self, change: Change, scale: float, rate: float, *parameters: Tensor) -> None:
        super().__init__(parameters, {"lr": rate})
        self.change, self.scale = change, scale

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Change every parameter."""
        for group in self.param_groups:
            for z in group["params"]:
                z -= self.change(self.state[z], z, z.grad, self.scale * group["lr"])


TRIED: dict[str, tuple[Change, tuple[float, ...]]] = {
    "larger rate": (adam, (2.0, 4.0)),
    "schedule-free": (schedule_free, (1.0, 2.0, 4.0)),
    "Prodigy": (prodigy, (0.0, 0.1, 1.0)),
    "Shampoo": (shampoo, (0.5, 1.0, 2.0)),
    "natural step": (natural, (0.5, 1.0, 2.0)),
    "Nesterov": (nesterov, (0.03, 0.1, 0.3)),
}
"""The change and the scales that are tried, by the name of the optimizer. With a scale of 0, Prodigy begins at SMALLEST."""

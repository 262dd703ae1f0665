"""The optimizers of the benchmark `optimizers`: what their papers say of them, on a quadratic of K x B coordinates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.benchmarks import optimizers
from tests.benchmarks.optimizers_tables import DEFAULT, common_steps, figures_of, passes
from tests.benchmarks.optimizers_tried import ORDER, TRIED, Projected, adam, natural, schedule_free, shampoo
from tests.conftest import values

pytestmark = pytest.mark.usefixtures("one_thread")

RATE = 0.05


def quadratic(ingredients: int = 5, blocks: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """A Hessian that couples all coordinates, with eigenvalues from .1 to 10, its minimum, and a start."""
    random = torch.Generator().manual_seed(0)
    n = ingredients * blocks
    vectors = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))[0]
    hessian = (vectors * torch.logspace(-1, 1, n, dtype=torch.float64)) @ vectors.T
    minimum = torch.randn(ingredients, blocks, generator=random, dtype=torch.float64)
    return hessian, minimum, torch.zeros(ingredients, blocks, dtype=torch.float64)


@pytest.mark.parametrize(("name", "scale"), [(name, scale) for name, (_, scales) in TRIED.items() for scale in scales])
def test_each_descends_a_quadratic(name: str, scale: float) -> None:
    hessian, minimum, z = quadratic()

    def loss(point: Tensor) -> float:
        apart = (point - minimum).flatten()
        return float(apart @ hessian @ apart / 2)

    optimizer, start, total = Projected(TRIED[name][0], scale, RATE, z), loss(z), torch.zeros_like(z)
    for _ in range(60):
        z.grad = (hessian @ (z - minimum).flatten()).view_as(z)
        optimizer.step()
        total += z
    assert loss(optimizer.state[z].get("average", total / 60)) < start / 2


def test_adam_is_that_of_torch() -> None:
    hessian, minimum, z = quadratic()
    other = z.clone()
    mine, its = Projected(adam, 2.0, RATE, z), torch.optim.AdamW([other], lr=2 * RATE, weight_decay=0.0)
    for _ in range(20):
        for point, optimizer in ((z, mine), (other, its)):
            point.grad = (hessian @ (point - minimum).flatten()).view_as(point)
            optimizer.step()
    torch.testing.assert_close(z, other)


@pytest.mark.slow
def test_a_run_with_adam_at_the_same_rate_is_that_of_the_default(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRIED, "adam", (adam, (1.0,)))
    recipe = {key: value for key, value in values(zoo).items() if key not in ("learn", "blocks")}
    session = optimizers.session_of(recipe, 1)
    runs = [optimizers.one_run(session, name) for name in (DEFAULT, ("adam", 1.0), (ORDER, 1.0))]
    for turn, figures in runs[0].items():
        assert runs[1][turn] == pytest.approx(figures, rel=1e-6)
    assert len(runs[0]["0"]) > 6  # the start, the ends of five epochs, and points between them
    assert runs[2]["0"]["0"] == runs[0]["0"]["0"]
    assert runs[2]["0"] != pytest.approx(runs[0]["0"], rel=1e-6)  # the same cut, another order of its batches


def test_the_first_steps_of_grafted_optimizers_are_as_long_as_adams() -> None:
    _, minimum, z = quadratic()
    for change in (shampoo, natural):
        assert change({}, z, minimum, RATE).norm().item() == pytest.approx(RATE * math.sqrt(z.numel()), rel=1e-6)
    u, _, v = torch.linalg.svd(minimum, full_matrices=False)  # (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T
    torch.testing.assert_close(shampoo({}, z, minimum, RATE) / (RATE * math.sqrt(z.numel() / 5)), u @ v, atol=1e-4, rtol=0)


def test_the_natural_step_solves_with_the_damped_fisher_matrix() -> None:
    random, state = torch.Generator().manual_seed(1), dict[str, object]()
    gradients = torch.randn(4, 3, 2, generator=random, dtype=torch.float64)
    changes = [natural(state, gradients[0], gradient, RATE) for gradient in gradients]
    rows = gradients.view(4, 6)
    fisher, mean = rows.T @ rows / 4, sum(0.1 * 0.9 ** (3 - n) * row for n, row in enumerate(rows))
    solved = torch.linalg.solve(fisher + fisher.trace() / 4 * torch.eye(6, dtype=torch.float64), mean)
    torch.testing.assert_close(changes[-1].flatten() / changes[-1].norm(), solved / solved.norm())


def test_schedule_free_leads_to_the_mean_of_its_fast_iterates() -> None:
    hessian, minimum, z = quadratic()
    optimizer, fast = Projected(schedule_free, 1.0, RATE, z), []
    for _ in range(10):
        z.grad = (hessian @ (z - minimum).flatten()).view_as(z)
        optimizer.step()
        fast.append(optimizer.state[z]["fast"])
    average = optimizer.state[z]["average"]
    torch.testing.assert_close(average, torch.stack(fast).mean(dim=0))
    torch.testing.assert_close(z, 0.1 * fast[-1] + 0.9 * average)


def test_passes_count_each_turn_up_to_where_the_default_ends_it() -> None:
    test = {"nll": 0.5, "per_pass": 2.0}
    default = {"0": {"0": 1.0, "2": 0.8, "4": 0.7}, "1": {"6": 0.6, "8": 0.65}, "test": test}
    faster = {"0": {"0": 1.0, "2": 0.65, "4": 0.9}, "1": {"6": 0.6, "8": 0.5}, "test": {**test, "nll": 0.4}}
    later = {"0": {"0": 1.0, "2": 0.8, "4": 0.75}, "1": {"6": 0.7, "8": 0.6}, "test": test}
    ahead = {"0": {"0": 1.0, "2": 0.55, "4": 0.9}, "1": {"6": 0.6, "8": 0.5}, "test": test}
    failed = {"0": {"0": 1.0}, "test": test}
    assert [passes(rows, default) for rows in (default, faster, later, ahead, failed)] == [3, 2, 4, 1, math.inf]
    assert common_steps(faster, default) == common_steps(default, faster)[::-1] == (6, 6)
    assert common_steps(ahead, later) == (2, 8)
    found = figures_of({(1, 0): {("default", 1.0): default, ("other", 1.0): faster}}, ("other", 1.0))
    assert found.ratios == [2 / 3]
    assert found.gain == pytest.approx(0.5 / 0.4)
    assert found.tests == [pytest.approx(-0.1)]

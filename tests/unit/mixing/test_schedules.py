"""Weights of the steps of a run, and the decays of the learning rate that they amount to."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from ray_soup.mixing.schedules import DECAYS, EQUAL, SHAPES, average, decay_of, schedule, weights_of, windows

COUNTS = (1, 2, 3, 6, 7, 33, 100, 1000)


def by_megatron(shape: str, count: int) -> list[float]:
    """The weights that Megatron-LM's tool gives to checkpoints, as its documentation defines them."""
    decay = {"linear": lambda x: 1 - x, "minus_sqrt": lambda x: 1 - math.sqrt(x)}[shape]
    values = [decay(n / count) for n in range(count)]
    return [1 - values[1], *(values[n] - values[n + 1] for n in range(1, count - 1)), values[-1]]


@pytest.mark.parametrize("count", COUNTS)
def test_weights_are_positive_and_sum_to_exactly_1_in_any_order(count: int) -> None:
    random = np.random.default_rng(count)
    steps = np.cumsum(random.integers(1, 1000, count)).tolist()
    found = [schedule(shape, steps) for shape in (*SHAPES, EQUAL)] + [average(decay, count) for decay in DECAYS]
    for weights in found:
        assert weights.shape == (count,)
        assert (weights >= 0).all()
        assert weights[-1] > 0
        for _ in range(5):
            assert sum(random.permutation(weights).tolist()) == 1.0


@pytest.mark.parametrize("count", COUNTS[1:])
def test_equidistant_weights_are_those_of_megatron(count: int) -> None:
    steps = range(500, 500 + 250 * count, 250)
    for shape in ("linear", "minus_sqrt"):
        np.testing.assert_allclose(schedule(shape, steps), by_megatron(shape, count), rtol=0, atol=3e-16)
    np.testing.assert_allclose(schedule(EQUAL, steps), np.full(count, 1 / count), rtol=0, atol=3e-16)
    np.testing.assert_array_equal(schedule(EQUAL, steps), schedule("linear", steps))


def test_a_moving_average_is_the_one_that_a_loop_computes() -> None:
    values = torch.randn(9, 5, dtype=torch.float64)
    for decay in DECAYS:
        mean = values[0]
        for value in values[1:]:
            mean = decay * mean + (1 - decay) * value
        torch.testing.assert_close(torch.from_numpy(average(decay, 9)) @ values, mean, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_soup_is_the_run_whose_learning_rate_had_that_decay(shape: str) -> None:
    """SGD on a linear loss, whose gradients do not depend on the path, so that the soup equals the run with the decay."""
    random, lr = np.random.default_rng(0), 0.1
    steps = [0, 10, 20, 40, 45]
    gradients = random.standard_normal((steps[-1], 3))
    path = np.concatenate([np.zeros((1, 3)), -lr * np.cumsum(gradients, axis=0)])
    weights = schedule(shape, steps)
    factors = decay_of(weights)
    assert factors[0] == 1
    theta = np.zeros(3)
    for number, (begin, end) in enumerate(itertools.pairwise(steps), start=1):
        for step in range(begin, end):
            theta -= lr * factors[number] * gradients[step]
    np.testing.assert_allclose(weights @ path[steps], theta, rtol=0, atol=1e-12)
    span = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1)
    np.testing.assert_allclose(factors, [SHAPES[shape]((step - steps[0]) / span) for step in steps], rtol=0, atol=1e-15)


def test_decays_and_weights_are_inverse_of_each_other() -> None:
    decay = np.sort(np.random.default_rng(1).random(20))[::-1]
    decay[0] = 1
    np.testing.assert_allclose(decay_of(weights_of(decay)), decay, rtol=0, atol=2**-52)
    blocks = np.random.default_rng(2).random((4, 3))
    np.testing.assert_allclose(decay_of(blocks)[1], blocks[1:].sum(axis=0))


def test_all_windows_are_tried_or_every_power_of_the_root_of_two() -> None:
    assert windows(2) == [2]
    assert windows(32) == list(range(2, 33))
    assert windows(100) == [2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 100]
    for count in range(33, 300):
        found = windows(count)
        assert found[0] == 2
        assert found[-1] == count
        assert (np.diff(found) > 0).all()

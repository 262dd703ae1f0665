"""What a report and the terminal show of the steps of a run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.mixing.schedules import decay_of, schedule
from ray_soup.soups.report.tables import steps_table
from ray_soup.soups.report.terminal_tables import _tests
from ray_soup.soups.report.trajectories import by_layer, weights_by_step

TENSORS = ("embed.weight", "layers.0.a", "layers.0.b", "layers.1.a", "head.weight", "head.same")


def soup(blocks: int, count: int = 5) -> Coefficients:
    """One block for each tensor but the last, which has no coefficients, or one for the model."""
    block_of = {name: min(n, blocks - 1) for n, name in enumerate(TENSORS)} | {"head.same": -1}
    values = np.random.default_rng(0).random((count, blocks))
    names = tuple(f"checkpoint-{k}" for k in range(count))
    return Coefficients(values / values.sum(axis=0), names, tuple(map(str, range(blocks))), block_of)


def test_a_thin_line_is_the_mean_over_the_blocks_of_a_layer() -> None:
    five = soup(5)
    v = five.values
    np.testing.assert_allclose(by_layer(five), np.stack([v[:, 0], v[:, 1:3].mean(axis=1), v[:, 3], v[:, 4]], axis=1))
    assert by_layer(soup(1)).shape == (5, 0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_soup_has_a_panel_for_weights_and_one_for_the_learning_rate(count: int) -> None:
    soups = {f"schedule:{n}": soup(1 + 4 * (n % 2)) for n in range(count)}
    drawn = weights_by_step(soups, [30, 10, 20, 50, 40], "epoch")
    assert [name for name in soups if f">{name}<" in drawn] == list(soups)
    assert drawn.count(">weight<") == drawn.count(">factor on rate<") == -(-count // 2)
    assert drawn.count(">epoch<") == count
    thick = len(re.findall(r"stroke: #0072b2; stroke-width: 2", drawn))
    assert thick >= count


def test_the_terminal_shows_the_steps_in_use_and_at_most_twenty_lines() -> None:
    weights = np.concatenate([np.zeros(3), schedule("cosine", range(0, 400, 10))])
    steps = list(range(0, 430, 10))
    head, lines = steps_table({"unit": "step", "steps": steps, "weights": weights.tolist()})
    assert head == ["step", "weight", "learning rate"]
    assert len(lines) == 20
    assert lines[-1][0] == "420"
    assert lines[-1][2] == f"{weights[-1]:.4f}"
    rates = dict(zip((f"{step:,}" for step in steps), decay_of(weights), strict=True))
    assert all(line[2] == f"{rates[line[0]]:.4f}" for line in lines)
    _, few = steps_table({"unit": "epoch", "steps": [1, 2, 3], "weights": [0.0, 0.25, 0.75]})
    assert few == [["2", "+0.2500", "1.0000"], ["3", "+0.7500", "0.7500"]]


@pytest.mark.parametrize("name", ["mehl+", "schedule:minus_sqrt"])
def test_paired_tests_of_long_names_continue_below_and_no_figure_is_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figures = {f"{what}{end}": -0.12345 for what in ("accuracy", "nll") for end in ("", "_low", "_high")}
    test = {"split": "test", "model_name": name, "against": "best_single", "mcnemar_p": 0.00018, **figures}
    shown = "\n".join(_tests({"examples": {"fit": 10, "test": 10}, "tests": [test, {**test, "against": "greedy"}]}))
    assert "…" not in shown
    assert shown.count("-0.1235 (-0.1235, -0.1235)") == shown.count("-12.35 (-12.35, -12.35)") == 2
    assert shown.count("minus greedy") == (1 if name == "mehl+" else 2)

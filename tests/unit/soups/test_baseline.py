"""The best single ingredient beside a soup: what is said, and on what."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import ray_soup
from ray_soup.actors.in_process import InProcessPool
from ray_soup.soups.baseline import improvement, remarks_on, significance
from ray_soup.task.outcomes import Outcome
from tests import tiny
from tests.unit.soups.test_in_memory import loader, states


def outcome(loss: np.ndarray, wrong: int = 0) -> Outcome:
    correct = np.ones(len(loss), bool)
    correct[:wrong] = False
    return Outcome(loss.astype(np.float32), correct, np.full(len(loss), 0.9, np.float32))


NOISE = np.random.default_rng(0).normal(size=400)
NOISE -= NOISE.mean()
SINGLE = outcome(np.full(400, 0.5))


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (outcome(0.6 + 0.1 * NOISE), "is worse than the best single ingredient on select, b.pt: NLL 0.6"),
        (outcome(0.51 + NOISE), "has a higher NLL than the best single ingredient on select, b.pt, but not significantly"),
        (outcome(0.49 + NOISE), "has a lower NLL than the best single ingredient on select, b.pt, but not significantly"),
        (outcome(np.full(400, 0.5)), "is no better than the best single ingredient on select, b.pt"),
        (outcome(0.4 + 0.1 * NOISE, wrong=4), "but also a lower accuracy"),
        (outcome(0.4 + 0.1 * NOISE), ""),
    ],
)
def test_a_note_says_how_a_soup_compares(ours: Outcome, said: str) -> None:
    change = improvement(ours, SINGLE)
    notes = remarks_on("b.pt", ours, SINGLE, change)
    assert len(notes) == bool(said)
    assert said in "".join(notes)
    assert change["select_nll"] == ours.nll - SINGLE.nll
    assert change["select_accuracy"] == ours.accuracy - SINGLE.accuracy
    assert change["select_nll_low"] <= change["select_nll"] + 1e-9
    assert change["select_nll_high"] >= change["select_nll"] - 1e-9
    assert bool(significance(change)) == (change["select_nll"] < 0 <= change["select_nll_high"])


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of examples of each call that evaluates whole ingredients."""
    calls: list[int] = []
    original = InProcessPool.evaluate_files

    def evaluate_files(self: InProcessPool, paths: list[str], splits: list, *more: object) -> Iterator[list[Outcome]]:
        calls.append(len(paths) * sum(map(len, splits)))
        return original(self, paths, splits, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(InProcessPool, "evaluate_files", evaluate_files)
    return calls


OPTIONS = {"learn": {"epochs": 2}, "precision": "float32", "select": 0.25}


@pytest.mark.parametrize("method", ["uniform", "mehl+", "greedy"])
def test_the_best_single_is_the_best_on_select(zoo: Path, method: str, evaluated: list[int]) -> None:
    fit, test = list(loader(zoo, "heldout")), list(loader(zoo, "test"))
    soup = ray_soup.mix_state_dicts(tiny.Tiny(), states(zoo)[:4], fit, method, test=test, **OPTIONS)
    assert sum(evaluated) == 4 * (597 if method == "greedy" else round(597 * 0.25))  # rows of select alone
    best = soup.best_single
    model = tiny.Tiny().eval()
    model.load_state_dict(states(zoo)[int(best["ingredient"])])
    images, labels = (torch.cat(parts) for parts in zip(*test, strict=True))
    with torch.no_grad():
        logits = model(images)
    assert best["test_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert abs(best["test_nll"] - torch.nn.functional.cross_entropy(logits, labels).item()) < 1e-5
    assert soup.record["best_single"] == best["ingredient"]
    assert soup.record["improvement"]["select_nll"] == soup.figures["select_nll"] - best["select_nll"]
    others = [
        ray_soup.mix_state_dicts(tiny.Tiny(), [state, state], fit, "best_single", **OPTIONS).figures
        for state in states(zoo)[:4]
    ]
    assert best["select_accuracy"] == max(other["select_accuracy"] for other in others)


def test_a_soup_that_is_worse_warns_and_none_skips_the_evaluation(zoo: Path, evaluated: list[int]) -> None:
    good, fit = states(zoo)[0], list(loader(zoo, "heldout"))
    bad = {name: t + 1.5 * torch.randn_like(t) if t.is_floating_point() and t.ndim else t for name, t in good.items()}
    with pytest.warns(UserWarning, match=r"worse than the best single ingredient on select, 0: NLL .* Use that ingredient"):
        soup = ray_soup.mix_state_dicts(tiny.Tiny(), [good, bad], fit, "uniform", **OPTIONS)
    assert soup.record["improvement"]["select_nll"] > 0
    assert any("worse than" in note for note in soup.notes)
    evaluated.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = ray_soup.mix_state_dicts(tiny.Tiny(), [good, bad], fit, "uniform", baseline="none", **OPTIONS)
    assert (evaluated, silent.best_single, "improvement" in silent.record) == ([], {}, False)
    assert all(torch.equal(t, silent.state_dict()[n]) for n, t in soup.state_dict().items())

"""Evaluation of models and of ensembles, example by example."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar

from ray_soup.actors import evaluation
from ray_soup.actors.evaluation import outcome_of, score
from ray_soup.io.cache import cache_at
from ray_soup.recipe import make_recipe
from ray_soup.soups.evaluations import ensemble_outcomes
from ray_soup.task.data import Split
from ray_soup.task.objective import Classification
from ray_soup.task.outcomes import LOG_FACTORS, Outcome, best_log_factor, join_outcomes, scaled_nll
from tests import tiny
from tests.conftest import InProcess, values, yield_last
from tests.unit.task.test_outcomes import example


def test_an_outcome_holds_nll_correctness_and_confidence_of_each_example() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    outcome = outcome_of(Classification(), logits, labels, factored=True, metric=lambda logits, labels: labels.float())
    np.testing.assert_allclose(outcome.loss, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-6)
    np.testing.assert_array_equal(outcome.correct, logits.argmax(1) == labels)
    np.testing.assert_allclose(outcome.confidence, logits.softmax(1).max(1).values, rtol=1e-6)
    np.testing.assert_array_equal(outcome.scores, labels)
    for column, log_factor in enumerate(LOG_FACTORS):
        expected = F.cross_entropy(logits * float(np.exp(log_factor)), labels, reduction="none")
        np.testing.assert_allclose(outcome.factored[:, column], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_factored_losses_give_the_temperature_with_the_lowest_nll(scale: float) -> None:
    logits, labels = example(scale=scale)
    outcome = outcome_of(Classification(), logits, labels, factored=True)
    found = best_log_factor(outcome)

    def nll(log_factor: float) -> float:
        return F.cross_entropy(logits.double() * np.exp(log_factor), labels).item()

    best = minimize_scalar(nll, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    assert found == pytest.approx(best.x, abs=1e-3)
    assert scaled_nll(outcome, found) == pytest.approx(best.fun, rel=1e-5)
    assert outcome.nll == pytest.approx(nll(0.0), rel=1e-6)
    assert outcome.accuracy == (logits.argmax(1) == labels).double().mean().item()


def test_outcomes_of_parts_joined_are_the_outcome_of_the_whole() -> None:
    logits, labels = example()
    whole, *parts = (
        outcome_of(
            Classification(), logits[some], labels[some], factored=True, metric=lambda logits, labels: logits.mean(dim=1)
        )
        for some in (slice(None), slice(0, 123), slice(123, 500))
    )
    for found, expected in zip(join_outcomes(parts).arrays(), whole.arrays(), strict=True):
        assert (found is None) == (expected is None)
        np.testing.assert_allclose(found, expected, rtol=1e-6) if expected is not None else None


def test_outcomes_have_no_factored_losses_and_scores_unless_asked_for() -> None:
    outcome = outcome_of(Classification(), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    assert outcome.factored is None
    assert outcome.scores is None


@pytest.mark.parametrize("micro_batch", [7, 128])
def test_a_score_sums_over_the_examples(zoo: Path, micro_batch: int) -> None:
    pool = InProcess(make_recipe(values(zoo, learn__micro_batch=micro_batch)))
    (shard,) = pool.shards
    path = str(zoo / "zoo" / "model_2.safetensors")
    split = Split("test", np.arange(5, 205, dtype=np.int32))
    ((outcome,),) = pool.evaluate_files([path], [split])
    found = score(shard.replica, split)  # the checkpoint's parameters are still in the model
    assert found.correct == outcome.correct.sum()
    assert found.count == 200
    assert found.loss == pytest.approx(outcome.loss.sum(dtype=np.float64), rel=1e-5)
    assert score(shard.replica, split, 2.0).correct == found.correct
    assert score(shard.replica, split, 2.0).loss != pytest.approx(found.loss, rel=1e-3)


def assert_equal(found: list[Outcome], expected: list[Outcome]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.loss, theirs.loss)
        np.testing.assert_array_equal(ours.correct, theirs.correct)


def test_the_ensemble_is_the_mean_of_the_logits_on_any_actor(zoo: Path) -> None:
    """On two actors that evaluated all members, on two that replace them at the end, and on one that serves both ranks."""
    recipe = make_recipe(values(zoo, method="greedy"))
    paths = tuple(str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(4))
    splits = [Split("fit", np.arange(100, 331, dtype=np.int32)), Split("test", np.arange(600, dtype=np.int32))]
    actors, others, one = InProcess(recipe, 2).shards, InProcess(recipe, 2).shards, InProcess(recipe).shards[0]
    parts = [[split.parts(2)[rank] for split in splits] for rank in range(2)]
    members = [[yield_last(actors[r].evaluate_member(paths[: k + 1], parts[r], r)) for r in range(2)] for k in range(4)]
    for k in range(4):
        for rank in range(2):
            assert_equal(yield_last(one.evaluate_member(paths[: k + 1], parts[rank], rank)), members[k][rank])
    found = [yield_last(actors[rank].evaluate_ensemble(paths, parts[rank], rank)) for rank in range(2)]
    again = [yield_last(others[rank].evaluate_ensemble(paths, parts[rank], rank)) for rank in range(2)]
    for rank in range(2):
        assert_equal(yield_last(one.evaluate_ensemble(paths, parts[rank], rank)), found[rank])
        assert_equal(again[rank], found[rank])
    images = {"fit": tiny.digits()[0][600:1197], "test": tiny.digits()[0][1197:]}
    labels = {"fit": tiny.digits()[1][600:1197], "test": tiny.digits()[1][1197:]}
    for n, split in enumerate(splits):
        logits = []
        for k, path in enumerate(paths):
            model = tiny.Tiny()
            model.load_state_dict(load_file(path))
            with torch.inference_mode():
                logits.append(model(torch.from_numpy(images[split.source][split.rows])))
            alone = outcome_of(Classification(), logits[-1], torch.from_numpy(labels[split.source][split.rows]))
            whole = join_outcomes([members[k][rank][n] for rank in range(2)])
            np.testing.assert_allclose(whole.loss, alone.loss, rtol=1e-4, atol=1e-6)
        expected = outcome_of(
            Classification(), torch.stack(logits).mean(0), torch.from_numpy(labels[split.source][split.rows])
        )
        together = join_outcomes([found[rank][n] for rank in range(2)])
        np.testing.assert_allclose(together.loss, expected.loss, rtol=1e-4, atol=1e-6)
        assert together.factored is not None


@pytest.mark.parametrize(("stop", "kept_in"), [*((stop, "folder") for stop in range(1, 9)), (4, "bucket"), (7, "bucket")])
def test_an_ensemble_that_was_interrupted_evaluates_no_member_again(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, stop: int, kept_in: str
) -> None:
    """It ends during the evaluation number `stop` of eight: four members on two ranks."""
    base = request.getfixturevalue("s3") if kept_in == "bucket" else str(tmp_path)
    recipe = make_recipe(values(zoo, method="greedy"))
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(4)]
    splits = [Split("fit", np.arange(100, 331, dtype=np.int32)), Split("test", np.arange(600, dtype=np.int32))]
    keys, evaluated = [[f"{k}{n}" for n in range(2)] for k in range(4)], list[str]()
    evaluate_checkpoint = evaluation.evaluate_checkpoint

    def counted(replica: Any, path: str, *more: Any) -> Iterator[Any]:
        evaluated.append(path)
        if len(evaluated) == stop:
            evaluated.append("interrupted")
            raise KeyboardInterrupt
        return (yield from evaluate_checkpoint(replica, path, *more))

    def attempt(place: Path) -> tuple[list[list[Outcome]], list[Outcome]]:
        stem = f"{base}/{place.name}/sums"
        with cache_at(place / "cache"):
            return ensemble_outcomes(InProcess(recipe, 2), paths, keys, splits, lambda *done: None, stem)

    for place in ("whole", "cut"):
        (tmp_path / place).mkdir()
    whole = attempt(tmp_path / "whole")
    monkeypatch.setattr(evaluation, "evaluate_checkpoint", counted)
    monkeypatch.setattr(evaluation, "SAVING", math.inf)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path / "cut")
    individual, together = attempt(tmp_path / "cut")
    for ours, theirs in zip([*individual, together], [*whole[0], whole[1]], strict=True):
        assert_equal(ours, theirs)
    assert evaluated[stop - 1 : stop + 1] == [paths[(stop - 1) // 2], "interrupted"]
    again = [path for path in evaluated if path != "interrupted"]
    assert sorted(again) == sorted([*paths, *paths, paths[(stop - 1) // 2]])
    assert attempt(tmp_path / "cut")[1] is not None
    assert len(evaluated) == 10

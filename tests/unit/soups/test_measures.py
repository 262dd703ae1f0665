"""What figures are called, and which of them decides, for each objective."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_soup.errors import RecipeError
from ray_soup.recipe import dump_recipe, load_recipe, make_recipe, with_changes
from ray_soup.soups.baseline import improvement, remarks_on, significance
from ray_soup.soups.comparison import diagnosis, verdict
from ray_soup.soups.evaluations import figures_of
from ray_soup.soups.report import figures
from ray_soup.soups.report.measures import Measures, measures_in, measures_of, recorded
from ray_soup.soups.report.paired import paired_legend, paired_table
from ray_soup.soups.report.statistics import paired_test
from ray_soup.soups.report.tables import (
    cost,
    legend,
    of_seed,
    quality,
    results_in_parts,
    series_legend,
    series_table,
    series_title,
    table,
)
from ray_soup.soups.report.text import number
from ray_soup.soups.report.trials import trials_table
from ray_soup.task.objective import OBJECTIVES, Objective
from ray_soup.task.outcomes import Outcome
from ray_soup.tune.search import optimized, pareto
from tests.unit.task import library_models
from tests.unit.task.language_models import llama

TOKENS = Measures("causal_lm", "token")
NUMBERS = Measures("regression", "number")
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.integers(1, 9, 400).astype(np.float64)


class Boxes(Objective):
    """An objective of the user, without accuracy."""

    unit = "box"

    def losses(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Any:
        return (outputs - targets).abs().flatten(1).sum(1)


def outcome(loss: float, right: float | None = None, score: float | None = None, noise: float = 0.01) -> Outcome:
    """Make up an outcome with these means per unit; a score is per example."""
    shift = RANDOM.normal(size=400) * noise
    correct = None if right is None else WEIGHT * np.clip(right + shift, 0, 1)
    scores = None if score is None else (score + shift).astype(np.float32)
    return Outcome(WEIGHT * (loss + shift), correct, None, None, scores, WEIGHT)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_run_json_names_every_objective_so_that_reports_find_its_words(name: str) -> None:
    recipe = make_recipe({"model": "a:b", "objective": name, "select_by": "nll"})
    measures = measures_of(recipe)
    assert (measures.objective, measures.unit) == (name, OBJECTIVES[name].unit)
    assert measures_in(recorded(measures)) == measures
    heading = quality([{"model_name": "a", "test_nll": 1.0}], measures)[3][1]
    expected = {"classification": "test NLL", "regression": "test MSE"}
    assert heading == expected.get(name, f"test NLL/{OBJECTIVES[name].unit}")


@pytest.mark.parametrize(
    ("name", "objective", "called"),
    [
        ("vit", "classification", "images"),
        ("bert", "classification", "examples"),
        ("llama", "causal_lm", "examples"),
    ],
)
def test_examples_are_called_images_only_if_they_are(tmp_path: Path, name: str, objective: str, called: str) -> None:
    models = {"vit": library_models.vit, "bert": library_models.bert, "llama": llama}
    models[name]().save_pretrained(tmp_path / "m")
    measures = measures_of(make_recipe({"model": f"transformers:{tmp_path / 'm'}"}))
    assert (measures.objective, measures.examples) == (objective, called)
    assert measures_in(recorded(measures)) == measures
    assert (recorded(measures).get("inputs") == "texts") == (name == "bert")


def test_the_loss_of_an_objective_of_the_user_is_not_called_nll() -> None:
    recipe = make_recipe({"model": "a:b", "objective": "tests.unit.soups.test_measures:Boxes"})
    measures = measures_of(recipe)
    rows = [{"model_name": "uniform", "test_nll": 0.00012345, "image_passes": 12}]
    assert table(rows, [*quality(rows, measures), *cost(measures)]) == (
        ["model", "test loss/box", "examples"],
        [["uniform", "0.0001234", "12"]],
    )
    assert "loss/box: the loss of the objective tests.unit.soups.test_measures:Boxes, per box." in legend(
        {"examples": {"test": 3}, **recorded(measures)}, rows
    )
    with pytest.raises(RecipeError, match="select_by: accuracy has no meaning for the objective own"):
        measures_of(with_changes(recipe, {"select_by": "accuracy"}))
    with pytest.raises(RecipeError, match="select_by: accuracy has no meaning for the objective regression"):
        measures_of(make_recipe({"model": "a:b", "objective": "regression", "select_by": "accuracy"}))


def test_a_record_without_an_objective_is_of_classification_and_reads_as_before() -> None:
    assert measures_in({"exit": 0}) == Measures()
    rows = [{"model_name": "a", "test_accuracy": 0.5, "test_nll": 1.0, "test_nll_scaled": 0.9, "image_passes": 1}]
    assert table(rows, [*quality(rows), *cost()])[0] == ["model", "test %", "test NLL", "NLL scaled", "images"]
    assert "NLL scaled: test NLL after temperature scaling" in legend({"examples": {"test": 3}}, rows)


def test_a_language_model_has_perplexity_and_bits_per_byte_on_test_only() -> None:
    figures_ = {"accuracy": 0.25, "nll": 2.0, "perplexity": 7.389, "bits_per_byte": 0.75}
    row = {"model_name": "uniform", **{f"{s}_{key}": value for s in ("select", "test") for key, value in figures_.items()}}
    head, cells = table([row], quality([row], TOKENS))
    assert head == [
        "model",
        "select token %",
        "select NLL/token",
        "test token %",
        "test NLL/token",
        "perplexity",
        "bits/byte",
    ]
    assert cells[0][3:] == ["25.00", "2.0000", "7.389", "0.7500"]
    text = legend({"examples": {"test": 3}, **recorded(TOKENS)}, [row])
    assert "NLL/token: mean cross-entropy over all tokens that are scored, in nats. token %: share that is" in text
    assert "Perplexity: exp of the NLL per token." in text
    assert "scaled" not in text


def test_paired_tests_have_the_columns_that_mean_something() -> None:
    def head_of(ours: Outcome, theirs: Outcome, measures: Measures) -> tuple[list[str], str]:
        tests = [{"split": "test", "model_name": "mehl+", "against": "greedy", **paired_test(ours, theirs)}]
        return paired_table(tests, "greedy", "test", measures)[0], paired_legend(tests, measures)

    head, text = head_of(outcome(1.0, 0.5), outcome(1.2, 0.4), TOKENS)
    assert head == ["minus greedy", "points (95 %)", "NLL/token (95 %)", "p"]
    assert (
        "differences in token accuracy (percentage points) and in NLL per token with 95 % bootstrap intervals, and" in text
    )
    assert "the p-value of the paired permutation test on the NLL, which flips the signs of the differences of whole" in text
    head, text = head_of(outcome(1.0), outcome(1.2), NUMBERS)
    assert head == ["minus greedy", "MSE (95 %)", "p"]
    assert "differences in MSE with" in text
    assert "the p-value of the paired permutation test on the MSE" in text
    by_metric = dataclasses.replace(TOKENS, select_by="metric")
    head, text = head_of(outcome(1.0, 0.5, 0.7), outcome(1.2, 0.4, 0.6), by_metric)
    assert head == ["minus greedy", "metric (95 %)", "NLL/token (95 %)", "p"]
    assert "differences in the metric and in NLL per token" in text
    plain = [Outcome(np.full(9, loss), np.arange(9) < right) for loss, right in ((0.5, 7), (0.6, 5))]
    head, text = head_of(plain[0], plain[1], Measures())
    assert head == ["minus greedy", "points (95 %)", "p", "NLL (95 %)"]
    assert "and the p-value of the exact McNemar test on accuracy. A" in text


def test_scores_of_an_objective_have_columns_in_every_table() -> None:
    named = [np.array([(n % 2, n / 9) for n in range(9)], [("exact", "f8"), ("top-2", "f8")]) for _ in range(2)]
    named[1]["exact"] = 0
    ours, theirs = (dataclasses.replace(Outcome(np.ones(9), np.arange(9) < 7), named=each) for each in named)
    test = paired_test(ours, theirs)
    assert (test["score_exact"], test["score_top-2"], test["score_top-2_p"]) == (pytest.approx(4 / 9), 0, 1)
    assert test["score_exact_p"] == 2 / 2**4  # all four differences have one sign
    tests = [{"split": "test", "model_name": "mehl+", "against": "greedy", **test}]
    head, (cells,) = paired_table(tests, "greedy", "test", Measures())
    assert head[-4:] == ["exact (95 %)", "p", "top-2 (95 %)", "p"]
    assert cells[-4].startswith("+0.4444 (+")
    assert cells[-3:] == ["0.12", "+0.0000 (+0.0000, +0.0000)", "1"]
    assert "in NLL and in exact and in top-2 with 95 %" in paired_legend(tests, Measures())
    rows = [{"model_name": "a", **figures_of({"test_v1": ours, "test_v2": theirs}), "test_v1_top-2_sd": 0.1}]
    assert table(rows, quality(rows, Measures()))[0] == [
        "model", "v1 %", "v1 NLL", "v1 exact", "v1 top-2", "v2 %", "v2 NLL", "v2 exact", "v2 top-2",
    ]  # fmt: skip
    titles = [title for title, _ in results_in_parts(rows, Measures(), several=True)]
    assert titles == ["Accuracy", "NLL", "Exact", "Top-2"]
    assert "exact, top-2: means of the objective's scores over the examples." in legend({"examples": {"test": 9}}, rows)


def test_the_paired_interval_of_a_metric_contains_its_difference_and_resamples_documents() -> None:
    ours, theirs = outcome(1.0, 0.5, 0.7, noise=0.3), outcome(1.0, 0.5, 0.6, noise=0.3)
    found = paired_test(ours, theirs)
    assert ours.metric is not None
    assert theirs.metric is not None
    assert found["metric"] == pytest.approx(ours.metric - theirs.metric, abs=1e-6)
    assert found["metric_low"] < found["metric"] < found["metric_high"]
    group = np.repeat(np.arange(4), 100)
    wide = paired_test(*(dataclasses.replace(o, group=group) for o in (ours, theirs)))
    assert wide["metric"] == pytest.approx(found["metric"], abs=1e-6)
    assert wide["metric_low"] != found["metric_low"]


@pytest.mark.parametrize(
    ("select_by", "figure", "title", "cell"),
    [
        ("auto", "accuracy", "Token accuracy on v2 in percent", "50.00"),
        ("accuracy", "accuracy", "Token accuracy on v2 in percent", "50.00"),
        ("nll", "nll", "NLL per token on v2", "1.2500"),
        ("metric", "metric", "Metric on v2", "0.7500"),
    ],
)
def test_a_series_shows_the_figure_that_ranks(select_by: str, figure: str, title: str, cell: str) -> None:
    measures = dataclasses.replace(TOKENS, select_by=select_by)
    rows = [{"model_name": "a", "count": 2, "test_v2_accuracy": 0.5, "test_v2_nll": 1.25, "test_v2_metric": 0.75}]
    assert measures.leading(rows, "test_v2") == figure
    assert series_title(rows, "test_v2", measures) == title
    assert series_table(rows, "count", "test_v2", measures) == (["model", "2"], [["a", cell]])
    assert series_legend(rows, "count", "test_v2", measures).startswith(title.replace(" on v2", ""))
    without = [{"model_name": "a", "count": 2, "test_v2_nll": 0.5}]
    assert measures.leading(without, "test_v2") == "nll"
    shown = of_seed({"seeds": [1, 2, 3]})
    assert " list (seed 1 only); each" in series_legend(rows, "count", "test_v2", measures, shown)
    assert of_seed({"seeds": [1]}) == of_seed({}) == ""


def test_a_number_that_rounds_to_zero_has_no_minus_sign() -> None:
    forms = {"{:.4f}": "0.0000", "{:+.4f}": "+0.0000", "{:.4g}": "0", "{:.2%}": "0.00%"}
    assert {form: number(form, -0.0) for form in forms} == forms
    assert number("{:.4f}", -1e-9) == "0.0000"
    assert (number("{:.4g}", -1e-9), number("{:+.2f}", -0.01)) == ("-1e-09", "-0.01")
    assert (number("{:.4f}", float("-inf")), number("{:.4f}", float("nan"))) == ("-inf", "nan")
    assert table([{"model_name": "a", "test_nll_scaled": -0.0}], quality([{"test_nll": 0.0}]))[1] == [["a", "0.0000"]]


NLL = Measures("causal_lm", "token", "auto")
ACCURACY = Measures("causal_lm", "token", "accuracy")
METRIC = Measures("regression", "number", "metric")


@pytest.mark.parametrize(
    ("measures", "better", "worse", "words"),
    [
        (NLL, outcome(1.0, 0.4), outcome(1.2, 0.5), "NLL per token"),
        (ACCURACY, outcome(1.2, 0.5), outcome(1.0, 0.4), "token accuracy"),
        (METRIC, outcome(1.2, None, 0.8), outcome(1.0, None, 0.7), "metric"),
    ],
)
def test_sentences_speak_of_the_figure_that_decides(measures: Measures, better: Outcome, worse: Outcome, words: str) -> None:
    """In each case the other figure says the opposite."""
    change = improvement(better, worse)
    assert measures.improved(change)
    assert f"Chosen by its {words} on select: mehl+, which beats the best single" in verdict(
        "mehl+", better, worse, change, measures
    )
    assert significance(change, measures) == []
    notes = remarks_on("a.pt", better, worse, change, measures)
    assert len(notes) == (measures is NLL)  # a lower accuracy is worth a word, a higher NLL is not
    back = improvement(worse, better)
    assert not measures.improved(back)
    assert verdict("mehl+", worse, better, back, measures).startswith("No soup beats the best single ingredient")
    (note,) = remarks_on("a.pt", worse, better, back, measures)
    assert note.startswith(f"This soup is worse than the best single ingredient on select, a.pt: {words} ")
    assert f"({words} " in verdict("mehl+", worse, better, back, measures)
    unclear = improvement(better, dataclasses.replace(better, loss=better.loss[::-1].copy()))
    assert set(change) >= {f"select_{measures.decisive(change)}{end}" for end in ("", "_low", "_high")}
    assert unclear["select_nll"] == pytest.approx(0, abs=1e-9)


def test_points_and_scales_of_a_note() -> None:
    ours, single = outcome(1.0, 0.5), outcome(1.0, 0.6)
    (note,) = remarks_on("a", ours, single, improvement(ours, single), ACCURACY)
    assert "token accuracy " in note
    assert "% against " in note
    assert " points, 95 % interval -" in note
    small, smaller = outcome(2e-7, noise=1e-9), outcome(1e-7, noise=1e-9)
    (note,) = remarks_on("a", small, smaller, improvement(small, smaller), NUMBERS)
    assert "MSE 2" in note
    assert "e-07 against" in note
    assert "accuracy" not in note


def test_an_ensemble_without_accuracy_is_judged_by_its_loss() -> None:
    single = outcome(1.0, 0.5)
    assert list(diagnosis(outcome(0.9), single, TOKENS)) == []
    (text,) = diagnosis(outcome(1.1), single, TOKENS)
    assert "(NLL per token 1." in text
    assert "accuracy" not in text
    by_metric = dataclasses.replace(NUMBERS, select_by="metric")
    assert list(diagnosis(outcome(1.1, None, 0.9), outcome(1.0, None, 0.8), by_metric)) == []


def test_a_search_goes_by_the_figure_that_selects_unless_it_names_one(tmp_path: Any) -> None:
    plain = {"model": "a:b", "metric": "c:d"}

    def goes_by(**keys: Any) -> str:
        recipe = make_recipe({**plain, **keys})
        (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
        again = load_recipe(tmp_path / "r.yaml")
        assert again == recipe
        assert optimized(again) == optimized(recipe)
        return optimized(recipe)

    assert goes_by() == goes_by(select_by="nll") == "select_nll"
    assert goes_by(select_by="accuracy") == "select_accuracy"
    assert goes_by(select_by="metric") == "select_metric"
    assert goes_by(select_by="metric", search={"metric": "select_nll"}) == "select_nll"
    assert goes_by(search={"metric": "select_accuracy"}) == "select_accuracy"
    assert optimized(with_changes(make_recipe(plain), {"select_by": "metric"})) == "select_metric"
    assert "metric: select_nll" in dump_recipe(make_recipe({"model": "a:b"}))  # as in folders of earlier versions
    with pytest.raises(RecipeError, match="Add `select_by: metric`"):
        goes_by(search={"metric": "select_metric"})
    with pytest.raises(RecipeError, match="has no meaning for the objective regression"):
        goes_by(objective="regression", search={"metric": "select_accuracy"})


def test_the_pareto_front_and_the_trials_follow_the_metric() -> None:
    def trial(number: int, metric: float, seconds: float) -> dict[str, Any]:
        return {"trial": number, "select_nll": 1.0 + number, "select_metric": metric, "seconds": seconds,
                "peak_memory_bytes": 100, "percent": 100, "error": None}  # fmt: skip

    best, quick, beaten = trial(0, 0.9, 9), trial(1, 0.5, 1), trial(2, 0.5, 9)
    assert pareto([best, quick, beaten], "select_metric") == [best, quick]
    search = {"keys": [], "metric": "select_metric", "trials": [best, quick]}
    assert trials_table(search, "trials", NUMBERS)[0][:3] == ["trial", "select MSE", "select metric"]
    own = dataclasses.replace(NUMBERS, own_loss="a:b")
    assert trials_table(search, "trials", own)[0][1] == "select loss"


def test_plots_draw_any_figure() -> None:
    rows = [{"model_name": n, "test_nll": v} for n, v in (("best_single", 1.0), ("ensemble", 0.9), ("mehl+", 0.8))]
    svg = figures.by_method(rows, "test_nll", "test MSE (9 examples)", {"mehl+": (0.7, 0.9)}, percent=False)
    assert "test MSE (9 examples)" in svg
    assert "mehl+" in svg
    series = [{"model_name": "mehl+", "count": n, "test_nll": 1 / n} for n in (2, 4)]
    assert "test MSE" in figures.by_count(series, "test_nll", "test MSE", percent=False)
    curve = [{"turn": 0, "steps": n, "select_nll": nll, "select_metric": m} for n, nll, m in ((0, 1.0, 0.1), (3, 2.0, 0.9))]
    assert "MSE" in figures.learning_curves({"mehl+": curve}, "MSE", "metric")
    assert figures.learning_curves({"mehl+": curve}, "MSE", "metric") != figures.learning_curves({"mehl+": curve}, "MSE")
    trials = [{"select_metric": m, "learn.lr": 0.1, "learn.model_batch": n} for n, m in ((2, 0.25), (4, 0.75))]
    assert "0.7500" in figures.search_plane(trials, "select_metric")

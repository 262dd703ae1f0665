"""The mechanics of a comparison on the tiny zoo. On a few hundred images the best soup is a matter of noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from ray_soup.actors.mesh_pool import MeshPool
from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import Recipe, for_method, make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.finished import verify
from ray_soup.soups.make import make
from ray_soup.soups.mixture import Mixture
from ray_soup.soups.output import Soup
from ray_soup.soups.report.markdown import comparison_markdown
from ray_soup.soups.report.tables import quality, table
from ray_soup.soups.results import KINDS, load_results
from ray_soup.soups.run import run
from ray_soup.soups.session import Session
from ray_soup.tune.resume import resume
from tests.conftest import ROOT, values

LABELS = ["best_single", "uniform", "greedy", "learned", "learned+", "mehl", "mehl+", "mehl-m3", "mehl+-m3"]
OPTIONS = CompareOptions(seeds=2, drop_top=(0, 2), by_count=(3, 8))


def tiny_recipe(folder: Path, **changes: Any) -> Recipe:
    return make_recipe(values(folder, **{"learn": {"batch_size": 150, "epochs": 2, "model_batch": 3}, **changes}))


@pytest.fixture(scope="module")
def compared(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Soup:
    return compare(tiny_recipe(zoo), tmp_path_factory.mktemp("compared") / "out", OPTIONS)


def test_every_soup_and_reference_is_in_the_table(compared: Soup) -> None:
    table = {row["model_name"]: row for row in compared.record["table"]}
    assert list(table) == ["mean single", "best_single", "ensemble", *LABELS[1:], "trained"]
    for name in [*LABELS, "trained"]:
        row = table[name]
        for key in ("select_accuracy", "select_nll", "test_accuracy", "test_nll", "test_nll_scaled", "seconds"):
            assert np.isfinite(row[key]), (name, key)
        assert row["test_nll_scaled"] <= row["test_nll"] * 1.05
        assert row["peak_memory_bytes"] > 1e8
    assert table["best_single"]["ingredients_used"] == 1
    assert 1 <= table["greedy"]["ingredients_used"] <= 8
    assert (table["mehl"]["steps"], table["mehl-m3"]["steps"], table["learned"]["steps"]) == (6, 18, 4)
    assert table["mehl"]["image_passes"] == 2 * 448
    assert table["trained"]["image_passes"] == 3 * table["mehl"]["image_passes"]  # three learning rates
    # the seed redraws select, so figures on select vary; on test only those of learned soups do
    for name in ("best_single", "uniform", "greedy", "ensemble"):
        assert "test_nll_sd" not in table[name]
        assert table[name]["select_nll_sd"] > 0
    for name in [*LABELS[3:], "trained"]:
        assert table[name]["test_nll_sd"] > 0


def test_results_have_a_line_for_every_model(compared: Soup) -> None:
    rows = [json.loads(line) for line in (compared.out / "results.jsonl").read_text().splitlines()]
    assert rows == json.loads(json.dumps(compared.rows))
    names = [row["model_name"] for row in rows]
    assert names[:9] == [f"model_{k}" for k in range(8)] + ["ensemble"]
    seeds = [(r["model_name"], r["model_batch"], r["seed"]) for r in rows if "model_batch" in r]
    assert len(seeds) == len(set(seeds)) == 3 + 2 * 6 + 2
    assert [row["kind"] for row in rows[:9]] == ["ingredient"] * 8 + ["ensemble"]
    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    for kind, key in (("mean", "table"), ("dropped", "eliminations"), ("counted", "counts")):
        of_run_json = [{k: row[k] for k in kept} for row, kept in zip(of_kind[kind], compared.record[key], strict=True)]
        assert of_run_json == json.loads(json.dumps(compared.record[key]))
    names_in_table = [row["model_name"] for row in compared.record["table"]]
    assert [row["name"] for row in of_kind["mean"]] == names_in_table
    one_seed = [r["name"] for kind in ("single", "soup", "reference") for r in of_kind[kind] if r["seed"] == 1]
    assert {*one_seed, "mean single", "ensemble"} == {*names_in_table}
    frame = load_results(compared.out)
    assert frame.columns[:2].tolist() == ["kind", "name"]
    assert len(frame) == len(rows)
    individual = [row["test_accuracy"] for row in rows[:8]]
    assert compared.record["table"][0]["test_accuracy"] == pytest.approx(np.mean(individual))


@pytest.mark.slow
def test_a_soup_of_the_table_is_the_soup_that_learn_makes(compared: Soup, zoo: Path, tmp_path: Path) -> None:
    for method in ("mehl+", "greedy"):
        alone = run(for_method(tiny_recipe(zoo), method, model_batch="auto"), tmp_path / method)
        ours = load_coefficients(compared.out / f"{method}.coefficients.safetensors")
        np.testing.assert_array_equal(ours.values, load_coefficients(alone.out / "coefficients.safetensors").values)
        row = next(r for r in compared.rows if (r["model_name"], r.get("model_batch"), r.get("seed")) == (method, 8, 1))
        for key in ("select_accuracy", "select_nll", "test_accuracy", "test_nll", "test_nll_scaled"):
            assert row[key] == pytest.approx(alone.rows[0][key], rel=1e-6), key  # compare evaluates in other batches


@pytest.mark.slow
def test_a_soup_of_fewer_ingredients_is_the_soup_of_a_recipe_that_names_only_these(
    compared: Soup, zoo: Path, tmp_path: Path
) -> None:
    """For the six ingredients without the two best, and for all eight, whose soups are those of the table."""
    dropped = {(row["dropped"], row["model_name"]): row for row in compared.record["eliminations"]}
    assert set(dropped) == {(n, m) for n in (0, 2) for m in ("best_single", "uniform", "greedy", "mehl+")}
    own = {row["model_name"]: row for row in compared.rows if row.get("seed") == 1 and row.get("model_batch") == 8}
    counted = {(row["count"], row["model_name"]): row for row in compared.record["counts"]}
    for method in ("greedy", "mehl+"):
        assert dropped[0, method]["test_nll"] == counted[8, method]["test_nll"] == own[method]["test_nll"]
    held_out = json.loads((run(for_method(tiny_recipe(zoo), "best_single"), tmp_path / "b").out / "run.json").read_text())
    accuracy = {name: (-o["accuracy"], o["nll"]) for name, o in held_out["held_out"].items()}
    left = sorted(sorted(accuracy, key=accuracy.__getitem__)[2:])
    recipe = tiny_recipe(zoo, ingredients=[str(zoo / "zoo" / f"{name}.safetensors") for name in left])
    alone = run(for_method(recipe, "mehl+", model_batch="auto"), tmp_path / "six")
    assert alone.rows[0]["test_nll"] == dropped[2, "mehl+"]["test_nll"]


def test_the_chosen_soup_is_the_best_on_select_and_passes_verification(compared: Soup) -> None:
    own = {row["model_name"]: row for row in compared.rows if row.get("seed") == 1 and row.get("model_batch") == 8}
    own |= {f"{r['model_name']}-m3": r for r in compared.rows if r.get("seed") == 1 and r.get("model_batch") == 3}
    best = min((name for name in own if name not in ("best_single", "trained")), key=lambda name: own[name]["select_nll"])
    assert compared.record["chosen"] == best
    assert compared.record["improvement"]["select_nll"] == own[best]["select_nll"] - own["best_single"]["select_nll"]
    assert len(verify(compared.out)) == 5
    again = CliRunner().invoke(main, ["compare", *arguments_of(compared), "--json", "--require-improvement"])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout.splitlines()[-1])["run"]["chosen"] == best
    assert "complete; nothing was run" in again.stderr


def arguments_of(soup: Soup) -> list[str]:
    """The arguments of the command that made the soup."""
    return [str(soup.out / "recipe.yaml"), str(soup.out), "--seeds=2", "--drop-top=0,2", "--by-count=3,8"]


def test_paired_tests_are_against_best_single_and_greedy(compared: Soup) -> None:
    tests = compared.record["tests"]
    pairs = {(t["model_name"], t["against"]) for t in tests}
    assert pairs == {(a, b) for b in ("best_single", "greedy") for a in [*LABELS, "trained"] if a not in ("best_single", b)}
    table = {row["model_name"]: row for row in compared.rows if row.get("seed") == 1 and row.get("model_batch") == 8}
    for t in tests:
        if t["model_name"] in table:
            ours, theirs = table[t["model_name"]], table[t["against"]]
            assert t["accuracy"] == pytest.approx(ours["test_accuracy"] - theirs["test_accuracy"])
            assert t["nll"] == pytest.approx(ours["test_nll"] - theirs["test_nll"], abs=1e-6)
            assert (t["gained"] - t["lost"]) / 600 == pytest.approx(t["accuracy"])


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_each_of_several_test_sets_has_the_figures_of_a_run_with_it_alone(zoo: Path, tmp_path: Path) -> None:
    arrays = np.load(zoo / "test.npz")
    for name, rows in {"near": slice(400), "far": slice(250, 600)}.items():
        np.savez(tmp_path / f"{name}.npz", images=arrays["images"][rows], labels=arrays["labels"][rows])
    tests = {name: str(tmp_path / f"{name}.npz") for name in ("near", "far")}
    recipe, held_out = {"method": "uniform"}, {"fit": str(zoo / "heldout.npz"), "select": 0.25}
    both = run(tiny_recipe(zoo, **recipe, data={**held_out, "test": tests}), tmp_path / "both")
    for name, spec in tests.items():
        alone = run(tiny_recipe(zoo, **recipe, data={**held_out, "test": spec}), tmp_path / f"{name}_alone")
        for figure in ("accuracy", "nll", "nll_scaled", "ece"):
            assert both.rows[0][f"test_{name}_{figure}"] == alone.rows[0][f"test_{figure}"]
    head, cells = table(both.rows, quality(both.rows))
    assert head[3:] == ["near %", "near NLL", "near scaled", "far %", "far NLL", "far scaled"]
    assert f"| {' | '.join(cells[0][:3])}" in (both.out / "README.md").read_text()
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**values(zoo), "data": {**held_out, "test": tests}}))
    shown = CliRunner().invoke(main, ["evaluate", str(tmp_path / "r.yaml"), str(both.out), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["test_far_nll"] == both.rows[0]["test_far_nll"]
    compared = compare(tiny_recipe(zoo, data={**held_out, "test": tests}, learn={"batch_size": 448, "epochs": 1}),
                       tmp_path / "compared", CompareOptions(drop_top=(0,)))  # fmt: skip
    rows = {row["model_name"]: row for row in compared.record["table"]}
    assert rows["uniform"]["test_near_accuracy"] == both.rows[0]["test_near_accuracy"]
    assert [t["split"] for t in compared.record["tests"]] == ["test_near"] * 17 + ["test_far"] * 17
    text = comparison_markdown(compared.record)
    assert text.count("On near:") == text.count("On far:") == 3
    assert "Accuracy by method on far" in (compared.out / "report.html").read_text()


def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each model file that is evaluated from here on."""
    found: list[str] = []
    evaluate_member, evaluate_file = MeshPool.evaluate_member, MeshPool.evaluate_file

    def member(self: MeshPool, paths: tuple[str, ...], *more: Any) -> Any:
        found.append(Path(paths[-1]).name)
        return evaluate_member(self, paths, *more)

    def file(self: MeshPool, path: str, *more: Any) -> Any:
        found.append(Path(path).name)
        return evaluate_file(self, path, *more)

    monkeypatch.setattr(MeshPool, "evaluate_member", member)
    monkeypatch.setattr(MeshPool, "evaluate_file", file)
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_interrupted_comparison_is_resumed_and_ends_the_same(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(zoo, learn={"batch_size": 150, "epochs": 2, "model_batch": 8})
    evaluated = evaluations(monkeypatch)
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "cache"))
    whole = compare(recipe, tmp_path / "whole")
    at_once, made = [*evaluated], list[str]()
    evaluated.clear()
    monkeypatch.setenv("RAY_SOUP_CACHE", str(tmp_path / "other_cache"))

    def interrupted(session: Session) -> Mixture:
        if len(made) == 5:
            made.append("interrupt")
            raise KeyboardInterrupt
        made.append(session.recipe.method)
        return make(session)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "evaluating ingredients" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "cut", progress=interrupt)
    in_progress = evaluated.pop()
    monkeypatch.setattr("ray_soup.soups.compare.make", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(recipe, tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["exit"] == 130
    monkeypatch.chdir(tmp_path)
    cut = resume("cut").soup
    assert cut is not None
    assert Path.cwd() == ROOT  # where the comparison was begun
    assert made == [*LABELS[:5], "interrupt", *LABELS[5:7]]
    assert in_progress == at_once[4]
    assert evaluated == at_once  # no model a second time
    timing = ("seconds", "peak_memory_bytes", "seconds_sd")
    for ours, theirs in zip(cut.record["table"], whole.record["table"], strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {k: v for k, v in theirs.items() if k not in timing}
    made.clear()
    monkeypatch.setattr("ray_soup.soups.compare.make", lambda session: made.append(session.recipe.method) or make(session))
    larger = CompareOptions(seeds=2, drop_top=(1,))
    added = compare(recipe, tmp_path / "cut", larger)  # only what is missing is made
    assert made == [*LABELS[3:7], "best_single", "uniform", "greedy", "mehl+"]
    assert json.loads(json.dumps(added.record["compare"])) == [2, [1], []]
    larger_at_once = compare(recipe, tmp_path / "at_once", larger)
    for key in ("table", "eliminations"):
        for ours, theirs in zip(added.record[key], larger_at_once.record[key], strict=True):
            assert {k: v for k, v in ours.items() if k not in timing} == {k: v for k, v in theirs.items() if k not in timing}
    assert not [*(tmp_path / "cut" / "state").rglob("*.pt"), *(tmp_path / "cut" / "state").rglob("*.difference.*")]
    assert len(verify(tmp_path / "cut")) == 5
    with pytest.raises(RecipeError, match="with --seeds 2 --drop-top 1; this command has --seeds 1, and would replace it"):
        compare(recipe, tmp_path / "cut")
    contents = tmp_path / "cut" / "state" / "soups" / "contents.json"
    contents.write_text(contents.read_text().replace('"fit": "', '"fit": "0'))
    with pytest.raises(RecipeError, match=r"was begun before the examples of fit changed\. Choose a new folder"):
        compare(recipe, tmp_path / "cut", CompareOptions(seeds=3, drop_top=(1,)))
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["exit"] == 0


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_no_improvement_has_its_exit_code_if_an_improvement_is_required(zoo: Path, tmp_path: Path) -> None:
    """One good ingredient among untrained ones: no mean of them is any good, and a small step does not change that."""
    import torch
    from safetensors.torch import save_file

    from tests.tiny import Tiny

    (tmp_path / "zoo").mkdir()
    shutil.copy(zoo / "zoo" / "model_0.safetensors", tmp_path / "zoo")
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(Tiny().state_dict(), tmp_path / "zoo" / f"untrained_{seed}.safetensors")
    recipe = values(zoo, ingredients=str(tmp_path / "zoo" / "*.safetensors"), learn={"lr": 1e-6, "epochs": 1})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**recipe, "greedy": {"keep": ">"}}))
    done = CliRunner().invoke(main, ["compare", str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--require-improvement"])
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert done.exit_code == (0 if record["improvement"]["select_nll"] < 0 else 4), done.output
    assert record["chosen"] == "greedy"  # it keeps the good one alone: equal, so not better
    assert done.exit_code == 4
    assert "No soup beats the best single ingredient on select" in done.stderr
    assert "The ensemble of all ingredients does not beat the best single" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--drop-top", "7"], "--drop-top is 7; expected 0 to 6 with 8 ingredients"),
        (["--by-count", "1"], "--by-count is 1; expected 2 to 8"),
        (["--by-count", "a"], "found 'a'; expected integers"),
        (["--seeds", "0"], "--seeds is 0; expected 1 to 1000"),
    ],
)
def test_options_out_of_range_are_refused(zoo: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values(zoo)))
    done = CliRunner().invoke(main, ["compare", str(tmp_path / "r.yaml"), str(tmp_path / "out"), *options])
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()

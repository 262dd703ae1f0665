"""Reports of regression, labels and pixels, from real runs: every output shows the figures under their names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from click.testing import CliRunner

from ray_soup.cli import main
from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.report.markdown import comparison_markdown
from ray_soup.soups.run import run
from ray_soup.task.loading import load_model
from ray_soup.tune.search import search
from tests.ray.small_tasks import HERE, write_task
from tests.ray.test_run import scalars_in

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
NAMES = {
    "regression": ("MSE", "MSE", ""),
    "multi_label": ("NLL/label", "NLL per label", "label accuracy"),
    "segmentation": ("NLL/pixel", "NLL per pixel", "pixel accuracy"),
}
OPTIONS = CompareOptions(drop_top=(1,), by_count=(2, 4))


class Compared:
    """A comparison, the recipe in a file, and what the command prints about it."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        self.recipe = write_task(kind, folder)
        (folder / "r.yaml").write_text(yaml.safe_dump(self.recipe))
        self.soup = compare(make_recipe(self.recipe), folder / "out", OPTIONS)

    def command(self, *arguments: str) -> Any:
        return CliRunner().invoke(main, [*arguments])


@pytest.fixture(scope="module", params=sorted(NAMES))
def compared(request: Any, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[Compared]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])
        yield Compared(request.param, tmp_path_factory.mktemp("task") / request.param)


def figures_by_hand(compared: Compared, path: Path) -> dict[str, float]:
    """Compute loss and accuracy on test with torch alone."""
    arrays = np.load(compared.folder / "test.npz")
    model = load_model(compared.recipe["model"], str(path))
    with torch.no_grad():
        outputs, targets = model(torch.from_numpy(arrays["images"])), torch.from_numpy(arrays["targets"])
    if compared.kind == "regression":
        return {"nll": F.mse_loss(outputs, targets).item()}
    if compared.kind == "multi_label":
        right = ((outputs > 0) == (targets > 0)).double().mean().item()
        return {"nll": F.binary_cross_entropy_with_logits(outputs, targets.float()).item(), "accuracy": right}
    scored = targets != 255
    right = (outputs.argmax(1) == targets)[scored].double().mean().item()
    return {"nll": F.cross_entropy(outputs, targets, ignore_index=255).item(), "accuracy": right}


def test_run_json_and_the_table_have_the_figures_that_mean_something(compared: Compared) -> None:
    record: Any = compared.soup.record
    unit = {"regression": "number", "multi_label": "label", "segmentation": "pixel"}[compared.kind]
    assert (record["objective"], record["unit"], record["select_by"]) == (compared.kind, unit, "auto")
    for row in record["table"]:
        assert math.isfinite(row["test_nll"])
        has_accuracy = compared.kind == "multi_label" or (
            compared.kind == "segmentation" and row["model_name"] != "ensemble"
        )
        assert ("test_accuracy" in row) == has_accuracy
        assert not {"test_ece", "test_nll_scaled", "test_perplexity", "temperature"} & set(row)
    first = compared.soup.rows[0]
    expected = figures_by_hand(compared, compared.folder / "zoo" / f"{first['model_name']}.safetensors")
    for key, value in expected.items():
        assert first[f"test_{key}"] == pytest.approx(value, abs=1e-5)
    own = {row["model_name"]: row for row in record["table"]}
    soups = [name for name in own if name not in ("mean single", "best_single", "ensemble", "trained")]
    assert record["chosen"] == min(soups, key=lambda name: own[name]["select_nll"])
    print(compared.kind, {name: round(row["test_nll"], 4) for name, row in own.items()})


def test_the_terminal_shows_them_in_80_columns(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    heading, name, accuracy = NAMES[compared.kind]
    done = compared.command("compare", str(compared.folder / "r.yaml"), str(compared.folder / "out"), "--drop-top=1",
                            "--by-count=2,4")  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith(("Made ", "On ", "Wrote ", "It is ", "    ")))
    assert "…" not in done.stdout
    assert any(f"test {heading}" in line for line in lines)
    shown = accuracy.capitalize() + " on test in percent" if accuracy else f"{name} on test"
    assert f"{shown}, without the N best ingredients:" in lines
    assert f"{shown}, with N ingredients:" in lines
    assert any(f"{heading} (95 %)" in line for line in lines)
    assert ("points (95 %)" in done.stdout) == bool(accuracy)
    assert "NLL" not in done.output or compared.kind != "regression"
    assert "accuracy" not in done.output.lower() or accuracy


def test_the_page_the_card_and_the_markdown_show_them(compared: Compared) -> None:
    heading, name, accuracy = NAMES[compared.kind]
    html = (compared.soup.out / "report.html").read_text()
    titles = re.findall(r"<h3>(.*?)</h3>", html)
    leading = accuracy.capitalize() if accuracy else name
    assert titles[:3] == [f"{leading} by method", f"{leading} by number of ingredients", "Learning curves"]
    assert "Reliability" not in titles
    assert "bootstrap intervals of the paired difference from the best single ingredient" in html
    assert "Wilson" not in html
    assert f"{name} on fit (dashed) and select (solid)" in html
    for text in (html, (compared.soup.out / "README.md").read_text(), comparison_markdown(compared.soup.record)):
        assert f"test {heading}" in text
        assert f"{heading}: mean " in text
        assert "NLL scaled" not in text
        assert (f"test {accuracy.split()[0]} %" in text) if accuracy else ("test %" not in text)


def test_notes_speak_of_the_loss_of_the_objective(compared: Compared) -> None:
    _, name, accuracy = NAMES[compared.kind]
    first = compared.soup.notes[0]
    assert f"({name} " in first
    assert (f", {accuracy} " in first) == bool(accuracy)
    assert not any("logits" in note for note in compared.soup.notes) or compared.kind == "multi_label"


def test_evaluate_prints_the_figures_of_torch(compared: Compared) -> None:
    heading, *_ = NAMES[compared.kind]
    command = ("evaluate", str(compared.folder / "r.yaml"), str(compared.soup.out))
    row = json.loads(compared.command(*command, "--json").stdout)
    assert row["objective"] == compared.kind
    for key, value in figures_by_hand(compared, compared.soup.out / "model.safetensors").items():
        assert row[f"test_{key}"] == pytest.approx(value, abs=1e-5)
    assert f"test {heading}" in compared.command(*command).stdout  # beside a path of any length


def test_a_required_improvement_is_one_of_the_figure_that_decides(tmp_path: Path) -> None:
    """The metric stops the run, and decides."""
    recipe = write_task("regression", tmp_path)
    recipe |= {"metric": f"{HERE}:closeness", "select_by": "metric", "learn": {"batch_size": 150, "epochs": 2}}
    soup = run(make_recipe(recipe), tmp_path / "learn")
    record: Any = soup.record
    curve = [line["select_metric"] for line in record["curve"]]
    assert soup.rows[0]["select_metric"] == pytest.approx(max(curve), abs=1e-4)
    change = record["improvement"]
    assert change["select_metric"] == pytest.approx(soup.rows[0]["select_metric"] - soup.rows[1]["select_metric"])
    assert change["select_metric_low"] <= change["select_metric"] <= change["select_metric_high"]
    assert all(("metric" in note) for note in soup.notes if "best single" in note)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["learn", str(tmp_path / "r.yaml"), str(tmp_path / "learn"), "--require-improvement"])
    assert done.exit_code == (0 if change["select_metric"] > 0 else 4), done.output
    assert ("does not have a higher metric on select" in done.stderr) == (done.exit_code == 4)
    found = scalars_in(tmp_path / "learn" / "tensorboard" / "mehl+")
    assert {tag for tag, _, _ in found} == {"fit_nll", "select_nll", "select_metric", "lr"}


def test_a_search_goes_by_the_metric(tmp_path: Path) -> None:
    recipe = write_task("regression", tmp_path)
    recipe |= {"metric": f"{HERE}:closeness", "select_by": "metric"}
    recipe["search"] = {"learn.lr": {"grid": [1e-5, 0.03]}, "scheduler": "none"}
    soup = search(make_recipe(recipe), tmp_path / "out")
    record: Any = soup.record
    found = record["search"]
    assert found["metric"] == "select_metric"
    assert found["best"] == max(found["trials"], key=lambda t: t["select_metric"])["trial"]
    assert all("select_accuracy" not in trial for trial in found["trials"])
    html = (soup.out / "report.html").read_text()
    assert "Trials that no other trial beats in metric, memory and time at once." in html
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    shown = CliRunner().invoke(main, ["search", str(tmp_path / "r.yaml"), str(tmp_path / "out")]).stdout
    assert "Pareto front of metric, memory and time:" in shown
    assert "select MSE" in shown


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"select_by": "accuracy"}, "select_by: accuracy has no meaning for the objective regression"),
        ({"select_by": "metric"}, "select_by: metric needs a metric"),
    ],
)
def test_a_figure_that_does_not_exist_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**write_task("regression", tmp_path), **keys}))
    for command in ("learn", "compare", "search"):
        done = CliRunner().invoke(main, [command, str(tmp_path / "r.yaml"), str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        assert message in done.stderr
        assert not (tmp_path / "out").exists()

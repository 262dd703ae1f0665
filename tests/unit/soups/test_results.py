"""The kinds of rows in results.jsonl, and what is made of the rows: tables of pandas, CSV, LaTeX, HTML."""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt

from ray_soup.cli import main
from ray_soup.errors import RecipeError
from ray_soup.io.hashing import sha256_file
from ray_soup.soups.export import FORMS
from ray_soup.soups.output import Soup
from ray_soup.soups.records import write_results, write_run_record
from ray_soup.soups.report.markdown import comparison_markdown
from ray_soup.soups.report.notebook import as_html, as_text
from ray_soup.soups.results import KINDS, load_results, with_kinds

HOSTILE = "50 % & <b>_$x$#{a}~^\\n"
NAMES = ("model_0", HOSTILE, "mehl+-x")


def row(name: str, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"model_name": name, **more, "select_accuracy": 0.5, "test_accuracy": accuracy, "test_nll": 2 - accuracy}


def made(size: int = 3, seed: int = 1) -> dict[str, int]:
    return {"seed": seed, "model_batch": size}


ROWS = [
    *(row(name, 0.5 + k / 10) for k, name in enumerate(NAMES)), row("ensemble", 0.9), row("best_single", 0.7, **made()),
    row("uniform", 0.7, **made()), row("mehl+", 0.8, **made()), row("mehl+", 0.75, **made(2)),
    row("mehl+", 0.9, **made(3, 2)), row("mine:method", 0.6, **made()), row("mehl+ polished", 0.9, **made()),
    row("trained", 0.9, **made()), row("peft:ties", 0.3), row("merged", 0.2),
]  # fmt: skip
TABLE = [row("mean single", 0.6), row("mehl+", 0.85, test_accuracy_sd=0.05), row("mehl+-m2", 0.75)]
RECORD: dict[str, Any] = {
    "exit": 0, "method": "mehl+", "chosen": "mehl+", "seed": 1, "seeds": [1, 2], "files": {}, "notes": [],
    "ingredients": [{"name": name, "path": f"/{k}", "sha256": "0" * 64} for k, name in enumerate(NAMES)],
    "examples": {"fit": 9, "select": 3, "test": 10}, "table": TABLE, "tests": [],
    "eliminations": [row("greedy", 0.6, dropped=2)], "counts": [row("greedy", 0.6, count=2)],
}  # fmt: skip


def test_every_row_has_a_kind_and_the_name_of_the_table() -> None:
    found = with_kinds(ROWS, RECORD)
    assert [(one["kind"], one["name"]) for one in found] == [
        *(("ingredient", name) for name in NAMES), ("ensemble", "ensemble"), ("single", "best_single"), ("soup", "uniform"),
        ("soup", "mehl+"), ("soup", "mehl+-m2"), ("soup", "mehl+"), ("soup", "mine:method"), ("soup", "mehl+ polished"),
        ("reference", "trained"), ("reference", "peft:ties"), ("reference", "merged"), ("mean", "mean single"),
        ("mean", "mehl+"), ("mean", "mehl+-m2"), ("dropped", "greedy"), ("counted", "greedy"),
    ]  # fmt: skip
    assert {one["kind"] for one in found} == {*KINDS}
    for one, before in zip(found, [*ROWS, *TABLE, *RECORD["eliminations"], *RECORD["counts"]], strict=True):
        assert one.items() >= before.items()
    assert with_kinds(found, RECORD) == found
    alone = with_kinds([row("mine:method", 0.5), row("best_single", 0.5)], {**RECORD, "method": "mine:method", "table": []})
    assert [one["kind"] for one in alone[:2]] == ["soup", "single"]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished comparison of an earlier version, whose rows have no kinds."""
    write_results(ROWS, tmp_path / "results.jsonl")
    digest = sha256_file(str(tmp_path / "results.jsonl"))
    write_run_record({**RECORD, "files": {"results.jsonl": digest}}, tmp_path / "run.json")  # type: ignore[typeddict-item]
    return tmp_path


def test_results_become_a_table_of_pandas(out: Path) -> None:
    frame = load_results(out)
    assert frame.columns[:2].tolist() == ["kind", "name"]
    soups = frame[frame.kind == "soup"].groupby("name").test_accuracy.mean()
    assert soups["mehl+"] == pytest.approx(0.85)
    assert frame.loc[frame.kind == "mean", "test_accuracy_sd"].tolist()[1] == 0.05
    assert math.isnan(frame.loc[0, "seed"])
    with pytest.raises(RecipeError, match=r"is not a finished soup: no run\.json found"):
        load_results(out / "other")
    (out / "results.jsonl").write_bytes(b"{}")
    with pytest.raises(RecipeError, match=r"results\.jsonl was changed"):
        load_results(out)


def test_csv_has_every_figure_in_full(out: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(out), "--csv"])
    assert done.exit_code == 0, done.stderr
    read, expected = [*csv.DictReader(io.StringIO(done.stdout))], with_kinds(ROWS, RECORD)
    assert len(read) == len(expected)
    for one, other in zip(read, expected, strict=True):
        assert {key: value for key, value in one.items() if value} == {key: str(value) for key, value in other.items()}


def test_markdown_and_latex_show_the_same_cells() -> None:
    rows = with_kinds(ROWS, RECORD)
    text = FORMS["markdown"](RECORD, rows)
    assert text.strip() == comparison_markdown(RECORD)
    shown = [t.content for t in MarkdownIt("gfm-like", {"linkify": False}).parse(text) if t.type == "inline"]
    tex = FORMS["latex"](RECORD, rows)
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == 3
    lines = re.findall(r"^(.*) \\\\$", tex, re.MULTILINE)
    cells = [cell.replace("\\%", "%") for line in lines for cell in line.split(" & ")]
    cells = [cell.replace("$^\\dagger$", "†").replace("$\\pm$ ", "±").replace("$-$", "-") for cell in cells]
    assert cells == [cell for cell in shown if not cell.startswith(("Examples", "Accuracy"))]


def test_latex_and_html_show_any_name_and_nothing_else() -> None:
    rows = [row(HOSTILE, 0.5)]
    tex = FORMS["latex"]({k: v for k, v in RECORD.items() if k != "table"}, with_kinds(rows, RECORD))
    shown = r"50 \% \& \textless{}b\textgreater{}\_\$x\$\#\{a\}\textasciitilde{}\textasciicircum{}\textbackslash{}n & 50.00"
    assert shown in tex
    page = as_html(HOSTILE, rows)
    assert page.count("<b>") == 0
    assert page.count("50 % &amp; &lt;b&gt;_$x$#{a}~^\\n") == 2
    assert re.findall(r"<(\w+)", page) == ["table", "caption", "thead", "tr", "th", "th", "th", "th", "tbody", "tr", "th",
                                           "td", "td", "td"]  # fmt: skip


def test_a_soup_is_shown_as_a_table() -> None:
    soup = Soup("out", ROWS[4:6], {"method": "uniform", "ingredients": RECORD["ingredients"]})  # type: ignore[typeddict-item]
    title, head, *lines = repr(soup).splitlines()
    assert title == "Soup in out: uniform, made from 3 ingredients"
    assert re.split("  +", head) == ["model", "select %", "test %", "test NLL"]
    assert [re.split("  +", line) for line in lines] == [["best_single", "50.00†", "70.00", "1.3000"],
                                                         ["uniform", "50.00", "70.00", "1.3000"]]  # fmt: skip
    assert soup._repr_html_() == as_html(title, ROWS[4:6])
    assert as_text("a", [row("x\ny", 0.5)]).splitlines()[2].startswith("x\\ny")
    assert np.ptp([len(line) for line in repr(soup).splitlines()[1:]]) == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "Nothing to export. Add --csv, --latex, --markdown, --wandb, --mlflow or --push ORG/NAME."),
        (["--csv", "--latex"], "Found --csv and --latex; expected one of them. Choose one."),
        (["--mlflow", "--to", "x"], "--to FILE needs --csv, --latex or --markdown."),
        (["--csv", "--private"], "--private needs --push ORG/NAME."),
        (["--push", "soup"], "--push: found 'soup'; expected the name of a repository on the Hub, ORG/NAME."),
    ],
)
def test_what_export_refuses(options: list[str], text: str, out: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(out), *options])
    assert done.exit_code == 2
    assert text in done.stderr


def test_export_writes_a_file(out: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(out), "--markdown", "--to", str(tmp_path / "x.md")])
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == f"Exported to {tmp_path / 'x.md'}."
    assert (tmp_path / "x.md").read_text() == FORMS["markdown"](RECORD, with_kinds(ROWS, RECORD))

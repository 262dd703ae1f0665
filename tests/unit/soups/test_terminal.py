"""What the command prints: progress, and the tables of a comparison."""

from __future__ import annotations

import json
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ray_soup.errors import RecipeError
from ray_soup.io.progress import WHOLE_RUN
from ray_soup.soups.output import Soup
from ray_soup.soups.report import console, progress_bar, terminal
from ray_soup.soups.report.marks import MARK
from ray_soup.soups.report.terminal import ProgressBar, print_comparison, print_evaluation, print_row, print_soup
from ray_soup.soups.report.terminal_tables import comparison_text, table_text
from ray_soup.soups.report.zoo import print_zoo

SENTENCES = ("Made", "On ", "Wrote")
"""How lines begin that are no tables."""


def row(name: str, **figures: Any) -> dict[str, Any]:
    return {"model_name": name, "select_accuracy": 0.5, "select_nll": 1.25, **figures}


def comparison(*tests: str) -> Soup:
    """Make up the record of a comparison with these test sets."""
    figures = {f"{split}_{figure}": 0.75 for split in tests for figure in ("accuracy", "nll")}
    rows = [row("best_single", **figures), row("mehl+", **figures, steps=12)]
    paired = {"accuracy": 0.01, "accuracy_low": 0.0, "accuracy_high": 0.02, "mcnemar_p": 0.5}
    paired |= {"nll": -0.1, "nll_low": -0.2, "nll_high": -0.05}
    record: dict[str, Any] = {
        "examples": dict.fromkeys(("fit", "select", *tests), 100),
        "table": rows,
        "tests": [
            {"model_name": "mehl+", "against": against, "split": split, **paired}
            for split in tests
            for against in ("best_single", "greedy")
        ],
        "eliminations": [{"dropped": n, **r} for n in (0, 2) for r in rows],
        "counts": [{"count": n, **r} for n in (4, 8) for r in rows],
        "chosen": "mehl+",
        "files": {"model.safetensors": "00"},
    }
    return Soup("out", rows, record, ["A note."])  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", [60, 80, 132, None])
def test_tables_fit_into_any_terminal_with_every_value_uncut(columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit side by side continues below; in a pipe, every line is as long as it needs to be."""
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    else:
        monkeypatch.delenv("COLUMNS", raising=False)
    soup = comparison("test_v2", "test_sketch")
    soup.record["table"][1] |= {f"evaluate_benchmark number {n}": n + 0.125 for n in range(12)}
    soup.record["evaluate"] = {"function": "a:b"}
    shown = comparison_text(soup.record)
    for n in range(12):
        assert shown.count(f"benchmark number {n} ") + shown.count(f"benchmark number {n}\n") == 1
        assert f" {n + 0.125:.4g}" in shown
    assert "…" not in shown
    longest = max(len(line) for line in shown.splitlines() if line[:1] != "†" and line[-1:] != ":")  # no sentences
    assert longest <= columns if columns else longest > 132


def test_numbers_are_not_cut_even_where_names_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    long, number = "a" * 30 + "b" * 30, "-123,456.7890 (-123,456.7890, +1.0)"
    first, _, row, *rest = table_text(["model", "points", "p", "seconds"], [[long, number, "0.05", "1"]]).splitlines()
    assert first.split() == ["model", "points", "p"]  # a p-value stays beside its difference
    assert row.split(maxsplit=1) == [f"{'a' * 9}…{'b' * 10}", f"{number}  0.05"]
    assert [line.split() for line in rest if "s" in line] == [["model", "seconds"]]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock of the progress bar by the last element of a list."""
    seconds = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: seconds[-1])
    return seconds


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = ProgressBar()
    for second in range(26):
        clock.append(second)
        progress("3/7 learning", second, 40)
    clock.append(30)
    progress("mixing", 10**9, 4 * 10**9)
    clock.append(42)
    progress(WHOLE_RUN, 42, 102)
    progress("mixing", 2 * 10**9, 4 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "3/7 learning: 10 of 40 steps, 1.0/s, 10 s so far, 30 s left",
        "3/7 learning: 20 of 40 steps, 1.0/s, 20 s so far, 20 s left",
        "mixing: 1.0 GB of 4.0 GB, 0 s so far",
        "mixing: 2.0 GB of 4.0 GB, 83.3 MB/s, 12 s so far, 24 s left, about 1 min 0 s left in all",
    ]


def test_without_a_terminal_a_line_comes_also_while_nothing_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress_bar, "LOG_INTERVAL_S", 0.1)
    monkeypatch.setattr(ProgressBar, "tick_s", 0.02)
    begun = time.monotonic()
    with ProgressBar() as progress:
        progress("starting", 0, 1)
        shown = ""
        while shown.count("\n") < 3 and time.monotonic() < begun + 60:
            time.sleep(0.05)
            shown += capsys.readouterr().err
    lines = (shown + capsys.readouterr().err).splitlines()
    assert 3 <= len(lines) <= (time.monotonic() - begun) / 0.1 + 2
    assert all(re.fullmatch(r"starting: \d+ s so far", line) for line in lines)


def test_the_log_in_json_has_objects_at_both_ends_of_a_phase_and_for_messages(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_log_format", "json")
    progress = ProgressBar()
    progress("hashing", 0, 400)
    for second in range(5):
        clock.append(second)
        progress("hashing", 100 * second, 400)
    clock.append(6.0)
    progress("writing", 0, 1)
    terminal.say("A note\nof two lines.")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert all(datetime.fromisoformat(line.pop("time")).tzinfo is not None for line in lines)
    assert lines == [
        {"phase": "hashing", "done": 0, "total": 400, "unit": "bytes", "seconds": 0.0, "left": None},
        {"phase": "hashing", "done": 400, "total": 400, "unit": "bytes", "seconds": 6.0, "left": 0.0},
        {"phase": "writing", "done": 0, "total": 1, "unit": "", "seconds": 0.0, "left": None},
        {"message": "A note\nof two lines."},
    ]


def test_on_a_terminal_progress_is_a_bar_for_each_kind_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with ProgressBar() as progress:
        progress("learning", 1, 2)
        progress("learning", 2, 2)
        progress("mixing", 1, 4)
    shown = capsys.readouterr().err
    for part in ("learning", "100 %", "mixing", "25 %"):
        assert part in shown


def test_a_row_has_a_figure_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_row(row("mehl+", test_accuracy=0.9, steps=12))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["select", "%", "50.00†"] in lines
    assert ["test", "%", "90.00"] in lines
    assert ["steps", "12"] in lines


@pytest.mark.parametrize("columns", ["40", "80", "100"])
def test_a_long_path_cuts_no_figure(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_row(row(f"/{'folder/' * 30}out", test_accuracy=0.9, steps=12))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["test", "%", "90.00"] in lines
    assert ["steps", "12"] in lines


def test_a_finished_soup_is_not_said_to_have_run(capsys: pytest.CaptureFixture[str]) -> None:
    soup = comparison("test")
    soup.was_complete = True
    print_soup(soup, as_json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"out": "out", "results": soup.rows, "run": soup.record}
    assert shown.err == "out is complete; nothing was run. To check it: ray-soup verify out\nA note.\n"
    for show in (print_soup, print_comparison):
        show(soup, as_json=False)
        shown = capsys.readouterr()
        assert shown.err.count("out is complete; nothing was run.") == 1
        assert "Wrote" not in shown.out


@pytest.mark.parametrize("tests", [("test",), ("test_v1", "test_v2"), ()])
def test_a_comparison_has_all_tables_in_80_columns(
    tests: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    soup = comparison(*tests)
    soup.record["seeds"] = [3, 4, 5]
    print_comparison(soup, as_json=False)
    shown = capsys.readouterr()
    names = [split.removeprefix("test_") for split in tests] or ["select"]
    for name in names:
        assert f"Accuracy on {name} in percent, without the N best ingredients (seed 3 only):" in shown.out
        assert f"Accuracy on {name} in percent, with N ingredients (seed 3 only):" in shown.out
        if tests:
            for baseline in ("best_single", "greedy"):
                assert f"Paired tests against {baseline} on {name}:" in shown.out
    assert shown.out.endswith("Wrote out/report.html with tables and figures, and model.safetensors with the soup mehl+.\n")
    assert all(len(line) <= 80 for line in shown.out.splitlines() if not line.startswith(SENTENCES))
    assert "A note." in shown.err


def test_markdown_goes_to_the_terminal_and_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"before\n{MARK}\nold\n{MARK}\nafter\n")
    print_comparison(comparison("test"), as_json=False, markdown=True, into=str(file))
    shown = capsys.readouterr().out
    assert shown.startswith("| model |")
    assert shown.strip() in file.read_text()
    file.write_text("no marks")
    with pytest.raises(RecipeError, match=r"README\.md has 0 lines"):
        print_comparison(comparison("test"), as_json=False, into=str(file))


def test_failed_trainings_are_counted_with_the_first_error(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"file": "model_00.safetensors", "lr": 1e-4, "epochs": 3, "accuracy": 0.987}]
    print_zoo(entries, [{"error": "NaN loss"}], "zoo")
    assert capsys.readouterr().out.splitlines() == [
        "model_00.safetensors  lr 1.0e-04  epochs 3  held-out accuracy 98.70%",
        "1 more failed (zoo/state/failures.json). The first error: NaN loss",
        "Wrote 1 checkpoints and manifest.json to zoo.",
    ]
    print_zoo(entries, [], "zoo", was_complete=True)
    assert "Wrote" not in capsys.readouterr().out


def test_the_best_single_stands_beside_a_soup_and_beside_a_copy_of_a_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    soup = Soup("out", [row("uniform"), row("best_single", select_accuracy=0.25)], {"files": {}, "method": "uniform"}, [])  # type: ignore[arg-type]
    print_soup(soup, as_json=False)
    shown = capsys.readouterr().out
    assert ["model", "uniform", "best_single"] in [line.split() for line in shown.splitlines()]
    assert ["select", "%", "50.00", "25.00†"] in [line.split() for line in shown.splitlines()]
    assert "† optimistic:" in shown
    copy = comparison("test")
    copy.rows = [row("the first ingredient"), *copy.rows]
    print_soup(copy, as_json=False)
    assert ["model", "mehl+", "best_single"] in [line.split() for line in capsys.readouterr().out.splitlines()]


HOSTILE = "a\x1b[2J\r\x07\u202e\udc80\nb[red]漢" + "x" * 5000


INSPECTED = {
    "ingredients": [{"name": HOSTILE, "path": HOSTILE, "bytes": 8}], "tensors": {HOSTILE: ["float32", [2]]}, "numbers": 2,
    "bytes": 8, "notes": [HOSTILE],
}  # fmt: skip


def hostile_soup() -> Soup:
    soup = comparison("test_" + HOSTILE)
    soup.record["chosen"] = soup.rows[0]["model_name"]
    soup.notes = [HOSTILE]
    return soup


def show_a_bar() -> None:
    with ProgressBar() as bar:  # otherwise its thread continues to draw
        bar(HOSTILE, 1, 2)


@pytest.mark.parametrize("force_color", ["", "1"])
@pytest.mark.parametrize(
    "show",
    [
        lambda: terminal.print_ingredients(INSPECTED, False),
        lambda: terminal.print_ingredients(INSPECTED, True),
        lambda: print_zoo([{"file": HOSTILE, "lr": 1e-4, "epochs": 3}], [{"error": HOSTILE}], HOSTILE),
        lambda: print_row(row(HOSTILE)),
        lambda: terminal.print_table([HOSTILE, "b"], [[HOSTILE, HOSTILE]]),
        lambda: print_comparison(hostile_soup(), as_json=False),
        lambda: print_comparison(hostile_soup(), as_json=True),
        lambda: terminal.print_json({HOSTILE: [HOSTILE, float("nan")]}),
        lambda: terminal.say(HOSTILE),
        show_a_bar,
    ],
)
def test_names_do_not_reach_the_terminal_raw(
    show: Any, force_color: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", force_color)
    show()
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert "\x1b[2J" not in text
        assert not set("\r\x07\u202e\udc80") & set(re.sub("\r(\x1b\\[1A)?\x1b\\[2K", "", text))


def test_long_and_wide_names_are_cut_and_padded_by_terminal_columns() -> None:
    assert console.name_of("漢字", 6) == "漢字  "
    cut = console.name_of("漢" * 500)
    assert cut.endswith("…")
    assert len(cut) <= console.LONGEST_NAME / 2 + 1
    assert console.name_of("a\nb\tc") == "a\\nb\\tc"


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(console, "_redirect", lambda stream: None)
    monkeypatch.setattr(console.click, "echo", gone)
    terminal.say("x")
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress = ProgressBar()
    write = "_write_buffer" if hasattr(progress._console, "_write_buffer") else "_check_buffer"  # of older versions
    monkeypatch.setattr(progress._console, write, gone)
    progress("learning", 1, 2)
    progress.stop()


def test_the_last_lines_say_what_was_made_how_good_it_is_and_how_to_load_it(capsys: pytest.CaptureFixture[str]) -> None:
    soup = comparison("test")
    soup.record |= {"ingredients": [{}] * 8, "load": "ray_soup.load_model('a:b', '.')"}  # type: ignore[typeddict-item]
    soup.rows[1]["ingredients_used"] = 5
    print_soup(soup, as_json=False)
    expected = [
        "Made by mehl+ from 5 of 8 ingredients.",
        "On test, it is better than the best single ingredient: NLL 0.7500 against 0.7500 (difference -0.1000, 95 % "
        "interval -0.2000 to -0.0500), accuracy 75.00% against 75.00%.",
        "Wrote out/model.safetensors, its coefficients, and README.md (the model card).",
        "To load it from its folder:",
        "    ray_soup.load_model('a:b', '.')",
    ]
    assert capsys.readouterr().out.splitlines()[-5:] == expected
    soup.was_complete = True
    soup.record["tests"] = []
    soup.record["improvement"] = {"select_nll": 0.1, "select_nll_low": -0.1, "select_nll_high": 0.3}
    print_soup(soup, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].startswith(
        "On select, it is not significantly different from the best single ingredient: NLL 1.2500 against 1.2500 "
    )
    assert lines[-4].endswith("accuracy 50.00% against 50.00%. Figures on select are optimistic: choices were made on it.")
    assert lines[-3].startswith("It is in out/model.safetensors")


def test_an_evaluation_says_if_the_weights_were_not_float32(capsys: pytest.CaptureFixture[str]) -> None:
    print_evaluation(row("out"), as_json=False)
    plain = capsys.readouterr().out
    print_evaluation(row("out", dtype="bfloat16"), as_json=False)
    assert capsys.readouterr().out == f"{plain}Computed with weights in bfloat16.\n"

"""The benchmark of zoos: its tables on results made by hand, what it keeps, and one tiny zoo from end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests import tiny
from tests.benchmarks import zoos, zoos_images
from tests.benchmarks.zoos_tables import ACCURACY, NLL, PLAIN, SCALED, differences_table, main_table, worse_than_plain
from tests.conftest import values

FOUND: dict[str, dict[int, dict[str, dict[str, float]]]] = {
    "images": {
        1: {
            "greedy": {"nll": 0.5, "scaled": 0.45, "accuracy": 0.8},
            PLAIN: {"nll": 0.4, "scaled": 0.41, "accuracy": 0.82, "steps": 10, "images": 1000},
            "mehl+ refit": {"nll": 0.38, "scaled": 0.40, "accuracy": 0.83, "steps": 20, "images": 3000},
        },
        2: {
            "greedy": {"nll": 0.6, "scaled": 0.5, "accuracy": 0.78},
            PLAIN: {"nll": 0.5, "scaled": 0.47, "accuracy": 0.8, "steps": 20, "images": 3000},
            "mehl+ refit": {"nll": 0.5, "scaled": 0.46, "accuracy": 0.8, "steps": 40, "images": 5000},
        },
    },
    "language": {
        1: {"greedy": {"nll": 2.0}, PLAIN: {"nll": 1.9}, "mehl+ refit": {"nll": 1.95}},
        2: {"greedy": {"nll": 2.1}, PLAIN: {"nll": 1.9}},
    },
    "adapters": {1: {"greedy": {"nll": 3.0}, PLAIN: {"nll": 2.0}}},
}

VARIED: dict[str, dict[str, Any]] = {
    "plain": {}, "newer": {"learn.magic": True}, "wrong": {"blocks": -1}, "odd": {"learn.smoothness": 0.1},
}  # fmt: skip


def cells(table: str) -> dict[str, dict[str, str]]:
    """The cells of a Markdown table by row and heading."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def test_figures_are_means_over_zoos_of_means_over_seeds() -> None:
    found = cells(main_table(FOUND))
    assert found[PLAIN]["zoos"] == "3"
    assert found["mehl+ refit"]["zoos"] == "2"
    assert found[PLAIN]["NLL"] == f"{np.mean([0.45, 1.9, 2.0]):.4f}"
    assert found["mehl+ refit"]["NLL"] == f"{np.mean([0.44, 1.95]):.4f}"
    assert found[PLAIN]["accuracy %"] == "81.00 (of 1)"  # the only zoo where it has a meaning
    assert found[PLAIN]["steps"] == "15"
    assert found[PLAIN]["images"] == "2,000"
    assert found["greedy"]["steps"] == ""


def test_differences_are_paired_and_have_the_error_of_the_mean_over_zoos() -> None:
    found = cells(main_table(FOUND))
    by_zoo = np.array([np.mean([-0.02, 0.0]), 0.05])  # seed 2 of the language has no refit, and the adapters have none
    assert found["mehl+ refit"][f"NLL minus {PLAIN}"] == f"{by_zoo.mean():+.4f} ({by_zoo.std(ddof=1) / math.sqrt(2):.4f})"
    assert found["mehl+ refit"]["better/worse"] == "1/1"
    assert found[PLAIN][f"NLL minus {PLAIN}"] == ""
    assert "NLL minus trained" not in found[PLAIN]  # no zoo has this row
    scaled = cells(differences_table(FOUND, SCALED))
    assert scaled["mehl+ refit"][f"minus {PLAIN}"] == "-0.0100"  # one zoo: no error
    points = cells(differences_table(FOUND, ACCURACY))
    assert points["mehl+ refit"]["minus greedy"] == "+2.50"


def test_a_table_of_one_zoo_has_errors_over_its_seeds() -> None:
    found = cells(main_table({"images": FOUND["images"]}))
    assert found["mehl+ refit"][f"NLL minus {PLAIN}"] == "-0.0100 (0.0100)"
    assert "zoos" not in found[PLAIN]
    language = cells(main_table({"language": FOUND["language"]}))
    assert list(language[PLAIN]) == ["model", NLL.heading, f"NLL minus {PLAIN}", "NLL minus greedy"]
    assert differences_table({"language": FOUND["language"]}, ACCURACY) == ""


def test_a_row_is_worse_where_it_loses_more_than_the_error_over_seeds() -> None:
    same = {**FOUND, "equal": {1: {PLAIN: {"nll": 0.5}, "mehl+ refit": {"nll": 0.50004}}}}
    assert cells(main_table(same))["mehl+ refit"]["better/worse"] == "1/1"
    assert worse_than_plain(same) == {
        "greedy": ["images", "language", "adapters"], "mehl+ refit": ["language"],
    }  # fmt: skip


def test_passes_are_counted_up_to_the_best_nll_of_plain_on_select() -> None:
    def row(*curve: float) -> dict[str, float]:
        return {"nll": 1.0, **{f"curve_{n}": value for n, value in enumerate(curve)}}

    plain, rest = {PLAIN: row(0.9, 0.7, 0.6, 0.65)}, {"mehl+ a": row(0.9, 0.6, 0.5), "mehl+ b": row(0.9, 0.8, 0.61)}
    at_start = {PLAIN: row(0.5, 0.6), "mehl+ a": row(0.5, 0.4)}
    results = zoos.gathered([("y", 1, plain), ("y", 1, {**rest, "greedy": {"nll": 1.0}}), ("z", 1, at_start)])
    found = {name: figures.get("passes") for name, figures in results["y"][1].items()}
    assert found == {PLAIN: 1.0, "mehl+ a": 0.5, "mehl+ b": math.inf, "greedy": None}
    assert all("passes" not in figures for figures in results["z"][1].values())  # nothing to save
    shown = cells(main_table(results))
    assert [shown[name]["passes to plain"] for name in found] == ["1.00", "0.50", "never", ""]


def test_results_are_kept_for_the_same_code_and_survive_a_torn_line(tmp_path: Path) -> None:
    file, key, other = tmp_path / "results.jsonl", ("z", 1, "refit", "d"), ("z", 2, "refit", "d")
    kept = zoos.Kept(file)
    kept.add(key, {"mehl+ refit": {"nll": 0.25}}, 3.0)
    file.write_text(file.read_text() + '{"zoo": "z", "se')
    again = zoos.Kept(file)
    assert again.found == {key: {"mehl+ refit": {"nll": 0.25}}}
    again.add(other, {"mehl+ refit": {"nll": 0.5}}, 1.0)  # on a line of its own
    assert set(zoos.Kept(file).found) == {key, other}
    file.write_text(file.read_text().replace(kept.code, "0" * 16, 1))
    assert set(zoos.Kept(file).found) == {other}
    assert set(zoos.Kept(file, any_version=True).found) == {key, other}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_result_of_this_version_goes_before_those_of_others(tmp_path: Path, reverse: bool) -> None:
    file = tmp_path / "results.jsonl"
    kept = zoos.Kept(file)
    kept.add(("z", 1, "refit", "d"), {"mehl+ refit": {"nll": 0.25}}, 3.0)
    old = file.read_text().replace(kept.code, "0" * 16).replace("0.25", "0.75")
    file.write_text("".join([file.read_text(), old] if reverse else [old, file.read_text()]))
    assert list(zoos.Kept(file, any_version=True).found.values()) == [{"mehl+ refit": {"nll": 0.25}}]


def test_options_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = zoos.options_in(
        ["--only", "shift-12, digits-6", "--seeds", "2", "--variants", "refit", "--out", str(tmp_path)]
    )
    assert (options.zoos, options.seeds, options.variants) == (("digits-6", "shift-12"), (1, 2), ("plain", "refit"))
    for wrong in (["--only", "digits"], ["--seeds", "0"], ["--variants", "nothing"]):
        with pytest.raises(SystemExit):
            zoos.options_in(wrong)
        assert wrong[1] in capsys.readouterr().err


def test_a_seed_draws_its_own_splits_and_the_same_ones_again(tmp_path: Path) -> None:
    def split(seed: int) -> dict[str, set[bytes]]:
        found = zoos_images.cut(tmp_path, zoos_images.small_digits(), {"train": 200, "heldout": 100, "test": 300}, seed)
        return {name: {image.numpy().tobytes() for image in images} for name, (images, _) in found.items()}

    one, again, other = split(1), split(1), split(2)
    assert one == again != other
    assert sorted(map(len, one.values())) == [100, 200, 300]
    assert len(set.union(*one.values())) == 600  # no example in two splits
    with np.load(tmp_path / "test.npz") as arrays:
        assert {image.tobytes() for image in arrays["inputs"]} == other["test"]


def uniform_nll(folder: Path) -> float:
    """The NLL on test of the mean of the first four ingredients, by plain torch."""
    states = [load_file(file) for file in sorted((folder / "zoo").glob("model_[0-3].safetensors"))]
    model = tiny.build().eval()
    model.load_state_dict({
        name: sum(state[name].double() for state in states).div(len(states)).to(tensor.dtype)
        for name, tensor in states[0].items()
    })  # fmt: skip
    with np.load(folder / "test.npz") as arrays, torch.inference_mode():
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
        return F.cross_entropy(model(images), labels).item()


@pytest.mark.slow
def test_a_tiny_zoo_from_end_to_end(
    zoo: Path, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def make(folder: Path, seed: int) -> dict[str, Any]:
        """Four models of digits."""
        calls.append(seed)
        return values(zoo, ingredients=str(zoo / "zoo" / "model_[0-3].safetensors"))

    monkeypatch.setattr(zoos, "ZOOS", {"tiny-4": make})
    monkeypatch.setattr(zoos, "DOCS", tmp_path / "zoos.md")
    monkeypatch.setattr(zoos, "VARIANTS", VARIED)
    monkeypatch.setattr(sys, "argv", ["zoos", "--out", str(tmp_path / "out"), "--write"])
    found = zoos.main()
    said = capsys.readouterr().out
    assert "mehl+ newer: skipped, this version of ray_soup has no key learn.magic" in said
    assert "mehl+ wrong: skipped, this version of ray_soup refuses it. " in said
    assert "tiny-4, seed 1, mehl+ odd: refused. " in said
    assert found["uniform, mean test NLL"] == pytest.approx(uniform_nll(zoo), rel=1e-5)
    assert found[f"{PLAIN}, mean test NLL"] == found["mehl+, mean test NLL"]  # the same soup, made twice
    rows = cells(main_table(zoos.gathered(zoos.run_all(zoos.options_in(["--out", str(tmp_path / "out")])))))
    assert {"best_single", "greedy", "uniform", "ensemble", "mehl+", "mehl+, in quarters", PLAIN} <= set(rows)
    assert rows[PLAIN]["steps"] == rows["mehl+"]["steps"] != ""
    assert "- `tiny-4`: Four models of digits." in (tmp_path / "zoos.md").read_text()

    kept = tmp_path / "out" / "results.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    assert [json.loads(line)["name"] for line in lines] == ["compare", "plain"]
    kept.write_text(lines[0] + lines[1][:50])  # interrupted: the variant is made again, compare is not
    assert zoos.main() == found
    assert "compare in" not in (again := capsys.readouterr().out)
    assert "mehl+ plain 0." in again
    assert calls == [1]
    assert not list((tmp_path / "out" / "runs").iterdir())

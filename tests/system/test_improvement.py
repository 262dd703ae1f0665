"""`--require-improvement`: exit code 4 if the soup is not better than the best single ingredient on select."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_soup.soups.records import read_run_record, write_run_record
from tests.conftest import values
from tests.system.command import call, write_recipe
from tests.tiny import Tiny

COMMANDS = [pytest.param(name, marks=pytest.mark.slow) for name in ("uniform", "greedy", "learn", "search")]
SENTENCE = "ray-soup: the soup does not have a lower NLL on select than the best single ingredient. Use that one.\n"


def mirrored(zoo: Path, folder: Path) -> None:
    """Write two ingredients on opposite sides of a trained one, which is their mean and much better than either."""
    state = load_file(zoo / "zoo" / "model_0.safetensors")
    torch.manual_seed(0)
    noise = {name: 0.1 * torch.randn(t.shape) for name, t in state.items() if name.endswith(("weight", "bias"))}
    for side in (-1, 1):
        save_file({n: t + side * noise.get(n, 0) for n, t in state.items()}, folder / f"side_{side + 1}.safetensors")


def untrained(zoo: Path, folder: Path) -> None:
    """Write one trained ingredient and two untrained ones, which no soup should contain."""
    shutil.copy(zoo / "zoo" / "model_0.safetensors", folder)
    for seed in range(2):
        torch.manual_seed(seed)
        save_file(Tiny().state_dict(), folder / f"untrained_{seed}.safetensors")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("write", "code"), [(mirrored, 0), (untrained, 4)])
def test_the_exit_code_says_whether_the_soup_is_better(
    zoo: Path, tmp_path: Path, cluster: None, command: str, write: Callable[[Path, Path], None], code: int
) -> None:
    (tmp_path / "zoo").mkdir()
    write(zoo, tmp_path / "zoo")
    recipe = write_recipe(
        tmp_path,
        values(
            zoo,
            ingredients=str(tmp_path / "zoo"),
            learn={"lr": 1e-6, "epochs": 1},  # as good as the uniform soup
            greedy={"keep": ">"},
            search={"learn.wd": {"uniform": [0, 1]}, "trials": 1, "scheduler": "none"},
        ),
    )
    done = call(command, recipe, tmp_path / "out", "--require-improvement", "--json")
    assert done.exit_code == code, done.output
    record = json.loads(done.stdout.splitlines()[-1])["run"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    (single,) = (row["select_nll"] for row in rows if row["model_name"] == "best_single")
    assert (rows[0]["select_nll"] < single) == (code == 0)
    assert record["improvement"]["select_nll"] == rows[0]["select_nll"] - single
    assert (SENTENCE in done.stderr) == (code == 4)
    assert record["exit"] == 0  # the run itself has succeeded
    again = call(command, recipe, tmp_path / "out", "--require-improvement")
    assert again.exit_code == code
    assert "complete; nothing was run" in again.stderr
    assert call(command, recipe, tmp_path / "out").exit_code == 0


@pytest.mark.slow
def test_a_soup_of_an_older_version_without_a_comparison_is_refused(zoo: Path, tmp_path: Path, cluster: None) -> None:
    recipe, out = write_recipe(tmp_path, values(zoo)), tmp_path / "out"
    assert call("uniform", recipe, out).exit_code == 0
    record = read_run_record(out)
    assert record is not None
    del record["improvement"]
    write_run_record(record, out / "run.json")
    done = call("uniform", recipe, out, "--require-improvement")
    assert done.exit_code == 2
    assert "run.json does not compare the soup with the best ingredient: an older ray_soup wrote it" in done.stderr


@pytest.mark.parametrize("command", ["uniform", "greedy", "learn", "search", "compare"])
@pytest.mark.parametrize(
    ("changes", "lacks"),
    [({"data": {"test": "test.npz"}}, "no data.fit, held-out data to compare on"), ({"baseline": "none"}, "baseline: none")],
)
def test_a_recipe_with_nothing_to_compare_with_is_refused(
    zoo: Path, tmp_path: Path, command: str, changes: dict[str, Any], lacks: str
) -> None:
    recipe = write_recipe(tmp_path, values(zoo, **changes))
    done = call(command, recipe, tmp_path / "out", "--require-improvement")
    assert done.exit_code == 2
    assert f"on select, but the recipe has {lacks}. Change the recipe, or omit the option." in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["best-single", "evaluate"])
def test_a_command_that_makes_no_soup_does_not_have_the_option(tmp_path: Path, command: str) -> None:
    done = call(command, tmp_path / "r.yaml", tmp_path / "out", "--require-improvement")
    assert done.exit_code == 2
    assert "No such option" in done.stderr

"""The command: exit codes, messages, resuming, and what a failed run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.mixing.bake import bake
from ray_soup.soups.output import open_output
from tests.conftest import ROOT, ray_soup, values
from tests.system.command import call, change_ingredient, write_recipe


@pytest.fixture
def own(zoo: Path, tmp_path: Path) -> Path:
    """Copy the data and the zoo, so that a test can break them."""
    shutil.copytree(zoo / "zoo", tmp_path / "zoo")
    for name in ("heldout", "test"):
        shutil.copy(zoo / f"{name}.npz", tmp_path)
    return tmp_path


def truncate(folder: Path) -> None:
    path = folder / "zoo" / "model_2.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickle_code(folder: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {folder}/was_run",)

    torch.save({"x": Bad()}, folder / "zoo" / "model_9.pt")


def only_one(folder: Path) -> None:
    for k in range(1, 8):
        (folder / "zoo" / f"model_{k}.safetensors").unlink()


def no_ingredients(folder: Path) -> None:
    shutil.rmtree(folder / "zoo")
    (folder / "zoo").mkdir()


def wrong_label(folder: Path) -> None:
    data = dict(np.load(folder / "test.npz"))
    data["labels"][41] = 10
    np.savez(folder / "test.npz", **data)


def leak(folder: Path) -> None:
    data, held_out = dict(np.load(folder / "test.npz")), np.load(folder / "heldout.npz")
    data["images"][[41, 50]] = held_out["images"][[7, 9]]
    np.savez(folder / "test.npz", **data)


def nan(state: dict[str, torch.Tensor]) -> None:
    state["key.weight"][1, 2] = float("nan")


FAULTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "a truncated file": (truncate, 3, "model_2.safetensors is truncated"),
    "a pickle that would run code": (pickle_code, 3, "model_9.pt was not opened: it holds 'posix.system'"),
    "a missing tensor": (lambda f: change_ingredient(f, 3, lambda s: s.pop("head.bias")), 3, "missing: head.bias [10]"),
    "an additional tensor": (
        lambda f: change_ingredient(f, 3, lambda s: s.update(more=torch.zeros(2))), 3, "not in the model: more float32 [2]",
    ),
    "a misshapen tensor": (
        lambda f: change_ingredient(f, 3, lambda s: s.update({"head.bias": torch.zeros(9)})), 3,
        "shape: head.bias is [9], in the model [10]",
    ),
    "NaN in one tensor": (
        lambda f: change_ingredient(f, 5, nan), 3, "model_5.safetensors: the tensor key.weight contains nan at element 25;",
    ),
    "integers where the others have floats": (
        lambda f: change_ingredient(f, 3, lambda s: s.update({"head.bias": torch.zeros(10, dtype=torch.int64)})), 3,
        "dtype: head.bias is int64 [10], the other ingredients have floats",
    ),
    "an empty folder": (no_ingredients, 2, "no checkpoints at"),
    "one ingredient only": (only_one, 2, "a soup needs two or more ingredients; found one"),
    "the same file twice": (
        lambda f: os.symlink(f / "zoo" / "model_1.safetensors", f / "zoo" / "model_8.safetensors"), 3, "are the same file",
    ),
    "a label outside the classes": (
        wrong_label, 2, "test.npz: label 10 at row 41 (1 out of range); the model has 10 classes, so labels are 0 to 9",
    ),
    "an image of fit in test": (leak, 2, "data.test and data.fit share examples (2 of 600): row 41 of"),
    "no data": (lambda f: (f / "heldout.npz").unlink(), 2, "heldout.npz: does not exist"),
}  # fmt: skip


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_leaves_no_partial_output(own: Path, fault: str) -> None:
    damage, code, said = FAULTS[fault]
    damage(own)
    recipe = write_recipe(own, {**values(own), "ingredients": str(own / "zoo")})
    result = call("learn", recipe, own / "out")
    assert said in result.stderr
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert not (own / "was_run").exists()
    assert not (own / "out").exists()


def test_wrong_keys_models_and_files_of_a_recipe_are_named(own: Path) -> None:
    recipe = write_recipe(own, {**values(own), "ingredeints": "x"})
    result = call("learn", recipe, own / "out")
    assert result.exit_code == 2
    assert "ingredeints: unknown key; did you mean 'ingredients'?" in result.stderr
    recipe = write_recipe(own, values(own))
    result = call("learn", recipe, own / "out", "learn.lrr=1")
    assert (result.exit_code, "did you mean 'learn.lr'?" in result.stderr) == (2, True)
    result = call("learn", recipe, own / "out", "model=tests.tiny:nothing")
    assert (result.exit_code, "has no 'nothing'" in result.stderr) == (2, True)
    result = call("learn", recipe, own / "out", "model=open_clip:ViT-B-33?classes=10")
    assert (result.exit_code, "open_clip has no 'ViT-B-33'" in result.stderr) == (2, True)
    result = call("learn", own / "none.yaml", own / "out")
    assert (result.exit_code, "cannot be read" in result.stderr) == (2, True)
    assert call("learn", recipe).exit_code == 2
    assert not (own / "out").exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_rerunning_a_finished_command_runs_nothing_and_another_recipe_is_refused(own: Path) -> None:
    recipe = write_recipe(own, values(own, learn__epochs=1))
    first = call("learn", recipe, own / "out", "--json")
    assert first.exit_code == 0, first.output
    record = json.loads(first.stdout.splitlines()[-1])
    assert record["results"][0]["model_name"] == "mehl+"
    second = call("learn", recipe, own / "out")
    assert second.exit_code == 0
    assert "is complete; nothing was run" in second.stderr
    assert "Wrote" not in second.output
    resumed = call("resume", own / "out")
    assert (resumed.exit_code, resumed.output) == (0, second.output)
    other = call("learn", recipe, own / "out", "learn.lr=0.5")
    assert other.exit_code == 2
    assert "belongs to another recipe: learn.lr was 0.01 and is now 0.5" in other.stderr
    (own / "notes").mkdir()
    (own / "notes" / "thesis.tex").touch()
    for more in ((), ("--overwrite",)):
        foreign = call("learn", recipe, own / "notes", *more)
        assert (foreign.exit_code, "thesis.tex" in foreign.stderr) == (2, True)
    none = call("resume", own / "notes")
    assert (none.exit_code, "notes has no run to resume: state/begun.json does not exist." in none.stderr) == (2, True)
    before = (own / "out" / "model.safetensors").read_bytes()
    refused = call(
        "learn", recipe, own / "out", "--overwrite", "learn.batch_size=60", f"data.fit={own / 'zoo' / 'model_1.safetensors'}"
    )
    assert refused.exit_code == 2, refused.output
    replaced = call("uniform", recipe, own / "out", "--overwrite")
    assert (replaced.exit_code, "Wrote" in replaced.output) == (0, True)
    assert (own / "out" / "model.safetensors").read_bytes() != before
    assert call("learn", recipe, own / "out", "--overwrite").exit_code == 0
    assert (own / "out" / "model.safetensors").read_bytes() == before
    assert sorted(f.name for f in (own / "out" / "state").iterdir() if f.name != "lock") == ["begun.json", "resolved.json"]
    assert [f.name for f in (own / "notes").iterdir() if f.name != "state"] == ["thesis.tex"]
    assert call("verify", own / "out").exit_code == 0
    with open(own / "out" / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    flipped = call("verify", own / "out")
    assert (flipped.exit_code, "model.safetensors was changed: its SHA-256 is" in flipped.stderr) == (1, True)


@pytest.mark.usefixtures("cluster")
def test_one_run_at_a_time_in_a_folder(own: Path) -> None:
    recipe = write_recipe(own, values(own))
    with open_output(own / "out"):
        result = subprocess.run(ray_soup("learn", str(recipe), str(own / "out")), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "Another run is using" in result.stderr


@pytest.mark.usefixtures("cluster")
@pytest.mark.slow
def test_a_full_disk_while_baking_fails_and_a_rerun_resumes(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = own / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs more permissions")

    def bake_on_a_full_disk(*arguments: Any, **options: Any) -> Any:
        with open(small / "ballast", "wb", buffering=0) as file:
            written = 4096
            while written == 4096:
                try:
                    written = file.write(b"x" * 4096)
                except OSError:
                    break
        return bake(*arguments, **options)

    try:
        recipe = write_recipe(own, values(own, learn__epochs=1))
        with monkeypatch.context() as patch:
            patch.setattr("ray_soup.soups.baking.bake", bake_on_a_full_disk)
            result = call("learn", recipe, small / "out")
        assert "model.safetensors could not be written (No space left on device)" in result.stderr
        assert result.exit_code == 1
        assert not list((small / "out").rglob("*.safetensors"))
        (small / "ballast").unlink()
        assert call("learn", recipe, small / "out").exit_code == 0
        assert call("verify", small / "out").exit_code == 0
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_inspect_reads_headers_and_names_faults(own: Path) -> None:
    result = call("inspect", own / "zoo", "--json")
    shown = json.loads(result.stdout)
    assert len(shown["ingredients"]) == 8
    assert shown["tensors"]["head.bias"] == ["float32", [10]]
    assert call("inspect", own / "zoo", "--model", "tests.tiny:build").exit_code == 0
    change_ingredient(own, 3, lambda s: s.update({"head.bias": torch.zeros(9)}))
    result = call("inspect", own / "zoo")
    assert result.exit_code == 3
    assert "1 of 8 ingredients do not fit together" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_uniform_soup_and_a_best_single_are_made_evaluated_and_baked(own: Path) -> None:
    recipe = write_recipe(own, values(own))
    assert call("uniform", recipe, own / "u").exit_code == 0
    assert call("best-single", recipe, own / "b").exit_code == 0
    row = json.loads(call("evaluate", recipe, own / "u", "--split", "select", "--json").stdout)
    saved = json.loads((own / "u" / "results.jsonl").read_text().splitlines()[0])
    assert row["select_accuracy"] == saved["select_accuracy"]
    assert call("evaluate", recipe, own / "zoo" / "model_0.safetensors").exit_code == 0
    result = call("bake", own / "u", own / "again", "--json")
    assert result.exit_code == 0
    assert (own / "again" / "model.safetensors").read_bytes() == (own / "u" / "model.safetensors").read_bytes()
    wrong = call("learn", write_recipe(own, values(own, method="uniform")), own / "x")
    assert (wrong.exit_code, "the recipe has uniform" in wrong.stderr) == (2, True)


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for verb in (
        "demo", "fetch", "inspect", "plan", "finetune", "uniform", "greedy", "best-single", "learn", "compare", "search",
        "evaluate", "bake", "verify", "completion", "init", "keys", "doctor", "export", "resume",
    ):  # fmt: skip
        assert verb in result.output
        assert call(verb, "--help").exit_code == 0
    for code in ("0 done", "1 failed", "2 wrong usage", "4 no improvement", "130 interrupted", "143 terminated"):
        assert code in " ".join(result.output.split())

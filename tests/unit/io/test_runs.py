"""Folders as training scripts leave them: one checkpoint of each run is found, by a rule that is reported."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import IngredientError, RecipeError
from ray_soup.io.find import check_apart, find_checkpoints, open_ingredients

STATE = {"a": torch.ones(2)}


def find_notes(spec: str | list[str]) -> list[str]:
    notes: list[str] = []
    open_ingredients(spec, (), notes)
    return notes


def torch_file(path: Path, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": STATE, **more}, path)


def model_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    save_file(STATE, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({}, path / name)


def transformers(folder: Path, best: int | None, steps: tuple[int, ...] = (500, 1000, 1500)) -> None:
    """What the Trainer leaves with save_strategy="steps"."""
    for step in steps:
        model_folder(folder / f"checkpoint-{step}")
        named = None if best is None else f"/home/someone/runs/{folder.name}/checkpoint-{best}"
        state = {"best_model_checkpoint": named, "global_step": step}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def lightning(folder: Path, best: str, monitor: str | None = "val_loss") -> None:
    """What a Trainer of Lightning leaves with save_top_k=3 and save_last=True."""
    checkpoints = folder / "checkpoints"
    for n, name in enumerate(("epoch=1-step=20.ckpt", "epoch=9-step=100.ckpt", "epoch=10-step=110.ckpt", "last.ckpt")):
        path = f"/elsewhere/{folder.name}/checkpoints/{best}" if n else ""
        callback = {"monitor": monitor, "best_model_path": path, "best_model_score": torch.tensor(0.5)}
        callbacks = {"ModelCheckpoint{'monitor': 'val_loss'}": callback, "EarlyStopping{}": {"wait_count": 1}}
        torch_file(checkpoints / name, callbacks=callbacks, **{"pytorch-lightning_version": "2.5.0"})
    (folder / "hparams.yaml").write_text("lr: 0.1\n")


def timm(folder: Path, best: int) -> None:
    """What timm's CheckpointSaver leaves, whose best checkpoint has two names."""
    for epoch in (8, 9, 10):
        torch_file(folder / f"checkpoint-{epoch}.pth.tar", epoch=epoch, arch="resnet18")
    (folder / "model_best.pth.tar").hardlink_to(folder / f"checkpoint-{best}.pth.tar")
    for name in ("last.pth.tar", "recovery-11-0.pth.tar"):
        torch_file(folder / name, epoch=10)
    (folder / "args.yaml").write_text("model: resnet18\n")


def torchvision(folder: Path, epochs: int) -> None:
    """What torchvision's references leave with --output-dir."""
    for epoch in range(epochs):
        for name in (f"model_{epoch}.pth", "checkpoint.pth"):
            torch_file(folder / name)


def open_clip(folder: Path) -> None:
    for name in ("epoch_2.pt", "epoch_10.pt", "epoch_latest.pt"):
        torch_file(folder / "checkpoints" / name)
    (folder / "params.txt").write_text("lr: 0.1\n")


def files(*names: str) -> Callable[[Path], None]:
    """Return what writes checkpoints of these names."""

    def write(folder: Path) -> None:
        for name in names:
            torch_file(folder / name)

    return write


Layout = tuple[dict[str, Callable[[Path], None]], list[str], str]
LAYOUTS: dict[str, Layout] = {
    "transformers, best": (
        {"a": lambda p: transformers(p, 500), "b": lambda p: transformers(p, 1000)},
        ["a/checkpoint-500", "b/checkpoint-1000"], r"the best by trainer_state\.json.* 4 others left out",
    ),
    "transformers, last": (
        {"a": lambda p: transformers(p, None), "b": lambda p: transformers(p, 700)},  # the best one was removed
        ["a/checkpoint-1500", "b/checkpoint-1500"], "the last step",
    ),
    "transformers, one step each": (
        {"a": lambda p: transformers(p, None, (90,)), "b": lambda p: transformers(p, None, (100,))},
        ["a/checkpoint-90", "b/checkpoint-100"], "the last step",
    ),
    "Lightning, best": (
        {"version_0": lambda p: lightning(p, "epoch=9-step=100.ckpt"),
         "version_10": lambda p: lightning(p, "epoch=1-step=20.ckpt")},
        ["version_0/checkpoints/epoch=9-step=100.ckpt", "version_10/checkpoints/epoch=1-step=20.ckpt"],
        "the best by Lightning's ModelCheckpoint",
    ),
    "Lightning, last": (
        {"version_0": lambda p: lightning(p, "gone.ckpt"),
         "version_1": lambda p: lightning(p, "epoch=1-step=20.ckpt", None)},
        ["version_0/checkpoints/epoch=10-step=110.ckpt", "version_1/checkpoints/epoch=10-step=110.ckpt"], "the last step",
    ),
    "timm": (
        {"20260101-resnet18": lambda p: timm(p, 9), "20260102-resnet18": lambda p: timm(p, 10)},
        ["20260101-resnet18/model_best.pth.tar", "20260102-resnet18/model_best.pth.tar"], r"model_best\.pth\.tar",
    ),
    "torchvision": (
        {"lr0.1": lambda p: torchvision(p, 12), "lr0.2": lambda p: torchvision(p, 3)},
        ["lr0.1/model_11.pth", "lr0.2/model_2.pth"], "the last epoch",
    ),
    "open_clip": (
        {"one": open_clip, "two": open_clip},
        ["one/checkpoints/epoch_10.pt", "two/checkpoints/epoch_10.pt"], "the last epoch",
    ),
    "Hydra": (
        {f"2026-01-01/12-00-00/{n}": files("model.pt") for n in (2, 10)},
        ["2026-01-01/12-00-00/2/model.pt", "2026-01-01/12-00-00/10/model.pt"], "the only checkpoint",
    ),
    "best by name": (
        {f"{run}/weights": files("best.pt", "last.pt") for run in "ab"},
        ["a/weights/best.pt", "b/weights/best.pt"], "the one called best",
    ),
    "steps": (
        {run: files("step_900.pt", "step_1000.pt") for run in "ab"}, ["a/step_1000.pt", "b/step_1000.pt"], "the last step",
    ),
    "a model and its optimizer": (
        {run: files("model.pt", "optimizer.pt") for run in "ab"}, ["a/model.pt", "b/model.pt"], "the only checkpoint",
    ),
}  # fmt: skip


PLAIN = ("Hydra", "best by name", "steps", "a model and its optimizer")
"""Runs of no known library: a folder in a list, or the only one, is then taken as a whole."""


@pytest.mark.parametrize(
    ("layout", "spec"),
    [(name, spec) for name in LAYOUTS for spec in ("runs", "runs/*", "list") if spec != "list" or name not in PLAIN],
)
def test_each_run_contributes_one_checkpoint(tmp_path: Path, layout: str, spec: str) -> None:
    made, expected, rule = LAYOUTS[layout]
    runs = tmp_path / "runs"
    for name, make in made.items():
        make(runs / name)
    torch_file(runs / ".hidden" / "a.pt")
    if spec == "runs":
        torch_file(runs / "wandb" / "run" / "a.pt")
    given: Any = str(tmp_path / spec) if spec != "list" else [str(runs / name.partition("/")[0]) for name in made]
    found = find_checkpoints(given)
    assert found == [str(runs / name) for name in expected]
    notes = " ".join(find_notes(given))
    assert re.search(rule if spec != "list" else rule.partition(".*")[0], notes), notes
    assert "To choose otherwise, name files with a glob." in notes
    with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
        check_apart(given if spec != "list" else str(runs), str(runs / "deep" / "out"))


def test_a_model_in_the_folder_of_a_run_stands_for_it(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        transformers(tmp_path / name, 500)
    for name in ("a", "b"):
        model_folder(tmp_path / name)
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "b")]
    saved, left = find_notes(str(tmp_path))
    assert "2 runs, of each the model saved at the end" in saved
    assert "6 others left out" in saved
    assert left.startswith(f"{tmp_path}/c is a run without a model in its own folder, and was left out. To use it, name ")


def test_a_folder_with_the_steps_of_one_run_is_refused_with_the_way_to_name_them(tmp_path: Path) -> None:
    transformers(tmp_path / "a", 500)
    for spec in (tmp_path, tmp_path / "a"):
        with pytest.raises(
            RecipeError, match=r"two or more ingredients; found one run\. .*checkpoint-500\. 2 others left out"
        ):
            open_ingredients(str(spec))
    assert len(open_ingredients(f"{tmp_path}/a/checkpoint-*")) == 3
    assert find_notes(f"{tmp_path}/a/checkpoint-*") == []


def test_a_glob_that_mixes_steps_of_one_run_with_other_runs_is_noted(tmp_path: Path) -> None:
    transformers(tmp_path / "a", 500)
    transformers(tmp_path / "b", 500, (500,))
    assert len(find_checkpoints(f"{tmp_path}/*/checkpoint-*")) == 4
    (note,) = find_notes(f"{tmp_path}/*/checkpoint-*")
    assert note.startswith(f"1 of 2 runs contribute several steps of one training, such as {tmp_path}/a: checkpoint-500, ")
    assert find_notes(f"{tmp_path}/*/checkpoint-500") == []


def test_a_plain_folder_of_checkpoints_is_taken_as_a_whole(tmp_path: Path) -> None:
    for name in ("model_0.pth", "model_1.pth", "epoch=3-step=12.ckpt", "last.ckpt", "best.pt"):
        torch_file(tmp_path / name)
    torch_file(tmp_path / "older" / "x.pt")
    assert len(find_checkpoints(str(tmp_path))) == 5
    assert find_notes(str(tmp_path)) == []
    check_apart(str(tmp_path), str(tmp_path / "deep" / "out"))


@pytest.mark.parametrize("names", [("a.pt", "b.pt"), ("model_1.pt", "model_2.pt"), ("step_1.pt", "epoch_1.pt")])
def test_if_nothing_says_which_checkpoint_represents_a_run_it_is_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for run in ("one", "two"):
        for name in names:
            torch_file(tmp_path / run / name)
    with pytest.raises(RecipeError, match=r"/one has 2 checkpoints, and nothing says .*Name the ingredients with a glob"):
        find_checkpoints(str(tmp_path))
    assert len(find_checkpoints(f"{tmp_path}/*/*.pt")) == 4


def test_two_figures_that_lightning_monitors_are_ambiguous(tmp_path: Path) -> None:
    for name in ("version_0", "version_1"):
        lightning(tmp_path / name, "epoch=1-step=20.ckpt")
        content = torch.load(tmp_path / name / "checkpoints" / "last.ckpt")
        content["callbacks"]["other"] = {"monitor": "acc", "best_model_path": "x/epoch=9-step=100.ckpt"}
        torch.save(content, tmp_path / name / "checkpoints" / "last.ckpt")
    with pytest.raises(RecipeError, match=r"several ModelCheckpoints name epoch=1-step=20\.ckpt, epoch=9-step=100\.ckpt\."):
        find_checkpoints(str(tmp_path))


def test_links_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    transformers(tmp_path / "elsewhere" / "a", 500)
    transformers(tmp_path / "runs" / "b", 500)
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "twice").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "runs")
    assert len(find_checkpoints(str(tmp_path / "runs"))) == 2
    for out in ("runs/out", "elsewhere/out", "elsewhere/a/out"):
        with pytest.raises(RecipeError, match="is where the recipe looks"):
            check_apart(str(tmp_path / "runs"), str(tmp_path / out))
    check_apart(str(tmp_path / "runs"), str(tmp_path / "out"))


def test_shards_and_adapters_in_a_run_are_one_model(tmp_path: Path) -> None:
    for run in "ab":
        folder = tmp_path / run / "checkpoint-7"
        folder.mkdir(parents=True)
        save_file(STATE, folder / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / run / "checkpoint-7") for run in "ab"]
    for run in "cd":
        folder = tmp_path / run / "checkpoint-7"
        folder.mkdir(parents=True)
        save_file({"x.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")
    with pytest.raises(IngredientError, match="is a LoRA adapter"):
        open_ingredients(str(tmp_path))


def test_a_damaged_record_of_the_best_step_leaves_the_last_one(tmp_path: Path) -> None:
    for name, text in (
        ("a", "{"),
        ("b", "[]"),
        ("c", '{"best_model_checkpoint": 7}'),
        ("d", '{"best_model_checkpoint": "/"}'),
    ):
        transformers(tmp_path / name, 500)
        (tmp_path / name / "checkpoint-1500" / "trainer_state.json").write_text(text)
    assert find_checkpoints(str(tmp_path)) == [str(tmp_path / name / "checkpoint-1500") for name in "abcd"]


def test_too_many_folders_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_soup.io.runs.MOST_FOLDERS", 3)
    for n in range(4):
        torch_file(tmp_path / str(n) / "a.pt")
    with pytest.raises(RecipeError, match="more than 3 folders below it to search"):
        find_checkpoints(str(tmp_path))


def test_inspect_says_which_checkpoint_of_each_run_is_used_and_what_is_left_out(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ray_soup.cli import main

    for name, best in (("a", 500), ("b", 1000)):
        transformers(tmp_path / name, best)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"{tmp_path}: 2 runs, of each the best by trainer_state.json" in result.output
    assert f"4 others left out, such as {tmp_path}/a/checkpoint-1000. To choose otherwise" in result.output
    assert "a/checkpoint-500" in result.output
    assert "b/checkpoint-1000" in result.output


@pytest.mark.parametrize("layout", ["transformers, best", "Lightning, best", "Hydra"])
def test_runs_in_remote_storage_are_found_by_the_same_rules(tmp_path: Path, layout: str) -> None:
    made, expected, _ = LAYOUTS[layout]
    for name, make in made.items():
        make(tmp_path / "runs" / name)
    uri = f"file://{tmp_path}/runs"
    assert find_checkpoints(uri) == [f"{uri}/{name}" for name in expected]
    with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
        check_apart(uri, f"{uri}/deep/out")
    check_apart(uri, f"file://{tmp_path}/out")

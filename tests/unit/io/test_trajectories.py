"""Steps of one run as ingredients: ?per_trial= finds them in order, and nothing that is no step is mixed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ray_soup.errors import RecipeError
from ray_soup.io.find import check_apart, find_checkpoints, find_sweeps, open_ingredients
from ray_soup.io.steps import Step, fault_of, named_step, split_per_trial
from tests.unit.io.test_runs import (
    STATE,
    files,
    lightning,
    model_folder,
    open_clip,
    timm,
    torch_file,
    torchvision,
    transformers,
)


def finished(folder: Path) -> None:
    """A run of Transformers with the model that it saved at the end, a checkpoint cut short, and states of the trainer."""
    transformers(folder, 1000)
    model_folder(folder)
    (folder / "checkpoint-2000").mkdir()
    (folder / "checkpoint-2000" / "config.json").write_text("{}")


def with_metrics(folder: Path) -> None:
    """Lightning's names with a figure after the step, and a folder of another kind."""
    for name in ("epoch=1-step=20-val_loss=0.25", "epoch=9-step=100-val_loss=1.5e-3", "last"):
        torch_file(folder / "checkpoints" / f"{name}.ckpt")
    (folder / "step_3_images").mkdir()


def generic(folder: Path) -> None:
    """Folders with a model each, and the state of an optimizer beside it."""
    for step in (8, 16, 100):
        torch_file(folder / f"global_step{step}" / "weights.pt")
        torch_file(folder / f"global_step{step}" / "optimizer.pt")


def adapters(folder: Path) -> None:
    for step in (10, 9, 100):
        at = folder / f"checkpoint-{step}"
        at.mkdir(parents=True)
        factors = {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
        state = {f"base_model.model.a.lora_{side}.weight": factor for side, factor in factors.items()}
        save_file(state, at / "adapter_model.safetensors")
        (at / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        (at / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({}, at / "optimizer.pt")


Case = tuple[Callable[[Path], None], list[str], list[int], list[str]]
CASES: dict[str, Case] = {
    "transformers": (
        finished, ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"], [500, 1000, 1500],
        ["checkpoint-2000", "model.safetensors"],
    ),
    "PEFT": (adapters, ["checkpoint-9", "checkpoint-10", "checkpoint-100"], [9, 10, 100], []),
    "Lightning": (
        lambda p: lightning(p, "gone.ckpt"),
        [f"checkpoints/epoch={n}.ckpt" for n in ("1-step=20", "9-step=100", "10-step=110")], [20, 100, 110], ["last.ckpt"],
    ),
    "Lightning with figures": (
        with_metrics,
        ["checkpoints/epoch=1-step=20-val_loss=0.25.ckpt", "checkpoints/epoch=9-step=100-val_loss=1.5e-3.ckpt"],
        [20, 100], ["last.ckpt"],
    ),
    "timm": (
        lambda p: timm(p, 9), [f"checkpoint-{n}.pth.tar" for n in (8, 9, 10)], [8, 9, 10],
        ["last.pth.tar", "model_best.pth.tar", "recovery-11-0.pth.tar"],
    ),
    "torchvision": (lambda p: torchvision(p, 3), [f"model_{n}.pth" for n in range(3)], [0, 1, 2], ["checkpoint.pth"]),
    "open_clip": (open_clip, ["checkpoints/epoch_2.pt", "checkpoints/epoch_10.pt"], [2, 10], ["epoch_latest.pt"]),
    "by name": (
        files("step_50.pt", "step_100.pt", "step_100_optimizer.pt", "best.pt"), ["step_50.pt", "step_100.pt"], [50, 100],
        ["best.pt"],
    ),
    "folders by name": (generic, [f"global_step{n}/weights.pt" for n in (8, 16, 100)], [8, 16, 100], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_steps_of_a_run_are_found_in_order_and_nothing_else(name: str, tmp_path: Path) -> None:
    write, paths, numbers, left_out = CASES[name]
    write(tmp_path / "run")
    notes: list[str] = []
    found = open_ingredients(f"{tmp_path}/run?per_trial=all", (), notes)
    assert [ingredient.path for ingredient in found] == [str(tmp_path / "run" / path) for path in paths]
    assert [ingredient.step.number for ingredient in found if ingredient.step is not None] == numbers
    assert fault_of([(ingredient.path, ingredient.step) for ingredient in found]) is None
    (note,) = notes
    run = tmp_path / "run" / ("checkpoints" if paths[0].startswith("checkpoints/") else "")
    assert f": {len(paths)} steps of {run} ({numbers[0]}, " in note
    other = f" {len(left_out)} other{'s' * (len(left_out) > 1)} left out, such as {run}/{left_out[0]}." if left_out else ""
    assert note.endswith(f"{numbers[-1]}).{other}")
    last = find_checkpoints(f"{tmp_path}/run?per_trial=last:2")
    assert last == [str(tmp_path / "run" / path) for path in paths[-2:]]


def test_each_run_below_a_folder_contributes_its_last_steps_under_unique_names(tmp_path: Path) -> None:
    transformers(tmp_path / "runs" / "a", None)
    transformers(tmp_path / "runs" / "b", None, (10, 20))
    lightning(tmp_path / "runs" / "c", "gone.ckpt")
    for spec in (f"{tmp_path}/runs?per_trial=last:2", f"{tmp_path}/runs/*?per_trial=last:2"):
        found = open_ingredients(spec)
        assert [ingredient.name for ingredient in found] == [
            "a/checkpoint-1000", "a/checkpoint-1500", "b/checkpoint-10", "b/checkpoint-20",
            "c/checkpoints/epoch=9-step=100.ckpt", "c/checkpoints/epoch=10-step=110.ckpt",
        ]  # fmt: skip
        assert "not named as steps of one run" in str(fault_of([(i.path, i.step) for i in found]))
    one = open_ingredients([f"{tmp_path}/runs/a?per_trial=last:1", f"{tmp_path}/runs/b?per_trial=last:1"])
    assert [ingredient.name for ingredient in one] == ["a/checkpoint-1500", "b/checkpoint-20"]


def test_a_container_is_chosen_in_every_step(tmp_path: Path) -> None:
    for step in (1, 2):
        torch_file(tmp_path / f"epoch_{step}.pt", ema=STATE)
    for spec in ("?per_trial=all&key=ema", "?key=ema&per_trial=all"):
        assert [i.path for i in open_ingredients(f"{tmp_path}{spec}")] == [
            f"{tmp_path}/epoch_{n}.pt?key=ema" for n in (1, 2)
        ]


def tune_experiment(folder: Path) -> None:
    """What Ray Tune leaves of two trials with three and two checkpoints; the second one's have dates for names."""
    trials = []
    for trial, names in (("t1", ["checkpoint_000000", "checkpoint_000001", "checkpoint_000010"]),
                         ("t2", ["checkpoint_2026-01-01_10-00-00.5", "checkpoint_2026-01-01_11-00-00.5"])):  # fmt: skip
        lines = []
        for number, name in enumerate(names):
            model_folder(folder / trial / name)
            lines.append(json.dumps({"acc": number / 10, "checkpoint_dir_name": name}))
        (folder / trial / "result.json").write_text("\n".join(lines))
        static = {"trial_id": trial, "status": "TERMINATED", "relative_logdir": trial, "config": {"lr": 0.1}}
        trials.append([json.dumps(static), json.dumps({})])
    (folder / "experiment_state-2026.json").write_text(json.dumps({"trial_data": trials}))


def test_trials_of_ray_contribute_their_last_checkpoints(tmp_path: Path) -> None:
    tune_experiment(tmp_path)
    notes: list[str] = []
    found = open_ingredients(f"{tmp_path}?per_trial=last:2", (), notes)
    assert [i.name for i in found] == [
        "t1/checkpoint_000001", "t1/checkpoint_000010", "t2/checkpoint_2026-01-01_10-00-00.5",
        "t2/checkpoint_2026-01-01_11-00-00.5",
    ]  # fmt: skip
    assert [i.step for i in found] == [
        Step(str(tmp_path / trial), "checkpoint_#", number)
        for trial, number in (("t1", 1), ("t1", 10), ("t2", 1), ("t2", 2))
    ]
    assert [i.trial.metrics for i in found if i.trial is not None] == [{}, {"acc": 0.2}, {}, {"acc": 0.1}]
    assert all(i.trial is not None and i.trial.config == {"lr": 0.1} for i in found)
    assert len(notes) == 1
    assert len(find_sweeps(f"{tmp_path}?per_trial=all")[0].trials) == 2
    with pytest.raises(RecipeError, match=r"asks for the last 3 steps of each run, but .*t2 has 2. Write"):
        open_ingredients(f"{tmp_path}?per_trial=last:3")
    with pytest.raises(RecipeError, match=r"\?metric= takes one checkpoint of each trial"):
        open_ingredients(f"{tmp_path}?metric=acc&mode=max&per_trial=all")


def renamed(folder: Path) -> None:
    transformers(folder, None)
    shutil.move(folder / "checkpoint-500", folder / "checkpoint-7")


REFUSED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "too many": (finished, "?per_trial=last:4", r"last 4 steps of each run, but .*run has 3. Write \?per_trial=last:3 or"),
    "no number": (finished, "?per_trial=last:0", r"found \?per_trial=last:0 .*; expected \?per_trial=all, or"),
    "a word": (finished, "?per_trial=best", r"found \?per_trial=best .*; expected \?per_trial=all, or"),
    "twice": (
        files("epoch=1-step=20.ckpt", "epoch=2-step=40.ckpt", "epoch=2-step=40-v1.ckpt"), "?per_trial=all",
        "two models of the same step, epoch=2-step=40",
    ),
    "two series": (
        files("step_1.pt", "step_2.pt", "step_1_ema.pt", "step_2_ema.pt"), "?per_trial=all", "checkpoints of several kinds",
    ),
    "files and folders": (
        lambda p: (generic(p), torch_file(p / "step_3.pt")), "?per_trial=all", "checkpoints of several kinds",
    ),
    "a step that nobody can tell": (
        files("step_1.pt", "step_2.pt", "start.pt"), "?per_trial=all", "nothing says which step of the run .*start.pt is",
    ),
    "no steps": (files("a.pt", "b.pt"), "?per_trial=all", "nothing says which steps of a run the checkpoints in .* are"),
    "the record differs": (renamed, "?per_trial=all", "says that this is step 500, but its folder is called checkpoint-7"),
    "two models in a step": (
        files("step_1/a.pt", "step_1/b.pt"), "?per_trial=all", "which one is the model of this step: a.pt, b.pt",
    ),
    "no run": (lambda p: p.mkdir(), "?per_trial=all", "names no run: expected folders with checkpoints"),
    "nothing there": (lambda p: None, "?per_trial=all", "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_ordered_is_refused(name: str, tmp_path: Path) -> None:
    write, asked, message = REFUSED[name]
    write(tmp_path / "run")
    with pytest.raises(RecipeError, match=message):
        open_ingredients(f"{tmp_path}/run{asked}")


def test_names_in_a_glob_or_a_list_say_the_step_and_the_order_of_ingredients_stays(tmp_path: Path) -> None:
    transformers(tmp_path / "run", None, (500, 1000))
    found = open_ingredients([str(tmp_path / "run" / f"checkpoint-{n}") for n in (1000, 500)])
    assert [i.step for i in found] == [Step(str(tmp_path / "run"), "checkpoint-#", n) for n in (1000, 500)]
    by_file = open_ingredients(f"{tmp_path}/run/checkpoint-*/model.safetensors")
    assert [i.step for i in by_file] == [
        Step(str(tmp_path / "run"), "checkpoint-#/model.safetensors", n) for n in (500, 1000)
    ]


@pytest.mark.parametrize(
    ("paths", "fault"),
    [
        (["r/step_1.pt", "r/step_2.pt"], None),
        (["r/epoch=1-step=5.ckpt", "r/epoch=2-step=9.ckpt?key=ema"], None),
        (["zoo/lr_0.1_epoch_3.pt", "zoo/lr_0.2_epoch_4.pt"], "not named as steps of one run"),
        (["a/checkpoint-5", "b/checkpoint-6"], "not named as steps of one run"),
        (["r/epoch_1.pt", "r/step_500.pt"], "not named as steps of one run"),
        (["r/epoch_1.pt", "r/epoch_01.pt"], "are both epoch 1"),
        (["r/model_1.pt", "r/model_2.pt"], "says which step r/model_1.pt is"),
        (["r/step_1.pt", "r/final.pt"], "says which step r/final.pt is"),
    ],
)
def test_ingredients_are_steps_of_one_run_only_if_their_names_agree(paths: list[str], fault: str | None) -> None:
    found = fault_of([(path, named_step(path)) for path in paths])
    assert found is None if fault is None else fault in str(found)


def test_options_are_split_in_any_order() -> None:
    assert split_per_trial("s3://b/run?per_trial=last:4&key=ema") == ("s3://b/run?key=ema", "last:4")
    assert split_per_trial("run?key=ema&per_trial=all") == ("run?key=ema", "all")
    assert split_per_trial("run?key=ema") == ("run?key=ema", None)


def test_a_soup_is_not_written_where_it_would_be_the_next_step(tmp_path: Path) -> None:
    transformers(tmp_path / "runs" / "a", None)
    for spec in (f"{tmp_path}/runs/a?per_trial=all", f"{tmp_path}/runs/*?per_trial=last:2"):
        with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
            check_apart(spec, str(tmp_path / "runs" / "a" / "checkpoint-9999"))
        check_apart(spec, str(tmp_path / "soup"))
    with pytest.raises(RecipeError, match="is where the recipe looks for ingredients"):
        check_apart(f"{tmp_path}/runs?per_trial=all", str(tmp_path / "runs" / "soup"))


def test_runs_in_remote_storage(tmp_path: Path, s3: str) -> None:
    from tests.conftest import put

    transformers(tmp_path / "runs" / "a", None)
    put(tmp_path / "runs", f"{s3}/runs")
    for spec in (f"{s3}/runs?per_trial=last:2", f"{s3}/runs/a?per_trial=last:2"):
        found = open_ingredients(spec)
        assert [i.path for i in found] == [f"{s3}/runs/a/checkpoint-{n}" for n in (1000, 1500)]
        assert [i.step.number for i in found if i.step] == [1000, 1500]

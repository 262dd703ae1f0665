"""Run folders with distributed checkpoints, as trainers leave them: one checkpoint of each run is found, and read."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from ray_soup.errors import RecipeError
from ray_soup.io.check import check_together
from ray_soup.io.find import find_checkpoints, open_ingredients
from tests.distributed import load, run_processes, write
from tests.unit.io.test_distributed import check_ranges

STATE = {"model.weight": torch.arange(12.0).reshape(3, 4), "optimizer.exp_avg.weight": torch.zeros(3, 4)}


def titan(run: Path, steps: tuple[int, ...]) -> None:
    """What torchtitan leaves: the model's tensors at the top level."""
    for step in steps:
        write(
            run / "checkpoint" / f"step-{step}", {"weight": STATE["model.weight"] + step, "optimizer.state": torch.ones(1)}
        )


def trainer(run: Path, steps: tuple[int, ...]) -> None:
    """What the Trainer of Transformers leaves under FSDP with a sharded state dict."""
    for step in steps:
        folder = run / f"checkpoint-{step}"
        write(folder / "pytorch_model_fsdp_0", {"model.weight": STATE["model.weight"] + step})
        write(folder / "optimizer_0", {"optimizer.state.weight.exp_avg": torch.ones(3, 4)})
        (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": f"x/checkpoint-{steps[0]}"}))


def accelerate(run: Path, steps: tuple[int, ...]) -> None:
    """What `Accelerator.save_state` leaves under FSDP."""
    for step in steps:
        write(
            run / "checkpoints" / f"checkpoint_{step}" / "pytorch_model_fsdp_0",
            {"model.weight": STATE["model.weight"] + step},
        )
        write(run / "checkpoints" / f"checkpoint_{step}" / "optimizer_0", {"optimizer.exp_avg": torch.ones(3, 4)})


def lightning(run: Path, steps: tuple[int, ...]) -> None:
    """What Lightning leaves with a sharded state dict: a folder for each checkpoint, and the best one in its state."""
    for step in steps:
        folder = run / "checkpoints" / f"epoch=0-step={step}.ckpt"
        write(folder, {"model.weight": STATE["model.weight"] + step, "optimizer_0.state.weight.exp_avg": torch.ones(3, 4)})
        best = {"monitor": "val_loss", "best_model_path": f"/x/epoch=0-step={steps[0]}.ckpt"}
        torch.save({"callbacks": {"ModelCheckpoint{}": best}, "epoch": 0}, folder / "meta.pt")


LAYOUTS = {
    "torchtitan": (titan, "the last step", 200),
    "Transformers": (trainer, "the best by trainer_state.json", 10),
    "Accelerate": (accelerate, "the last step", 200),
    "Lightning": (lightning, "the best by Lightning's ModelCheckpoint", 10),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_run_contributes_one_checkpoint(tmp_path: Path, name: str) -> None:
    layout, rule, chosen = LAYOUTS[name]
    for run in ("run_0", "run_1"):
        layout(tmp_path / run, (10, 30, 200))
    notes: list[str] = []
    found = open_ingredients(str(tmp_path), (), notes)
    assert len(found) == 2
    assert f"2 runs, of each {rule}" in notes[0]
    assert "4 others left out" in notes[0]
    for ingredient in check_together(found, {"weight": (3, 4)}):
        assert torch.equal(ingredient.read("weight"), (STATE["model.weight"] + chosen).reshape(-1))


def test_the_steps_of_one_run_are_no_independent_ingredients(tmp_path: Path) -> None:
    titan(tmp_path, (10, 30, 200))
    for spec in (str(tmp_path), str(tmp_path / "checkpoint")):
        with pytest.raises(RecipeError, match="a soup needs two or more ingredients; found one run"):
            open_ingredients(spec)
    steps = [f"{tmp_path}/checkpoint/step-{step}" for step in (10, 30, 200)]
    assert find_checkpoints(str(tmp_path / "checkpoint" / "step-*")) == steps  # whoever writes a glob wants all of them


def test_checkpoints_that_may_be_of_one_run_or_of_several_are_refused(tmp_path: Path) -> None:
    for name in ("step-1", "epoch-1"):
        write(tmp_path / name, STATE)
    with pytest.raises(RecipeError, match=r"has 2 checkpoints, and nothing says whether they are steps of one run: "):
        open_ingredients(str(tmp_path))


def test_a_step_and_a_final_model_are_found_by_their_folders(tmp_path: Path) -> None:
    trainer(tmp_path / "a", (10,))
    write(tmp_path / "b" / "final", {"model.weight": STATE["model.weight"]})
    assert [i.name for i in open_ingredients([str(tmp_path / "a" / "checkpoint-10"), str(tmp_path / "b" / "final")])] == [
        "checkpoint-10",
        "final",
    ]
    assert len(open_ingredients(str(tmp_path))) == 2


@pytest.mark.slow
def test_a_run_of_lightning_in_two_processes(tmp_path: Path) -> None:
    script = """
    import warnings; warnings.simplefilter("ignore")
    import pytorch_lightning as pl, torch
    from pytorch_lightning.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.utils.data import DataLoader, TensorDataset
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(5, 3)
        def configure_model(self):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
        def training_step(self, batch, index):
            return self.net(batch[0]).square().sum()
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())
    data = DataLoader(TensorDataset(torch.randn(8, 5)), batch_size=2)
    for seed in range(2):
        pl.seed_everything(seed)
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), max_epochs=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=f"run_{seed}",
        )
        trainer.fit(Module(), data)
    """
    (tmp_path / "fit.py").write_text(textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "fit.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = check_together(open_ingredients(str(tmp_path)), {"weight": (3, 5), "bias": (3,)})
    assert [len(i.tensors["weight"].pieces) for i in found] == [2, 2]
    assert not torch.equal(found[0].read("weight"), found[1].read("weight"))
    for ingredient in found:
        stored = {info.stored[1]: torch.empty(info.shape, dtype=info.dtype) for info in ingredient.tensors.values()}
        loaded = load(Path(ingredient.files[0]).parent, stored)
        check_ranges(
            ingredient, {name: loaded[info.stored[1]] for name, info in ingredient.tensors.items()}, random.Random(0)
        )


@pytest.mark.slow
def test_what_accelerate_saves_in_two_processes(tmp_path: Path) -> None:
    run_processes(
        """
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import save_fsdp_model
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # never used: the group exists
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
        accelerator = Accelerator(cpu=True)
        for k in range(2):
            torch.manual_seed(k)
            model = fully_shard(torch.nn.Linear(5, 3), mesh=mesh)
            save_fsdp_model(plugin, accelerator, model, f"run_{k}/checkpoint_0")
        """,
        tmp_path,
    )
    found = check_together(open_ingredients(str(tmp_path)), {"weight": (3, 5), "bias": (3,)})
    for k, ingredient in enumerate(found):
        torch.manual_seed(k)
        expected = torch.nn.Linear(5, 3)
        assert ingredient.files[0] == f"{tmp_path}/run_{k}/checkpoint_0/pytorch_model_fsdp_0/.metadata"
        assert torch.equal(ingredient.read("weight"), expected.weight.detach().reshape(-1))
        assert torch.equal(ingredient.read("bias"), expected.bias.detach())

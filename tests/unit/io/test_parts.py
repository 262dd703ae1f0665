"""Parts of checkpoints that single processes wrote are refused, and no soup is made of ZeRO's copies in 16 bits."""

from __future__ import annotations

import inspect
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ray_soup.errors import IngredientError
from ray_soup.io.find import open_ingredients
from ray_soup.io.ingredient import open_ingredient

MODULE = {"module": {"weight": torch.ones(2, 2, dtype=torch.bfloat16)}}


def zero(run: Path, script: bool = True) -> Path:
    """What DeepSpeed leaves of a step of ZeRO-2 on two processes."""
    step = run / "global_step10"
    step.mkdir(parents=True)
    torch.save(MODULE, step / "mp_rank_00_model_states.pt")
    for rank in range(2):
        torch.save({"optimizer_state_dict": {}}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (run / "latest").write_text("global_step10")
    if script:
        (run / "zero_to_fp32.py").touch()
    return step


@pytest.mark.parametrize("script", [True, False])
def test_zero_is_refused_with_the_line_that_joins_it(tmp_path: Path, script: bool) -> None:
    step = zero(tmp_path / "it's a run", script)
    zero(tmp_path / "z", script)
    copies = step / "mp_rank_00_model_states.pt"
    for spec in (str(tmp_path), str(step), str(step / "*.pt"), str(copies)):
        with pytest.raises(IngredientError, match="Join the parts: python") as error:
            open_ingredients(spec)
        words = shlex.split(str(error.value).partition("Join the parts: ")[2])
        run = str(step.parent)
        start = [f"{run}/zero_to_fp32.py"] if script else ["-m", "deepspeed.utils.zero_to_fp32"]
        assert words == ["python", *start, run, f"{step}-merged", "--safe_serialization", "--tag", "global_step10"]
    with pytest.raises(
        IngredientError, match=r"holds the copies in 16 bits, or none, of a model that DeepSpeed ZeRO trained"
    ):
        open_ingredient(str(copies))


def test_a_model_of_deepspeed_without_zero_is_an_ingredient_and_a_part_of_one_is_not(tmp_path: Path) -> None:
    torch.save(MODULE, tmp_path / "mp_rank_00_model_states.pt")
    assert open_ingredient(str(tmp_path / "mp_rank_00_model_states.pt")).read("weight").sum() == 4
    torch.save(MODULE, tmp_path / "mp_rank_01_model_states.pt")
    with pytest.raises(
        IngredientError, match=r"mp_rank_00_model_states\.pt is the part 0 of a model that tensor parallelism cut"
    ):
        open_ingredient(str(tmp_path / "mp_rank_00_model_states.pt"))


@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0_rank0.bin", "pytorch_model_fsdp_rank3.bin"])
def test_a_rank_file_of_accelerate_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / name)
    for spec in (str(tmp_path), str(tmp_path / name)):
        with pytest.raises(IngredientError, match=rf"{name} is the part .* of FSDP wrote; .*SHARDED_STATE_DICT"):
            open_ingredients(spec)


@pytest.mark.skipif(
    "save_distributed" not in inspect.signature(dcp.HuggingFaceStorageWriter).parameters,
    reason="torch before 2.9 writes no such shards",
)
def test_a_shard_of_the_writer_for_hugging_face_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"weight": torch.ones(4, 2)}, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
        )
    with pytest.raises(IngredientError, match=r"shard-00001-model.*\.safetensors is the part .* enable_consolidation=True"):
        open_ingredients(str(tmp_path))

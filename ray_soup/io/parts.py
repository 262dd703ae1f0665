"""Files that one process of a job wrote by itself: parts of a checkpoint, refused with the command that joins them.

DeepSpeed ZeRO keeps the float32 weights with the state of the optimizer, cut over all processes; what it stores beside them
as the model are copies in 16 bits. So that file, too, is refused if the others are in its folder.
"""

from __future__ import annotations

import os
import re
import shlex

from ray_soup.errors import IngredientError
from ray_soup.io import storage

FSDP = re.compile(r"(model|optim|extra_state)_world_size_\d+_rank_\d+\.pt")
ACCELERATE = re.compile(r"pytorch_model_fsdp(_\d+)?_rank\d+\.bin")
ZERO = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt")
MODEL_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
SHARD = re.compile(r"shard-\d+-model(-\d+-of-\d+)?\.safetensors")
"""What `torch.distributed.checkpoint.HuggingFaceStorageWriter` writes in every process before it consolidates them."""
JOIN_ZERO = "zero_to_fp32.py"
"""The script that DeepSpeed puts beside its checkpoints."""


def refuse_part(path: str) -> None:
    """Check that a file is not the part that one process of a distributed job wrote. Raises IngredientError."""
    name = os.path.basename(path)
    if FSDP.fullmatch(name):
        raise IngredientError(
            f"{path} is the part of a checkpoint that one process of FSDP wrote; expected the whole model: name the folder "
            f"of all parts, if they are DTensors. {join_fsdp(path)}"
        )
    if ACCELERATE.fullmatch(name):
        raise IngredientError(
            f"{path} is the part of a checkpoint that one process of FSDP wrote; expected the whole model. Save it with "
            "fsdp_state_dict_type: SHARDED_STATE_DICT (Accelerate's use_dcp=True) or FULL_STATE_DICT."
        )
    if SHARD.fullmatch(name):
        raise IngredientError(
            f"{path} is the part of a checkpoint that one process of torch.distributed.checkpoint wrote; expected the whole "
            "model. Save it with HuggingFaceStorageWriter(..., enable_consolidation=True)."
        )
    if ZERO.fullmatch(name):
        raise _part(path, "DeepSpeed ZeRO", _join_zero(path))
    if found := MODEL_STATES.fullmatch(name):
        beside = storage.listdir(path.rpartition("/")[0] or ".")
        if any(map(ZERO.fullmatch, beside)):
            raise IngredientError(
                f"{path} holds the copies in 16 bits, or none, of a model that DeepSpeed ZeRO trained in float32; its "
                f"weights are in the other files beside it. Join the parts: {_join_zero(path)}"
            )
        other = next((n for n in beside if n != name and MODEL_STATES.fullmatch(n)), None)
        if other is not None:
            raise IngredientError(
                f"{path} is the part {int(found[1])} of a model that tensor parallelism cut; {other} is beside it. Join the "
                "parts with the library that trained it, and use the whole model."
            )


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0] if storage.is_remote(path) else os.path.dirname(os.path.abspath(path))


def join_fsdp(path: str) -> str:
    """Return what to do about the parts of FSDP beside a file that cannot be read in parts."""
    folder = _folder_of(path)
    join = ["python", "-m", "verl.model_merger", "merge", "--backend", "fsdp"]
    return f"Join the parts: {shlex.join([*join, '--local_dir', folder, '--target_dir', f'{folder}-merged'])}"


def _part(path: str, what: str, command: str) -> IngredientError:
    return IngredientError(
        f"{path} is the part of a checkpoint that one process of {what} wrote; expected the whole model. Join the "
        f"parts: {command}"
    )


def _join_zero(path: str) -> str:
    """Return the command that joins the parts of a checkpoint of DeepSpeed ZeRO, whose folder is that of one step."""
    folder = _folder_of(path)
    above = os.path.dirname(folder)
    script = f"{above}/{JOIN_ZERO}"
    there = not storage.is_remote(path) and os.path.isfile(script)
    run = [script] if there else ["-m", "deepspeed.utils.zero_to_fp32"]
    tag = ["--tag", os.path.basename(folder)]
    return shlex.join(["python", *run, above, f"{folder}-merged", "--safe_serialization", *tag])

"""Distributed checkpoints of torch: with any layout of pieces, and as several processes save them."""

from __future__ import annotations

import io
import pickle
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.conftest import ROOT

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""First index and shape of a piece."""


def cut(shape: tuple[int, ...], cuts: int, rng: random.Random) -> list[Box]:
    """Cut a tensor into up to `cuts + 1` boxes, one random cut of one random box after another."""
    boxes: list[Box] = [(tuple(0 for _ in shape), shape)]
    for _ in range(cuts):
        begin, size = boxes.pop(rng.randrange(len(boxes)))
        wide = [d for d, n in enumerate(size) if n > 1]
        if not wide:
            boxes.append((begin, size))
            continue
        d = rng.choice(wide)
        at = rng.randrange(1, size[d])
        boxes.append((begin, (*size[:d], at, *size[d + 1 :])))
        boxes.append(((*begin[:d], begin[d] + at, *begin[d + 1 :]), (*size[:d], size[d] - at, *size[d + 1 :])))
    rng.shuffle(boxes)
    return boxes


def write(folder: Path, state: Mapping[str, torch.Tensor], cuts: int = 0, files: int = 1, seed: int = 0) -> Metadata:
    """Write tensors, by flat names, as a distributed checkpoint in random pieces; returns what its `.metadata` says."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    streams = [io.BytesIO() for _ in range(files)]
    pieces = []
    for name, tensor in state.items():
        boxes = cut(tuple(tensor.shape), cuts, rng)
        chunks = [ChunkStorageMetadata(torch.Size(begin), torch.Size(size)) for begin, size in boxes]
        entries[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.size(), chunks)
        pieces += [(name, tensor, begin, size) for begin, size in boxes]
    rng.shuffle(pieces)
    for name, tensor, begin, size in pieces:
        part = tensor.detach()[tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))].clone()
        if part.dim() > 1 and rng.random() < 0.3:
            part = part.transpose(0, -1).contiguous().transpose(0, -1)  # stored column by column
        number = rng.randrange(files)
        offset = streams[number].tell()
        torch.save(part, streams[number])
        length = streams[number].tell() - offset
        places[MetadataIndex(name, begin)] = _StorageInfo(f"__{number}_0.distcp", offset, length)
    for number, stream in enumerate(streams):
        (folder / f"__{number}_0.distcp").write_bytes(stream.getvalue())
    metadata = Metadata(entries, None, places)
    write_metadata(folder, metadata)
    return metadata


def write_metadata(folder: Path, metadata: Any) -> None:
    """Write the file `.metadata`."""
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def load(folder: Path, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what torch loads for tensors of these names, shapes and dtypes."""
    found = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(found, checkpoint_id=str(folder))
    return found


def save(state: dict[str, Any], folder: Path) -> Path:
    """Save a nested state dict in one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=str(folder))
    return folder


PROLOGUE = """
import os, sys, warnings
warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
mesh = init_device_mesh("cpu", (world,))
"""


def run_processes(code: str, folder: Path, world: int = 2) -> None:
    """Run a script with `rank`, `world` and `mesh` in processes of one gloo group, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    script = PROLOGUE + textwrap.dedent(code) + "\ndist.destroy_process_group()\n"
    command = [sys.executable, "-c", script]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(folder / "rendezvous")],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    (folder / "rendezvous").unlink(missing_ok=True)
    assert [process.returncode for process in started] == [0] * world, "\n".join(said)

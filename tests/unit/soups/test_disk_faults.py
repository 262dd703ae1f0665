"""A disk that is full, broken, read-only or limited at any write of a command.

The command fails with a sentence and leaves nothing half-written; once the disk works, its rerun gives the same result.
`python -m tests.benchmarks disk` lets every write of every command fail; here every write of the short ones fails, and a
sample of the others.
"""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ray_soup.errors import DiskError, SoupError
from ray_soup.io.disk import replacing
from ray_soup.soups.finished import verify
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.run import run
from ray_soup.tune import demo
from tests import tiny
from tests.conftest import ROOT, put
from tests.disk_sweep import ERRORS, Command, check_faults, commands_of, fail, in_this_process, on, without_data
from tests.faults import FaultyDisk, faulty


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with in_this_process():
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def commands(zoo: Path, inputs: Path) -> dict[str, Command]:
    with in_this_process():
        return commands_of(zoo, inputs)


@pytest.mark.parametrize("name", ["uniform", "bake", "verify and evaluate"])
def test_some_failed_writes(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    check_faults(commands[name], tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "bake", "verify and evaluate"])
def test_every_failed_write(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    assert check_faults(commands[name], tmp_path) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learn", "greedy", "compare", "search", "finetune"])
def test_failed_writes_at_even_distances(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    check_faults(commands[name], tmp_path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "bake", "verify and evaluate", "learn", "search", "finetune"])
def test_a_disk_that_fails_from_some_write_on(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    check_faults(commands[name], tmp_path, 6, 1 << 60)


def test_every_failed_write_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own: what follows is `finetune` and `compare`."""
    monkeypatch.setattr(demo.np, "loadtxt", lambda *_, **__: np.zeros((30, 785), np.uint8))
    monkeypatch.setattr("ray_soup.tune.finetune.finetune", lambda *_, **__: None)
    monkeypatch.setattr("ray_soup.soups.compare.compare", lambda *_, **__: None)

    def command(folder: Path) -> dict[str, bytes]:
        demo.demo(folder / "out")
        return {file.name: file.read_bytes() for file in (folder / "out" / "data").iterdir()}

    assert check_faults(command, tmp_path) > 10


@pytest.mark.slow
def test_every_failed_write_of_the_copy_of_a_remote_soup(
    commands: dict[str, Command], inputs: Path, s3: str, tmp_path: Path
) -> None:
    """`verify` reads a soup in remote storage from a copy in the cache."""
    put(inputs / "whole", f"{s3}/whole")
    assert check_faults(lambda _: verify(f"{s3}/whole"), tmp_path) > 50


SCRIPT = """
import sys
from ray_soup.cli import main
main(["uniform", sys.argv[1], sys.argv[2]])
"""


@pytest.fixture
def recipe_file(zoo: Path, tmp_path: Path) -> Path:
    import yaml

    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": tiny.SPEC, "ingredients": paths}))
    return file


def call(recipe: Path, out: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `ray-soup uniform` in a process of its own."""
    command = [sys.executable, "-c", SCRIPT, str(recipe), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_named(recipe_file: Path, tmp_path: Path) -> None:
    """`ulimit -f`: the model has 19 KB, the other files less."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))

    done = call(recipe_file, tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert f"{tmp_path}/out/state/out/model.safetensors could not be written (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert call(recipe_file, tmp_path / "out").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "learn"])
def test_a_small_disk_is_named(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    """Disks of a few KB or a few inodes; output and cache of a run take more. The heartbeats of the lease fail, too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "right").mkdir()
    limits = ["size=4k", "size=16k", "size=28k", "nr_inodes=4", "nr_inodes=8"]
    with on(tmp_path / "right"):
        right = commands[name](tmp_path / "right")
    for limit in limits:
        command = ["mount", "-t", "tmpfs", "-o", limit, "none", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        try:
            with in_this_process(beat_s=0.1):
                _, sentence, _ = fail(commands[name], disk, errno.EIO, -1, 0)
                assert sentence is not None, limit
                assert str(disk) in sentence
                assert "No space left on device" in sentence or "GB free" in sentence
                assert not (disk / "out" / "model.safetensors").exists()
                subprocess.run(["mount", "-o", "remount,size=16m,nr_inodes=1000", str(disk)], check=True)
                assert fail(commands[name], disk, errno.EIO, -1, 0)[2] == right
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_failed_writes_of_a_local_mirror(zoo: Path, s3: str, tmp_path: Path) -> None:
    """OUT is a URI: the sentence names the copy on this disk, and the rerun ends with a soup that passes `verify`."""

    def at(out: str) -> Command:
        return lambda _: run(without_data(zoo), out)

    disk, sentence, _ = fail(at(f"{s3}/right"), tmp_path, errno.EIO, -1, 0)
    assert sentence is None
    step = disk.count // 6
    for number, fails_at in zip(ERRORS * 2, range(step // 2, disk.count, step), strict=False):
        out = f"{s3}/{fails_at}"
        faulted, sentence, _ = fail(at(out), tmp_path, number, fails_at)
        if sentence is not None:
            assert str(tmp_path) in sentence, faulted.calls[fails_at]
        with on(tmp_path):
            at(out)(tmp_path)
            verify(out)


def test_failed_writes_of_a_curve_are_named(tmp_path: Path) -> None:
    """No write happens in a thread, whose failure nobody would see."""
    state = SimpleNamespace(curve=[{"steps": n, "select_nll": float(n)} for n in range(3)])
    disk = FaultyDisk([tmp_path])
    with faulty(disk):
        scalars(tmp_path / "counted" / "board")(3, 3, state)  # type: ignore[arg-type]
    assert disk.count > 10
    for fails_at in range(disk.count):
        board = tmp_path / str(fails_at) / "board"
        with (
            faulty(FaultyDisk([board.parent], errno.ENOSPC, fails_at)),
            pytest.raises(SoupError, match=f"{board} could not be written .*Free some disk space"),
        ):
            scalars(board)(3, 3, state)  # type: ignore[arg-type]


def test_every_failed_write_of_a_torch_archive_is_named(tmp_path: Path) -> None:
    """After a failed write `torch.save` raises a RuntimeError about positions in its archive."""
    file = tmp_path / "a.state"

    def save(fails_at: int) -> FaultyDisk:
        with faulty(FaultyDisk([tmp_path], errno.ENOSPC, fails_at)) as disk, replacing(file) as stream:
            torch.save({"a": torch.arange(9), "b": torch.ones(3)}, stream)
        return disk

    writes = save(-1).count
    file.unlink()
    for fails_at in range(writes):
        with pytest.raises(DiskError, match=rf"^{file} could not be written \(No space left on device\)\. Free"):
            save(fails_at)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(commands: dict[str, Command], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    _, sentence, _ = fail(commands["uniform"], tmp_path, errno.EIO, -1, 0)
    assert sentence is not None
    assert "Permission denied" in sentence

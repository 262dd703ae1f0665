"""A disk that is full, broken, read-only or limited at any write of a command.

The command fails with a sentence and leaves nothing half-written; once the disk works, its rerun is bit-identical.
"""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ray_soup.actors.in_process import InProcessPool
from ray_soup.actors.messages import Mesh
from ray_soup.errors import SoupError, explain
from ray_soup.io import lease
from ray_soup.io.cache import cache_at
from ray_soup.mixing.coefficients import load_coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups import session
from ray_soup.soups.compare import compare
from ray_soup.soups.finished import bake_copy, verify
from ray_soup.soups.output import COEFFICIENTS
from ray_soup.soups.report.tensorboard import scalars
from ray_soup.soups.run import run
from tests import tiny
from tests.conftest import ROOT, values
from tests.faults import FaultyDisk, faulty

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EFBIG, errno.EDQUOT)
Command = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _actors_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(recipe: Any, ingredients: Any, mesh: Mesh, cpus: float) -> InProcessPool:
        return InProcessPool(recipe, ingredients, mesh, 1)

    monkeypatch.setattr(lease, "BEAT_S", 0.1)  # heartbeats write, and fail, too
    monkeypatch.setattr(session, "connect", nullcontext)
    monkeypatch.setattr(session, "RayPool", pool)
    monkeypatch.setattr(session, "resolve_mesh", lambda *_, **__: (Mesh(1, 1), 1.0))
    monkeypatch.setattr(session, "has_room", lambda *_: True)
    monkeypatch.setattr(session, "memory_of_each", lambda *_: 1 << 40)


@pytest.fixture(scope="module")
def commands(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """The commands, each a function of the folder that it writes."""
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    plain = make_recipe({"method": "uniform", "model": tiny.SPEC, "ingredients": paths, "shard_size": "10KB"})
    small = values(zoo, ingredients=paths, learn__epochs=1, learn__batch_size=150)
    whole = tmp_path_factory.mktemp("whole") / "out"
    run(plain, whole)
    return {
        "uniform": lambda out: run(plain, out),
        "bake": lambda out: bake_copy(whole, out),
        "learn": lambda out: run(make_recipe(small), out),
        "greedy": lambda out: run(make_recipe({**small, "method": "greedy"}), out),
        "compare": lambda out: compare(make_recipe(small), out),
    }


def digests(out: Path) -> dict[str, str]:
    """The digests of the files of the model, and of its coefficients."""
    found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("model*")}
    values = load_coefficients(out / COEFFICIENTS).values
    return {**found, COEFFICIENTS: hashlib.sha256(values.tobytes()).hexdigest()}


def fail_once(command: Command, folder: Path, number: int, fails_at: int, lasts: int) -> tuple[FaultyDisk, str | None]:
    """Run a command with a new cache on a disk whose write `fails_at` fails; return the disk, and what a failure says."""
    disk = FaultyDisk([folder], number, fails_at, lasts)
    try:
        with cache_at(folder / "cache"), faulty(disk):
            command(folder / "out")
    except Exception as error:
        sentence, code = explain(error)
        assert code in (1, 2), sentence
        assert "Unexpected error" not in sentence, sentence
        return disk, sentence
    return disk, None


def check_fault(command: Command, right: dict[str, str], folder: Path, number: int, fails_at: int, lasts: int) -> None:
    disk, sentence = fail_once(command, folder, number, fails_at, lasts)
    out = folder / "out"
    if fails_at >= disk.count:  # the number of heartbeats varies
        shutil.rmtree(folder)
        return
    failed = disk.calls[fails_at]
    if sentence is None:  # a file that nobody needs, such as a heartbeat
        assert digests(out) == right, failed
    else:
        assert str(folder) in sentence, f"{failed}: {sentence}"
        assert not (out / "run.json").exists() or '"exit": 0' not in (out / "run.json").read_text(), failed
        left = [f for f in folder.rglob("*.tmp*") if f.is_file() and "cache" not in f.parts]
        assert left == [] or lasts > 1 or failed.startswith("unlink"), failed  # a broken disk cannot be tidied up
        with cache_at(folder / "cache"):
            command(out)
    assert digests(out) == right, failed
    if lasts == 1 and fails_at % 5 == 0:
        verify(out)
    shutil.rmtree(folder)


def all_faults(command: Command, tmp_path: Path, sample: int | None, lasts: int = 1) -> None:
    """Let every write fail, or `sample` of them at even distances."""
    disk, sentence = fail_once(command, tmp_path / "right", errno.EIO, -1, 0)
    assert sentence is None
    right = digests(tmp_path / "right" / "out")
    assert len(right) >= 2
    step = 1 if sample is None else max(1, disk.count // sample)
    for fails_at in range(step // 2, disk.count, step):
        (tmp_path / "one").mkdir()
        check_fault(command, right, tmp_path / "one", ERRORS[fails_at % len(ERRORS)], fails_at, lasts)


@pytest.mark.parametrize("name", ["uniform", "bake"])
def test_some_failed_writes(commands: dict[str, Command], tmp_path: Path, name: str) -> None:
    all_faults(commands[name], tmp_path, 6)


@pytest.mark.slow
@pytest.mark.parametrize("lasts", [1, 1 << 60], ids=["once", "from then on"])
@pytest.mark.parametrize("name", ["uniform", "bake"])
def test_every_failed_write(commands: dict[str, Command], tmp_path: Path, name: str, lasts: int) -> None:
    all_faults(commands[name], tmp_path, None, lasts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sample"), [("learn", 10), ("greedy", 10), ("compare", 4)])
def test_failed_writes_of_a_run_with_actors(commands: dict[str, Command], tmp_path: Path, name: str, sample: int) -> None:
    all_faults(commands[name], tmp_path, sample)


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
    """Disks of a few KB or a few inodes; output and cache of a run take more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    limits = ["size=4k", "size=16k", "size=28k", "nr_inodes=4", "nr_inodes=8"]
    with cache_at(tmp_path / "cache"):
        commands[name](tmp_path / "right")
    for limit in limits:
        command = ["mount", "-t", "tmpfs", "-o", limit, "none", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a file system")
        try:
            _, sentence = fail_once(commands[name], disk, errno.EIO, -1, 0)
            assert sentence is not None, limit
            assert str(disk) in sentence
            assert "No space left on device" in sentence or "GB free" in sentence
            assert not (disk / "out" / "model.safetensors").exists()
            subprocess.run(["mount", "-o", "remount,size=16m,nr_inodes=1000", str(disk)], check=True)
            fail_once(commands[name], disk, errno.EIO, -1, 0)
            assert digests(disk / "out") == digests(tmp_path / "right")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_failed_writes_of_a_local_mirror(commands: dict[str, Command], s3: str, tmp_path: Path) -> None:
    """OUT is a URI: the sentence names the copy on this disk, and the rerun ends with a soup that passes `verify`."""
    disk, sentence = fail_once(lambda _: commands["uniform"](f"{s3}/right"), tmp_path, errno.EIO, -1, 0)
    assert sentence is None
    step = disk.count // 6
    for number, fails_at in zip(ERRORS * 2, range(step // 2, disk.count, step), strict=False):
        out = f"{s3}/{fails_at}"
        faulted, sentence = fail_once(lambda _, out=out: commands["uniform"](out), tmp_path, number, fails_at, 1)
        if sentence is not None:
            assert str(tmp_path) in sentence, faulted.calls[fails_at]
        with cache_at(tmp_path / "cache"):
            commands["uniform"](out)
            verify(out)


def test_failed_writes_of_a_curve_are_named(tmp_path: Path) -> None:
    """No write happens in a thread, whose failure nobody would see."""
    state = SimpleNamespace(curve=[{"steps": n, "select_nll": float(n)} for n in range(3)])
    disk = FaultyDisk([tmp_path])
    with faulty(disk):
        scalars(tmp_path / "board")(3, 3, state)  # type: ignore[arg-type]
    assert disk.count > 10
    for fails_at in range(disk.count):
        shutil.rmtree(tmp_path / "board", ignore_errors=True)
        with (
            faulty(FaultyDisk([tmp_path], errno.ENOSPC, fails_at)),
            pytest.raises(SoupError, match=f"{tmp_path}/board could not be written .*Free some disk space"),
        ):
            scalars(tmp_path / "board")(3, 3, state)  # type: ignore[arg-type]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(commands: dict[str, Command], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    _, sentence = fail_once(commands["uniform"], tmp_path, errno.EIO, -1, 0)
    assert sentence is not None
    assert "Permission denied" in sentence

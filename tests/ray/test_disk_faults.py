"""A disk that fails under `finetune` and `search`, in this process and in those that Ray starts."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from ray_soup.errors import DiskError, SoupError, explain
from ray_soup.recipe import Recipe, make_recipe
from ray_soup.tune.finetune import finetune
from ray_soup.tune.search import search
from tests.conftest import values
from tests.disk_sweep import digests
from tests.faults import faulty_workers

FOREVER = 1 << 60


def tuned(zoo: Path) -> Recipe:
    data = {"train": str(zoo / "train.npz"), "fit": str(zoo / "heldout.npz")}
    options = {"trials": 3, "epochs": 1, "randaugment": 0, "init": str(zoo / "zoo" / "model_0.safetensors")}
    return make_recipe(values(zoo, model="tests.faults:build", data=data, finetune=options))


def searched(zoo: Path) -> Recipe:
    paths = [str(zoo / "zoo" / f"model_{k}.safetensors") for k in range(3)]
    options = {"learn.lr": {"grid": [0.03]}, "scheduler": "none"}
    return make_recipe(values(zoo, model="tests.faults:build", ingredients=paths, search=options))


@pytest.mark.slow
def test_a_training_run_that_cannot_write_fails_finetune_and_is_repeated(zoo: Path, tmp_path: Path, cluster: None) -> None:
    """A zoo with fewer checkpoints than asked for would be the result of a full disk."""
    right = finetune(tuned(zoo), tmp_path / "right")
    out = tmp_path / "out"
    with (
        faulty_workers(out, 3, FOREVER, in_all=False),
        pytest.raises(
            DiskError, match=rf"^{out}/state/trials/\w+\.state could not be written \(No space left on device\)\. Free"
        ),
    ):
        finetune(tuned(zoo), out)
    assert not (out / "manifest.json").exists()
    assert finetune(tuned(zoo), out) == right


@pytest.mark.slow
def test_trials_that_cannot_write_fail_the_search_and_are_repeated(zoo: Path, tmp_path: Path, cluster: None) -> None:
    search(searched(zoo), tmp_path / "right")
    out = tmp_path / "out"
    with (
        faulty_workers(out, 3, FOREVER),
        pytest.raises(
            DiskError, match=rf"^{out}/state/trials/\w+\.pt could not be written \(No space left on device\)\. Free"
        ),
    ):
        search(searched(zoo), out)
    assert json.loads((out / "run.json").read_text())["exit"] == 1
    search(searched(zoo), out)
    assert digests(out) == digests(tmp_path / "right")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["8k", "40k"])
def test_a_small_disk_is_named(zoo: Path, tmp_path: Path, cluster: None, size: str) -> None:
    """Ray Tune writes to it, too: the state of the experiment."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises((SoupError, OSError)) as failed:
            finetune(tuned(zoo), disk / "out")
        sentence, code = explain(failed.value)
        assert code in (1, 2)
        assert re.match(rf"{disk}/out/?\S* .*(No space left on device|files of Ray Tune are incomplete)", sentence), sentence
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert len(finetune(tuned(zoo), disk / "out")) == 3
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

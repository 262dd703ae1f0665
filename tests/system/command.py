"""The command in this process, and zoos to break."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from ray_soup.cli import main
from tests.conftest import ROOT, kill_tree

Command = Callable[..., subprocess.CompletedProcess[str]]
IN_CHILD = """
import json, sys
from ray_soup.actors.ray_session import connect
from tests.system.command import call

with connect():
    for line in sys.stdin:
        done = call(*json.loads(line))
        print(json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""


def call(*arguments: str | Path) -> Result:
    """Run `ray-soup` in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


@contextmanager
def commands_in(environment: dict[str, str]) -> Iterator[Command]:
    """Run `ray-soup` in a child process with another environment; one process, and one local Ray, for several commands."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_CHILD], env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
        process.stdin.flush()
        return subprocess.CompletedProcess(arguments, *json.loads(process.stdout.readline()))

    try:
        yield command
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(180) == 0
    finally:
        if process.poll() is None:
            kill_tree(process)


def write_recipe(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def change_ingredient(folder: Path, k: int, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Apply `change` to the state dict of zoo/model_k in `folder`."""
    path = folder / "zoo" / f"model_{k}.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)

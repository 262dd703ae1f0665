"""Whole commands, from their start to their exit, on files of ViT-B/32 size in the page cache.

`uniform` takes turns with a plain loop over the files, its `import torch` included, and with mergekit if `mergekit-pytorch`
is on the PATH. All write the mean to the same disk.

python -m tests.benchmarks commands                         # 24 files, 8.5 GB
python -m tests.benchmarks commands --files 8 --rounds 2    # for a look
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import yaml

from tests.benchmarks.ingredients import MODEL, write_zoo

HEADERS = 72
"""Files that `inspect` reads: the headers are those of the first file, and the data are holes."""
PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
*files, out = sys.argv[1:]
total = {}
for file in files:
    for name, tensor in load_file(file).items():
        total[name] = total[name].add_(tensor) if name in total else tensor.clone()
save_file({name: tensor.div_(len(files)) for name, tensor in total.items()}, out)
"""


def seconds(command: Sequence[object], cache: Path) -> float:
    """Run a command that must succeed; return its wall time."""
    environment = {**os.environ, "RAY_SOUP_CACHE": str(cache)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
    start = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def write_headers(file: Path, folder: Path) -> None:
    """Write HEADERS files with the header and the size of `file`."""
    folder.mkdir()
    with open(file, "rb") as source:
        begin = source.read(8)
        begin += source.read(struct.unpack("<Q", begin)[0])
    for k in range(HEADERS):
        with open(folder / f"model_{k}.safetensors", "wb") as target:
            target.write(begin)
            target.truncate(file.stat().st_size)


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest absolute difference between two files of the same tensors."""
    from safetensors.torch import load_file

    theirs = load_file(other)
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in load_file(one).items())


def options_in(arguments: list[str]) -> argparse.Namespace:
    """Read the options of this benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks commands", description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=24, help="number of ingredients")
    parser.add_argument("--rounds", type=int, default=3, help="rounds after a first one that warms up")
    return parser.parse_args(arguments)


def main() -> dict[str, float]:
    """Write the files, and time every command in turns."""
    options = options_in(sys.argv[sys.argv.index("commands") + 1 :])
    folder = Path(tempfile.mkdtemp(prefix="ray_soup_commands"))
    try:
        (folder / "zoo").mkdir()
        write_zoo(folder / "zoo", MODEL, options.files)
        os.sync()  # so that writing the files is not measured
        return measured(folder, options.rounds)
    finally:
        shutil.rmtree(folder)


def measured(folder: Path, rounds: int) -> dict[str, float]:
    """Time the commands on the files in `folder`/zoo; return medians over rounds."""
    ours, cache, out = [sys.executable, "-m", "ray_soup.cli"], folder / "cache", folder / "out"
    files = sorted((folder / "zoo").iterdir())
    write_headers(files[0], folder / "headers")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"ingredients": str(folder / "zoo"), "model": MODEL}))
    merge = {"merge_method": "linear", "dtype": "float32"}
    models = [{"model": str(file), "parameters": {"weight": 1.0}} for file in files]
    (folder / "merge.yaml").write_text(yaml.safe_dump({**merge, "models": models}))
    commands: dict[str, list[object]] = {
        "uniform": [*ours, "uniform", folder / "recipe.yaml", out],
        "plain loop": [sys.executable, "-c", PLAIN, *files, folder / "plain.out"],
        "verify": [*ours, "verify", out],
        "bake": [*ours, "bake", out, folder / "again"],
        f"inspect, {HEADERS} files": [*ours, "inspect", folder / "headers"],
        "--help": [*ours, "--help"],
    }
    if mergekit := shutil.which("mergekit-pytorch"):
        commands["mergekit"] = [mergekit, folder / "merge.yaml", folder / "merged"]
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for old in (out, folder / "again", folder / "merged"):
            shutil.rmtree(old, ignore_errors=True)
        (folder / "plain.out").unlink(missing_ok=True)
        for name, command in commands.items():
            times[name].append(seconds(command, cache))
    found = {f"{name} (s)": median(some[1:]) for name, some in times.items()}
    found["uniform, the first of a model and an empty cache (s)"] = times["uniform"][0]
    pairs = {name: [a / b for a, b in zip(times["uniform"][1:], times[name][1:], strict=True)] for name in times}
    found |= {f"uniform / {name}": median(pairs[name]) for name in ("plain loop", "mergekit") if name in pairs}
    found["largest difference from the plain loop"] = largest_difference(out / "model.safetensors", folder / "plain.out")
    return found

"""Golden hashes: the numbers of a fixed set of runs, bit for bit, to compare before and after a refactoring.

    python -m tests.benchmarks.golden            # run everything and compare with golden.json
    python -m tests.benchmarks.golden --write    # run everything and replace golden.json
    python -m tests.benchmarks.golden --only digits,resumed

Each case runs the `ray-soup` command on real files: the demo zoo, the digits zoo, a two-shard mesh, a run that is killed
and resumed, a zoo with BatchNorm layers, and a search. For every tensor of every `coefficients.safetensors` and
`model.safetensors`, golden.json holds a SHA-256 of dtype, shape and bytes; for `results.jsonl` it holds a SHA-256 of its
rows without times and memory. Bits depend on the processor: hashes are compared only on the model that wrote them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from ray_soup.io.claims import state_of

HASHES = Path(__file__).with_name("golden.json")
MEASURED = ("seconds", "peak_memory_bytes")  # of results.jsonl; the rest must not change
SINCE_0_2 = ("kind", "name")  # keys that the rows did not have when the hashes were made
DEMO = {
    "model": "ray_soup.demo:digits_vit",
    "precision": "float32",
    "actors": {"replicas": 1, "shards": 2, "cpus": 1},
    "finetune": {
        "trials": 6,
        "lr": {"loguniform": [1e-3, 5e-3]},
        "wd": {"loguniform": [1e-4, 0.3]},
        "epochs": {"randint": [3, 6]},
        "trunk": {"epochs": 8},
        "label_smoothing": {"choice": [0.0, 0.1]},
        "mixup": {"choice": [0.0, 0.2]},
        "shift": {"choice": [0, 1, 2]},
        "randaugment": 0,
    },
}


def processor() -> str:
    """The model name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def command(*arguments: str) -> list[str]:
    """`ray-soup` with these arguments, as a child process runs it."""
    return [sys.executable, "-m", "ray_soup.cli", *arguments]


def ray_soup(*arguments: str) -> None:
    """Run `ray-soup` and fail loudly."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"ray-soup {' '.join(arguments)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")


def write_recipe(folder: Path, **values: Any) -> str:
    """A recipe for the digits zoo in `folder`; returns its path."""
    recipe = {
        "ingredients": "zoo/*.safetensors",
        "model": "tests.tiny:build",
        "data": {"fit": "heldout.npz", "select": 0.25, "test": "test.npz"},
        "learn": {"batch_size": 61, "epochs": 2},
        "actors": {"replicas": 1, "shards": 1, "cpus": 1},
        "precision": "float32",
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, **values}))
    return str(file)


def make_digits(folder: Path, build: str = "build", count: int = 8) -> None:
    """The digits zoo of the tests, made by a child process so that its random state is its own."""
    (folder / "zoo").mkdir(parents=True)
    script = (
        "import sys; from pathlib import Path; from tests import tiny; folder = Path(sys.argv[1]); "
        "tiny.write_data(folder); tiny.write_zoo(folder / 'zoo', int(sys.argv[3]), getattr(tiny, sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), build, str(count)], check=True)


def demo(folder: Path) -> list[Path]:
    """The demo's data and model: a zoo fine-tuned on the spot, and every soup of it on a mesh of two shards."""
    script = "import sys; from pathlib import Path; {}; write_digits(Path(sys.argv[1]))"
    for module in ("ray_soup.tune.demo", "ray_soup.demo"):
        code = script.format(f"from {module} import write_digits")
        done = subprocess.run([sys.executable, "-c", code, str(folder / "data")], capture_output=True, check=False)
        if done.returncode == 0:
            break
    else:
        sys.exit("write_digits was not found")
    data = {"train": "data/train.npz", "fit": "data/heldout.npz", "test": "data/test.npz"}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**DEMO, "ingredients": "zoo/*.safetensors", "data": data}))
    ray_soup("finetune", str(recipe), str(folder / "zoo"))
    ray_soup("compare", str(recipe), str(folder / "soups"), "learn.epochs=2")
    return [folder / "zoo", folder / "soups"]


def digits(folder: Path) -> list[Path]:
    """Each method on its own, and the whole comparison, on the digits zoo."""
    make_digits(folder)
    recipe = write_recipe(folder)
    outs = []
    for name, arguments in {
        "uniform": ("uniform",),
        "best": ("best-single",),
        "greedy": ("greedy",),
        "learned": ("learn", "--method", "learned"),
        "learned_plus": ("learn", "--method", "learned+"),
        "mehl": ("learn", "--method", "mehl"),
        "mehl_plus_batches": ("learn", "--method", "mehl+", "learn.model_batch=3", "out_dtype=bfloat16"),
    }.items():
        verb, *options = arguments
        overrides = [o for o in options if "=" in o]
        flags = [o for o in options if "=" not in o]
        ray_soup(verb, recipe, str(folder / name), *overrides, *flags)
        outs.append(folder / name)
    ray_soup("compare", recipe, str(folder / "all"), "--seeds", "2", "--drop-top", "0,1", "--by-count", "3,5")
    ray_soup("bake", str(folder / "greedy"), str(folder / "again"))
    return [*outs, folder / "all", folder / "again"]


def mesh(folder: Path) -> list[Path]:
    """Two shards of one replica, and two replicas."""
    make_digits(folder)
    recipe = write_recipe(folder)
    ray_soup("learn", recipe, str(folder / "shards"), "actors.shards=2", "learn.model_batch=5")
    ray_soup("learn", recipe, str(folder / "replicas"), "actors.replicas=2", "directions.dtype=float32")
    return [folder / "shards", folder / "replicas"]


def resumed(folder: Path) -> list[Path]:
    """A run that gets SIGKILL after some epochs, and the same command again."""
    make_digits(folder)
    recipe, out = write_recipe(folder, learn={"batch_size": 16, "epochs": 12, "model_batch": 4}), folder / "killed"
    process = subprocess.Popen(command("learn", recipe, str(out)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (steps := steps_saved(state_of(out) / "learn.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    kill_tree(process)
    if not steps:
        sys.exit("the run saved no step before it ended: nothing was resumed")
    ray_soup("learn", recipe, str(out))
    ray_soup("learn", recipe, str(folder / "undisturbed"))
    return [out, folder / "undisturbed"]


def steps_saved(file: Path) -> int:
    """Steps in a state file; 0 before there is one."""
    try:
        return int(torch.load(file, weights_only=True)["steps"])
    except (FileNotFoundError, RuntimeError, EOFError):
        return 0


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL for a command and everything it started."""
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=20)


def batchnorm(folder: Path) -> list[Path]:
    """Running statistics re-estimated on fit, and a soup written in several files."""
    make_digits(folder, "build_conv", 5)
    recipe = write_recipe(folder, model="tests.tiny:build_conv", shard_size=4000)
    ray_soup("uniform", recipe, str(folder / "uniform"))
    ray_soup("learn", recipe, str(folder / "mehl"))
    ray_soup("greedy", recipe, str(folder / "greedy"))
    return [folder / "uniform", folder / "mehl", folder / "greedy"]


def search(folder: Path) -> list[Path]:
    """Ray Tune over learning rate and model batch."""
    make_digits(folder)
    recipe = write_recipe(folder, search={"trials": 3, "scheduler": "none"})
    ray_soup("search", recipe, str(folder / "search"))
    return [folder / "search"]


CASES: dict[str, Callable[[Path], list[Path]]] = {
    "digits": digits, "mesh": mesh, "resumed": resumed, "batchnorm": batchnorm, "search": search, "demo": demo
}  # fmt: skip


def hashes_of(out: Path) -> dict[str, str]:
    """A hash for each tensor of the safetensors files in `out`, and one for the rows of results.jsonl."""
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                tensor = tensors.get_tensor(name).contiguous()
                digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
                found[f"{file.name}:{name}"] = digest.hexdigest()[:16]
    results = out / "results.jsonl"
    if results.exists():
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        rows = [row for row in rows if row.get("kind") not in ("mean", "dropped", "counted")]  # the hashes are older
        if len(rows) == 2 and rows[1]["model_name"] == "best_single":  # beside a soup since 0.2; the hashes are older
            rows = rows[:1]
        kept = [{k: v for k, v in row.items() if k.removesuffix("_sd") not in (*MEASURED, *SINCE_0_2)} for row in rows]
        text = json.dumps(kept, sort_keys=True)
        found["results.jsonl"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


def run_case(name: str, folder: Path) -> dict[str, dict[str, str]]:
    """Run one case below `folder`; the hashes of each of its output folders."""
    folder.mkdir(parents=True)
    return {out.name: hashes_of(out) for out in CASES[name](folder)}


def main() -> dict[str, float]:
    """Compare this code with golden.json; returns the number of tensors compared and of differences, by case."""
    parser = argparse.ArgumentParser(description="Compare the numbers of fixed runs, bit for bit, with golden.json.")
    parser.add_argument("--write", action="store_true", help="replace golden.json")
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    options, _ = parser.parse_known_args()
    known = json.loads(HASHES.read_text()) if HASHES.exists() else {"processor": None, "cases": {}}
    comparable = options.write or known["processor"] == processor()
    if not comparable:
        print(f"golden.json is of {known['processor']!r}, this machine is {processor()!r}: nothing is compared.")
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="golden", dir="/tmp") as temporary:
        os.environ["RAY_SOUP_CACHE"] = f"{temporary}/cache"
        os.environ.pop("RAY_ADDRESS", None)
        for name in options.only.split(","):
            started = time.monotonic()
            found = run_case(name, Path(temporary) / name)
            expected = known["cases"].get(name, {})
            count = sum(map(len, found.values()))
            if options.write:
                known["cases"][name], known["processor"] = found, processor()
                HASHES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            elif comparable:
                different = [
                    f"{out}/{key}"
                    for out, keys in {**expected, **found}.items()
                    for key in keys
                    if expected.get(out, {}).get(key) != found.get(out, {}).get(key)
                ]
                result[f"{name}: differences"] = len(different)
                for line in different[:8]:
                    print(f"  differs: {name}/{line}")
            result[f"{name}: hashes"] = count
            print(f"{name}: {count} hashes in {time.monotonic() - started:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    sys.exit(1 if any(value for key, value in main().items() if "differences" in key) else 0)

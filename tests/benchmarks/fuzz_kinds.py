"""The kinds of files that ray_soup reads, each with files to damage, a command that reads them, and a check of its result.

The check never uses ray_soup's own readers: safetensors, torch, numpy, pyarrow, datasets and torchvision say what is right.
"""

from __future__ import annotations

import io
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import distributed
from tests.benchmarks.mutations import BINARY, Mutation, edit_json, edit_safetensors, edit_yaml
from tests.tiny import Tiny, digits

State = dict[str, torch.Tensor]
MODEL = "tests.benchmarks.fuzz_kinds:build"
CONTAINERS = ("state_dict", "model")


@dataclass(frozen=True)
class Kind:
    """One kind of input."""

    build: Callable[[Path], None]
    """Fills an empty folder."""
    files: tuple[str, ...]
    """The files to damage, relative to the folder."""
    command: Callable[[Path], None]
    """Reads them; raises SystemExit or an exception, as the command line does."""
    check: Callable[[Path], None]
    """Raises AssertionError if the result of `command` is wrong."""
    mutations: tuple[Mutation, ...] = BINARY
    may_fail: bool = False
    """Whether exit 1 is an answer too: `verify` says that a soup was changed."""
    names_file: bool = True
    """Whether the message must name the damaged file or its folder."""
    also_named: str = "\0"
    """Another text that names the cause well enough."""
    undamaged: tuple[str, ...] = ("right",)
    """What the command may answer if nothing is damaged."""


def build() -> tuple[torch.nn.Module, Callable[[Any], torch.Tensor]]:
    """Return the model and the preprocessing of images."""
    torch.manual_seed(0)
    return Tiny(), pixels


def pixels(image: Any) -> torch.Tensor:
    """Turn an image of 8 x 8 pixels into numbers from 0 to 16."""
    return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 15)


@cache
def states() -> tuple[State, ...]:
    """Return the state dicts of four models that differ a little."""
    torch.manual_seed(0)
    trunk = Tiny().state_dict()
    floats = {name for name, value in trunk.items() if value.is_floating_point() and name not in ("unused", "mean")}
    return tuple(
        {n: v + 0.05 * torch.randn(v.shape) if n in floats else v.clone() for n, v in trunk.items()} for _ in range(4)
    )


def command_line(*arguments: str | Path) -> None:
    """Run `ray-soup` in this process."""
    from ray_soup.cli import main

    main([str(a) for a in arguments], standalone_mode=True)


# Ingredients: a uniform soup of four, the second of which is damaged


def write_recipe(folder: Path, **keys: Any) -> None:
    recipe = {"ingredients": str(folder / "zoo"), "model": MODEL, **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def zoo_of(write: Callable[[State, Path], None]) -> Callable[[Path], None]:
    """Return a builder: `write` writes the second ingredient, the others are safetensors."""

    def fill(folder: Path) -> None:
        (folder / "zoo").mkdir()
        for name, state in zip("acd", (states()[k] for k in (0, 2, 3)), strict=True):
            save_file(state, folder / "zoo" / f"{name}.safetensors")
        write(states()[1], folder / "zoo")
        write_recipe(folder)

    return fill


def uniform(folder: Path) -> None:
    """Run `uniform` on the zoo of this copy of the folder."""
    command_line("uniform", folder / "recipe.yaml", folder / "out", f"ingredients={folder / 'zoo'}")


def their_state(path: Path) -> State:
    """Load an ingredient as its own library does."""
    if (path / ".metadata").exists():
        named = {f"model.{name}": value for name, value in states()[0].items()}
        return distributed.load(path, named)
    if path.is_dir():
        path = next(path / n for n in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors",
                                       "model.pt") if (path / n).exists())  # fmt: skip
    if path.name.endswith(".index.json"):
        where = json.loads(path.read_text())["weight_map"]
        shards = {shard: their_state(path.parent / shard) for shard in set(where.values())}
        return {name: shards[shard][name] for name, shard in where.items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([Namespace]):
        found = torch.load(path, map_location="cpu", weights_only=True)
    found = next((found[c] for c in CONTAINERS if isinstance(found.get(c), dict)), found)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def soup_is_uniform(folder: Path) -> None:
    """Compare the soup in `out` with the mean of what the libraries load from the ingredients that run.json lists."""
    out = folder / "out"
    record = json.loads((out / "run.json").read_text())
    assert record["exit"] == 0, record
    soup = their_state(out)
    theirs = [their_state(Path(entry["path"])) for entry in record["ingredients"]]
    prefixes = ("", "model.", "module.")
    for name, value in soup.items():
        same = [next(state[p + name] for p in prefixes if p + name in state) for state in theirs]
        if value.is_floating_point():
            expected = (sum(one.to(torch.float64) for one in same) / len(same)).to(value.dtype)
            assert torch.allclose(value, expected, rtol=1e-6, atol=1e-7), (
                f"{name}: {value.flatten()[:4]} for {expected.flatten()[:4]}"
            )
        else:
            assert torch.equal(value, same[0]), name
    assert set(soup) == set(states()[0]), set(soup) ^ set(states()[0])


def write_zip(state: State, zoo: Path) -> None:
    torch.save({"epoch": 3, "model": state, "args": Namespace(lr=0.1, name="x")}, zoo / "b.pt")


def write_views(state: State, zoo: Path) -> None:
    """Write tensors that are columns, rows that are repeated, and parts of larger storages."""
    views = {n: torch.stack([v, v + 3, v - 3], -1).unbind(-1)[0] if v.is_floating_point() else v for n, v in state.items()}
    views["embed.bias"] = state["embed.bias"].mean()[None].expand(state["embed.bias"].shape)
    views["head.weight"] = torch.complex(state["head.weight"] + 1, state["head.weight"]).imag
    torch.save(views, zoo / "b.pt")


def write_legacy(state: State, zoo: Path) -> None:
    torch.save(state, zoo / "b.pth", _use_new_zipfile_serialization=False)


def write_lightning(state: State, zoo: Path) -> None:
    named = {f"model.{name}": value for name, value in state.items()}
    torch.save({"state_dict": named, "hyper_parameters": {"lr": 0.1}, "epoch": 1}, zoo / "b.ckpt")


def write_sharded(state: State, zoo: Path, suffix: str, save: Callable[[State, Path], None], index: str) -> None:
    folder = zoo / "b"
    folder.mkdir()
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    where = {}
    for number, half in enumerate(halves):
        save({n: state[n] for n in half}, folder / f"part-{number}{suffix}")
        where |= dict.fromkeys(half, f"part-{number}{suffix}")
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def write_safetensors_shards(state: State, zoo: Path) -> None:
    write_sharded(state, zoo, ".safetensors", save_file, "model.safetensors.index.json")


def write_distributed(state: State, zoo: Path) -> None:
    """Write a distributed checkpoint in pieces, with the state of an optimizer."""
    named = {f"model.{name}": value for name, value in state.items()}
    moments = {f"optimizer.state.{name}.exp_avg": value for name, value in state.items()}
    distributed.write(zoo / "b", named | moments, cuts=2, files=2)


def write_bin_shards(state: State, zoo: Path) -> None:
    write_sharded(state, zoo, ".bin", torch.save, "pytorch_model.bin.index.json")


def write_tune(folder: Path) -> None:
    """Write an experiment as Ray Tune leaves it: three trials with two checkpoints each."""
    zoo, trials = folder / "zoo", []
    for k in range(3):
        trial = zoo / f"trial_{k}"
        reports = []
        for epoch in range(2):
            checkpoint = trial / f"checkpoint_{epoch:06}"
            checkpoint.mkdir(parents=True)
            save_file(states()[(k + epoch) % 4], checkpoint / "model.safetensors")
            reports.append(
                {
                    "accuracy": 0.5 + 0.1 * k - 0.05 * epoch,
                    "checkpoint_dir_name": checkpoint.name,
                    "training_iteration": epoch,
                }
            )
        (trial / "result.json").write_text("\n".join(map(json.dumps, reports)) + "\n")
        static = {"trial_id": f"t{k}", "status": "TERMINATED", "relative_logdir": trial.name, "config": {"lr": 0.1 * k}}
        trials.append([json.dumps(static), json.dumps({"last_result": reports[-1]})])
    (zoo / "experiment_state-2026-01-01_00-00-00.json").write_text(json.dumps({"trial_data": trials}))
    write_recipe(folder)


def best_of_tune(folder: Path) -> None:
    command_line("uniform", folder / "recipe.yaml", folder / "out", f"ingredients={folder / 'zoo'}?metric=accuracy&mode=max")


def by_recipe(folder: Path) -> None:
    command_line("uniform", folder / "recipe.yaml", folder / "out")


def whole_recipe(folder: Path) -> None:
    """Write a recipe with many keys, relative to its folder."""
    zoo_of(lambda state, zoo: save_file(state, zoo / "b.safetensors"))(folder)
    recipe = {
        "method": "uniform", "ingredients": "zoo/*.safetensors", "model": MODEL, "blocks": "tensor", "buffers": "average",
        "learn": {"lr": 0.01, "epochs": 5, "batch_size": 64, "seed": 1, "model_batch": "auto", "clip": None},
        "actors": {"replicas": 1, "cpus": 1}, "directions": {"dtype": "int8"}, "out_dtype": "keep",
        "search": {"trials": 4, "learn.lr": {"loguniform": [0.001, 0.1]}, "learn.model_batch": {"choice": [2, 4]}},
        "finetune": {"lr": {"loguniform": [1e-4, 1e-2]}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


# Data: an evaluation of one model, against a loop over what the data's own library loads


ROWS = 60


def pictures() -> list[Image.Image]:
    return [Image.fromarray((image * 15).astype(np.uint8)) for image in digits()[0][:ROWS]]


def labels() -> list[int]:
    return digits()[1][:ROWS].tolist()


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_of(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        (folder / "zoo").mkdir()
        save_file(states()[0], folder / "zoo" / "a.safetensors")
        write(folder)

    return fill


def write_npz(folder: Path) -> None:
    np.savez(folder / "data.npz", images=digits()[0][:ROWS].astype(np.float32), labels=np.array(labels()))


def write_compressed(folder: Path) -> None:
    np.savez_compressed(folder / "data.npz", images=digits()[0][:ROWS].astype(np.float32), labels=np.array(labels()))


def write_parquet(folder: Path) -> None:
    images = [{"bytes": png(image), "path": None} for image in pictures()]
    pq.write_table(pa.table({"image": images, "label": labels()}), folder / "data.parquet", compression="zstd")


def write_images(folder: Path) -> None:
    for row, (image, label) in enumerate(zip(pictures(), labels(), strict=True)):
        (folder / "data" / str(label)).mkdir(parents=True, exist_ok=True)
        (folder / "data" / str(label) / f"{row:03}.png").write_bytes(png(image))


def write_dataset(folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=[f"digit {n}" for n in range(10)])})
    images = [{"bytes": png(image), "path": None} for image in pictures()]
    Dataset.from_dict({"image": images, "label": labels()}, features=features).save_to_disk(str(folder / "data"))


def evaluate_on(name: str) -> Callable[[Path], None]:
    """Return a command that writes NLL and accuracy of the first ingredient on the data into figures.json."""

    def evaluate(folder: Path) -> None:
        from ray_soup.actors.in_process import InProcessPool
        from ray_soup.actors.messages import Mesh
        from ray_soup.errors import SoupError
        from ray_soup.io.progress import no_progress
        from ray_soup.recipe import make_recipe
        from ray_soup.task.data import cut_splits

        recipe = make_recipe({"model": MODEL, "data": {"test": str(folder / name)}, "precision": "float32"})
        try:
            pool = InProcessPool(recipe, [], Mesh(1, 1), 1)
            setup = pool.setup(no_progress)
            splits = cut_splits(recipe.data, setup.sizes, setup.fit_digests, 1)
            outcome = pool.evaluate_file(str(folder / "zoo" / "a.safetensors"), [splits["test"]], no_progress)[0]
        except SoupError as error:
            print(f"ray-soup: {error}")
            raise SystemExit(error.exit_code) from None
        figures = {"accuracy": outcome.accuracy, "nll": outcome.nll}
        (folder / "figures.json").write_text(json.dumps(figures))

    return evaluate


def their_examples(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Load the data as its own library does: images float32 [n, 8, 8] and labels int64 [n]."""
    if (folder / "data.npz").exists():
        with np.load(folder / "data.npz") as arrays:
            return torch.from_numpy(arrays["images"].astype(np.float32)), torch.from_numpy(arrays["labels"].astype(np.int64))
    if (folder / "data.parquet").exists():
        table = pq.read_table(folder / "data.parquet", page_checksum_verification=False)
        rows = table.to_pylist()
        images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
        found = [row["label"] for row in rows]
    elif (folder / "data" / "data-00000-of-00001.arrow").exists():
        with pa.memory_map(str(folder / "data" / "data-00000-of-00001.arrow")) as stream:
            rows = pa.ipc.open_stream(stream).read_all().to_pylist()
        images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in rows]
        found = [row["label"] for row in rows]
    else:
        from torchvision.datasets import ImageFolder

        samples = ImageFolder(str(folder / "data")).samples
        images, found = [Image.open(file) for file, _ in samples], [label for _, label in samples]
    return torch.stack([pixels(image) for image in images]), torch.tensor(found, dtype=torch.int64)


def figures_are_right(folder: Path) -> None:
    images, targets = their_examples(folder)
    model = Tiny().eval()
    model.load_state_dict(states()[0])
    with torch.no_grad():
        logits = model(images)
    figures = json.loads((folder / "figures.json").read_text())
    nll, accuracy = F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).float().mean().item()
    assert abs(figures["nll"] - nll) < 1e-4 * max(1, abs(nll)), f"NLL {figures['nll']} for {nll}"
    assert abs(figures["accuracy"] - accuracy) < 1e-6, f"accuracy {figures['accuracy']} for {accuracy}"


# A finished soup


def finished(folder: Path) -> None:
    zoo_of(lambda state, zoo: save_file(state, zoo / "b.safetensors"))(folder)
    with open(folder / "log", "w") as log:
        import contextlib

        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log), contextlib.suppress(SystemExit):
            uniform(folder)
    shutil.copytree(folder / "out", folder / "kept")


def bake(folder: Path) -> None:
    command_line("bake", folder / "out", folder / "again")


def verify(folder: Path) -> None:
    command_line("verify", folder / "out")


def baked_is_the_same(folder: Path) -> None:
    ours, expected = load_file(folder / "again" / "model.safetensors"), load_file(folder / "kept" / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def soup_is_untouched(folder: Path) -> None:
    """`verify` may pass only if what a user takes from the folder is what the run left there."""
    for file in (folder / "kept").iterdir():
        if file.is_file() and file.name != "run.json":
            assert (folder / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    now, kept = (json.loads((folder / o / "run.json").read_text()) for o in ("out", "kept"))
    for key in ("ingredients", "files", "method"):
        assert now[key] == kept[key], key


def rerun_is_right(folder: Path) -> None:
    """Rerunning the command on a finished soup may succeed only if the soup there is right."""
    soup_is_uniform(folder)


# State of a learning run


def write_state(folder: Path) -> None:
    from ray_soup.soups.state import LearnState, save_state

    coordinates = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(4, 10)
    save_state(LearnState(coordinates, steps=7), folder / "learn.pt")


def load_state(folder: Path) -> None:
    from ray_soup.errors import SoupError
    from ray_soup.soups import state

    try:
        found = state.load_state(folder / "learn.pt")
    except SoupError as error:
        print(f"ray-soup: {error}")
        raise SystemExit(error.exit_code) from None
    torch.save(found.y, folder / "coordinates.pt")


def state_is_right(folder: Path) -> None:
    expected = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(4, 10)
    assert torch.equal(torch.load(folder / "coordinates.pt"), expected)


# Lists of downloads


def write_list(folder: Path) -> None:
    entries = [{"url": f"http://127.0.0.1:9/model_{k}.pt", "size": 1000 + k, "sha256": "0" * 64} for k in range(3)]
    (folder / "list.yaml").write_text(yaml.safe_dump(entries))


def read_list(folder: Path) -> None:
    from ray_soup.errors import SoupError
    from ray_soup.io import fetch

    try:
        fetch.read_list(str(folder / "list.yaml"))
    except SoupError as error:
        print(f"ray-soup: {error}")
        raise SystemExit(error.exit_code) from None


def nothing(folder: Path) -> None:
    del folder


def ingredient(write: Callable[[State, Path], None], files: Sequence[str], *more: Mutation) -> Kind:
    return Kind(zoo_of(write), tuple(f"zoo/{f}" for f in files), uniform, soup_is_uniform, (*BINARY, *more))


def data(write: Callable[[Path], None], name: str, files: Sequence[str], *more: Mutation) -> Kind:
    return Kind(data_of(write), tuple(files), evaluate_on(name), figures_are_right, (*BINARY, *more))


def shards(state: State, zoo: Path) -> None:
    write_safetensors_shards(state, zoo)


TUNE_FILES = ("zoo/experiment_state-2026-01-01_00-00-00.json", "zoo/trial_1/result.json", "zoo/trial_2/result.json")
OUT_FILES = ("run.json", "coefficients.safetensors", "recipe.yaml", "results.jsonl", "model.safetensors")
JSON_AND_BINARY = (*BINARY, *[edit_json] * 10)

KINDS: dict[str, Kind] = {
    "safetensors": ingredient(lambda s, z: save_file(s, z / "b.safetensors"), ["b.safetensors"], *[edit_safetensors] * 5),
    "torch": ingredient(write_zip, ["b.pt"]),
    "torch, views": ingredient(write_views, ["b.pt"]),
    "torch, legacy": replace(ingredient(write_legacy, ["b.pth"]), undamaged=("right", "exit 3")),
    "Lightning": ingredient(write_lightning, ["b.ckpt"]),
    "index": ingredient(shards, ["b/model.safetensors.index.json"], *[edit_json] * 10),
    "shards": ingredient(shards, ["b/part-0.safetensors", "b/part-1.safetensors"], *[edit_safetensors] * 5),
    "distributed": ingredient(write_distributed, ["b/.metadata", "b/__0_0.distcp", "b/__1_0.distcp"]),
    "torch index": ingredient(write_bin_shards, ["b/pytorch_model.bin.index.json"], *[edit_json] * 10),
    "torch shards": ingredient(write_bin_shards, ["b/part-0.bin", "b/part-1.bin"]),
    "Tune": Kind(write_tune, TUNE_FILES, best_of_tune, soup_is_uniform, JSON_AND_BINARY, also_named="zoo/trial_"),
    "recipe": Kind(
        whole_recipe, ("recipe.yaml",), by_recipe, soup_is_uniform, (*BINARY, *[edit_yaml] * 20), names_file=False
    ),
    "npz": data(write_npz, "data.npz", ["data.npz"]),
    "npz, compressed": data(write_compressed, "data.npz", ["data.npz"]),
    "Parquet": data(write_parquet, "data.parquet", ["data.parquet"]),
    "images": data(write_images, "data", [f"data/{labels()[r]}/{r:03}.png" for r in range(0, ROWS, 7)]),
    "dataset": data(write_dataset, "data", ["data/data-00000-of-00001.arrow"]),
    "dataset, JSON": data(write_dataset, "data", ["data/state.json", "data/dataset_info.json"], *[edit_json] * 10),
    "verify": Kind(finished, tuple(f"out/{f}" for f in OUT_FILES), verify, soup_is_untouched, may_fail=True),
    "verify, JSON": Kind(finished, ("out/run.json",), verify, soup_is_untouched, (edit_json,), may_fail=True),
    "bake": Kind(finished, tuple(f"out/{f}" for f in OUT_FILES), bake, baked_is_the_same),
    "bake, coefficients": Kind(
        finished, ("out/coefficients.safetensors",), bake, baked_is_the_same, (edit_safetensors, *BINARY)
    ),
    "bake, JSON": Kind(finished, ("out/run.json",), bake, baked_is_the_same, (edit_json,)),
    "rerun": Kind(
        finished, ("out/run.json", "out/state/begun.json", "out/results.jsonl"), by_recipe, rerun_is_right, JSON_AND_BINARY
    ),
    "state": Kind(write_state, ("learn.pt",), load_state, state_is_right),
    "list": Kind(write_list, ("list.yaml",), read_list, nothing, (*BINARY, *[edit_yaml] * 10)),
}

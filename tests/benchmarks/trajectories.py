"""One run at a constant learning rate: its last checkpoint, schedules, learned coefficients, and real decays.

A Llama of 131 k parameters learns the source text of Python's standard library, byte by byte, at a constant rate. Its last
checkpoints are mixed by every method for the steps of a run, and the results are compared with continuations of the same run
whose learning rate falls linearly to zero. Writes the table to docs/trajectories.md.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

DOCS = Path(__file__).parent.parent.parent / "docs" / "trajectories.md"
LENGTH, RATE = 64, 3e-3
LEARN = {"lr": 0.1, "epochs": 10, "cosine_lr": True, "average": False, "whiten": 0.0, "screen": False}
"""The learning rate and the epochs of this study; all else as version 0.1, with which docs/trajectories.md was made."""


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    checkpoints: int = 32
    every: int = 50
    batch: int = 16
    decays: tuple[int, ...] = (8, 16)
    """Lengths of real decays, in checkpoints."""
    fit: int = 1500
    select: int = 700
    test: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)


def chunks() -> tuple[np.ndarray, np.ndarray]:
    """Cut the standard library into different chunks of bytes, uint8 [n, LENGTH]: for training, and held out by file."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    files = [file for file in files if "site-packages" not in file.parts]
    order = np.random.default_rng(0).permutation(len(files))
    held_out = len(files) // 5
    found = []
    for some in (order[held_out:], order[:held_out]):
        text = b"".join(files[n].read_bytes() for n in some)
        rows = np.frombuffer(text[: len(text) // LENGTH * LENGTH], dtype=np.uint8).reshape(-1, LENGTH)
        rows = np.unique(rows, axis=0)
        found.append(rows[np.random.default_rng(1).permutation(len(rows))])
    return found[0], found[1]


def build() -> torch.nn.Module:
    """Return the model, with the same initialization for every seed of torch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=170, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip


def train(folder: Path, rows: np.ndarray, seed: int, size: Size) -> None:
    """Write the checkpoints of a run at a constant rate, and the end of a run for each real decay, as RUN-decay-N."""
    torch.manual_seed(seed)
    model, random = build(), np.random.default_rng(seed)
    model.save_pretrained(folder / "init")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    total = size.checkpoints * size.every
    batches = [random.integers(len(rows), size=size.batch) for _ in range(total)]
    begins = {total - length * size.every: length for length in size.decays}
    branches: dict[int, Any] = {}
    for step, batch in enumerate(batches):
        if step in begins:
            branches[begins[step]] = (step, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()))
        _step(model, optimizer, rows[batch], RATE * min(1, (step + 1) / 50))
        if (step + 1) % size.every == 0:
            model.save_pretrained(folder / "run" / f"checkpoint-{step + 1}")
    for length, (first, weights, state) in branches.items():
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for step in range(first, total):
            _step(model, optimizer, rows[batches[step]], RATE * (1 - (step - first) / (total - first)))
        model.save_pretrained(folder / f"decay-{length}")


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: np.ndarray, rate: float) -> None:
    ids = torch.from_numpy(rows.astype(np.int64))
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def methods() -> dict[str, dict[str, Any]]:
    """Return the keys of the recipe for each row of the table."""
    from ray_soup.recipe import SCHEDULES

    rows: dict[str, dict[str, Any]] = {"last": {"method": "last"}, "uniform": {"method": "uniform"}}
    rows |= {name: {"method": name} for name in SCHEDULES if name != "schedule:linear"}
    rows |= {f"mehl per {blocks}": {"method": "mehl", "blocks": blocks} for blocks in ("model", "layer", "tensor")}
    return rows | {"mehl per tensor, smoothness 0.01": {"method": "mehl", "blocks": "tensor", "learn.smoothness": 0.01}}


def measure(folder: Path) -> tuple[dict[str, float], dict[str, str]]:
    """Return the test NLL of every row of the table for one run, and which window or decay was chosen."""
    from ray_soup.recipe import make_recipe, with_changes
    from ray_soup.soups.make import make
    from ray_soup.soups.output import open_output
    from ray_soup.soups.session import Session
    from ray_soup.soups.write import bake_and_evaluate
    from tests.conftest import InProcess

    recipe = make_recipe({
        "method": "mehl", "model": f"transformers:{folder}/init?length={LENGTH}", "learn": LEARN,
        "ingredients": f"{folder}/run?per_trial=all", "directions": {"dtype": "float32"}, "precision": "float32",
        "data": {name: f"{folder}/{name}.jsonl" for name in ("fit", "select", "test")},
    })  # fmt: skip
    pool = InProcess(recipe)
    everything = pool.inputs.everything
    session = Session(recipe, pool.inputs, pool, pool.setup_info, pool.mesh, 1, len(everything), subset=everything)
    session = session.with_soup(splits=session.cut(1))
    found: dict[str, float] = {}
    chosen: dict[str, str] = {}
    with open_output(folder / "out") as output:
        for name, changes in methods().items():
            one = session.with_soup(recipe=with_changes(recipe, {**changes}), state_file=output.state(f"{len(found)}.pt"))
            mixture = make(one)
            splits = {"test": session.splits["test"]}
            outcomes = bake_and_evaluate(one, output, mixture, folder / "model.safetensors", splits, [])
            found[name] = outcomes["test"].nll
            by = mixture.figures.get("schedule", {})
            chosen[name] = f"{by['decay']:g}" if "decay" in by else str(by.get("window", ""))
    for path in sorted(folder.glob("decay-*"), key=lambda path: int(path.name.partition("-")[2])):
        (outcome,) = pool.evaluate_file(str(path), [session.splits["test"]])
        found[f"real linear decay over {path.name.partition('-')[2]}"] = outcome.nll
    return found, chosen


def study(size: Size) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Run the study; return the figures of each seed, and what was chosen."""
    for_training, held_out = chunks()
    figures, choices = [], []
    for seed in size.seeds:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            folder, first = Path(temporary), 0
            for name, count in (("fit", size.fit), ("select", size.select), ("test", size.test)):
                rows = held_out[first : first + count].tolist()
                (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
                first += count
            train(folder, for_training, seed, size)
            trained = time.monotonic()
            found, chosen = measure(folder)
        figures.append(found)
        choices.append(chosen)
        print(f"seed {seed}: trained in {trained - begun:.0f} s, measured in {time.monotonic() - trained:.0f} s", flush=True)
    return figures, choices


def markdown(size: Size, figures: list[dict[str, float]], choices: list[dict[str, str]]) -> str:
    """Return the table with its explanation."""
    seeds = " | ".join(f"seed {seed}" for seed in size.seeds)
    lines = [f"| model | {seeds} | mean | chosen |", f"| --- |{' ---: |' * (len(size.seeds) + 2)}"]
    for name in figures[0]:
        values = [found[name] for found in figures]
        spread = f" ±{stdev(values):.4f}" if len(values) > 1 else ""
        how = ", ".join(chosen.get(name, "") for chosen in choices)
        cells = " | ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {name} | {cells} | {mean(values):.4f}{spread} | {how.strip(', ') or '-'} |")
    text = f"""# A run without a decay of the learning rate

Test NLL in nats per byte. A Llama of {parameters():,} parameters learns the source text of Python's standard library, byte
by byte, at a constant rate of {RATE:g} after a warm-up of 50 steps, with a checkpoint every {size.every} steps of
{size.batch} chunks of {LENGTH} bytes. Its {size.checkpoints} checkpoints are the ingredients.
Held-out chunks are from other files: {size.fit:,} in fit, {size.select:,} in select, {size.test:,} in test.
Learned coefficients: with the defaults of version 0.1 but `learn.lr={LEARN["lr"]}` and
`learn.epochs={LEARN["epochs"]}`. The real decays repeat the last {" or ".join(map(str, size.decays))} intervals of the run,
with the same batches, while the rate falls linearly to zero. *chosen*: the window, or the decay of the moving average, that
was best on select, by seed.

"""
    end = "\nMade with `python -m tests.benchmarks trajectories`.\n"
    return text + "\n".join(lines) + "\n" + end


def parameters() -> int:
    return sum(parameter.numel() for parameter in build().parameters())


def main() -> dict[str, float]:
    """Run the study and write its table; with `tiny` behind the name, only try it and write nothing."""
    torch.set_num_threads(1)
    tiny = "tiny" in sys.argv
    size = Size(4, 5, 4, (2,), 40, 20, 30, (0,)) if tiny else Size()
    figures, choices = study(size)
    text = markdown(size, figures, choices)
    print(text)
    assert all(math.isfinite(value) for found in figures for value in found.values())
    if not tiny:
        DOCS.write_text(text, encoding="utf-8")
    return {name: mean(found[name] for found in figures) for name in figures[0]}

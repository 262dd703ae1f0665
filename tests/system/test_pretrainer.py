"""A pretrainer as a user: a script with the Trainer of transformers leaves a run; its mixed checkpoints load back there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from ray_soup.mixing.coefficients import load_coefficients
from tests.conftest import ROOT
from tests.system.command import call
from tests.unit.task.language_models import sum_and_count

pytestmark = pytest.mark.slow
SCRIPT = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

torch.manual_seed(0)
adapters = len(sys.argv) > 1
rows = [json.loads(line) for line in open("train.jsonl")]
if adapters:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained("run/checkpoint-20")
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
else:
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(config)
arguments = TrainingArguments(
    "adapters" if adapters else "run", max_steps=40, per_device_train_batch_size=16, learning_rate=1e-2,
    lr_scheduler_type="constant", save_steps=10, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
)
data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
trainer = Trainer(model=model, args=arguments, train_dataset=data)
trainer.train()
trainer.save_model()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder after training: text of this repository as bytes, a run, and one of adapters that begins in it."""
    folder = tmp_path_factory.mktemp("pretrainer")
    text = b"".join(file.read_bytes() for file in sorted((ROOT / "ray_soup").rglob("*.py")))
    rows = np.unique(np.frombuffer(text[: len(text) // 32 * 32], dtype=np.uint8).reshape(-1, 32), axis=0)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    for name, some in {"train": rows[:2000], "fit": rows[2000:2200], "test": rows[2200:2300]}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"input_ids": row.tolist()}) for row in some))
    (folder / "pretrain.py").write_text(SCRIPT)
    for arguments in ([], ["--adapters"]):
        done = subprocess.run(
            [sys.executable, "pretrain.py", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


def recipe_of(folder: Path, name: str, **changes: Any) -> Path:
    recipe = {
        "model": "transformers:run/checkpoint-20?length=32",
        "ingredients": f"{name}?per_trial=all",
        "data": {"fit": "fit.jsonl", "select": 0.3, "test": "test.jsonl"},
        "learn": {"lr": 0.1, "epochs": 1},
        "actors": {"replicas": 1, "cpus": 1},
        "precision": "float32",
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, **changes}))
    return folder / f"{name}.yaml"


def nll_on_test(folder: Path, model: torch.nn.Module) -> float:
    rows = [json.loads(line)["input_ids"] for line in (folder / "test.jsonl").read_text().splitlines()]
    total = np.sum([sum_and_count(model.eval(), row) for row in rows], axis=0)
    return float(total[0] / total[1])


def test_the_best_soup_of_a_run_loads_back_with_the_figure_reported(folder: Path, cluster: None) -> None:
    from transformers import AutoModelForCausalLM

    assert (folder / "run" / "model.safetensors").exists()  # what save_model left, which is no step
    done = call("compare", recipe_of(folder, "run"), folder / "soups")
    assert done.exit_code == 0, done.output
    assert "4 steps of" in done.output
    assert "left out, such as" in done.output
    record = json.loads((folder / "soups" / "run.json").read_text())
    table = {row["model_name"]: row for row in record["table"]}
    assert {"last", "schedule:minus_sqrt", "schedule:uniform", "schedule:cosine", "ema", "mehl+"} <= set(table)
    best = table[record["chosen"]]["test_nll"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "soups")
    assert nll_on_test(folder, loaded) == pytest.approx(best, rel=1e-5)
    last = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint-40")
    assert nll_on_test(folder, last) == pytest.approx(table["last"]["test_nll"], rel=1e-5)
    print({name: round(row["test_nll"], 4) for name, row in table.items()})


def test_steps_of_an_adapter_are_mixed_into_one_that_peft_loads(folder: Path, cluster: None) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = call("learn", recipe_of(folder, "adapters"), folder / "adapter", "learn.smoothness=0.01")
    assert done.exit_code == 0, done.output
    (row, *_) = [json.loads(line) for line in (folder / "adapter" / "results.jsonl").read_text().splitlines()]
    base = AutoModelForCausalLM.from_pretrained(folder / "run" / "checkpoint-20")
    assert nll_on_test(folder, PeftModel.from_pretrained(base, folder / "adapter")) == pytest.approx(
        row["test_nll"], rel=1e-5
    )
    record = json.loads((folder / "adapter" / "run.json").read_text())
    assert record["trajectory"]["steps"] == [10, 20, 30, 40]
    weights = load_coefficients(folder / "adapter" / "coefficients.safetensors").shares()
    assert record["trajectory"]["weights"] == pytest.approx(weights.tolist())

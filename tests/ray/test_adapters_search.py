"""Users of PEFT from their own script to the soup loaded back there, and a search over a learning rate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_soup.recipe import make_recipe
from ray_soup.soups.finished import verify
from ray_soup.soups.records import finished_record
from ray_soup.tune.search import search
from tests.adapters import CONFIGS, values, write_adapters, write_texts
from tests.system.command import call, write_recipe
from tests.unit.task.language_models import byte_tokenizer, llama, saved

pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
TRAIN = """
import torch, peft, transformers
import pyarrow.parquet as pq

tokenizer = transformers.AutoTokenizer.from_pretrained("base")
rows = pq.read_table("train.parquet").to_pylist()
examples = [{**tokenizer(r["text"], truncation=True, max_length=32), "labels": r["label"]} for r in rows]
for k, (lr, steps) in enumerate(((3e-3, 40), (1e-2, 30), (5e-3, 20))):
    transformers.set_seed(k)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model.config.pad_token_id = tokenizer.pad_token_id
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    arguments = transformers.TrainingArguments(
        f"runs/run_{k}", max_steps=steps, save_steps=steps // 2, learning_rate=lr, per_device_train_batch_size=16,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )
    transformers.Trainer(
        peft.get_peft_model(model, config), arguments, train_dataset=examples,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
    ).train()
"""
LOAD = """
import json, torch, peft, transformers
import pyarrow.parquet as pq

tokenizer = transformers.AutoTokenizer.from_pretrained("soup")
model = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
model.config.pad_token_id = tokenizer.pad_token_id
model = peft.PeftModel.from_pretrained(model, "soup").eval()
losses, right = [], []
with torch.inference_mode():
    for row in pq.read_table("test.parquet").to_pylist():
        text = tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt")
        logits = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]])).item())
        right.append(int(logits.argmax()) == row["label"])
print(json.dumps([sum(losses) / len(losses), sum(right) / len(right)]))
"""


def write_sentences(file: Path, count: int, seed: int) -> None:
    """Texts of three classes, each with words that are more frequent in it."""
    random, words = np.random.default_rng(seed), ["red", "green", "blue", "one", "two", "three", "up", "down", "far"]
    labels = random.integers(3, size=count)
    texts = []
    for label in labels:
        weights = np.ones(9)
        weights[3 * label : 3 * label + 3] = 3
        texts.append(" ".join(random.choice(words, 5, p=weights / weights.sum())))
    pq.write_table(pa.table({"text": texts, "label": labels}), file)


def script(folder: Path, text: str) -> str:
    """Run a user's script in a folder; return the last line that it prints."""
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return (done.stdout.strip().splitlines() or [""])[-1]


def test_a_user_of_trainer_and_peft_gets_a_soup_of_classifiers(tmp_path: Path) -> None:
    """The base is a causal language model; the Trainer leaves runs/*/checkpoint-N."""
    words = byte_tokenizer()
    words.pad_token = "</s>"
    saved(llama(std=0.05), words, tmp_path / "base")
    for name, count in (("train", 200), ("fit", 160), ("test", 120)):
        write_sentences(tmp_path / f"{name}.parquet", count, count)
    script(tmp_path, TRAIN)
    assert len([*tmp_path.glob("runs/*/checkpoint-*/adapter_model.safetensors")]) == 6
    recipe = {
        "method": "mehl+", "model": "transformers:base?task=classification&length=32", "ingredients": "runs",
        "data": {"fit": "fit.parquet", "select": 0.3, "test": "test.parquet"},
        "learn": {"epochs": 4, "batch_size": 32, "lr": 0.03}, "actors": {"replicas": 1, "shards": 1, "cpus": 1},
    }  # fmt: skip
    result = call("learn", write_recipe(tmp_path, recipe), tmp_path / "soup")
    assert result.exit_code == 0, result.output
    row = json.loads((tmp_path / "soup" / "results.jsonl").read_text(encoding="utf-8").splitlines()[0])
    nll, accuracy = json.loads(script(tmp_path, LOAD))
    print(f"NLL {row['test_nll']:.4f}, accuracy {row['test_accuracy']:.2%}")
    assert nll == pytest.approx(row["test_nll"], rel=1e-5)
    assert accuracy == row["test_accuracy"]
    assert "classes=3" in (tmp_path / "soup" / "recipe.yaml").read_text(encoding="utf-8")
    verify(tmp_path / "soup")


def test_a_search_over_adapters_writes_the_best_trial(tmp_path: Path) -> None:
    write_adapters(tmp_path, CONFIGS[:3])
    write_texts(tmp_path)
    recipe = make_recipe(values(
        tmp_path, method="mehl+", learn={"epochs": 1, "batch_size": 8}, search={"learn.lr": {"grid": [0.1]}}, baseline="none"
    ))  # fmt: skip
    soup = search(recipe, tmp_path / "out")
    trials = finished_record(tmp_path / "out")["search"]["trials"]
    assert [trial["learn.lr"] for trial in trials] == ["auto", 0.1]
    assert not any(trial.get("error") for trial in trials)
    best = min(trials, key=lambda trial: trial["select_nll"])
    assert soup.record["search"]["best"] == best["trial"]
    assert soup.rows[0]["select_nll"] == pytest.approx(best["select_nll"], rel=1e-5)
    verify(tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()

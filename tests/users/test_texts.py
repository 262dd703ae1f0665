"""Users of Transformers: a classifier of texts, a causal language model, and LoRA adapters, all made by its Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.ray.own_loops import Figures, Loop, assert_figures
from tests.ray.test_any_text_task import bert, texts, tokenizer
from tests.unit.task.language_models import byte_tokenizer, llama, saved
from tests.users.steps import compared, learned, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
QUIET = """
import transformers

quiet = dict(use_cpu=True, report_to="none", disable_tqdm=True)
"""


def loop_of(names: dict[str, Any]) -> Loop:
    """The user's function `figures_of(model)`: sum of the losses, number of units, right ones of each example or text."""
    return lambda model: Figures(*names["figures_of"](model))


# A classifier whose tokenizer cuts at 256 tokens

TRAIN_CLASSIFIER = """
import pyarrow.parquet as pq

words = transformers.AutoTokenizer.from_pretrained("first")
rows = pq.read_table("train.parquet").to_pylist()
examples = [{**words(row["text"], truncation=True, max_length=256), "labels": row["label"]} for row in rows]
for k in range(3):
    arguments = transformers.TrainingArguments(
        f"runs/run_{k}", max_steps=5, save_steps=5, learning_rate=3e-3 * (1 + k), per_device_train_batch_size=8, seed=k,
        **quiet
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained("first")
    transformers.Trainer(model, arguments, train_dataset=examples, processing_class=words).train()
"""
USE_CLASSIFIER = """
import pyarrow.parquet as pq
import torch

words = transformers.AutoTokenizer.from_pretrained("soup")
rows = pq.read_table("test.parquet").to_pylist()
examples = [{**words(row["text"], truncation=True, max_length=256), "labels": row["label"]} for row in rows]


def figures_of(model):
    arguments = transformers.TrainingArguments("unused", per_device_eval_batch_size=7, **quiet)
    found = transformers.Trainer(model, arguments, processing_class=words).predict(examples)
    logits, labels = torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert abs(found.metrics["test_loss"] - loss / len(labels)) < 1e-4
    return loss, len(labels), (logits.argmax(1) == labels).numpy()


load = transformers.AutoModelForSequenceClassification.from_pretrained
zoo = [load(f"runs/run_{k}/checkpoint-5") for k in range(3)]
soup = load("soup")
"""


def test_a_user_of_text_classification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the texts are longer than 128 tokens, and some longer than the model's 256, which is the default."""
    words = tokenizer()
    saved(bert("ForSequenceClassification", 256, num_labels=3, initializer_range=0.2), words, tmp_path / "first")
    made = {name: texts(count, seed, 400) for seed, (name, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items())}
    for name, rows in made.items():
        pq.write_table(pa.Table.from_pylist([{"text": t, "label": y} for t, y in rows]), tmp_path / f"{name}.parquet")
    lengths = [len(words(text)["input_ids"]) for text, _ in made["test"]]
    cut = sum(length > 256 for length in lengths)
    assert cut > 3
    assert sum(128 < length <= 256 for length in lengths) > 6
    script(tmp_path, QUIET + TRAIN_CLASSIFIER)
    found = compared(tmp_path, """
        model: transformers:runs/run_0/checkpoint-5
        ingredients: runs
        data: {fit: fit.parquet, select: 0.4, test: test.parquet}
        """)  # fmt: skip
    assert any(f"data.test: {cut} of 24 texts ({cut / 24:.1%}) were cut at 256 tokens" in note for note in found[1].notes)
    names = script(tmp_path, QUIET + USE_CLASSIFIER)
    monkeypatch.chdir(tmp_path)
    assert_figures(found, names["zoo"], names["soup"], loop_of(names))


# A causal language model; each document is one window (test_language_models has longer ones)

TRAIN_CAUSAL = """
import json

words = transformers.AutoTokenizer.from_pretrained("first")
words.pad_token = words.eos_token
examples = [words(json.loads(line)["text"]) for line in open("train.jsonl")]
for k in range(3):
    arguments = transformers.TrainingArguments(
        f"runs/run_{k}", max_steps=5, save_steps=5, learning_rate=1e-2 * (1 + k), per_device_train_batch_size=8, seed=k,
        **quiet
    )
    collator = transformers.DataCollatorForLanguageModeling(words, mlm=False)
    model = transformers.AutoModelForCausalLM.from_pretrained("first")
    transformers.Trainer(model, arguments, collator, examples, processing_class=words).train()
"""
USE_CAUSAL = """
import json

import numpy as np
import torch

words = transformers.AutoTokenizer.from_pretrained("soup")
examples = [words(json.loads(line)["text"], return_tensors="pt")["input_ids"] for line in open("test.jsonl")]


@torch.inference_mode()
def figures_of(model):
    loss, units, right = 0.0, 0, []
    for ids in examples:
        out, count = model(input_ids=ids, labels=ids), ids.shape[1] - 1
        loss, units = loss + out.loss.item() * count, units + count
        right.append(int((out.logits[:, :-1].argmax(2) == ids[:, 1:]).sum()))
    return loss, units, np.array(right)


load = transformers.AutoModelForCausalLM.from_pretrained
zoo = [load(f"runs/run_{k}/checkpoint-5") for k in range(3)]
soup = load("soup")
"""


def test_a_user_of_causal_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(llama(std=0.02), byte_tokenizer([text for text, _ in texts(60, 9, 40)]), tmp_path / "first")
    for seed, (name, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items()):
        lines = [json.dumps({"text": text}) for text, _ in texts(count, seed, 30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    script(tmp_path, QUIET + TRAIN_CAUSAL)
    found = compared(tmp_path, """
        model: transformers:runs/run_0/checkpoint-5
        ingredients: runs
        data: {fit: fit.jsonl, select: 0.4, test: test.jsonl}
        """)  # fmt: skip
    names = script(tmp_path, QUIET + USE_CAUSAL)
    monkeypatch.chdir(tmp_path)
    assert_figures(found, names["zoo"], names["soup"], loop_of(names))


# LoRA: classifiers whose base is a causal language model; the Trainer leaves several checkpoints of each run

TRAIN_LORA = """
import peft
import pyarrow.parquet as pq

words = transformers.AutoTokenizer.from_pretrained("base")
rows = pq.read_table("train.parquet").to_pylist()
examples = [{**words(row["text"], truncation=True, max_length=32), "labels": row["label"]} for row in rows]
for k, (rate, steps) in enumerate(((3e-3, 40), (1e-2, 30), (5e-3, 20))):
    transformers.set_seed(k)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model.config.pad_token_id = words.pad_token_id
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    arguments = transformers.TrainingArguments(
        f"runs/run_{k}", max_steps=steps, save_steps=steps // 2, learning_rate=rate, per_device_train_batch_size=16, **quiet
    )
    collator = transformers.DataCollatorWithPadding(words)
    transformers.Trainer(peft.get_peft_model(model, config), arguments, collator, examples).train()
"""
USE_LORA = """
import peft
import pyarrow.parquet as pq
import torch

words = transformers.AutoTokenizer.from_pretrained("soup")


def load(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    model.config.pad_token_id = words.pad_token_id
    return peft.PeftModel.from_pretrained(model, folder).eval()


@torch.inference_mode()
def figures_of(model):
    loss, right = 0.0, []
    for row in pq.read_table("test.parquet").to_pylist():
        text = words(row["text"], truncation=True, max_length=32, return_tensors="pt")
        logits = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"]).logits
        loss += torch.nn.functional.cross_entropy(logits, torch.tensor([row["label"]])).item()
        right.append(int(logits.argmax()) == row["label"])
    return loss, len(right), right


soup = load("soup")
"""


def write_sentences(file: Path, count: int, seed: int) -> None:
    """Texts of three classes, each with words that are more frequent in it."""
    random, words = np.random.default_rng(seed), ["red", "green", "blue", "one", "two", "three", "up", "down", "far"]
    labels = random.integers(3, size=count)
    found = []
    for label in labels:
        weights = np.ones(9)
        weights[3 * label : 3 * label + 3] = 3
        found.append(" ".join(random.choice(words, 5, p=weights / weights.sum())))
    pq.write_table(pa.table({"text": found, "label": labels}), file)


def test_a_user_of_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = byte_tokenizer()
    words.pad_token = "</s>"
    saved(llama(std=0.05), words, tmp_path / "base")
    for name, count in (("train", 200), ("fit", 160), ("test", 120)):
        write_sentences(tmp_path / f"{name}.parquet", count, count)
    script(tmp_path, QUIET + TRAIN_LORA)
    assert len([*tmp_path.glob("runs/*/checkpoint-*/adapter_model.safetensors")]) == 6
    soup = learned(tmp_path, {
        "method": "mehl+", "model": "transformers:base?task=classification&length=32", "ingredients": "runs",
        "data": {"fit": "fit.parquet", "select": 0.3, "test": "test.parquet"},
        "learn": {"epochs": 4, "batch_size": 32, "lr": 0.03}, "actors": {"replicas": 1, "shards": 1, "cpus": 1},
    })  # fmt: skip
    names = script(tmp_path, QUIET + USE_LORA)
    monkeypatch.chdir(tmp_path)
    own = Figures(*names["figures_of"](names["soup"]))
    assert soup["test_nll"] == pytest.approx(own.nll, rel=1e-5)
    assert soup["test_accuracy"] == np.mean(own.correct)
    assert "classes=3" in (tmp_path / "soup" / "recipe.yaml").read_text(encoding="utf-8")

"""Other tasks on texts, trained by the Trainer of transformers: compared, each model has the library's own figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests.ray.own_loops import COUNT, Figures, assert_figures, compared
from tests.unit.task.language_models import byte_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
WORDS = ("river", "stone", "paper", "cloud", "window", "garden", "summer", "engine", "letter", "market")
KEYS = ("north", "south", "east")
TAGS = ("O", *KEYS)


def texts(count: int, seed: int, most: int) -> list[tuple[str, int]]:
    """Texts of 4 to `most` words; every third one tells the class."""
    random = np.random.default_rng(seed)
    found = []
    for n in range(count):
        words = random.choice(WORDS, random.integers(4, most))
        words[::3] = KEYS[n % 3]
        found.append((" ".join(words), n % 3))
    return found


def tokenizer() -> Any:
    """Whole words, nearly, with tokens for padding and masks."""
    words = byte_tokenizer([text for text, _ in texts(60, 9, 40)])
    words.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>"})
    return words


def bert(task: str, length: int, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=length, **more,
    )  # fmt: skip
    return getattr(transformers, f"Bert{task}")(config)


# From a text to a row of the data, and from a row to what the library's model takes


def masked(words: Any, text: str, label: int) -> dict[str, Any]:
    """The masks are drawn once, by the library's own collator, and stored."""
    from transformers import DataCollatorForLanguageModeling

    made = DataCollatorForLanguageModeling(words, mlm_probability=0.25)([words(text)])
    return {name: made[name][0].tolist() for name in ("input_ids", "labels")}


def tagged(words: Any, text: str, label: int) -> dict[str, Any]:
    tokens = text.split()
    return {"tokens": tokens, "ner_tags": [TAGS.index(token) if token in TAGS else 0 for token in tokens]}


def labeled(words: Any, text: str, label: int) -> dict[str, Any]:
    return {"text": text, "labels": [float(word in text) for word in (*KEYS[:2], *WORDS[:2])]}


def measured(words: Any, text: str, label: int) -> dict[str, Any]:
    return {"text": text, "labels": [label / 2, len(text) / 200]}


def of_words(words: Any, row: dict[str, Any]) -> dict[str, Any]:
    """As run_ner.py of transformers does it: the first token of each word has its tag."""
    found = words(row["tokens"], is_split_into_words=True, truncation=True)
    places = found.word_ids()
    first = [place is not None and (n == 0 or places[n - 1] != place) for n, place in enumerate(places)]
    tags = [row["ner_tags"][place] if own else -100 for place, own in zip(places, first, strict=True)]
    return {**found, "labels": tags}


def of_text(words: Any, row: dict[str, Any]) -> dict[str, Any]:
    return {**words(row["text"], truncation=True), "labels": row["labels"]}


@dataclass(frozen=True)
class Task:
    objective: str
    auto: str
    row: Callable[[Any, str, int], dict[str, Any]]
    example: Callable[[Any, dict[str, Any]], dict[str, Any]]
    right: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    config: dict[str, Any] = field(default_factory=dict)
    collator: str = "DataCollatorWithPadding"
    training: Callable[[Any, str], dict[str, Any]] | None = None
    """What the collator of training takes instead of an example: it draws other masks in each epoch."""


def same_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1) == labels


TASKS = {
    "masked language model": Task(
        "masked_lm", "MaskedLM", masked, lambda words, row: row, same_class,
        collator="DataCollatorForLanguageModeling", training=lambda words, text: words(text),
    ),
    "tokens": Task(
        "token_classification", "TokenClassification", tagged, of_words, same_class,
        {"id2label": dict(enumerate(TAGS))}, "DataCollatorForTokenClassification",
    ),
    "several labels": Task(
        "multi_label", "SequenceClassification", labeled, of_text, lambda o, y: (o > 0) == (y > 0.5),
        {"problem_type": "multi_label_classification", "num_labels": 4},
    ),
    "numbers": Task(
        "regression", "SequenceClassification", measured, of_text, None, {"problem_type": "regression", "num_labels": 2},
    ),
}  # fmt: skip


def train(task: Task, words: Any, examples: list[dict[str, Any]], folder: Path) -> list[nn.Module]:
    """An ordinary training script, three times; the models as the library loads them."""
    import transformers

    bert(f"For{task.auto}", 128, **task.config).save_pretrained(folder / "first")
    auto = getattr(transformers, f"AutoModelFor{task.auto}")
    for k in range(COUNT):
        arguments = transformers.TrainingArguments(
            str(folder / "runs" / f"run_{k}"), max_steps=5, save_steps=5, learning_rate=1e-2 * (1 + k), seed=k,
            per_device_train_batch_size=8, use_cpu=True, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        collator = getattr(transformers, task.collator)(words)
        model = auto.from_pretrained(folder / "first")
        transformers.Trainer(model, arguments, collator, examples, processing_class=words).train()
    return [auto.from_pretrained(folder / "runs" / f"run_{k}" / "checkpoint-5") for k in range(COUNT)]


@pytest.mark.parametrize("name", TASKS)
def test_figures_are_those_of_the_library(tmp_path: Path, name: str) -> None:
    """Parquet files of texts, words or tokens; the library's own loss of each example, and its right predictions."""
    import transformers

    task, words = TASKS[name], tokenizer()
    rows = {}
    for seed, (split, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items()):
        torch.manual_seed(seed)
        given = texts(count, seed, 30)
        rows[split] = [task.row(words, text, label) for text, label in given]
        pq.write_table(pa.Table.from_pylist(rows[split]), tmp_path / f"{split}.parquet")
    if task.training is None:
        examples = [task.example(words, row) for row in rows["train"]]
    else:
        examples = [task.training(words, text) for text, _ in given]
    zoo = train(task, words, examples, tmp_path)
    test = [{name: torch.tensor([value]) for name, value in task.example(words, row).items()} for row in rows["test"]]
    test = [example for example in test if (example["labels"] != -100).any()]

    @torch.inference_mode()
    def figures(model: nn.Module) -> Figures:
        loss, units, right = 0.0, 0, []
        for example in test:
            out, labels = model(**example), example["labels"]
            count = int((labels != -100).sum())
            loss, units = loss + out.loss.item() * count, units + count
            if task.right is not None:
                right.append(int(task.right(out.logits, labels).sum()))
        return Figures(loss, units, np.array(right) if right else None)

    data = {name: str(tmp_path / f"{name}.parquet") for name in ("fit", "test")}
    found = compared(tmp_path, f"transformers:{tmp_path}/runs/run_0/checkpoint-5", f"{tmp_path}/runs", data)
    assert found[0].objective == "auto"
    assert found[1].record["objective"] == task.objective
    auto = getattr(transformers, f"AutoModelFor{task.auto}")
    assert_figures(found, zoo, auto.from_pretrained(found[1].out), figures)

"""Language models and classifiers of texts: compared, each model has the figures of transformers' own loss and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.ray.own_loops import Figures, assert_figures, compared, fine_tuned, rows_of
from tests.unit.task.language_models import byte_tokenizer, llama

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]
WORDS = ("river", "stone", "paper", "cloud", "window", "garden", "summer", "engine", "letter", "market")
KEYS = ("north", "south", "east")


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


def saved(zoo: list[nn.Module], words: Any, folder: Path) -> str:
    """Save each model as its own script would, the tokenizer beside it; the value is the glob of them all."""
    for k, model in enumerate(zoo):
        model.save_pretrained(folder / "zoo" / f"run_{k}")
        words.save_pretrained(folder / "zoo" / f"run_{k}")
    return f"{folder}/zoo/*"


def library_soup(auto: str, out: Path) -> nn.Module:
    import transformers

    return getattr(transformers, auto).from_pretrained(out)


# Classes of texts


def test_a_classifier_of_texts_of_256_tokens(tmp_path: Path) -> None:
    """Half of the texts are longer than 128 tokens, and some longer than the model's 256, which is the default."""
    words = tokenizer()
    made = {name: texts(count, seed, 400) for seed, (name, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items())}
    for name, rows in made.items():
        pq.write_table(pa.Table.from_pylist([{"text": t, "label": y} for t, y in rows]), tmp_path / f"{name}.parquet")

    def batch_of(rows: list[tuple[str, int]]) -> tuple[Any, torch.Tensor]:
        batch = words([text for text, _ in rows], truncation=True, max_length=256, padding=True, return_tensors="pt")
        return batch, torch.tensor([label for _, label in rows])

    lengths = [len(words(text)["input_ids"]) for text, _ in made["test"]]
    assert sum(length > 256 for length in lengths) > 3
    assert sum(128 < length <= 256 for length in lengths) > 6

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        batch, labels = batch_of([made["train"][n] for n in rows_of(seed, number, 30, 8)])
        return model(**batch, labels=labels).loss

    zoo = fine_tuned(lambda: bert("ForSequenceClassification", 256, num_labels=3, initializer_range=0.2), step, 3e-3)
    ingredients = saved(zoo, words, tmp_path)

    @torch.inference_mode()
    def loop(model: nn.Module) -> Figures:
        loss, right = 0.0, []
        for first in range(0, 24, 7):
            batch, labels = batch_of(made["test"][first : first + 7])
            logits = model(**batch).logits
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right.append((logits.argmax(1) == labels).numpy())
        return Figures(loss, 24, np.concatenate(right))

    data = {name: str(tmp_path / f"{name}.parquet") for name in ("fit", "test")}
    found = compared(tmp_path, f"transformers:{tmp_path}/zoo/run_0", ingredients, data)
    cut = sum(length > 256 for length in lengths)
    assert any(f"data.test: {cut} of 24 texts ({cut / 24:.1%}) were cut at 256 tokens" in note for note in found[1].notes)
    assert_figures(found, zoo, library_soup("AutoModelForSequenceClassification", found[1].out), loop)


# Language models


def by_own_loss(examples: list[dict[str, torch.Tensor]], shift: int) -> Callable[[nn.Module], Figures]:
    """The library's own loss of each example, [1, tokens], and its right predictions; labels follow `shift` places later."""

    @torch.inference_mode()
    def loop(model: nn.Module) -> Figures:
        loss, units, right = 0.0, 0, []
        for example in examples:
            labels, out = example["labels"][:, shift:], model(**example)
            count = int((labels != -100).sum())
            loss, units = loss + out.loss.item() * count, units + count
            predicted = out.logits[:, : labels.shape[1]].argmax(2)
            right.append(int((predicted == labels).sum()))
        return Figures(loss, units, np.array(right))

    return loop


def test_a_masked_language_model(tmp_path: Path) -> None:
    """The masks are drawn once, by the library's own collator, and stored."""
    from transformers import DataCollatorForLanguageModeling

    words = tokenizer()
    collator = DataCollatorForLanguageModeling(words, mlm_probability=0.25)

    def masked(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        return [dict(collator([words(text)])) for text, _ in texts(count, seed, 30)]

    made = {name: masked(count, seed) for seed, (name, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items())}
    for name in ("fit", "test"):
        rows = [{key: example[key][0].tolist() for key in ("input_ids", "labels")} for example in made[name]]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        return torch.stack([model(**made["train"][n]).loss for n in rows_of(seed, number, 30, 4)]).mean()

    zoo = fine_tuned(lambda: bert("ForMaskedLM", 128), step, 1e-2)
    ingredients = saved(zoo, words, tmp_path)
    data = {name: str(tmp_path / f"{name}.parquet") for name in ("fit", "test")}
    found = compared(tmp_path, f"transformers:{tmp_path}/zoo/run_0", ingredients, data)
    assert found[0].objective == "auto"
    test = [example for example in made["test"] if (example["labels"] != -100).any()]
    assert_figures(found, zoo, library_soup("AutoModelForMaskedLM", found[1].out), by_own_loss(test, 0))


def test_a_causal_language_model(tmp_path: Path) -> None:
    """Each document is one window; test_language_models has longer ones."""
    words = byte_tokenizer([text for text, _ in texts(60, 9, 40)])
    made = {}
    for seed, (name, count) in enumerate({"fit": 30, "test": 24, "train": 30}.items()):
        documents = [text for text, _ in texts(count, seed, 30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
        ids = [torch.tensor([words(text)["input_ids"]]) for text in documents]
        made[name] = [{"input_ids": tokens, "labels": tokens} for tokens in ids]

    def step(model: nn.Module, seed: int, number: int) -> torch.Tensor:
        return torch.stack([model(**made["train"][n]).loss for n in rows_of(seed, number, 30, 4)]).mean()

    zoo = fine_tuned(lambda: llama(std=0.02), step, 1e-2)
    ingredients = saved(zoo, words, tmp_path)
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("fit", "test")}
    found = compared(tmp_path, f"transformers:{tmp_path}/zoo/run_0", ingredients, data)
    assert_figures(found, zoo, library_soup("AutoModelForCausalLM", found[1].out), by_own_loss(made["test"], 1))

"""A masked language model: compared, each model has the figures of transformers' own loss and logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from tests.ray.own_loops import Figures, assert_figures, compared, fine_tuned, rows_of
from tests.unit.task.language_models import byte_tokenizer

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


def by_own_loss(examples: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], Figures]:
    """The library's own loss of each example, [1, tokens], and its right predictions."""

    @torch.inference_mode()
    def loop(model: nn.Module) -> Figures:
        loss, units, right = 0.0, 0, []
        for example in examples:
            labels, out = example["labels"], model(**example)
            count = int((labels != -100).sum())
            loss, units = loss + out.loss.item() * count, units + count
            right.append(int((out.logits.argmax(2) == labels).sum()))
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
    assert_figures(found, zoo, library_soup("AutoModelForMaskedLM", found[1].out), by_own_loss(test))

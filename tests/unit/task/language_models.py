"""Tiny language models and tokenizers of transformers, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""A chat template whose prefixes are those of the whole conversation."""
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<s>assistant\n"
    "{% generation %}{{ message['content'] }}</s>{% endgeneration %}\n"
    "{% else %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""The same, with a mark for what the assistant wrote."""
TEXTS = [
    "The quick brown fox jumps over the lazy dog.", "Grüße aus München: 3 € für einen Kaffee.", "a", "",
    " ".join(["Every token after the first is scored once, in one window."] * 3),
    "def f(x):\n    return x + 1\n", " ".join(f"{n} squared is {n * n}." for n in range(20)),
]  # fmt: skip


def byte_tokenizer(texts: Sequence[str] = TEXTS, size: int = 320, bos: bool = True, template: str | None = None) -> Any:
    """A byte-level BPE as Llama 3 has: <s> in front of each text, no padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    found.chat_template = template
    return found


def llama(vocabulary: int = 320, tied: bool = False, std: float = 0.2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=std,
    )).eval()  # fmt: skip


def gpt2(vocabulary: int = 320) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1,
    )).eval()  # fmt: skip


def bert_for(task: str, vocabulary: int = 320, std: float = 0.2, **more: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=std, **more,
    )  # fmt: skip
    return getattr(transformers, f"Bert{task}")(config).eval()


def can_pack(name: str) -> bool:
    """Whether transformers packs texts for this model: old versions of GPT-2 take no mask for each place."""
    import transformers

    return name != "gpt2" or int(transformers.__version__.partition(".")[0]) >= 5


def nudge(model: nn.Module, seed: int) -> None:
    """Add a little noise to all parameters: models of several seeds are near each other."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


def saved(model: nn.Module, tokenizer: Any, folder: Path) -> str:
    """Write a model and its tokenizer; the value is the recipe key `model`."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return f"transformers:{folder}"


def sum_and_count(model: nn.Module, ids: Sequence[int], labels: Sequence[int] | None = None) -> tuple[float, int]:
    """The library's own loss of one sequence, times the number of tokens that it is a mean over."""
    tokens = torch.tensor([list(ids)])
    wanted = tokens if labels is None else torch.tensor([list(labels)])
    count = int((wanted[:, 1:] != -100).sum())
    with torch.inference_mode():
        loss = model(input_ids=tokens, labels=wanted).loss.item() if count else 0.0
    return loss * count, count

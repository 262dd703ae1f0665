"""Tokenization with a tokenizer of transformers: what it depends on, and how many tokens a model takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ray_soup.io.lazy import torch
from ray_soup.task.classes import Classes
from ray_soup.task.preprocess import NamedPreprocess

OF_TOKENS = ("causal_lm", "masked_lm", "token_classification")
"""Objectives whose examples are rows of a table that become tokens with targets."""
UNLIMITED = 1 << 30
"""More tokens than any model takes; transformers writes 1e30 where a tokenizer has no limit."""
DEFAULT_LENGTH = 1024
"""Length of the windows of a causal language model, and of texts for a model without a limit of its own."""


@dataclass(frozen=True)
class Tokenizing(NamedPreprocess):
    """Tokenization of texts, or of rows of a table, for one model."""

    tokenizer: Any = None
    """A tokenizer of transformers; None: rows must be token ids."""
    length: int = UNLIMITED
    """Maximum number of tokens of an example."""
    stride: int = UNLIMITED
    """Tokens from the beginning of a window to that of the next one, less than `length`."""
    vocabulary: int = UNLIMITED
    """Number of token ids that the model has embeddings for."""
    objective: str = "classification"
    """The objective of the model; those of OF_TOKENS take rows."""
    padding: int = 0
    """The token id that fills an example up to the longest of its batch."""
    labels: Classes | None = None
    """The names of the model's labels, of a model that labels tokens and names them."""


def takes_rows(preprocess: object) -> bool:
    """Return whether a preprocessing makes examples of rows of a table, and not of one image or text each."""
    return isinstance(preprocess, Tokenizing) and preprocess.objective in OF_TOKENS


def identity_of_tokenizer(tokenizer: Any) -> str:
    """Describe a tokenizer by its vocabulary, rules and settings, for cache keys."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else ""
    words = f"{sorted(tokenizer.get_vocab().items())}{rules}{getattr(tokenizer, 'chat_template', None)}"
    return f"{hashlib.sha256(words.encode()).hexdigest()} {tokenizer!r}"


def most_tokens(model: Any) -> int:
    """Return the maximum number of tokens that a model of transformers takes, UNLIMITED if it has no limit."""
    limits = [getattr(model.config, "max_position_embeddings", None) or UNLIMITED]
    for name, module in model.named_modules():  # RoBERTa and its relatives count positions from the padding index on
        of_positions = name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding)
        if of_positions and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


def default_length(model: Any, tokenizer: Any) -> int:
    """Return the smaller limit of a model and its tokenizer; DEFAULT_LENGTH if both have none."""
    of_tokenizer = getattr(tokenizer, "model_max_length", None) or UNLIMITED
    limit = min(most_tokens(model), int(min(of_tokenizer, UNLIMITED)))
    return limit if limit < UNLIMITED else DEFAULT_LENGTH

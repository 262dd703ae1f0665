"""Models of the library transformers that have outputs for each token: causal and masked language models, taggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ray_soup.errors import RecipeError
from ray_soup.task.model_spec import ModelSpec, no_weight_warnings
from ray_soup.task.tokenizing import (
    DEFAULT_LENGTH,
    UNLIMITED,
    Tokenizing,
    default_length,
    identity_of_tokenizer,
    most_tokens,
)
from ray_soup.task.transformers_models import describe_files, load_config, load_tokenizer, model_of
from ray_soup.task.transformers_tasks import auto_task, token_objective

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def transformers_tokens(spec: ModelSpec) -> tuple[torch.nn.Module, Tokenizing]:
    """Build the model that a config.json describes, and the tokenization of rows for it.

    The model maps token ids and attention mask, integers [n, 2, tokens], or its arguments by name, to logits [n, tokens,
    vocabulary or classes]. Raises RecipeError if the model does not exist, or an option does not fit it.
    """
    transformers, example = spec.import_library(), f"transformers:{spec.name}?length=1024"
    config = load_config(transformers, spec)
    objective = token_objective(config)
    known = {"causal_lm": ("stride",), "token_classification": ("classes",)}.get(objective, ())
    spec.check_options(("length", *known, "attn_implementation"), example)
    attention = spec.choice("attn_implementation", ATTENTION)
    config.use_cache = False
    more = {} if attention is None else {"attn_implementation": attention}
    try:
        with no_weight_warnings():
            model = model_of(transformers, config, auto_task(config, spec), **more)
    except (ValueError, ImportError) as error:
        raise RecipeError(
            f"model: transformers cannot build {spec.text} ({str(error).partition(chr(10))[0]}). Change the option "
            "attn_implementation, or choose another model."
        ) from error
    model.eval()  # dropout must not disturb the check below; training code sets the mode itself
    describe_files(model)
    model.register_forward_pre_hook(_token_inputs, with_kwargs=True)
    if objective == "causal_lm":
        _check_causal(model, spec)
    return model, _tokenizing(transformers, spec, model, objective, example)


def _token_inputs(model: Any, inputs: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(inputs) != 1:
        return inputs, named
    given = inputs[0]
    if not isinstance(given, Mapping):
        given = {"input_ids": given} if given.ndim == 2 else {"input_ids": given[:, 0], "attention_mask": given[:, 1]}
    return (), {name: value.long() if not value.is_floating_point() else value for name, value in given.items()} | named


def _check_causal(model: Any, spec: ModelSpec) -> None:
    """Check that no output depends on later tokens, which some configs allow. Raises RecipeError."""
    if next(model.parameters()).is_meta:
        return
    ids = torch.ones(2, 2, 4, dtype=torch.long)
    ids[1, 0, 3] = 2
    with torch.inference_mode():
        first, second = model(ids).logits
    if not torch.allclose(first[:3], second[:3], rtol=1e-3, atol=1e-4):
        raise RecipeError(
            f"model: {spec.text} is {type(model).__name__}, and its outputs depend on later tokens, so that it sees what it "
            "should predict. Set is_decoder in its config.json to true, or choose another model."
        )


def _tokenizing(transformers: Any, spec: ModelSpec, model: Any, objective: str, example: str) -> Tokenizing:
    """Load the tokenizer, and decide how long examples are. Raises RecipeError."""
    tokenizer = load_tokenizer(transformers, spec.name)
    default = default_length(model, tokenizer)
    length = spec.count("length", example, min(DEFAULT_LENGTH, default) if objective == "causal_lm" else default)
    limit = most_tokens(model)
    if length > limit or length < 2:
        what = f"the model takes at most {limit} tokens" if length > limit else "a token is predicted from those before it"
        cure = "smaller" if length > limit else "larger"
        raise RecipeError(f"model: {spec.text}: length is {length}; {what}. Choose a {cure} length.")
    stride = spec.count("stride", f"{example}&stride=512", length - 1) if objective == "causal_lm" else length
    if objective == "causal_lm" and stride >= length:
        raise RecipeError(
            f"model: {spec.text}: stride is {stride} and length {length}; the next window must begin before the last token "
            f"of this one, so that every token has one before it. Choose a stride of at most {length - 1}."
        )
    padding = getattr(tokenizer, "pad_token_id", None)
    padding = getattr(model.config, "pad_token_id", None) if padding is None else padding
    return Tokenizing(
        lambda text: tokenizer(text)["input_ids"], f"{objective} {length} {stride} {identity_of_tokenizer(tokenizer)}",
        "documents", tokenizer, length, stride, _embeddings(model), objective, 0 if padding is None else padding,
    )  # fmt: skip


def _embeddings(model: Any) -> int:
    """Return the number of token ids that a model has embeddings for."""
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return UNLIMITED
    return int(getattr(found, "num_embeddings", UNLIMITED))

"""Models of the library transformers that have outputs for each token: causal and masked language models, taggers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch
from ray_soup.task.classes import Classes
from ray_soup.task.model_spec import DTYPE, ModelSpec
from ray_soup.task.packing import check_packing, in_float32, pack
from ray_soup.task.tokenizing import DEFAULT_LENGTH, UNLIMITED, Tokenizing, identity_of_tokenizer
from ray_soup.task.transformers_models import FLASH, built, length_of, load_config, load_tokenizer
from ray_soup.task.transformers_tasks import auto_task, token_objective


def transformers_tokens(spec: ModelSpec) -> tuple[torch.nn.Module, Tokenizing]:
    """Build the model that a config.json describes, and the tokenization of rows for it.

    The model maps token ids and attention mask, integers [n, 2, tokens], or its arguments by name, to logits [n, tokens,
    vocabulary or classes]. Raises RecipeError if the model does not exist, or an option does not fit it.
    """
    transformers, example = spec.import_library(), f"transformers:{spec.name}?length=1024"
    config = load_config(transformers, spec)
    objective = token_objective(config)
    known = {"causal_lm": ("stride", "pack"), "token_classification": ("classes",)}.get(objective, ())
    spec.check_options(("task", "length", *known, DTYPE, "attn_implementation"), example)
    config.use_cache = False
    model = built(spec, config, auto_task(config, spec))
    model.eval()  # dropout must not disturb the checks below; training code sets the mode itself
    model.register_forward_pre_hook(_token_inputs, with_kwargs=True)
    tokenizing = _tokenizing(transformers, spec, model, objective, example)
    can_run = not next(model.parameters()).is_meta
    if objective == "causal_lm" and can_run:
        _check_causal(model, spec)
    if spec.choice("pack", ("true", "false")) == "true":
        pack(model)
        if can_run:
            check_packing(model, spec.text, tokenizing.length)
    return model, tokenizing


def _token_inputs(model: Any, inputs: Any, named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(inputs) != 1:
        return inputs, named
    given = inputs[0]
    if not isinstance(given, Mapping):
        given = {"input_ids": given} if given.ndim == 2 else {"input_ids": given[:, 0], "attention_mask": given[:, 1]}
    return (), {name: value.long() if not value.is_floating_point() else value for name, value in given.items()} | named


def _check_causal(model: Any, spec: ModelSpec) -> None:
    """Check that no output depends on later tokens, which some configs allow. Raises RecipeError.

    The model computes in float32, where rounding hides nothing, but with FLASH in its own dtype on a GPU.
    """
    of_flash = spec.options.get("attn_implementation") == FLASH
    device = torch.device("cuda" if of_flash and torch.cuda.is_available() else "cpu")
    computed = "bfloat16" if of_flash and spec.in_bfloat16 else "float32"
    ids = torch.ones(2, 2, 4, dtype=torch.long, device=device)
    ids[1, 0, 3] = 2
    try:
        with torch.no_grad(), nullcontext() if of_flash else in_float32(model):
            first, second = model.to(device)(ids).logits.float()
    except (RuntimeError, ValueError, ImportError) as error:
        raise RecipeError(
            f"model: {spec.text} cannot compute in {computed} on a {device.type.upper()} "
            f"({str(error).partition(chr(10))[0]}). Change the option attn_implementation: sdpa runs everywhere and uses "
            f"flash attention on a GPU. {FLASH} needs GPUs and {DTYPE}=bfloat16."
        ) from error
    finally:
        model.to("cpu")
    rounding = 2**-6 * first.abs().max().item() if of_flash else 1e-4
    if not torch.allclose(first[:3], second[:3], rtol=1e-3, atol=rounding):
        raise RecipeError(
            f"model: {spec.text} is {type(model).__name__}, and its outputs depend on later tokens, so that it sees what it "
            "should predict. Set is_decoder in its config.json to true, or choose another model."
        )


def _tokenizing(transformers: Any, spec: ModelSpec, model: Any, objective: str, example: str) -> Tokenizing:
    """Load the tokenizer, and decide how long examples are. Raises RecipeError."""
    tokenizer, causal = load_tokenizer(transformers, spec.name), objective == "causal_lm"
    length = length_of(spec, model, tokenizer, DEFAULT_LENGTH if causal else UNLIMITED, least=2)
    stride = spec.count("stride", f"{example}&stride=512", length - 1) if causal else length
    if causal and stride >= length:
        raise RecipeError(
            f"model: {spec.text}: stride is {stride} and length {length}; the next window must begin before the last token "
            f"of this one, so that every token has one before it. Choose a stride of at most {length - 1}."
        )
    padding = getattr(tokenizer, "pad_token_id", None)
    padding = getattr(model.config, "pad_token_id", None) if padding is None else padding
    return Tokenizing(
        lambda text: tokenizer(text)["input_ids"], f"{objective} {length} {stride} {identity_of_tokenizer(tokenizer)}",
        "documents", tokenizer, length, stride, _embeddings(model), objective, 0 if padding is None else padding,
        _labels(model.config) if objective == "token_classification" else None,
    )  # fmt: skip


def _labels(config: Any) -> Classes | None:
    """Return the names of the labels in a config; None if they are those that transformers makes up."""
    names = [str(config.id2label.get(label)) for label in range(config.num_labels)]
    made_up = names == [f"LABEL_{label}" for label in range(len(names))]
    return None if made_up or len({*names}) < len(names) else Classes("model", "id2label in its config.json", tuple(names))


def _embeddings(model: Any) -> int:
    """Return the number of token ids that a model has embeddings for."""
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return UNLIMITED
    return int(getattr(found, "num_embeddings", UNLIMITED))

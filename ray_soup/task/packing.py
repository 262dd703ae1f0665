"""Several short texts of a batch in one row, instead of each padded to the longest: the model computes fewer places.

    texts of 8, 3 and 5 tokens        aaaaaaaa bbb..... ccccc...    ->    aaaaaaaa bbbccccc

No token sees one of another text (a block-diagonal attention mask), and positions begin at 0 in each text, so the logits are
those of the padded batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray_soup.errors import RecipeError
from ray_soup.io.lazy import torch

LIMITS = ("sliding_window", "attention_chunk_size")
"""Settings of a config by which a token sees only some of those before it, which the mask of a packed row replaces."""
TOLERANCE = 1e-5
"""Largest difference between packed and padded logits, relative to the largest logit."""


def pack(model: Any) -> None:
    """Let a causal language model of transformers compute the texts of a batch packed into as few rows as hold them."""
    whole = model.forward

    def forward(*args: Any, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if args or more or attention_mask is None or not _at_the_beginning(attention_mask):
            return whole(*args, input_ids=input_ids, attention_mask=attention_mask, **more)
        rows, starts = places((attention_mask != 0).sum(1).tolist(), input_ids.shape[1])
        if len(set(rows)) == len(rows):
            return whole(input_ids=input_ids, attention_mask=attention_mask)
        row, start = (torch.tensor(values, device=input_ids.device)[:, None] for values in (rows, starts))
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        found = whole(**_packed(input_ids, attention_mask != 0, row, start, column, model.dtype))
        found.logits = found.logits[row, (start + column).clamp(max=len(column) - 1)]
        return found

    model.forward = forward


def places(lengths: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Choose a row and its first place there for each text: the longest first, each into the first row with room.

    Args:
        lengths: tokens of each text, at most `width`.
        width: places in a row.
    """
    rows, starts, filled = [0] * len(lengths), [0] * len(lengths), list[int]()
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, count in enumerate(filled) if count + lengths[text] <= width), len(filled))
        filled += [0] if row == len(filled) else []
        rows[text], starts[text] = row, filled[row]
        filled[row] += lengths[text]
    return rows, starts


def _at_the_beginning(mask: torch.Tensor) -> bool:
    """Return whether each row of a mask [n, tokens] is ones, then zeros."""
    if mask.ndim != 2:
        return False
    seen = mask != 0
    return bool((seen[:, 0].all() & (seen[:, 1:] <= seen[:, :-1]).all()).item())


def _packed(
    ids: torch.Tensor, seen: torch.Tensor, row: torch.Tensor, start: torch.Tensor, column: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Move texts into their rows.

    Args:
        ids: token ids, int64 [n, tokens].
        seen: which of them are tokens and not padding, bool [n, tokens].
        row: the row of each text, int64 [n, 1].
        start: its first place there, int64 [n, 1].
        column: 0, 1, ..., int64 [tokens].
        dtype: that of the model.

    Returns token ids and positions, int64 [rows, tokens], and what is added to attention, [rows, 1, tokens, tokens].
    """
    to = row.expand_as(ids)[seen], (start + column)[seen]
    text, packed, position = (ids.new_zeros(int(row.max()) + 1, len(column)) for _ in range(3))
    packed[to], position[to] = ids[seen], column.expand_as(ids)[seen]
    text[to] = torch.arange(1, len(ids) + 1, device=ids.device)[:, None].expand_as(ids)[seen]  # 0: places that stay empty
    allowed = (text[:, :, None] == text[:, None, :]) & (column[:, None] >= column)
    hidden = torch.zeros(allowed.shape, dtype=dtype, device=ids.device).masked_fill(~allowed, torch.finfo(dtype).min)
    return {"input_ids": packed, "position_ids": position, "attention_mask": hidden[:, None]}


def check_packing(model: Any, text: str, length: int) -> None:
    """Check that a model to which `pack` was applied computes the logits of a padded batch.

    Args:
        model: the model, in eval mode.
        text: the recipe key `model`, for messages.
        length: maximum number of tokens of an example.

    Raises RecipeError if it does not, or if this cannot be seen.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in LIMITS:
        limit = getattr(config, name, None)
        if limit and length > limit:
            raise RecipeError(
                f"model: {text}: pack=true needs a length of at most {limit}, because a token of this model sees {limit} "
                f"tokens ({name} in its config.json), and length is {length}. Choose a smaller length, or remove pack=true."
            )
    fault = _fault(model)
    if fault:
        name = type(model).__name__
        raise RecipeError(f"model: {text}: pack=true is not possible with {name}: {fault}. Remove pack=true.")


def _fault(model: Any) -> str:
    """Try texts of 8, 3 and 5 tokens. Return what is wrong with the packed logits; empty if nothing is."""
    words = getattr(model.get_input_embeddings(), "num_embeddings", 24)
    ids, lengths = torch.arange(24).view(3, 8) % words, (8, 3, 5)
    mask = torch.stack([(torch.arange(8) < length).long() for length in lengths])
    with torch.no_grad(), in_float32(model):
        try:
            found = model({"input_ids": ids, "attention_mask": mask}).logits
        except Exception as error:  # what a model cannot do with positions, or with a mask of each place
            return f"it cannot compute packed texts ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
        alone = [model({"input_ids": ids[k : k + 1, :length]}).logits[0] for k, length in enumerate(lengths)]
        joined = model({"input_ids": torch.cat([ids[1, :3], ids[2, :5]])[None]}).logits[0, 3:]
    largest = max(logits.abs().max().item() for logits in alone)
    most = max((found[k, :length] - alone[k]).abs().max().item() for k, length in enumerate(lengths))
    if not most <= TOLERANCE * largest:
        return (
            f"its logits of packed texts differ from those of each alone, by {most:.1g} where the largest is {largest:.1g}"
        )
    if not (joined - alone[2]).abs().max().item() > 100 * TOLERANCE * largest:
        return "with random parameters, it does not show whether texts of a row affect each other"
    return ""


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let a model in bfloat16 compute in float32, where the rounding error is too small to hide a difference."""
    low = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype == torch.bfloat16]
    for tensor, values in low:
        tensor.data = values.float()
    try:
        yield
    finally:
        for tensor, values in low:
            tensor.data = values

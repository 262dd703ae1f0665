"""From rows of texts, conversations or tokens to tokens and what is scored of them, with the columns that TRL knows.

- `text`: every token is scored.
- `prompt`, `completion`: the tokens of the completion. Both are texts, or lists of messages.
- `messages`: the tokens of the assistant's turns, by the tokenizer's chat template.
- `input_ids` and `labels`: the tokens whose label is not IGNORED; without labels every token.
- `tokens` and a column that ends with `_tags`: the first token of each word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_soup.task.raw_examples import IGNORED, Source, reason
from ray_soup.task.rows import Row
from ray_soup.task.tokenizing import Tokenizing
from ray_soup.task.windows import Document

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark in a chat template that says which tokens the assistant writes."""
WITH_TOKENS = ("labels", "attention_mask", "token_type_ids", "position_ids", "completion_mask", "assistant_masks")
"""Columns beside `input_ids` that change what is computed or scored."""
FORMS: dict[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    "causal_lm": (
        (("input_ids",), WITH_TOKENS),
        (("messages",), ("tools",)),
        (("prompt", "completion"), ("tools",)),
        (("text",), ()),
    ),
    "masked_lm": ((("input_ids", "labels"), WITH_TOKENS),),
    "token_classification": ((("input_ids", "labels"), WITH_TOKENS),),
}
"""For each objective the columns that rows may have, required and optional, in order of preference."""
MORE = {
    "masked_lm": " The masked places must be stored, because figures must not depend on a random draw.",
    "token_classification": " Words need the columns `tokens` and one that ends with `tags`.",
}


def columns_for(source: Source, columns: Sequence[str], objective: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Choose the columns to read, required and optional ones. Raises RecipeError if a table has none of FORMS."""
    if objective == "token_classification" and "tokens" in columns and "input_ids" not in columns:
        tags = [name for name in columns if name in ("labels", "tags")] or [n for n in columns if n.endswith("_tags")]
        if len(tags) == 1:
            return ("tokens", tags[0]), ()
        named = f"the columns {', '.join(tags)}" if tags else "no column of tags"
        raise source.error(f"has `tokens` and {named}; expected one column of tags. Call the right one `labels`.")
    for required, optional in FORMS[objective]:
        if set(required) <= set(columns):
            return required, optional
    wanted = "; ".join(" and ".join(f"`{name}`" for name in required) for required, _ in FORMS[objective])
    raise source.error(
        f"has the columns {', '.join(columns)[:200]}; expected {wanted}, for a model of the kind {objective}."
        f"{MORE.get(objective, '')} Rename or add columns."
    )


def documents_of(
    source: Source, rows: Sequence[Row], places: Sequence[str], columns: Sequence[str], how: Tokenizing
) -> list[Document]:
    """Tokenize rows.

    Args:
        source: where the rows come from.
        rows: the rows.
        places: describes the place of each row, for errors.
        columns: the required columns, by which the form of the rows is known.
        how: the tokenization.

    Raises RecipeError for a row that cannot be used.
    """
    if how.tokenizer is None and columns[0] != "input_ids":
        raise source.error(
            f"has the column `{columns[0]}`, and the model's folder has no tokenizer. Save the tokenizer in it, or tokens "
            "(`input_ids`) in the data."
        )
    if columns[0] == "text":
        texts = [_text(source, row, place) for row, place in zip(rows, places, strict=True)]
        found = [_whole(ids, len(text.encode())) for ids, text in zip(_ids(how, texts), texts, strict=True)]
        return _checked(source, found, places, how)
    make = {"messages": _of_messages, "prompt": _of_prompt, "input_ids": _of_ids, "tokens": _of_words}[columns[0]]
    found = []
    for row, place in zip(rows, places, strict=True):
        try:
            found.append(make(row, how))
        except Exception as error:  # the chat template is a program of the user's, and may raise anything
            raise source.error(f"{place}: {reason(error)}. Change the row, or remove it.") from error
    return _checked(source, found, places, how)


def _checked(source: Source, documents: list[Document], places: Sequence[str], how: Tokenizing) -> list[Document]:
    """Check that the model has all tokens. Raises RecipeError."""
    for place, document in zip(places, documents, strict=True):
        outside = (document.ids < 0) | (document.ids >= how.vocabulary)
        if outside.any():
            raise source.error(
                f"{place} has the token {document.ids[outside][0]}; the model has embeddings for 0 to "
                f"{how.vocabulary - 1}. Use the tokenizer that the model was trained with."
            )
    return documents


def _ids(how: Tokenizing, texts: list[str]) -> list[list[int]]:
    """Tokenize texts with the special tokens that the tokenizer itself adds."""
    found = how.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = found["input_ids"]
    return ids


def _text(source: Source, row: Row, where: str) -> str:
    text = row["text"]
    fault = None if isinstance(text, str) else f"`text` is {str(text)[:40]!r}; expected a string"
    try:
        _ = text.encode() if fault is None else b""
    except UnicodeEncodeError as error:
        fault = f"`text` is not valid Unicode ({reason(error)})"
    if fault is not None:
        raise source.error(f"{where}: {fault}. Change the row, or remove it.")
    return str(text)


def _whole(ids: Sequence[int], nbytes: float) -> Document:
    tokens = np.asarray(ids, np.int32)
    return Document(tokens, tokens.astype(np.int64), nbytes)


def _scored(
    ids: Sequence[int] | np.ndarray, scored: Sequence[bool] | np.ndarray, how: Tokenizing, text: str | None = None
) -> Document:
    """Make a document of which some tokens are scored; without their `text` it is what the tokenizer makes of them."""
    tokens, chosen = np.asarray(ids, np.int32), np.asarray(scored, bool)
    if text is None:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = how.tokenizer.decode(tokens[chosen].tolist(), **options)
    return Document(tokens, np.where(chosen, tokens, IGNORED).astype(np.int64), len(text.encode(errors="replace")))


def _from(start: Sequence[int], whole: Sequence[int], what: str) -> int:
    """Return the number of tokens in `start`, which must be those that `whole` begins with. Raises ValueError."""
    if list(whole[: len(start)]) != list(start):
        raise ValueError(what)
    return len(start)


# Prompts and completions


def _of_prompt(row: Row, how: Tokenizing) -> Document:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        start = _rendered(how, [*_messages(prompt)], row, add_generation_prompt=True)
        whole = _rendered(how, [*_messages(prompt), *_messages(completion)], row)
        begun = _from(start, whole, "the chat template renders the prompt otherwise if a completion follows it")
        return _scored(whole, np.arange(len(whole)) >= begun, how)
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError(
            f"`prompt` is a {type(prompt).__name__} and `completion` a {type(completion).__name__}; expected two strings, "
            "or two lists of messages"
        )
    start, whole = _ids(how, [prompt, prompt + completion])
    if start and list(whole[: len(start)]) != list(start) and start[-1] in how.tokenizer.all_special_ids:
        start = start[:-1]  # a special token that the tokenizer adds at the end
    begun = _from(
        start, whole, "the tokens of `prompt` are not those that the whole text begins with, so that it is not clear which "
        "ones to score; let `completion` begin with the space between the two"
    )  # fmt: skip
    return _scored(whole, np.arange(len(whole)) >= begun, how, completion)


# Conversations


def _of_messages(row: Row, how: Tokenizing) -> Document:
    messages, template = _messages(row["messages"]), how.tokenizer.get_chat_template()
    if GENERATION.search(template):
        found = how.tokenizer.apply_chat_template(
            messages, tools=_tools(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return _scored(found["input_ids"], np.asarray(found["assistant_masks"]) == 1, how)
    whole = _rendered(how, messages, row)
    scored = np.zeros(len(whole), bool)
    what = (
        "the chat template does not render the first messages alone as it renders them in the whole conversation, and it "
        "has no {% generation %} that says what the assistant wrote; add that to it, or store `input_ids` and `labels`"
    )
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            begun = _from(_rendered(how, messages[:number], row, add_generation_prompt=True), whole, what)
            scored[begun : _from(_rendered(how, messages[: number + 1], row), whole, what)] = True
    return _scored(whole, scored, how)


def _messages(found: object) -> list[dict[str, Any]]:
    """Check messages, and drop the empty entries that tables of rows with different keys have. Raises ValueError."""
    messages = found if isinstance(found, list) else []
    if not messages or not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise ValueError(f"found {str(found)[:60]!r}; expected a list of messages, each with `role` and `content`")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _tools(row: Row) -> Any:
    tools = row.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def _rendered(how: Tokenizing, messages: list[dict[str, Any]], row: Row, add_generation_prompt: bool = False) -> list[int]:
    """Return the tokens of a conversation."""
    found = how.tokenizer.apply_chat_template(
        messages, tools=_tools(row), tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    ids: list[int] = found["input_ids"]
    return ids


# Tokens


def _of_ids(row: Row, how: Tokenizing) -> Document:
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    if ids is None or (labels is None and how.objective != "causal_lm"):
        raise ValueError(f"`{'input_ids' if ids is None else 'labels'}` is null")
    targets = ids.astype(np.int64) if labels is None else labels
    for name in ("completion_mask", "assistant_masks"):
        mask = _integers(row, name)
        targets = targets if mask is None else np.where(_as_long(mask, name, ids) == 1, targets, IGNORED)
    kept = slice(None)
    mask = _integers(row, "attention_mask")
    if mask is not None:
        seen = np.flatnonzero(_as_long(mask, "attention_mask", ids))
        kept = slice(seen[0], seen[-1] + 1) if len(seen) else slice(0)
        if len(seen) and len(seen) != kept.stop - kept.start:
            raise ValueError("`attention_mask` has zeros between ones; expected padding at an end only")
        hidden = np.delete(_as_long(targets, "labels", ids), kept)
        if labels is not None and (hidden != IGNORED).any():
            raise ValueError(f"`labels` scores padding, where `attention_mask` is 0; expected {IGNORED} there")
    for name, expected in (("token_type_ids", np.zeros(len(ids))), ("position_ids", np.arange(len(ids)))):
        found = _integers(row, name)
        if found is not None and not np.array_equal(_as_long(found, name, ids)[kept], expected[: len(ids[kept])]):
            raise ValueError(f"`{name}` is not what the model computes itself, and is not supported; remove the column")
    ids, targets = ids[kept].astype(np.int32), _as_long(targets, "labels", ids)[kept].astype(np.int64)
    if how.objective != "causal_lm" and len(ids) > how.length:
        raise ValueError(f"{len(ids)} tokens; the model takes at most {how.length}. Cut them as they were cut for training")
    if how.objective != "causal_lm" or how.tokenizer is None:
        return Document(ids, targets)
    return Document(ids, targets, _scored(ids, targets != IGNORED, how).nbytes)


def _integers(row: Row, name: str) -> np.ndarray | None:
    """Return a column's list as int64 [tokens]; None if the row has none. Raises ValueError."""
    if row.get(name) is None:
        return None
    found = np.asarray(row[name])
    if found.ndim != 1 or (found.dtype.kind not in "iub" and len(found)):
        raise ValueError(f"`{name}` is {found.dtype} {list(found.shape)}; expected a list of integers")
    return found.astype(np.int64)


def _as_long(found: np.ndarray, name: str, ids: np.ndarray) -> np.ndarray:
    if len(found) != len(ids):
        raise ValueError(f"`{name}` has {len(found)} entries and `input_ids` {len(ids)}; expected equally many")
    return found


# Words


def _of_words(row: Row, how: Tokenizing) -> Document:
    words, tags = row["tokens"], _integers(row, next(name for name in row if name != "tokens"))
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words) or tags is None:
        raise ValueError("expected a list of strings in `tokens` and a list of integers as tags")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words and {len(tags)} tags; expected equally many")
    found = how.tokenizer(words, is_split_into_words=True, truncation=True, max_length=how.length, verbose=False)
    places: list[int | None] = found.word_ids()
    targets = np.full(len(places), IGNORED, np.int64)
    for place, word in enumerate(places):
        if word is not None and (place == 0 or places[place - 1] != word):
            targets[place] = tags[word]
    seen = {word for word in places if word is not None}
    return Document(np.asarray(found["input_ids"], np.int32), targets, cut=bool(words) and len(words) - 1 not in seen)

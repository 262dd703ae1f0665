"""Open a source for a model: in its stored form, or tokenized, with the tokens in the cache of the node."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ray_soup.io.cache import cached, content_key
from ray_soup.recipe import Data
from ray_soup.task.classes import Classes, relabeled
from ray_soup.task.documents import columns_for, documents_of
from ray_soup.task.mask_folders import with_masks
from ray_soup.task.preprocess import Preprocess, input_kind
from ray_soup.task.raw_examples import IGNORED, PART, RawExamples, Source
from ray_soup.task.rows import SUFFIXES, Table, open_table, table_of
from ray_soup.task.sources import check_sources, existing, is_local, named_sources, read_source
from ray_soup.task.tokenizing import OF_TOKENS, Tokenizing, takes_rows
from ray_soup.task.windows import Windows, assembled, padded, windows

Progress = Generator[tuple[int, int], None, RawExamples]
NPZ = ".npz"
MOVED = "were moved by one place, so that each token is predicted from those before it."
BYTES_PER_BYTE = 6
"""Bytes in the cache for each byte of text, to make room for them."""


def open_source(source: Source, preprocess: Preprocess | None) -> Progress:
    """Open a source of examples for a model with this preprocessing; texts for a model of transformers are tokenized.

    Yields (done, total). Raises RecipeError if the source cannot be read.
    """
    if not isinstance(preprocess, Tokenizing):
        raw = yield from read_source(source, input_kind(preprocess))
        return (yield from with_masks(raw, preprocess)) if raw.masks else raw
    if not takes_rows(preprocess):
        raw = yield from read_source(source, "text")
        return (yield from _texts(raw, preprocess)) if raw.arrays is None else raw
    if source.spec.endswith(NPZ):
        return _as_in_transformers((yield from read_source(source, "text")), preprocess)
    return (yield from _rows(source, preprocess))


def check_data(data: Data, targets: str, objective: str) -> None:
    """Check the local sources of a recipe on this machine; nothing is decoded.

    Args:
        data: the recipe's section `data`.
        targets: the kind of targets that the objective needs.
        objective: the objective that the model itself names, if it does.

    Raises RecipeError.
    """
    if objective not in OF_TOKENS:
        return check_sources(data, targets)
    for source in named_sources(data, targets).values():
        if is_local(source) and not source.spec.endswith(NPZ):
            columns_for(source, table_of(source, existing(source, SUFFIXES)).columns, objective)
    return None


def _as_in_transformers(raw: RawExamples, how: Tokenizing) -> RawExamples:
    """Move the labels of arrays for a causal language model by one place, as the models of transformers do themselves."""
    if how.objective != "causal_lm":
        return raw
    if raw.labels.ndim != 2:
        raise raw.source.error(f"labels are {list(raw.labels.shape)}; expected one for each token, [n, tokens]. Save them.")
    note = f"{raw.source.key}: labels {MOVED}"
    return replace(raw, labels=moved_by_one(raw.labels), notes=(*raw.notes, note))


def moved_by_one(labels: np.ndarray) -> np.ndarray:
    """Move the labels of tokens, [n, tokens], so that the target of a place is the token after it."""
    moved = np.full_like(labels, IGNORED)
    moved[:, :-1] = labels[:, 1:]
    return moved


# Texts with one label each


def _texts(raw: RawExamples, how: Tokenizing) -> Progress:
    """Tokenize the texts of a classifier, in parts."""
    total = len(raw.labels)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        ids, cut = list[np.ndarray](), 0
        for texts in raw.parts():
            odd = next((k for k, text in enumerate(texts) if not isinstance(text, str)), None)
            if odd is not None:
                raise raw.source.error(
                    f"{raw.where(len(ids) + odd)} is no text, and the model takes texts. Use data with a column of texts."
                )
            found = how.tokenizer(
                texts, padding=False, truncation=True, max_length=how.length, return_attention_mask=False, verbose=False
            )["input_ids"]
            whole = how.tokenizer(texts, padding=False, truncation=False, return_attention_mask=False, verbose=False)
            cut += sum(len(one) > len(some) for one, some in zip(whole["input_ids"], found, strict=True))
            ids += [np.asarray(some, np.int32) for some in found]
            yield len(ids), total
        lengths = np.array([max(1, len(some)) for some in ids], np.int64)
        share = f"{cut:,} of {len(ids):,} texts ({cut / max(1, len(ids)):.1%}) were cut at {how.length} tokens."
        notes = [f"{raw.source.key}: {share} The option `length` of the model changes this."] if cut else []
        none = np.zeros((len(ids), 0), np.int64)
        Windows(
            padded(ids, how.padding),
            none,
            np.arange(len(ids)),
            np.zeros(0),
            lengths,
            notes=notes,
            cut=cut / max(1, len(ids)),
        ).save(folder)

    identity = (*raw.identity, how.text)
    hold = yield from cached("data", content_key("texts", 2, identity), total * 8 * min(how.length, 256), make)
    found = Windows.load(hold.path)
    if len(found.inputs) != total:
        raise raw.source.error(
            f"found {len(found.inputs)} texts and {total} labels. The files changed while they were read: rerun the command."
        )
    return replace(
        raw,
        arrays=found.inputs,
        lengths=found.lengths,
        identity=identity,
        notes=(*raw.notes, *found.notes),
        hold=hold,
        cut=found.cut,
    )


# Rows of texts, conversations or tokens


def _rows(source: Source, how: Tokenizing) -> Progress:
    table = yield from open_table(source)
    columns, optional = columns_for(source, table.columns, how.objective)
    names = table.classes(columns[1] if columns[0] == "tokens" else "labels")
    if not table.identity:
        found = yield from _windows(table, columns, optional, how)
        return _examples(source, found, how, names)

    def make(folder: Path) -> Iterator[tuple[int, int]]:
        made = yield from _windows(table, columns, optional, how)
        made.save(folder)

    identity = (*table.identity, how.text)
    hold = yield from cached("data", content_key("rows", 2, identity), table.nbytes * BYTES_PER_BYTE, make)
    return replace(_examples(source, Windows.load(hold.path), how, names), identity=identity, hold=hold)


def _windows(
    table: Table, columns: Sequence[str], optional: Sequence[str], how: Tokenizing
) -> Generator[tuple[int, int], None, Windows]:
    """Tokenize all rows of a table. Raises RecipeError for a row that cannot be used."""
    parts, files = list[tuple[int, np.ndarray, np.ndarray, float]](), list[tuple[str, int]]()
    first, cut, empty = 0, 0, 0
    for name, rows_of in table.parts:
        rows = list(rows_of((*columns, *optional)))
        of_file = f" of {name}" if len(table.parts) > 1 else ""
        for start in range(0, len(rows), PART):
            places = [f"row {row}{of_file}" for row in range(start, min(start + PART, len(rows)))]
            found = documents_of(table.source, rows[start : start + PART], places, columns, how)
            for number, document in enumerate(found, first + start):
                if how.objective == "causal_lm":
                    cuts = list(windows(document, how.length, how.stride))
                    cut += len(document.ids) > how.length
                else:
                    cuts = [(document.ids, document.targets)] if (document.targets != IGNORED).any() else []
                    cut += document.cut
                scored = [int((targets != IGNORED).sum()) for _, targets in cuts]
                sizes = [document.nbytes * count / sum(scored) for count in scored]
                parts += [(number, ids, targets, size) for (ids, targets), size in zip(cuts, sizes, strict=True)]
                empty += not cuts
            yield min(start + PART, len(rows)), len(rows)
        first += len(rows)
        files.append((name, len(rows)))
    if not parts:
        raise table.source.error(f"none of its {first} rows has a token to score. Check the columns {', '.join(columns)}.")
    made = assembled(parts, how.padding)
    made.files, made.notes = files, _notes(table.source, columns, how, len(parts), first, cut, empty)
    made.cut = cut / max(1, first)
    return made


def _notes(
    source: Source, columns: Sequence[str], how: Tokenizing, count: int, rows: int, cut: int, empty: int
) -> list[str]:
    """Return what the user should know about how rows became windows."""
    named = " and ".join(f"`{name}`" for name in columns)
    if how.objective == "causal_lm":
        first = (
            f"{source.key}: {rows:,} documents ({named}) in {count:,} windows of up to {how.length:,} tokens; {cut:,} "
            "longer documents were cut."
        )
    else:
        first = f"{source.key}: {rows:,} rows ({named})" + (
            f"; {cut:,} have more than {how.length:,} tokens, and the words after these are not scored." if cut else "."
        )
    if not empty:
        return [first]
    return [f"{first} {empty:,} have nothing to score and were left out."]


def _examples(source: Source, found: Windows, how: Tokenizing, names: Classes | None) -> RawExamples:
    """Make examples of windows. If the data and the model name the labels, they are those of the model."""
    causal, targets, notes = how.objective == "causal_lm", found.targets, found.notes
    classes = names if how.objective == "token_classification" else None
    if classes is not None and how.labels is not None:
        targets, note = relabeled(targets, classes, how.labels)
        classes, notes = how.labels, [*notes, note] if note else notes
    return RawExamples(
        source, targets, found.inputs, classes=classes, where=found.where, notes=tuple(notes),
        groups=found.documents if causal else None,
        bytes=found.bytes if causal and not np.isnan(found.bytes).any() else None, lengths=found.lengths, cut=found.cut,
    )  # fmt: skip


def digests_of_documents(digests: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Replace the digest of each window by that of its whole document, so that a document is never divided: uint64 [n]."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    hashes = [blake2b(own.tobytes(), digest_size=8).digest() for own in np.split(digests, starts[1:])]
    return np.repeat(np.frombuffer(b"".join(hashes), np.uint64), np.diff(starts, append=len(groups)))

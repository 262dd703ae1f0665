"""Cut tokenized documents into windows, in which every token after the first of a document is scored exactly once."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ray_soup.task.raw_examples import IGNORED, row_number

ARRAYS = ("inputs", "targets", "documents", "bytes", "lengths")


@dataclass(frozen=True)
class Document:
    """The tokens of one row."""

    ids: np.ndarray
    """Token ids, int32 [tokens]."""
    targets: np.ndarray
    """What is scored at the place of each token, IGNORED if nothing is, int64 [tokens]: for a causal language model the
    token itself."""
    nbytes: float = float("nan")
    """Bytes in UTF-8 of the text that the scored tokens stand for; NaN if it is not known."""
    cut: bool = False
    """Whether tokens were left out."""


def windows(document: Document, length: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut a document for a causal language model.

    The first window begins with the document, and each of the others `stride` tokens after the one before. A window scores
    the tokens that no earlier one scores, except the first of the document, which has nothing before it.

    Args:
        document: the document.
        length: maximum number of tokens in a window.
        stride: at most length - 1, so that neighbors overlap and the first token that a window scores has one before it.

    Yields token ids and targets, both [tokens]; the target of a place is the token after it. Windows without a target are
    left out.
    """
    count, first, scored = len(document.ids), 0, 1
    while scored < count:
        last = min(first + length, count)
        targets = np.full(last - first, IGNORED, np.int64)
        targets[scored - 1 - first : last - 1 - first] = document.targets[scored:last]
        if (targets != IGNORED).any():
            yield document.ids[first:last], targets
        scored, first = last, first + stride


@dataclass
class Windows:
    """The windows of all documents of a source, padded to the longest."""

    inputs: np.ndarray
    """Token ids and attention mask, int32 [n, 2, tokens]."""
    targets: np.ndarray
    """int32 [n, tokens]; int64 if a number is too large."""
    documents: np.ndarray
    """Number of the row that each window is a part of, int64 [n]."""
    bytes: np.ndarray
    """Bytes of text that each window scores, float64 [n]; NaN if they are not known."""
    lengths: np.ndarray
    """int64 [n]."""
    files: list[tuple[str, int]] = field(default_factory=list)
    """Name and number of rows of each file."""
    notes: list[str] = field(default_factory=list)
    """What the user should know about the windows."""
    cut: float | None = None
    """Share of the texts or documents that have more tokens than fit into one example."""

    @property
    def where(self) -> Callable[[int], str]:
        """Return a function that describes the row of a window."""
        documents, files = self.documents, self.files
        starts = np.cumsum([0, *(count for _, count in files)]).tolist()

        def describe(window: int) -> str:
            row = int(documents[window])
            number = bisect.bisect_right(starts, row) - 1
            return row_number(row) if len(files) < 2 else f"row {row - starts[number]} of {files[number][0]}"

        return describe

    def save(self, folder: Path) -> None:
        """Write the windows to files in a folder."""
        for name in ARRAYS:
            with open(folder / f"{name}.npy", "wb") as file:
                np.save(file, getattr(self, name))
        (folder / "windows.json").write_text(
            json.dumps({"files": self.files, "notes": self.notes, "cut": self.cut}), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path) -> Windows:
        """Read what `save` wrote; inputs and targets are memory-mapped."""
        mapped = ("inputs", "targets")
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r" if name in mapped else None) for name in ARRAYS}
        more = json.loads((folder / "windows.json").read_text(encoding="utf-8"))
        return cls(**arrays, files=[(name, count) for name, count in more["files"]], notes=more["notes"], cut=more["cut"])


def padded(rows: Sequence[np.ndarray], padding: int) -> np.ndarray:
    """Stack rows of token ids, filled with `padding`, and their attention masks: int32 [n, 2, longest]."""
    inputs = np.zeros((len(rows), 2, max(map(len, rows), default=0)), np.int32)
    inputs[:, 0] = padding
    for number, ids in enumerate(rows):
        inputs[number, 0, : len(ids)], inputs[number, 1, : len(ids)] = ids, 1
    return inputs


def assembled(parts: Sequence[tuple[int, np.ndarray, np.ndarray, float]], padding: int) -> Windows:
    """Make Windows of (row, token ids, targets, bytes) each, filled with the token id `padding`."""
    inputs = padded([ids for _, ids, _, _ in parts], padding)
    small = np.iinfo(np.int32)
    fits = all(small.min <= some.min() and some.max() <= small.max for _, _, some, _ in parts)
    targets = np.full((len(parts), inputs.shape[2]), IGNORED, np.int32 if fits else np.int64)
    for number, (_, ids, some, _) in enumerate(parts):
        targets[number, : len(ids)] = some
    numbers = np.array([row for row, *_ in parts], np.int64)
    sizes = np.array([size for *_, size in parts], np.float64)
    return Windows(inputs, targets, numbers, sizes, inputs[:, 1].sum(axis=1, dtype=np.int64))

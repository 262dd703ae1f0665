"""Names and other foreign text in a report: one function for each kind of document that it goes into.

Nothing that a file, a tensor or a class is called changes the structure of a page, a card, a table or a figure, and no
credentials get into one. Does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ray_soup.io.redact import printable, redact

OPTIMISTIC = "†"
"""Marks figures on data that the model was learned, stopped or chosen on."""
OPTIMISTIC_NOTE = f"{OPTIMISTIC} optimistic: the model was learned, stopped or chosen on this data."
BEFORE_REFIT = "‡"
"""Marks figures of a soup before its refit."""
BEFORE_REFIT_NOTE = f"{BEFORE_REFIT} before the refit, which learned on this data, too."
MARKS = {OPTIMISTIC: OPTIMISTIC_NOTE, BEFORE_REFIT: BEFORE_REFIT_NOTE}
"""What each mark means."""
SOURCES = {
    "files": "as the files of the ingredients say",
    "recipe": "as the recipe says",
    "default": "the default of the model's library; neither the ingredients nor the recipe say otherwise",
    "none": "none, because the data are arrays",
}
"""Why data were preprocessed in this way, by the `source` in run.json."""
LABEL = 60
"""Characters of the longest label in a figure."""

_NO_XML = re.compile("[\ufffe\uffff]")
_MARKDOWN = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")
_BLOCK = re.compile(r"[-+#=\s]|\d+[.)]")


def number(form: str, value: float) -> str:
    """Format a number, as with "{:.4f}"; one that rounds to zero has no minus sign."""
    text = form.format(value)
    is_zero = "0" in text and not re.search("[1-9]", text)
    return text.replace("-", "+" if "+" in form else "", 1) if is_zero else text


def size_in_bytes(nbytes: float) -> str:
    """Format a number of bytes, as in 1.2 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Format an estimated time, as in 12.3 ms, 4.5 s, 6 min or 1.7 h."""
    if seconds < 1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def plain(text: str) -> str:
    """Return a text for a page or a figure: printable, in characters of XML, without credentials. Newlines stay."""
    return _NO_XML.sub(lambda found: ascii(found[0])[1:-1], printable(redact(text)))


def one_line(text: str) -> str:
    r"""Return `plain` text on one line: newlines and tabs become the visible escapes \n and \t."""
    return plain(text).replace("\n", "\\n").replace("\t", "\\t")


def label(text: str) -> str:
    """Return a text for a figure: `one_line`, and shortened in the middle to LABEL characters."""
    return shortened(one_line(text), LABEL)


def shortened(text: str, most: int) -> str:
    """Replace the middle of a text of more than `most` characters by an ellipsis."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"


def capital(text: str) -> str:
    """Return a text that begins with a capital letter."""
    return f"{text[:1].upper()}{text[1:]}"


def preprocessing_text(record: Mapping[str, Any]) -> str:
    """Describe the preprocessing that run.json records, in words; empty if it records none.

    Args:
        record: the value of the key `preprocessing`.
    """
    source = record.get("source", "")
    if source not in SOURCES:
        return ""
    parts = [f"the function {record['function']}"] if "function" in record else []
    parts += [f"as the function {record['model']} returns it"] if "model" in record else []
    parts += [f"texts of up to {record['length']:,} tokens"] if "length" in record else []
    for name in ("size", "resize_size", "channels", "mean", "std", "crop", "interpolation"):
        if name in record:
            values = record[name] if isinstance(record[name], list) else [record[name]]
            join, shown = (
                (" x " if name == "size" else ", "),
                [f"{v:.9g}" if isinstance(v, float) else f"{v}" for v in values],
            )
            parts.append(f"{name} {join.join(shown)}")
    cut = [f"{share:.1%} of {name}" for name, share in record.get("cut", {}).items()]
    parts += [f"{' and '.join(cut)} longer"] if cut else []
    why = SOURCES[source]
    if places := list(dict.fromkeys(str(place).removeprefix("its ") for place in record.get("files", {}).values())):
        why += f"{'' if source == 'files' else '; the rest as the files of the ingredients say'}: {', '.join(places)}"
    return f"{'; '.join(parts)} ({why})" if parts else why


def markdown_text(text: str) -> str:
    """Return Markdown that shows `text` unchanged, on one line: in a paragraph, in a heading or in a cell of a table.

    Characters with a meaning become character references, which never have one.
    """
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def markdown_paragraph(text: str) -> str:
    """Return a paragraph of Markdown that shows `text`: it does not begin a heading, a list or a block of code."""
    escaped = markdown_text(text)
    begin = _BLOCK.match(escaped)
    return f"{begin[0][:-1]}&#{ord(begin[0][-1])};{escaped[begin.end() :]}" if begin else escaped


def markdown_code(text: str) -> str:
    """Return a code span that shows `text`."""
    text = one_line(text)
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def markdown_block(text: str, language: str) -> str:
    """Return a fenced block of code that shows `text`."""
    text = plain(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    """Return the length of the longest run of backticks in a text."""
    return max(map(len, re.findall("`+", text)), default=0)

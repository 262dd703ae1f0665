"""The code blocks of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(f for f in DOCS.rglob("*.md") if not {"generated", "_build"} & set(f.parts))]
MARKDOWN = MarkdownIt().enable("table")


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    """The number of its first line in the page."""
    language: str
    text: str

    @property
    def file(self) -> str:
        """The file whose name the block begins with, as in `# model.py`; a recipe without one is recipe.yaml."""
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else "recipe.yaml" if self.language == "yaml" else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    return MARKDOWN.parse(page.read_text(encoding="utf-8"))


def blocks(page: Path) -> list[Block]:
    return [
        Block(page, token.map[0] + 2, token.info.strip(), token.content)
        for token in tokens(page)
        if token.type == "fence" and token.map
    ]


def all_blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def shell_commands(block: Block) -> Iterator[list[str]]:
    """The words of each command in a block of shell, without comments, pipes and redirections."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("pip install") and "#" not in line:
            yield line.split()
            continue
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words: list[str] = []
        before = ""
        for word in [*reader, "&&"]:
            if set(word) <= {"&", "|", ";"}:
                yield from [words] if words else []
                words = []
            elif ">" not in (word, before):
                words.append(word)
            before = word


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, and of the page that it includes."""
    found = tokens(page)
    headings = {slug(found[n + 1].content) for n, token in enumerate(found) if token.type == "heading_open"}
    included = [page.parent / token.info.split()[-1] for token in found if token.info.startswith("{include}")]
    return headings.union(*(anchors(file) for file in included if file.exists()))


def links(page: Path) -> list[str]:
    """The targets of a page's links."""
    inner = [child for token in tokens(page) for child in token.children or []]
    return [str(child.attrs["href"]) for child in inner if child.type == "link_open"]

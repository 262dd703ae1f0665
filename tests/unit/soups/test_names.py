"""Whatever a file, a tensor, a class or a test set is called, reports keep their structure and hold no credentials."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import make_recipe
from ray_soup.soups.report.card import model_card
from ray_soup.soups.report.marks import MARK
from ray_soup.soups.report.page import Report, html
from ray_soup.soups.report.tables import markdown
from ray_soup.soups.report.text import (
    label,
    markdown_block,
    markdown_code,
    markdown_paragraph,
    markdown_text,
    one_line,
    plain,
)

HOSTILE = [
    "a: b", "- a", "# a", "1. a", "    a", "a | b", "a \\| b\\", "<script>alert(1)</script>", "]]>", "-->", MARK, "'\"><b>",
    "[a](http://b)", "![a](b)", "`a`", "```\nb", "~~~\nb", "a\nb\n\nc", "\ta", "$\\frac{1}{0}$", "$a", "\\$",
    "*a* _b_ __c__",
    "&lt;&#60;", "{{ a }} {% b %}", "\x1b[31m\x00\x08", "\u202eabc", "\ud800", "\ufffe", "\r\n", "漢字🙂", "n" * 3000, " ",
    "---", "|---|", "_", "___", "a_b_c", "s3://key:pa/ss@bucket/x?token=abc", "%s{0}", "@a", "<!--",
    "null", "!!python/name:os",
]  # fmt: skip
PHASES = [phase for phase in Phase if phase is not Phase.shrink]  # a shrunk page is no easier to read
names = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(codec=None), min_size=1, max_size=30))


class Text(HTMLParser):
    """Collects the text, the attributes' values and the tags of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attributes:
            self.attributes.setdefault(key, []).append(value or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def report_of(name: str, split: str, block: str, more: Sequence[str] = ()) -> Report:
    """Build a report in which every foreign text is one of these names."""
    recipe = make_recipe({"model": "a.b:c", "ingredients": ["/a"], "data": {"fit": "/b"}})
    recipe = recipe.model_copy(update={"base_model": name})
    row = {"model_name": name, "select_accuracy": 0.5, "select_nll": 1.0, f"test_{split}_accuracy": 0.5}
    other = {**row, "model_name": "mehl+", f"test_{split}_accuracy": 0.75}
    series = [{**r, "count": n, "dropped": n} for r in (row, other) for n in (1, 2)]
    record: dict[str, Any] = {
        "method": "mehl+", "parameters": 3, "wall_s": 1.0, "notes": [name, f"{name} and {split}"],
        "versions": {"torch": name},
        "ingredients": [{"name": one, "sha256": "0" * 64} for one in (name, block, *more)],
        "examples": {"select": 4, f"test_{split}": 4}, "table": [row, other], "tests": [],
        "eliminations": series, "counts": series,
        "search": {"keys": ["blocks"], "trials": [{"trial": 0, "blocks": name, "error": block}], "pareto": []},
    }  # fmt: skip
    ingredients = (name, block, *more)
    values = np.linspace(-1, 2, 2 * len(ingredients)).reshape(-1, 2)
    coefficients = {name: Coefficients(values, ingredients, (block, split), {"w": 0, "v": 1})}
    return Report(name, recipe, [row, other], record, coefficients, {}, {}, np.eye(len(ingredients)))


@pytest.mark.parametrize("name", ["$\\frac{1}{0}$ <b>", pytest.param("\ud800\x00\ufffe", marks=pytest.mark.slow)])
def test_a_page_shows_every_name_and_stays_the_page_that_it_is(name: str) -> None:
    ordinary = Text(html(report_of("a", "b", "c", ["d"] * len(HOSTILE))))
    page = html(report_of(name, name, name, HOSTILE))
    page.encode()
    found = Text(page)
    assert found.tags == ordinary.tags
    for text in (name, *HOSTILE):
        assert plain(text) in "".join(found.text)
    drawings = [base64.b64decode(s.split(",", 1)[1]).decode() for s in found.attributes["src"]]
    assert len(drawings) == len(ordinary.attributes["src"])
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "pa/ss" not in page
    assert "pa/ss" not in "".join(drawings)
    assert "$" not in name or escape(label(name), quote=False) in "".join(drawings)  # not typeset


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(names, names, names)
def test_any_text_may_be_a_name_in_a_report(name: str, split: str, block: str) -> None:
    report = report_of(name, split, block)
    page = html(report)
    page.encode()
    assert Text(page).tags == Text(html(report_of("a", "b", "c"))).tags


def front_matter(card: str) -> Any:
    _, front, rest = card.split("---\n", 2)
    assert rest.startswith("# A model soup")
    return yaml.safe_load(front)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)
@given(names, names)
@example("a: b", "|")
@example("s3://key:pa/ss@bucket/x", "s3://key:pa/ss@bucket/x")
def test_any_text_may_be_a_name_in_a_model_card(name: str, other: str) -> None:
    report = report_of(name, other, other)
    (coefficients,) = report.coefficients.values()
    card = model_card(report.recipe, coefficients, report.rows, report.record, f"load({name!r})")
    card.encode()
    assert "pa/ss" not in card
    found = front_matter(card)
    assert found["base_model"] == name or "pa/ss" in name
    assert found["tags"] == ["merge", "model-soup", "ray-soup"]
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(card.split("---\n", 2)[2])
    headings = [tokens[n + 1].content for n, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings[1:] == ["Results", "Ingredients", "Intended use and limits", "Recipe"]
    assert [t.info for t in tokens if t.type == "fence"] == ["python", "yaml"]
    assert sum(t.type == "table_open" for t in tokens) == 2
    assert not any(t.type in ("html_block", "bullet_list_open", "ordered_list_open", "code_block") for t in tokens)


def parsed(text: str) -> tuple[list[str], list[str]]:
    """Return the types of the blocks of a Markdown text, and the text of each inline part."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    shown = ["".join(c.content for c in t.children or ()) for t in tokens if t.type == "inline"]
    return [t.type for t in tokens], shown


@settings(max_examples=200, deadline=None, phases=PHASES)
@given(names, names)
def test_markdown_shows_the_text_and_nothing_but_the_text(name: str, other: str) -> None:
    types, cells = parsed(markdown(["a", name], [[other, "1"], ["b", name]]))
    assert types.count("th_open") == 2
    assert types.count("td_open") == 4
    expected = [one_line(text).strip() for text in ("a", name, other, "1", "b", name)]
    assert [cell.strip() for cell in cells] == expected
    types, shown = parsed(markdown_paragraph(name))
    assert types == ["paragraph_open", "inline", "paragraph_close"]
    assert shown[0].strip() == one_line(name).strip()
    block = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown_block(name, "yaml") + "\n\nend")
    assert [t.type for t in block] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert "`" not in markdown_text(name)
    code = MarkdownIt("gfm-like", {"linkify": False}).parse(f"the model {markdown_code(name)}: a soup")
    kinds = [child.type for child in code[1].children or ()]
    assert kinds == ["text", "code_inline", "text"]
    assert re.sub(" +", " ", code[1].children[1].content).strip() == re.sub(" +", " ", one_line(name)).strip()

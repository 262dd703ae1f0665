"""The report of a comparison as a reader sees it: the page in a browser, the Markdown tables and the model card."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.output import Soup
from ray_soup.soups.report.tables import MARK, comparison_markdown, insert
from tests.conftest import values

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
AWKWARD = ['<b>bold & "quoted".safetensors', "a_very_long_name_" * 8 + ".safetensors", "ümläut.safetensors"]


@pytest.fixture(scope="module")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Soup:
    """A comparison of ingredients with awkward names, two of which are identical."""
    folder = tmp_path_factory.mktemp("awkward")
    (folder / "zoo").mkdir()
    for number, name in enumerate(AWKWARD):
        shutil.copy(zoo / "zoo" / f"model_{number}.safetensors", folder / "zoo" / name)
    shutil.copy(zoo / "zoo" / "model_1.safetensors", folder / "zoo" / "twin.safetensors")
    recipe = {**values(zoo), "ingredients": str(folder / "zoo" / "*.safetensors"), "base_model": "someone/digits"}
    recipe["learn"] = {"batch_size": 224, "epochs": 2, "model_batch": 2}
    return compare(make_recipe(recipe), folder / "out", CompareOptions(drop_top=(0, 1), by_count=(2, 4), trained=False))


@pytest.fixture(scope="module")
def page(soup: Soup) -> Iterator[Any]:
    """The report in headless Chromium; `said` collects console messages, `asked` the requested URLs."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto((soup.out / "report.html").as_uri())
        page.wait_for_load_state("networkidle")
        yield page
        browser.close()


def test_the_page_shows_every_figure_and_loads_nothing_from_elsewhere(page: Any) -> None:
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [page.url]
    titles = page.eval_on_selector_all("figure h3", "all => all.map(e => e.textContent)")
    assert titles == [
        "Accuracy by method", "Accuracy by number of ingredients", "Learning curves", "Distribution of coefficients",
        "Coefficients of learned+", "Coefficients of mehl+", "Coefficients of mehl+-m2", "Cosines of directions",
        "Reliability",
    ]  # fmt: skip
    images = page.eval_on_selector_all(
        "figure img", "all => all.map(e => [e.complete, e.naturalWidth, e.getBoundingClientRect().height, e.alt])"
    )
    assert len(images) == len(titles)
    for complete, width, height, alt in images:
        assert complete
        assert width > 300
        assert height > 100
        assert len(alt) > 20
    assert page.locator("h2").all_text_contents()[0] == "Results"
    assert page.locator("table.wide").count() == 3


def test_awkward_names_are_escaped(page: Any) -> None:
    assert page.locator("b").count() == 0
    text = page.inner_text("body")
    for name in AWKWARD:
        assert name.removesuffix(".safetensors") in text


@pytest.mark.parametrize("width", [320, 390, 768, 900, 1280])
def test_nothing_scrolls_sideways(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overflowing = page.evaluate(
        "w => [...document.querySelectorAll('body *')].filter(e => w < 780 || !e.closest('.scroll'))"
        ".filter(e => e.getBoundingClientRect().right > w + 1)"
        ".filter(e => e.getBoundingClientRect().left > -9000).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert overflowing == []


def test_the_page_prints_on_a_few_sheets(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 2 <= pages <= 8


def test_duplicate_ingredients_are_named(soup: Soup) -> None:
    html = (soup.out / "report.html").read_text()
    assert re.search(r"Crosses mark near-duplicates \([^)]*twin\)", html)
    original = AWKWARD[1].removesuffix(".safetensors")
    assert any("twin" in note and original in note and "are identical files" in note for note in soup.notes)


def test_the_model_card_has_the_front_matter_of_the_hub(soup: Soup) -> None:
    card = (soup.out / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "someone/digits",
        "base_model_relation": "merge",
        "tags": ["merge", "model-soup", "ray-soup"],
        "library_name": "pytorch",
    }
    for heading in ("## Results", "## Ingredients", "## Intended use and limits", "## Recipe"):
        assert heading in text
    assert text.count("| mehl+ |") == 1


def test_the_tables_replace_what_stands_between_the_two_marks_of_a_file(soup: Soup, tmp_path: Path) -> None:
    text = comparison_markdown(soup.record)
    file = tmp_path / "README.md"
    file.write_text(f"before\n{MARK}\nold\n{MARK}\nafter\n")
    for _ in range(2):
        insert(text, str(file))
        assert file.read_text() == f"before\n{MARK}\n\n{text}\n\n{MARK}\nafter\n"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")

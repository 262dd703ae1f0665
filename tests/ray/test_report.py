"""The report of a comparison as a reader sees it: the page in a browser, the Markdown tables and the model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from ray_soup.recipe import make_recipe
from ray_soup.soups.compare import compare
from ray_soup.soups.comparison import CompareOptions
from ray_soup.soups.output import Soup
from ray_soup.soups.report.markdown import comparison_markdown
from ray_soup.soups.report.marks import MARK, insert
from tests.conftest import values

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
AWKWARD = ['<b>bold & "quoted".safetensors', "a_very_long_name_" * 8 + ".safetensors", "ümläut.safetensors"]


@pytest.fixture(scope="module")
def soup(zoo: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Soup:
    """A comparison of ingredients with awkward names, two of which are identical."""
    folder = tmp_path_factory.mktemp("awkward")
    (folder / "zoo").mkdir()
    for number, name in enumerate(AWKWARD):
        tensors = load_file(zoo / "zoo" / f"model_{number}.safetensors")
        save_file(
            tensors, folder / "zoo" / name, {"args": json.dumps({"lr": 0.001 * (1 + number), "<i>&": number % 2 == 0})}
        )
    shutil.copy(folder / "zoo" / AWKWARD[1], folder / "zoo" / "twin.safetensors")
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
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"], timeout=180_000)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)
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
        "w => [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll'))"
        ".filter(e => e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))",
        width,
    )
    assert overflowing == []
    first = page.locator("table").first.locator("tbody th").first.bounding_box()
    assert first["x"] >= 0
    assert first["width"] < width / 2


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(page: Any, scheme: str, width: int) -> None:
    """Uses axe-core (npm) if AXE names its file; tests/unit/soups/test_report.py checks what it can without a browser."""
    if not os.environ.get("AXE"):
        pytest.skip("AXE is not set to the path of axe-core's axe.min.js")
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.evaluate(Path(os.environ["AXE"]).read_text())
    found = page.evaluate("axe.run().then(r => r.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
    page.emulate_media(color_scheme="null")
    assert found == []


def test_tables_are_sorted_by_keyboard(page: Any, soup: Soup) -> None:
    """Numbers by value, texts by the alphabet, and what is missing last; screen readers can read the order."""
    table = page.get_by_role("region", name="Results", exact=True)
    headings = table.locator("thead th").all_inner_texts()

    def sorted_by(name: str) -> list[str]:
        table.locator("thead th").nth(headings.index(name)).get_by_role("button").focus()
        page.keyboard.press("Enter")
        return [row.locator("th, td").nth(headings.index(name)).inner_text() for row in table.locator("tbody tr").all()]

    expected = sorted(row["test_nll"] for row in soup.record["table"])
    for order, column in (("ascending", expected), ("descending", expected[::-1])):
        assert sorted_by("test NLL") == [f"{value:.4f}" for value in column]
        assert table.locator("thead th").nth(headings.index("test NLL")).get_attribute("aria-sort") == order
    steps = sorted_by("steps")
    assert steps == [*sorted(filter(str.isdigit, steps), key=int), *["-"] * steps.count("-")]
    assert "-" in steps
    assert table.locator("th[aria-sort]").count() == 1
    names = sorted_by("model")
    assert sorted(names) == sorted(row["model_name"] for row in soup.record["table"])
    assert page.evaluate("names => names.every((name, n) => !n || names[n - 1].localeCompare(name) <= 0)", names)


def test_the_page_is_dark_where_readers_like_it_dark_but_not_on_paper(page: Any) -> None:
    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    page.emulate_media(color_scheme="null", media="null")
    assert ground() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    assert ground() == "rgb(22, 24, 27)"
    assert "invert(1)" in page.evaluate("getComputedStyle(document.querySelector('figure img')).filter")
    page.emulate_media(color_scheme="dark", media="print")
    assert ground() == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="null", media="null")


def test_the_page_prints_on_a_few_sheets(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", printed))
    assert 2 <= pages <= 7


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


@pytest.mark.parametrize("name", ["README.md", "report.html"])
def test_what_others_read_names_no_machine_user_or_folder(soup: Soup, name: str) -> None:
    text = re.sub(r'"data:image[^"]+"', "", (soup.out / name).read_text())
    folders = map(str, (Path.home(), Path.cwd(), soup.out, soup.out.parent, tempfile.gettempdir()))
    assert [word for word in (socket.gethostname(), *folders) if re.search(rf"(?<!\w){re.escape(word)}\b", text)] == []
    assert f"ingredients: {soup.out.parent.name}/zoo/*.safetensors" in text


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

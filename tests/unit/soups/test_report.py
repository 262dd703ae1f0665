"""Tables, legends and colors of the report."""

from __future__ import annotations

import base64
import itertools
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ray_soup.errors import RecipeError
from ray_soup.mixing.coefficients import Coefficients
from ray_soup.recipe import METHODS, make_recipe
from ray_soup.soups.report import figures
from ray_soup.soups.report.heat_map import rank_correlation
from ray_soup.soups.report.marks import MARK, insert
from ray_soup.soups.report.tables import ENSEMBLE, MEAN_SINGLE, is_reference, legend, series_table, table
from ray_soup.task.outcomes import Outcome


@pytest.mark.parametrize("marks", [0, 1, 3])
def test_a_file_without_exactly_two_marks_is_left_alone(marks: int, tmp_path: Path) -> None:
    file = tmp_path / "none.md"
    file.write_text(f"{MARK}\n" * marks)
    with pytest.raises(RecipeError, match=rf"none\.md has {marks} lines .*; expected 2"):
        insert("tables", str(file))
    assert file.read_text() == f"{MARK}\n" * marks
    with pytest.raises(RecipeError, match=r"missing\.md cannot be read"):
        insert("tables", str(tmp_path / "missing.md"))


def test_a_table_has_the_columns_that_rows_have_and_shows_the_spread() -> None:
    rows = [{"model_name": "a", "test_accuracy": 0.95555, "test_accuracy_sd": 0.001}, {"model_name": "b"}]
    columns = (("model_name", "model", "{}"), ("test_accuracy", "test %", "{:.2f}"), ("steps", "steps", "{}"))
    assert table(rows, columns) == (["model", "test %"], [["a", "95.56 ±0.10"], ["b", "-"]])


def test_a_value_with_names_is_written_as_in_a_recipe() -> None:
    assert table([{"blocks": {"tensor": 4}}, {"blocks": "layer"}], [("blocks", "blocks", "{:.4g}")])[1] == [
        ["{tensor: 4}"],
        ["layer"],
    ]


def test_the_legend_explains_seeds_only_if_there_are_several() -> None:
    record = {"examples": {"fit": 1200, "test": 2000}, "seeds": [1]}
    assert "Examples: fit 1,200, test 2,000." in legend(record)
    assert "standard deviation" not in legend(record)
    assert "standard deviation over 3 seeds (1 to 3)" in legend({**record, "seeds": [1, 2, 3]})


def test_only_single_ingredients_and_the_ensemble_are_references() -> None:
    references = {name for name in (*METHODS, MEAN_SINGLE, ENSEMBLE, "mehl+-m2") if is_reference(name)}
    assert references == {"best_single", "last", MEAN_SINGLE, ENSEMBLE}


def test_colors_can_be_told_apart_without_color_vision() -> None:
    """Distances in CAM02-UCS, where 10 is plain to see, for each kind of color blindness, and in grey."""
    from colorspacious import cspace_convert, deltaE
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    drawn = [np.array(to_rgb(c)) for c in (figures.BLUE, figures.ORANGE, "white")]
    ends = [np.array(colormaps[figures.DIVERGING](x)[:3]) for x in (0.0, 0.5, 1.0)]
    for kind in ("deuteranomaly", "protanomaly", "tritanomaly"):
        seen = {"name": "sRGB1+CVD", "cvd_type": kind, "severity": 100}
        for colors in (drawn, ends):
            simulated = [np.clip(cspace_convert(c, seen, "sRGB1"), 0, 1) for c in colors]
            for i in range(3):
                for j in range(i):
                    assert deltaE(simulated[i], simulated[j], input_space="sRGB1") > 15, (kind, i, j)


@pytest.mark.parametrize("shift", [-3.0, -0.4, -1e-9, 0.0, 0.2, 5.0])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_no_bar_of_the_histogram_mixes_signs(shift: float, count: int) -> None:
    from matplotlib.figure import Figure

    random = np.random.default_rng(count)
    for values in (
        random.normal(size=count) + shift,
        np.append(random.normal(size=count) * 1e-3, [0.0, shift]),
        np.full(4, shift),
    ):
        edges = figures.histogram_edges(values)
        assert len(edges) <= 34
        assert edges[0] <= values.min()
        assert edges[-1] >= values.max()
        assert not np.any((edges[:-1] < 0) & (edges[1:] > 0))
        axes = Figure().subplots()
        figures.draw_histogram(axes, values)
        hatched = [bar for bar in axes.patches if bar.get_hatch()]
        assert sum(bar.get_height() for bar in hatched) == (values < 0).sum()
        assert sum(bar.get_height() for bar in axes.patches) == len(values)
        for bar in axes.patches:
            assert bool(bar.get_hatch()) == (bar.get_x() + bar.get_width() / 2 < 0)


def test_figures_on_data_that_a_model_was_chosen_on_are_marked_and_those_on_test_are_not() -> None:
    row = {"select_accuracy": 0.5, "select_nll": 1.0, "fit_nll": 0.5, "test_accuracy": 0.25, "test_v2_nll": 2.0}
    columns = [("model_name", "model", "{}"), *((key, key, "{:.1f}") for key in row)]
    rows = [{"model_name": name, **row} for name in ("mehl+-m2", "best_single", "greedy", "uniform", MEAN_SINGLE, ENSEMBLE)]
    _, cells = table([*rows, {"select_nll": 1.0, "select_nll_sd": 0.5}], columns)
    for line in cells[:3]:
        assert line[1:] == ["50.0†", "1.0†", "0.5†", "25.0", "2.0"]
    for line in cells[3:6]:  # nothing was learned or chosen
        assert line[1:] == ["50.0", "1.0", "0.5", "25.0", "2.0"]
    assert cells[6][2] == "1.0† ±0.5"
    _, (series,) = series_table([{"model_name": "mehl+", "count": 2, **row}], "count", "select")
    assert series == ["mehl+", "50.00†"]


def test_the_legend_explains_only_what_the_table_has() -> None:
    record = {"examples": {"select": 3, "test": 3}}
    plain = legend(record, [{"model_name": "uniform", "test_nll": 1.0, "select_nll": 1.0}])
    assert plain == (
        "Examples: select 3, test 3. All figures are measured on the written model files, in float32. Test was used for "
        "reporting only."
    )
    assert legend({**record, "dtype": "bfloat16"}) == plain.replace("in float32", "in bfloat16")
    explained = {
        "† optimistic: the model was learned, stopped or chosen on this data.": {"model_name": "mehl", "select_nll": 1.0},
        "‡ before the refit, which learned on this data, too.": {"model_name": "uniform", "refit_steps": 3},
        "trained: all weights, trained on fit from the uniform soup; no average of the ingredients.": {
            "model_name": "trained"
        },
        "Images: forward passes needed to make the soup.": {"model_name": "mehl", "image_passes": 3},
        "Seconds: time beyond the steps that all methods share.": {"model_name": "uniform", "seconds": 0.0},
        "A suffix -mN: N ingredients per model batch.": {"model_name": "mehl-m18"},
        "mean single: mean of the ingredients' own figures.": {"model_name": MEAN_SINGLE},
        "NLL scaled: test NLL after temperature scaling fitted on select.": {"model_name": "mehl", "test_nll_scaled": 1.0},
    }
    for text, row in explained.items():
        assert legend(record, [row]).removeprefix(f"{plain} ") == text
    passes = legend(record, [{"model_name": name, "image_passes": 3} for name in ("greedy", "mehl")])
    assert passes.endswith("to make the soup; for greedy they include evaluating the ingredients.")
    assert "Test was used" not in legend({"examples": {"select": 3}})


# The page

SWEEP = [{"lr": 0.1 * (k + 1), "opt": {"name": "adamw" if k % 2 else "sgd", "beta": 0.9}, "run": [k]} for k in range(4)]


@pytest.fixture(scope="module")
def page() -> str:
    """The report of two soups of a sweep, one with coefficients for each layer."""
    from ray_soup.soups.report.page import Report, html

    names = tuple(f"trial_{k}" for k in range(4))
    block_of = {f"blocks.{n}.weight": n for n in range(3)}
    values = np.array([[0.5, 0.75, 1.0], [0.5, 0.25, 0.5], [0.0, 0.0, -0.25], [0.0, 0.0, -0.25]])
    layers = Coefficients(values, names, ("a", "b", "c"), block_of)
    uniform = Coefficients(np.full((4, 1), 0.25), names, ("whole",), dict.fromkeys(block_of, 0))
    rows = [
        {"model_name": name, "select_nll": 1.0, "test_accuracy": 0.5 + 0.1 * n, "test_nll": 1.0, "steps": 3}
        for n, name in enumerate(("best_single", "uniform", "mehl+"))
    ]
    record = {
        "parameters": 3, "wall_s": 1.0, "notes": ["A note."], "versions": {"torch": "2"}, "chosen": "mehl+", "tests": [],
        "ingredients": [{"name": n, "sha256": "0" * 64, "hyperparameters": h} for n, h in zip(names, SWEEP, strict=True)],
        "examples": {"select": 4, "test": 1000}, "table": rows,
        "counts": [{**row, "count": count} for row in rows[1:] for count in (2, 4)],
    }  # fmt: skip
    recipe = make_recipe({"model": "a.b:c", "ingredients": ["/a"], "data": {"fit": "/b"}})
    curve = [{"turn": 0, "steps": n, "fit_nll": 1.0, "select_nll": 1.25 - n} for n in range(2)]
    outcome = Outcome(np.ones(4), np.ones(4, bool), np.full(4, 0.75, np.float32))
    soups = {"mehl+": layers, "uniform": uniform}
    return html(Report("A sweep", recipe, rows, record, {"mehl+": layers}, {"mehl+": curve}, {"mehl+": outcome}, np.eye(4),
                       [1, 2, 3, 4], soups))  # fmt: skip


def test_every_figure_says_what_it_shows_and_names_its_axes(page: str) -> None:
    figures_of_page = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures_of_page) == 8
    for figure in figures_of_page:
        title, alt, source, caption = re.search(
            r'<h3>(.*?)</h3>.*<img alt="(.*?)" src="data:image/svg\+xml;base64,(.*?)".*<figcaption>(.*?)</figcaption>',
            figure, re.DOTALL,
        ).groups()  # type: ignore[union-attr]  # fmt: skip
        assert alt == f"{title}. {caption}"
        assert re.match(r"\w.{20,}?\.", caption), caption
        svg = ElementTree.fromstring(base64.b64decode(source))
        texts = ["".join(e.itertext()) for e in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert sum(bool(re.search("[a-z]{3}", text)) for text in texts) >= 2, (title, texts)
    assert "mehl+ has the highest, 70.00%" in page
    assert "Hatched bars" in page
    assert "Dots: soups; diamonds: references." in page


def test_the_heat_map_says_which_settings_the_soup_used(page: str) -> None:
    """`beta` is the same everywhere, and a list is no single setting."""
    (figure,) = re.findall(r'<figure class="wide">.*?</figure>', page, re.DOTALL)
    svg = base64.b64decode(re.search(r"base64,(.*?)\"", figure)[1]).decode()  # type: ignore[index]
    names = re.findall(r">(trial_\d)<", svg)
    assert names == ["trial_0", "trial_1", "trial_2", "trial_3"]
    assert all(f">{text}<" in svg for text in ("lr", "opt.name", "adamw", "sgd", "0.1", "0.4"))
    assert "beta" not in page
    assert "Largest mean coefficient: 0.750 (lr 0.1, opt.name sgd); smallest: -0.083 (lr 0.3, opt.name sgd)." in figure
    assert "lr: -0.95." in figure  # ranks 4, 3, 1.5, 1.5 against 1, 2, 3, 4
    assert re.search(r"<th scope=\"row\">trial_2</th><td>0.0000</td><td>0.0000</td><td>-0.2500</td>", figure)
    ingredients = page[page.index('id="ingredients"') :]
    assert re.findall(r'<th scope="col".*?>(.*?)</th>', ingredients) == [
        "ingredient",
        "lr",
        "opt.name",
        "in mehl+",
        "SHA-256",
    ]
    assert "in uniform" not in ingredients
    assert '<th scope="row">trial_1</th><td>0.2</td><td>adamw</td><td>0.4167</td>' in ingredients


class Page(HTMLParser):
    """Collects what a screen reader needs to know of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


def test_a_screen_reader_finds_names_headings_and_tables(page: str) -> None:
    found = Page(page)
    assert found.all("html") == [{"lang": "en"}]
    assert len(found.all("main")) == len(found.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in found.seen if re.fullmatch(r"h\d", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in found.all("a")} <= {f"#{name}" for name in ids}
    regions = [a["aria-label"] for _, a in found.seen if a.get("role") == "region"]
    assert len(regions) == len(set(regions))
    assert all(a.get("tabindex") == "0" for _, a in found.seen if a.get("role") == "region")
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(a.get("scope") in ("row", "col") for a in found.all("th"))
    assert all(len(a["alt"] or "") > 20 for a in found.all("img"))
    assert not any(a.get(key, "data:")[:1] not in "d#" for _, a in found.seen for key in ("src", "href"))  # type: ignore[index]


def test_text_can_be_read_on_its_background_by_day_and_by_night() -> None:
    """WCAG 2 asks for a contrast of 4.5 between texts and their background."""
    template = (files("ray_soup.soups.report") / "page.html.jinja").read_text()

    def luminance(color: str) -> float:
        color = color if len(color) == 6 else "".join(c * 2 for c in color)
        parts = [int(color[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    schemes = [dict(re.findall(r"--(\w+): #(\w+)", line)) for line in template.splitlines() if ":root {" in line]
    assert len(schemes) == 2
    for colors in schemes:
        for text in ("ink", "soft", "link"):
            for ground in ("paper", "block"):
                low, high = sorted((luminance(colors[text]), luminance(colors[ground])))
                assert (high + 0.05) / (low + 0.05) > 4.5, (text, ground)


def test_the_rank_correlation_is_that_of_scipy() -> None:
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    first, second = random.integers(0, 5, 40).astype(float), random.normal(size=40)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(np.ones(4), second[:4]) == 0

"""Tables, legends and colors of the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_soup.errors import RecipeError
from ray_soup.recipe import METHODS
from ray_soup.soups.report import figures
from ray_soup.soups.report.tables import ENSEMBLE, MARK, MEAN_SINGLE, insert, legend, series_table, table


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
    references = {name for name in (*METHODS, MEAN_SINGLE, ENSEMBLE, "mehl+-m2") if figures.is_reference(name)}
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
    assert "† optimistic" in legend({"examples": {"select": 3}})

"""The sentence about preprocessing in the terminal, the card and the report."""

from __future__ import annotations

from typing import Any

import pytest

from ray_soup.soups.report.text import preprocessing_text


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, ""),
        ({"size": 48}, ""),  # of a program that does not say why
        ({"source": "none"}, "none, because the data are arrays"),
        ({"size": [48, 32], "std": [0.25], "crop": 1.0, "source": "files"},
         "size 48 x 32; std 0.25; crop 1 (as the files of the ingredients say)"),
        ({"size": 48, "files": {"img_size": "its args", "mean": "its args", "std": "args.yaml"}, "source": "files"},
         "size 48 (as the files of the ingredients say: args, args.yaml)"),
        ({"size": 48, "files": {"mean": "config.json"}, "source": "recipe"},
         "size 48 (as the recipe says; the rest as the files of the ingredients say: config.json)"),
        ({"function": "a.b:c", "source": "recipe"}, "the function a.b:c (as the recipe says)"),
        ({"model": "a.b:c", "size": 48, "source": "recipe"},
         "as the function a.b:c returns it; size 48 (as the recipe says)"),
        ({"length": 1024, "source": "files"}, "texts of up to 1,024 tokens (as the files of the ingredients say)"),
        ({"length": 5, "cut": {"fit": 0.5, "test": 1 / 3}, "source": "recipe"},
         "texts of up to 5 tokens; 50.0% of fit and 33.3% of test longer (as the recipe says)"),
    ],
)  # fmt: skip
def test_a_record_becomes_a_sentence(record: dict[str, Any], text: str) -> None:
    assert preprocessing_text(record) == text

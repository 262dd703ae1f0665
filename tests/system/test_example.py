"""The example of the documentation that learns in memory, over ten seeds."""

import re
from typing import Any

import pytest
import torch

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_soup_of_the_example_in_memory_beats_the_best_single_in_nine_of_ten_seeds() -> None:
    texts = [file.read_text() for file in (ROOT / "README.md", *(ROOT / "docs").glob("**/*.md"))]
    blocks = [block for text in texts for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)]
    example = next(block for block in blocks if "state_dicts.append(" in block and "mix_state_dicts(" in block)
    better = 0
    for seed in range(10):
        torch.manual_seed(seed)
        names: dict[str, Any] = {}
        exec(compile(example, "example", "exec"), names)
        soup = names["soup"]
        better += soup.figures["test_nll"] < soup.best_single["test_nll"]
    assert better >= 9

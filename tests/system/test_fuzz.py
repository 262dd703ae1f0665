"""Damaged files: the right result, or a refusal that names the file. `python -m tests.benchmarks fuzz` tries more."""

from __future__ import annotations

import pytest

from tests.benchmarks import fuzz
from tests.benchmarks.fuzz_kinds import KINDS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_damaged_files_are_read_right_or_refused() -> None:
    answers = fuzz.run(5 * len(KINDS), list(KINDS), seed=1, jobs=1)
    assert [a for a in answers if not fuzz.good(a)] == [], fuzz.table(answers)
    outcomes = {a.outcome for a in answers}
    assert {"right", "exit 2", "exit 3"} <= outcomes  # the damage is neither always harmless nor always fatal

"""What the documentation names exists."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

TEXTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(str(f.relative_to(ROOT)) for f in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("text", TEXTS)
def test_links_lead_to_files(text: str) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / text).read_text())
    missing = [target for target in targets if not ((ROOT / text).parent / target).exists()]
    assert missing == []


def test_the_table_of_faults_names_modules_functions_and_tests_that_exist() -> None:
    rows = [line.split("|")[2:4] for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    named = [(where, test) for where, test in rows if "`" in test]
    assert len(named) > 25
    sources = {f: f.read_text() for f in (ROOT / "tests").rglob("test_*.py")}
    for where, test in named:
        modules = re.findall(r"`([\w/]+\.py)`", where)
        assert modules or "." in where, where
        assert all((ROOT / "ray_soup" / module).exists() for module in modules), where
        code = "".join((ROOT / "ray_soup" / m).read_text() for m in modules)
        assert all(f"def {name}(" in code for name in re.findall(r"`, `(\w+)`", where)), where
        for name in re.findall(r"`([^`]+)`", test):
            name = name.rstrip(".")
            file = any(str(f).endswith(name) for f in sources)
            assert file or any(f"def {name}" in text for text in sources.values()), name
